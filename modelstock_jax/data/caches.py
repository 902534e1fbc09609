"""Caches on disk: decoded images, and small arrays in the user's cache directory."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from modelstock_jax.data.image_set import EncodedImages, fingerprint
from modelstock_jax.data.transforms import Unreadable, decode, resize_short_side
from modelstock_jax.errors import UserError
from modelstock_jax.fileio import replacing
from modelstock_jax.machine import usable_cores
from modelstock_jax.tensor_files.reader import read_json

DESCRIPTION = "cache.json"
_FORMAT = 1
_A_PART = 4096  # images
_ENTRY = np.dtype([("height", "<u2"), ("width", "<u2"), ("crc32", "<u4")])


class CachedImages(EncodedImages):
    """The images of a cache: `images[i]` is uint8 [H, W, 3], in the order of their source.

    No file is held open.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        """Reads the sizes of all images, 8 bytes each.

        Raises:
          UserError: no cache there, or one that is not whole.
        """
        self._directory = Path(directory)
        facts = read_json(self._directory / DESCRIPTION)
        known = isinstance(facts, dict) and facts.get("format") == _FORMAT
        if not known or not isinstance(facts.get("count"), int):
            raise UserError(f"{directory}: not a cache of this version; write it again")
        indices = [_index(self._directory, part) for part in range(_num_parts(facts["count"]))]
        missing = [path for path in indices if not path.is_file()]
        if missing:
            raise UserError(
                f"{directory}: {len(missing)} of {len(indices)} parts are missing; the command "
                "that began the cache goes on with it"
            )
        entries = [_read_index(path) for path in indices]
        self._entries = np.concatenate([np.zeros(0, _ENTRY), *entries])
        sizes = [_num_bytes(one) for one in entries]
        for part, size in enumerate(sizes):
            path = _pixels(self._directory, part)
            if not path.is_file() or path.stat().st_size != size.sum():
                raise UserError(
                    f"{path}: it should have {size.sum()} bytes; remove {indices[part]} and write "
                    "the cache again"
                )
        starts = [np.cumsum(size) - size for size in sizes]
        self._starts = np.concatenate([np.zeros(0, np.int64), *starts])

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> np.ndarray:
        height, width = (int(self._entries[index][name]) for name in ("height", "width"))
        if not height:
            raise Unreadable("it could not be decoded when the cache was written")
        pixels = np.fromfile(
            _pixels(self._directory, index // _A_PART),
            np.uint8,
            count=height * width * 3,
            offset=int(self._starts[index]),
        )
        return pixels.reshape(height, width, 3)

    def name(self, index: int) -> str:
        """The cache, and the image's number."""
        return f"{self._directory}, image {index}"

    def verify(self) -> None:
        """Reads everything and compares it with the checksums of when it was written.

        Raises:
          UserError: an image that has changed.
        """
        for index in track(range(len(self)), f"verifying {self._directory}", transient=True):
            entry = self._entries[index]
            if entry["height"] and zlib.crc32(self[index].data) != entry["crc32"]:
                part = index // _A_PART
                raise UserError(
                    f"{_pixels(self._directory, part)}: image {index} is damaged; remove "
                    f"{_index(self._directory, part)} and write the cache again"
                )


def write_cache(
    images: EncodedImages,
    directory: str | os.PathLike[str],
    *,
    short_side: int = 256,
    threads: int = 0,
    unreadable: str = "error",
) -> CachedImages:
    """Decodes all images, brings the short side of larger ones to `short_side`, and keeps them.

    For crops of 90 to 100 % of the area at 224 pixels, 256 is what the smallest crop needs. Three
    bytes a pixel: an image of 4:3 takes 262 kB, ImageNet's training set 0.35 TB. A call that was
    interrupted goes on where it stopped; each part of 4,096 images is read back once it is written.
    One process at a time may write: where hosts share the directory, write it before they start.

    Args:
      images: the source.
      directory: of the cache.
      short_side: pixels; bicubic, antialiased.
      threads: that decode; 0 means one a core.
      unreadable: an image that cannot be decoded is an 'error', or 'skip' leaves its place empty.

    Raises:
      UserError: an image that cannot be decoded, a directory with something else in it, or a disk
        that does not give back what was written.
    """
    if short_side < 1:
        raise UserError(f"short_side is {short_side}: it must be at least 1")
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {directory}: {error.strerror}") from error
    facts = {"format": _FORMAT, "short_side": short_side}
    facts |= {"count": len(images), "source": fingerprint(images)}
    path = directory / DESCRIPTION
    if not path.exists():
        if any(directory.iterdir()):
            raise UserError(f"{directory}: there is something else in it; give a new directory")
        _write(path, [json.dumps(facts, indent=1).encode()])
    elif (found := read_json(path)) != facts:
        changed = [name for name in facts if found.get(name) != facts[name]]
        raise UserError(
            f"{directory}: a cache of something else ({', '.join(changed)} differ); give a new "
            "directory"
        )

    def small(index: int) -> np.ndarray:
        try:
            pixels = decode(images[index])
        except Unreadable as error:
            if unreadable == "skip":
                return np.zeros((0, 0, 3), np.uint8)
            raise UserError(
                f"{images.name(index)}: image {index} cannot be decoded ({error}); replace it, "
                "remove it, or leave such images out with unreadable='skip'"
            ) from error
        if min(pixels.shape[:2]) <= short_side:
            return pixels
        return np.asarray(resize_short_side(pixels, short_side))

    with ThreadPoolExecutor(threads or usable_cores()) as pool:
        parts = range(_num_parts(len(images)))
        for part in track(parts, f"writing {directory}", transient=True):
            if not _index(directory, part).is_file():
                whole = range(part * _A_PART, min((part + 1) * _A_PART, len(images)))
                # A few at a time: a part's pixels are a gigabyte.
                some = (whole[first : first + 64] for first in range(0, len(whole), 64))
                _write_part(
                    directory, part, itertools.chain.from_iterable(pool.map(small, s) for s in some)
                )
    return CachedImages(directory)


def _read_index(path: Path) -> np.ndarray:
    try:
        entries = np.load(path, allow_pickle=False)
    except (OSError, EOFError, ValueError):
        entries = None
    if not isinstance(entries, np.ndarray) or entries.dtype != _ENTRY:
        raise UserError(f"{path}: damaged; remove it and write the cache again")
    return entries


def _write_part(directory: Path, part: int, pixels: Iterator[np.ndarray]) -> None:
    entries = []

    def record() -> Iterator[bytes]:
        for one in pixels:
            entries.append((*one.shape[:2], zlib.crc32(one.data)))
            yield one.tobytes()

    path = _pixels(directory, part)
    _write(path, record())
    index = np.array(entries, _ENTRY)
    with path.open("rb") as file:
        for entry, size in zip(index, _num_bytes(index), strict=True):
            if zlib.crc32(file.read(size)) != entry["crc32"]:
                raise UserError(f"{path}: the disk does not give back what was written to it")
    file = io.BytesIO()
    np.save(file, index, allow_pickle=False)
    _write(_index(directory, part), [file.getvalue()])


def _write(path: Path, chunks: Iterable[bytes]) -> None:
    try:
        # One name for every try: what a kill leaves may be a gigabyte, and is written over.
        with replacing(path, path.with_suffix(".tmp")) as beside, beside.open("wb") as file:
            file.writelines(chunks)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free some space there and give the "
            "same command again"
        ) from error


