"""Write safetensors files atomically: a reader never sees a partial file."""

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
from modelstock_jax.fileio import (
    flush,
    flush_path,
    os_errors_as_user_errors,
    replace_atomically,
    set_mode,
)
from modelstock_jax.tensor_files.checksums import RangeChecksum
from modelstock_jax.tensor_files.reader import BITS, INDEX, SINGLE, num_bytes


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one safetensors file: to a temporary file, flushed to disk, then renamed.

    Args:
      path: the file; an existing file is replaced
      tensors: name -> array of any shape; bfloat16 is that of ml_dtypes
      metadata: text for the header's `__metadata__`

    Raises:
      UserError: the file cannot be written; the message names the path and the reason
    """
    path = Path(path)
    # np.ascontiguousarray would add an axis to a scalar.
    contiguous = {name: np.asarray(tensors[name], order="C") for name in sorted(tensors)}
    # A kill leaves the temporary file behind: its name must not look like a model file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with os_errors_as_user_errors(path):
        with replace_atomically(path, temporary):
            mode = temporary.stat().st_mode
            try:
                save_file(contiguous, temporary, metadata={"format": "pt", **(metadata or {})})
            except SafetensorError as error:  # The library reports a full disk this way.
                raise UserError(f"{path}: cannot be written ({error})") from None
            # The library creates files that only their owner can read.
            set_mode(temporary, stat.S_IMODE(mode))
        flush_path(path.parent)


def write_directory_tensors(
    directory: Path, tensors: Mapping[str, np.ndarray], max_shard_bytes: int = 5 * 10**9
) -> None:
    """Write `model.safetensors`, or shards and their index if one file would be too large.

    Args:
      directory: an existing directory
      tensors: name -> array
      max_shard_bytes: maximum bytes of tensors per file; a larger tensor gets a separate file
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
    weight_map = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(directory / file, shard)
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_indented_json(directory / INDEX, index)


def write_text(path: Path, text: str) -> None:
    """Write a text file and flush it to disk; lone surrogates become JSON escapes."""
    with os_errors_as_user_errors(path), replace_atomically(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))


def write_indented_json(path: Path, value: object) -> None:
    """Write indented JSON that ends with a newline."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


_BLOCK = 2**20
_SYNC = 2**28  # bytes between flushes, so that the disk writes while the rest is computed


class ShardWriter:
    """Write one safetensors file: the header first, then the tensors in pieces, in any order.

    Pieces may come from any thread. The checksum is computed while the file is written: CRC-32 of
    each piece when it is written, or SHA-256 of the written prefix on a separate thread. Tensors
    are stored by decreasing element size, so that every tensor is aligned.

    Args:
      path: the file; it is replaced. Use a temporary name, and rename the file when it is finished.
      tensors: name -> dtype code and shape
      metadata: text for the header's `__metadata__`
      checksum: one of `checksums.KINDS`

    Raises:
      UserError: the file cannot be written; the message names the path and the reason

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "w.safetensors"
      >>> file = ShardWriter(path, {"w": ("F32", (2, 2))})
      >>> file.write("w", 2, np.ones(2, np.float32)); file.write("w", 0, np.zeros(2, np.float32))
      >>> checksum = file.finish()
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
        header, self._offsets = header_layout(tensors, metadata)
        self.size = max((stop for _, stop in self._offsets.values()), default=len(header))
        self._pieces: dict[int, int] = {}  # written ranges [start, stop) after the prefix
        self._prefix = 0
        self._error: OSError | None = None
        self._changed = threading.Condition()
        self._closing = False
        with os_errors_as_user_errors(self.path):
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        self._crc32 = RangeChecksum(self.size) if checksum == "crc32" else None
        self._sha256 = hashlib.sha256()
        self._follower = threading.Thread(target=self._follow, name="follow", daemon=True)
        self._follower.start()
        try:
            self._put(0, memoryview(header))
        except UserError:
            self.abandon()
            raise

    def write(self, name: str, start: int, values: np.ndarray) -> None:
        """Write elements [start, start + len(values)) of a flattened tensor. Thread-safe.

        Args:
          name: name of the tensor
          start: index of the first element
          values: [n], of the file's dtype (or its bits as integers of the same width)
        """
        width = BITS[self._codes[name]] // 8
        if values.itemsize != width or values.ndim != 1:
            raise ValueError(f"{name}: {self._codes[name]} expected, not {values.dtype}")
        begin, stop = self._offsets[name]
        offset = begin + start * width
        if offset < begin or offset + values.nbytes > stop:
            raise ValueError(f"{name}: elements {start} to {start + len(values)} are out of range")
        self._put(offset, np.ascontiguousarray(values).view(np.uint8).data)

    def finish(self) -> str:
        """Flush the file to disk and close it; every element must have been written.

        Returns:
          the checksum of the file, hexadecimal digits
        """
        with self._changed:
            missing = self._error is None and self._prefix != self.size
        self._stop()
        if missing:
            raise ValueError(f"{self.path}: byte {self._prefix} was never written")
        try:
            with os_errors_as_user_errors(self.path):
                if self._error is not None:
                    raise self._error
                flush(self._file)
        finally:
            os.close(self._file)
        return self._sha256.hexdigest() if self._crc32 is None else self._crc32.hexdigest()

    def abandon(self) -> None:
        """Close and remove the file."""
        self._stop()
        os.close(self._file)
        self.path.unlink(missing_ok=True)

    def _stop(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._follower.join()

    def _put(self, offset: int, data: memoryview) -> None:
        start, stop = offset, offset + len(data)
        if self._crc32 is not None:
            self._crc32.update(offset, data)
        with os_errors_as_user_errors(self.path):
            while data:
                count = os.pwrite(self._file, data, offset)
                offset, data = offset + count, data[count:]
        with self._changed:
            if stop > start:
                self._pieces[start] = stop
            while (end := self._pieces.pop(self._prefix, None)) is not None:
                self._prefix = end
            self._changed.notify_all()

    def _follow(self) -> None:
        """Flush the written prefix to disk as it grows, and hash it for SHA-256."""
        done, synced = 0, 0
        step = _BLOCK if self._crc32 is None else _SYNC
        try:
            while True:
                with self._changed:
                    while not self._closing and self._prefix - done < step:
                        self._changed.wait()
                    ready, closing = self._prefix, self._closing
                if self._crc32 is None:
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
                raise OSError(errno.EIO, "was truncated while it was written")
            self._sha256.update(block[:count])
            start += count


def header_layout(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Return the header of a file and the bytes [start, stop) of each tensor in the file.

    Example:
      >>> header, offsets = header_layout({"b": ("U8", (3,)), "w": ("F32", (2,))})
      >>> len(header) % 8, offsets["b"][0] - offsets["w"][0]
      (0, 8)
    """
    order = sorted(tensors, key=lambda name: (-BITS[tensors[name][0]], name))
    top: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offsets, offset = {}, 0
    for name in order:
        code, shape = tensors[name]
        stop = offset + num_bytes(code, tuple(shape))
        offsets[name] = (offset, stop)
        top[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(top, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {n: (len(header) + a, len(header) + b) for n, (a, b) in offsets.items()}
