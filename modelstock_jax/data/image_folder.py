"""Images in class folders: their files, listed once, and their labels."""

from __future__ import annotations

import os
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from modelstock_jax.data import caches
from modelstock_jax.data.image_set import EncodedImages
from modelstock_jax.errors import UserError

Images_co = TypeVar("Images_co", bound=EncodedImages, covariant=True)


class LabeledImages(NamedTuple, Generic[Images_co]):
    """Images and labels as stored, before the labels are mapped to the classes of a dataset.

    Attributes:
      images: M images
      labels: int32 [M], indices into `names`
      names: names of the classes: folder names, or the names in a prepared dataset's description
      source: path of the images, for messages
    """

    images: Images_co
    labels: np.ndarray
    names: tuple[str, ...]
    source: str


def read_folders(
    root: str | os.PathLike[str], only: Collection[str] | None = None
) -> LabeledImages[FileImages]:
    """List the images of ROOT/CLASS/*.JPEG, sorted by folder name, then by file name.

    Args:
      root: a directory with one folder per class
      only: names of the folders to read; None reads all

    Raises:
      UserError: there is no such directory, no folder in it, or a folder has no image
    """
    listing = list_folders(root, only)
    return LabeledImages(FileImages(listing), listing.folder_of, listing.folders, str(root))


class FileImages(EncodedImages):
    """The files of a listing; each file is read when it is accessed."""

    def __init__(self, listing: Listing) -> None:
        """Store the listing; open no file."""
        self._listing = listing

    def __len__(self) -> int:
        return len(self._listing.names)

    def __getitem__(self, index: int) -> bytes:
        try:
            with open(self.name(index), "rb") as file:
                return file.read()
        except OSError as error:
            raise UserError(f"{self.name(index)}: cannot be read ({error.strerror})") from error

    def name(self, index: int) -> str:
        """Return the path of the file."""
        listing = self._listing
        folder = listing.folders[listing.folder_of[index]]
        return os.path.join(listing.root, folder, os.fsdecode(listing.names[index]))

    def select(self, indices: np.ndarray) -> FileImages:
        """Return the files at `indices`; only their names are stored and pickled."""
        listing = self._listing
        return FileImages(
            listing._replace(folder_of=listing.folder_of[indices], names=listing.names[indices])
        )


SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")
_THREADS = 16  # Lists folders in parallel, because network disks have a high latency.


class Listing(NamedTuple):
    """The image files of class folders, sorted by folder name, then by file name (both as text).

    Attributes:
      root: the directory of the class folders
      folders: names of the F folders
      folder_of: int32 [M], index of the folder of each file
      names: bytes [M], name of each file in its folder
    """

    root: str
    folders: tuple[str, ...]
    folder_of: np.ndarray
    names: np.ndarray


def list_folders(root: str | os.PathLike[str], only: Collection[str] | None = None) -> Listing:
    """List the images in the folders of `root`, without hidden files and files of other suffixes.

    A large listing is stored in the user's cache directory ($XDG_CACHE_HOME or ~/.cache) and reused
    while the folders and their modification times are the same. Nothing is written to `root`.

    Args:
      root: a directory with one folder per class
      only: names of the folders to list; None lists all

    Raises:
      UserError: there is no such directory, no folder in it, or a folder has no image
    """
    root = Path(root)
    folders = sorted(name for name in _subfolders(root) if only is None or name in only)
    if not folders:
        raise UserError(f"{root}: no class folders; expected {root}/CLASS/IMAGE.jpg")
    # Read before listing: a folder that changes meanwhile is listed again the next time.
    stamps = {
        "folders": np.array([os.fsencode(name) for name in folders], np.bytes_),
        "changed": np.array([(root / name).stat().st_mtime_ns for name in folders], np.int64),
    }
    arrays = caches.load_arrays("listings", root)
    if not all(n in arrays and np.array_equal(arrays[n], stamp) for n, stamp in stamps.items()):
        with ThreadPoolExecutor(_THREADS) as pool:
            names = list(pool.map(lambda name: _images(root / name), folders))
        counts = [len(files) for files in names]
        arrays = stamps | {
            "folder_of": np.repeat(np.arange(len(folders), dtype=np.int32), counts),
            "names": np.concatenate(names),
        }
        if sum(counts) >= caches.MIN_ENTRIES:
            caches.save_arrays("listings", root, **arrays)
    return Listing(str(root), tuple(folders), arrays["folder_of"], arrays["names"])


def list_files(folder: str | os.PathLike[str]) -> Listing:
    """List the images of a single folder.

    Raises:
      UserError: there is no such directory, or it has no image
    """
    folder = Path(folder)
    names = _images(folder)
    return Listing(str(folder.parent), (folder.name,), np.zeros(len(names), np.int32), names)


def _subfolders(root: Path) -> list[str]:
    try:
        with os.scandir(root) as entries:
            return [e.name for e in entries if not e.name.startswith(".") and e.is_dir()]
    except OSError as error:
        reason = "no such directory" if isinstance(error, FileNotFoundError) else error.strerror
        raise UserError(f"{root}: {reason}") from error


def _images(folder: Path) -> np.ndarray:
    """Return the sorted names of the images in a folder, bytes [M]."""
    suffixes = tuple(suffix.encode() for suffix in SUFFIXES)
    try:
        # Names as bytes: entries of `os.scandir` need a third more time.
        names = os.listdir(os.fsencode(folder))
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from error
    images = [n for n in names if n.lower().endswith(suffixes) and not n.startswith(b".")]
    if not images:
        raise UserError(
            f"{folder}: no image (a file named .jpg, .jpeg, .png or similar); add images, or "
            "remove the folder"
        )
    return np.array(sorted(images), np.bytes_)
