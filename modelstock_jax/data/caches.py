"""Disk caches: decoded images, and small arrays in the user's cache directory."""

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

from modelstock_jax.data.image_set import EncodedImages, images_checksum
from modelstock_jax.data.transforms import Unreadable, decode, resize_short_side
from modelstock_jax.errors import UserError
from modelstock_jax.fileio import replace_atomically
from modelstock_jax.machine import usable_cores
from modelstock_jax.tensor_files.reader import read_json

DESCRIPTION = "cache.json"
_FORMAT = 1
_IMAGES_PER_PART = 4096
_ENTRY = np.dtype([("height", "<u2"), ("width", "<u2"), ("crc32", "<u4")])


class CachedImages(EncodedImages):
    """The images of a cache: `images[i]` is uint8 [H, W, 3], in the order of the source.

    No file stays open.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        """Read the sizes of all images, 8 bytes each.

        Raises:
          UserError: there is no cache, or it is incomplete
        """
        self._directory = Path(directory)
        metadata = read_json(self._directory / DESCRIPTION)
        supported = isinstance(metadata, dict) and metadata.get("format") == _FORMAT
        if not supported or not isinstance(metadata.get("count"), int):
            raise UserError(f"{directory}: not a cache of this version; write it again")
        indices = [_index(self._directory, part) for part in range(_num_parts(metadata["count"]))]
        missing = [path for path in indices if not path.is_file()]
        if missing:
            raise UserError(
                f"{directory}: {len(missing)} of {len(indices)} parts are missing; run the command "
                "that started the cache again to complete it"
            )
        entries = [_read_index(path) for path in indices]
        self._entries = np.concatenate([np.zeros(0, _ENTRY), *entries])
        sizes = [_num_bytes(entry) for entry in entries]
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
            _pixels(self._directory, index // _IMAGES_PER_PART),
            np.uint8,
            count=height * width * 3,
            offset=int(self._starts[index]),
        )
        return pixels.reshape(height, width, 3)

    def name(self, index: int) -> str:
        """Return the cache directory and the number of the image."""
        return f"{self._directory}, image {index}"

    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the heights and widths; an image that could not be decoded has none, 0."""
        return self._entries["height"].astype(int), self._entries["width"].astype(int)

    def verify(self) -> None:
        """Read all images and compare them with the checksums stored when they were written.

        Raises:
          UserError: an image has changed
        """
        for index in track(range(len(self)), f"verifying {self._directory}", transient=True):
            entry = self._entries[index]
            if entry["height"] and zlib.crc32(self[index].data) != entry["crc32"]:
                part = index // _IMAGES_PER_PART
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
    """Decode all images, resize the short side of larger ones to `short_side`, and store them.

    256 is enough for the smallest crop of 90 to 100 % of the area at 224 pixels. A pixel needs
    three bytes: an image of 4:3 needs 262 kB, ImageNet's training set 0.35 TB. An interrupted call
    resumes with the part that it was writing; each part of 4,096 images is read back after it is
    written. Only one process at a time may write: if hosts share the directory, write the cache
    before they start.

    Args:
      images: the source
      directory: directory of the cache
      short_side: in pixels; the resize is bicubic and antialiased
      threads: decoding threads; 0 uses one per core
      unreadable: what to do if an image cannot be decoded: 'error', or 'skip', which stores an
        empty entry

    Raises:
      UserError: an image cannot be decoded, the directory contains something else, or the disk
        does not return what was written
    """
    if short_side < 1:
        raise UserError(f"short_side is {short_side}: it must be at least 1")
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {directory}: {error.strerror}") from error
    metadata = {"format": _FORMAT, "short_side": short_side}
    metadata |= {"count": len(images), "source": images_checksum(images)}
    path = directory / DESCRIPTION
    if not path.exists():
        if any(directory.iterdir()):
            raise UserError(f"{directory}: not a cache and not empty; give a new directory")
        _write(path, [json.dumps(metadata, indent=1).encode()])
    elif (existing := read_json(path)) != metadata:
        changed = [name for name in metadata if existing.get(name) != metadata[name]]
        raise UserError(
            f"{directory}: a cache of other images or options ({', '.join(changed)} differ); give "
            "a new directory"
        )

    def resized(index: int) -> np.ndarray:
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
                start = part * _IMAGES_PER_PART
                indices = range(start, min(start + _IMAGES_PER_PART, len(images)))
                # 64 at a time: the pixels of a complete part are a gigabyte.
                chunks = (indices[first : first + 64] for first in range(0, len(indices), 64))
                pixels = itertools.chain.from_iterable(pool.map(resized, chunk) for chunk in chunks)
                _write_part(directory, part, pixels)
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

    def image_bytes() -> Iterator[bytes]:
        for image in pixels:
            entries.append((*image.shape[:2], zlib.crc32(image.data)))
            yield image.tobytes()

    path = _pixels(directory, part)
    _write(path, image_bytes())
    index = np.array(entries, _ENTRY)
    with path.open("rb") as file:
        for entry, size in zip(index, _num_bytes(index), strict=True):
            if zlib.crc32(file.read(size)) != entry["crc32"]:
                raise UserError(
                    f"{path}: the disk does not return what was written; check the disk"
                )
    file = io.BytesIO()
    np.save(file, index, allow_pickle=False)
    _write(_index(directory, part), [file.getvalue()])


def _write(path: Path, chunks: Iterable[bytes]) -> None:
    try:
        # The same temporary name every time: a killed process may leave a gigabyte, which the next
        # attempt overwrites.
        with (
            replace_atomically(path, path.with_suffix(".tmp")) as temporary,
            temporary.open("wb") as file,
        ):
            file.writelines(chunks)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free disk space and run the same "
            "command again"
        ) from error


def _num_parts(count: int) -> int:
    return -(-count // _IMAGES_PER_PART)


def _num_bytes(entries: np.ndarray) -> np.ndarray:
    return 3 * entries["height"].astype(np.int64) * entries["width"]


def _pixels(directory: Path, part: int) -> Path:
    return directory / f"part-{part:05d}.images"


def _index(directory: Path, part: int) -> Path:
    return directory / f"part-{part:05d}.npy"


MIN_ENTRIES = 20_000  # Smaller arrays are not cached: they are computed in about a second.


def load_arrays(kind: str, path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Return the cached arrays of a path by name; empty if there are none or the file is damaged.

    They are stored in $XDG_CACHE_HOME or ~/.cache; nothing is ever written next to the user's data.

    Args:
      kind: kind of the arrays, a subdirectory of the cache directory
      path: the path that the arrays describe
    """
    try:
        with _file(kind, path).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        return {}


def save_arrays(kind: str, path: str | os.PathLike[str], **arrays: Any) -> None:
    """Cache arrays for a path; a cache directory that is not writable is not an error."""
    target, temporary = _file(kind, path), None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            np.savez(file, **arrays)
        temporary.replace(target)
    except OSError:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def cache_directory() -> Path:
    """Return the user's cache directory of this package; it may not exist yet."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "modelstock_jax"


def _file(kind: str, path: str | os.PathLike[str]) -> Path:
    checksum = hashlib.sha256(os.fsencode(Path(path).resolve())).hexdigest()[:32]
    return cache_directory() / kind / f"{checksum}.npz"
