"""Writes safetensors files so that a reader never sees half of one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from modelstock_jax.errors import UserError
from modelstock_jax.fileio import explained, flush, flush_path, replacing, set_mode
from modelstock_jax.tensor_files.checksums import RangeChecksum
from modelstock_jax.tensor_files.reader import BITS, INDEX, SINGLE, num_bytes


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes one safetensors file: beside its place, flushed to the disk, then renamed.

    Args:
      path: Where; an existing file is replaced.
      tensors: Name -> array of any shape; bfloat16 is ml_dtypes'.
      metadata: Free text for the header.

    Raises:
      UserError: The file cannot be written (it names the path and the reason).
    """
    path = Path(path)
    # Not ascontiguousarray, which gives a scalar an axis.
    whole = {name: np.asarray(tensors[name], order="C") for name in sorted(tensors)}
    # A kill leaves the file beside: it must not look like a model's.
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with explained(path):
        with replacing(path, beside):
            mode = beside.stat().st_mode
            try:
                save_file(whole, beside, metadata={"format": "pt", **(metadata or {})})
            except SafetensorError as error:  # How the library reports a full disk.
                raise UserError(f"{path}: cannot be written ({error}).") from None
            set_mode(beside, stat.S_IMODE(mode))  # The library's files are for their owner alone.
        flush_path(path.parent)


def write_directory_tensors(
    directory: Path, tensors: Mapping[str, np.ndarray], max_shard_bytes: int = 5 * 10**9
) -> None:
    """Writes `model.safetensors`, or shards and their index where one file would be too large.

    Args:
      directory: An existing directory.
      tensors: Name -> array.
      max_shard_bytes: Bytes of tensors in a file; a larger tensor has a file of its own.
    """
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name in sorted(tensors):
        if shards[-1] and size + tensors[name].nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensors[name]
        size += tensors[name].nbytes
    if len(shards) == 1:
        write_tensors(directory / SINGLE, shards[0])
        return
    places = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(directory / file, shard)
        places.update(dict.fromkeys(shard, file))
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    write_indented_json(directory / INDEX, index)


def write_text(path: Path, text: str) -> None:
    """Writes a text file and flushes it to the disk; half surrogate pairs as JSON's escapes."""
    with explained(path), replacing(path) as beside:
        beside.write_bytes(text.encode("utf-8", "backslashreplace"))