def _num_parts(count: int) -> int:
    return -(-count // _A_PART)


def _num_bytes(entries: np.ndarray) -> np.ndarray:
    return 3 * entries["height"].astype(np.int64) * entries["width"]


def _pixels(directory: Path, part: int) -> Path:
    return directory / f"part-{part:05d}.images"


def _index(directory: Path, part: int) -> Path:
    return directory / f"part-{part:05d}.npy"


# Small arrays in the user's cache directory, kept for the place that they are about.

WORTH_KEEPING = 20_000  # entries; fewer are found again in about a second


def load_arrays(kind: str, place: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays kept for a place, by name; empty if there are none or the file is damaged.

    They lie in $XDG_CACHE_HOME, else ~/.cache: nothing is ever written beside a user's data.

    Args:
      kind: what the arrays are.
      place: the directory that they are about.
    """
    try:
        with _file(kind, place).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        return {}


def save_arrays(kind: str, place: str | os.PathLike[str], **arrays: Any) -> None:
    """Keeps arrays for a place; a cache directory that cannot be written is no error."""
    path, temporary = _file(kind, place), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            np.savez(file, **arrays)
        temporary.replace(path)
    except OSError:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def cache_directory() -> Path:
    """The user's cache directory of this package; it may not exist yet."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "modelstock_jax"


def _file(kind: str, place: str | os.PathLike[str]) -> Path:
    digest = hashlib.sha256(os.fsencode(Path(place).resolve())).hexdigest()[:32]
    return cache_directory() / kind / f"{digest}.npz"
