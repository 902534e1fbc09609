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
    """Images and labels as they are stored, before a data set says what the labels mean.

    Attributes:
      images: M images.
      labels: int32 [M], places in `names`.
      names: of the classes: folder names, or the names in a prepared set's description.
      place: where they lie, for messages.
    """

    images: Images_co
    labels: np.ndarray
    names: tuple[str, ...]
    place: str


def read_folders(
    root: str | os.PathLike[str], only: Collection[str] | None = None
) -> LabeledImages[FileImages]:
    """The images of ROOT/CLASS/*.JPEG, in the order of the folders' names, then the files'.

    Args:
      root: a directory with a folder for each class.
      only: names of the folders to read; all, if None.

    Raises:
      UserError: no such directory, no folders, or a folder without an image.
    """
    listing = list_folders(root, only)
    return LabeledImages(FileImages(listing), listing.folder_of, listing.folders, str(root))


class FileImages(EncodedImages):
    """The files of a listing; bytes are read as they are asked for."""

    def __init__(self, listing: Listing) -> None:
        """Opens nothing."""
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
        """The file's path."""
        listing = self._listing
        folder = listing.folders[listing.folder_of[index]]
        return os.path.join(listing.root, folder, os.fsdecode(listing.names[index]))


# The image files of a directory of class folders: listed fast, and listed once.

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")
_THREADS = 16  # folders listed at once, for the sake of network disks


class Listing(NamedTuple):
    """The image files of class folders, ordered by folder, then by name (both as text).

    Attributes:
      root: the directory of the class folders.
      folders: their names, F of them.
      folder_of: int32 [M], which folder a file lies in.
      names: bytes [M], the file's name in its folder.
    """

    root: str
    folders: tuple[str, ...]
    folder_of: np.ndarray
    names: np.ndarray


def list_folders(root: str | os.PathLike[str], only: Collection[str] | None = None) -> Listing:
    """Lists the images in the folders of `root`, hidden files and other suffixes aside.

    A large listing is kept in the user's cache directory ($XDG_CACHE_HOME, else ~/.cache), and
    used again as long as the same folders have the same times of change. Nothing is written to
    `root`.

    Args:
      root: a directory with a folder for each class.
      only: names of folders to list; the others are passed over.

    Raises:
      UserError: no such directory, no folder in it, or a folder without an image.
    """
    root = Path(root)
    folders = sorted(name for name in _subfolders(root) if only is None or name in only)
    if not folders:
        raise UserError(f"{root}: no folders of classes in it; expected {root}/CLASS/IMAGE.jpg")
    # Taken before listing: a folder that changes meanwhile is listed again the next time.
    stamps = {
        "folders": np.array([os.fsencode(name) for name in folders], np.bytes_),
        "changed": np.array([(root / name).stat().st_mtime_ns for name in folders], np.int64),
    }
    arrays = caches.load_arrays("listings", root)
    if not all(n in arrays and np.array_equal(arrays[n], stamp) for n, stamp in stamps.items()):
        with ThreadPoolExecutor(_THREADS) as pool:
            files = list(pool.map(lambda name: _images(root / name), folders))
        counts = [len(names) for names in files]
        arrays = stamps | {
            "folder_of": np.repeat(np.arange(len(folders), dtype=np.int32), counts),
            "names": np.array([name for names in files for name in names], np.bytes_),
        }
        if sum(counts) >= caches.WORTH_KEEPING:
            caches.save_arrays("listings", root, **arrays)
    return Listing(str(root), tuple(folders), arrays["folder_of"], arrays["names"])


def list_files(folder: str | os.PathLike[str]) -> Listing:
    """Lists the images of one folder, as a listing with this folder alone.

    Raises:
      UserError: no such directory, or no image in it.
    """
    folder = Path(folder)
    names = np.array(_images(folder), np.bytes_)
    return Listing(str(folder.parent), (folder.name,), np.zeros(len(names), np.int32), names)


def _subfolders(root: Path) -> list[str]:
    try:
        with os.scandir(root) as entries:
            return [e.name for e in entries if not e.name.startswith(".") and e.is_dir()]
    except OSError as error:
        reason = "no such directory" if isinstance(error, FileNotFoundError) else error.strerror
        raise UserError(f"{root}: {reason}") from error


def _images(folder: Path) -> list[bytes]:
    try:
        with os.scandir(folder) as entries:
            names = [
                os.fsencode(e.name)
                for e in entries
                if e.name.lower().endswith(SUFFIXES) and not e.name.startswith(".")
            ]
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from error
    if not names:
        raise UserError(
            f"{folder}: no image in it (a file named .jpg, .jpeg, .png or the like); fill the "
            "folder, or remove it"
        )
    return sorted(names)