def write_indented_json(path: Path, value: object) -> None:
    """Writes JSON, indented, with a last newline."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


# A safetensors file that is written piece by piece, from any thread.

_BLOCK = 2**20
_SYNC = 2**28  # So that the disk writes while the rest is computed.


class ShardWriter:
    """Writes one file: its header at once, its tensors in pieces and in any order.

    The digest is taken while the file is written: CRC-32 of each piece as it passes by, SHA-256 of
    the written prefix, on a thread of its own. Widest numbers come first, so that every tensor is
    aligned.

    Args:
      path: The file; it is replaced. Give it a name of its own and rename it when finished.
      tensors: Name -> dtype code and shape.
      metadata: Free text for the header.
      digest: One of `digests.KINDS`.

    Raises:
      UserError: The file cannot be written; it names the path and the reason.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "w.safetensors"
      >>> file = ShardWriter(path, {"w": ("F32", (2, 2))})
      >>> file.write("w", 2, np.ones(2, np.float32)); file.write("w", 0, np.zeros(2, np.float32))
      >>> digest = file.finish()
      >>> from modelstock_jax.tensor_files.reader import TensorFiles
      >>> TensorFiles(path)["w"].tolist()
      [[0.0, 0.0], [1.0, 1.0]]
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        tensors: Mapping[str, tuple[str, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
        checksum: str = "sha256",
    ):
        self.path = Path(path)
        self._codes = {name: code for name, (code, _) in tensors.items()}
        header, self._places = header_layout(tensors, metadata)
        self.size = max((stop for _, stop in self._places.values()), default=len(header))
        self._pieces: dict[int, int] = {}  # written [start, stop) beyond the prefix
        self._prefix = 0
        self._error: OSError | None = None
        self._changed = threading.Condition()
        self._closing = False
        with explained(self.path):
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        self._sum = RangeChecksum(self.size) if checksum == "crc32" else None
        self._sha256 = hashlib.sha256()
        self._follower = threading.Thread(target=self._follow, name="follow", daemon=True)
        self._follower.start()
        try:
            self._put(0, memoryview(header))
        except UserError:
            self.abandon()
            raise

    def write(self, name: str, start: int, values: np.ndarray) -> None:
        """Writes elements [start, start + len(values)) of a flattened tensor; thread-safe.

        Args:
          name: Of the tensor.
          start: Index of the first element.
          values: [n], of the file's dtype (or its bits, as whole numbers of that width).
        """
        width = BITS[self._codes[name]] // 8
        if values.itemsize != width or values.ndim != 1:
            raise ValueError(f"{name}: {self._codes[name]} expected, not {values.dtype}")
        begin, stop = self._places[name]
        place = begin + start * width
        if place < begin or place + values.nbytes > stop:
            raise ValueError(f"{name}: elements {start} to {start + len(values)} lie outside of it")
        self._put(place, np.ascontiguousarray(values).view(np.uint8).data)

    def finish(self) -> str:
        """Flushes the file to the disk; every element must have been written.

        Returns:
          The file's digest, hexadecimal digits.
        """
        with self._changed:
            missing = self._error is None and self._prefix != self.size
        self._stop()
        if missing:
            raise ValueError(f"{self.path}: byte {self._prefix} was never written")
        try:
            with explained(self.path):
                if self._error is not None:
                    raise self._error
                flush(self._file)
        finally:
            os.close(self._file)
        return self._sha256.hexdigest() if self._sum is None else self._sum.hexdigest()

    def abandon(self) -> None:
        """Closes and removes the file."""
        self._stop()
        os.close(self._file)
        self.path.unlink(missing_ok=True)

    def _stop(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._follower.join()

    def _put(self, place: int, data: memoryview) -> None:
        start, stop = place, place + len(data)
        if self._sum is not None:
            self._sum.update(place, data)
        with explained(self.path):
            while data:
                count = os.pwrite(self._file, data, place)
                place, data = place + count, data[count:]
        with self._changed:
            if stop > start:
                self._pieces[start] = stop
            while (end := self._pieces.pop(self._prefix, None)) is not None:
                self._prefix = end
            self._changed.notify_all()

    def _follow(self) -> None:
        """Goes after the written prefix: sends it to the disk, hashes it if asked."""
        done, synced = 0, 0
        step = _BLOCK if self._sum is None else _SYNC
        try:
            while True:
                with self._changed:
                    while not self._closing and self._prefix - done < step:
                        self._changed.wait()
                    ready, closing = self._prefix, self._closing
                if self._sum is None:
                    self._hash(done, ready)
                if not closing and ready - synced >= _SYNC:
                    flush(self._file, data_only=True)
                    synced = ready
                if closing and ready == done:
                    return
                done = ready
        except OSError as error:
            self._error = error

    def _hash(self, start: int, stop: int) -> None:
        block = memoryview(bytearray(_BLOCK))
        while start < stop:
            count = os.preadv(self._file, [block[: min(_BLOCK, stop - start)]], start)
            if not count:
                raise OSError(errno.EIO, "was cut short meanwhile")
            self._sha256.update(block[:count])
            start += count


def header_layout(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The header of a file, and each tensor's bytes [start, stop) in it.

    Example:
      >>> header, places = header_layout({"b": ("U8", (3,)), "w": ("F32", (2,))})
      >>> len(header) % 8, places["b"][0] - places["w"][0]
      (0, 8)
    """
    order = sorted(tensors, key=lambda name: (-BITS[tensors[name][0]], name))
    top: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offsets, place = {}, 0
    for name in order:
        code, shape = tensors[name]
        stop = place + num_bytes(code, tuple(shape))
        offsets[name] = (place, stop)
        top[name] = {"dtype": code, "shape": list(shape), "data_offsets": [place, stop]}
        place = stop
    text = json.dumps(top, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {n: (len(header) + a, len(header) + b) for n, (a, b) in offsets.items()}
