"""Checksums of tensors and files."""

from __future__ import annotations

import functools
import hashlib
import os
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from zlib_ng import zlib_ng

# Fastest first: measured at 10 GB/s (CRC-32) and 1.6 GB/s (SHA-256) per core.
KINDS = ("crc32", "sha256")
_POLYNOMIAL = 0xEDB88320  # of CRC-32; bit 31 is the coefficient of x^0
_BLOCK = 2**20


def checksum_tensors(tensors: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and bytes.

    The result does not depend on the order of the tensors or on the files that store them.

    Args:
      tensors: name -> array

    Returns:
      64 hexadecimal digits

    Example:
      >>> a, b = np.zeros(2, np.float32), np.ones((1, 2), np.float32)
      >>> checksum_tensors({"a": a, "b": b}) == checksum_tensors({"b": b, "a": a})
      True
      >>> checksum_tensors({"a": a, "b": b}) == checksum_tensors({"a": a, "b": b.T})
      False
    """
    sha256 = hashlib.sha256()
    for name in sorted(tensors):
        array = np.asarray(tensors[name], order="C")
        head = f"{name}\0{array.dtype.name}\0{','.join(map(str, array.shape))}\0"
        sha256.update(head.encode())
        sha256.update(array.reshape(-1).view(np.uint8).data)
    return sha256.hexdigest()


def checksum_file(path: str | os.PathLike[str], kind: str = "sha256") -> str:
    """Return the checksum of a file, as `sha256sum` or `crc32` prints it.

    Args:
      path: the file
      kind: one of `KINDS`

    Returns:
      hexadecimal digits: 64 for SHA-256, 8 for CRC-32
    """
    if kind == "crc32":
        return RangeChecksum(Path(path).stat().st_size).complete(path)
    with open(Path(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class RangeChecksum:
    """CRC-32 of a file, computed from ranges in any order and on any thread.

    Data that is read or written anyway is summed while it is in the processor's cache, so the file
    does not need a second pass.

    Args:
      size: bytes of the file

    Example:
      >>> checksum = RangeChecksum(9)
      >>> checksum.update(4, b"56789"); checksum.update(0, b"1234")
      >>> checksum.gaps(), checksum.hexdigest()
      ([], 'cbf43926')
    """

    def __init__(self, size: int):
        self.size = size
        self._seen: dict[int, tuple[int, int]] = {}  # start -> stop, crc
        self._lock = threading.Lock()

    def update(self, start: int, data: memoryview | bytes) -> None:
        """Add the bytes from offset `start`; a range that was added before costs nothing."""
        if start in self._seen or not len(data):
            return
        crc = zlib_ng.crc32(data)
        with self._lock:
            self._seen[start] = (start + len(data), crc)

    def gaps(self) -> list[tuple[int, int]]:
        """Return the ranges [start, stop) that were not added yet, in order."""
        gaps, offset = [], 0
        for start, stop, _ in self._disjoint_ranges():
            if start > offset:
                gaps.append((offset, start))
            offset = stop
        return gaps if offset == self.size else [*gaps, (offset, self.size)]

    def complete(self, path: str | os.PathLike[str]) -> str:
        """Read the missing ranges from the file and return `hexdigest`."""
        block = bytearray(_BLOCK)
        with open(path, "rb", 0) as file:
            for start, stop in self.gaps():
                file.seek(start)
                while start < stop:
                    count = file.readinto(memoryview(block)[: min(_BLOCK, stop - start)])
                    if not count:
                        raise ValueError(f"{path}: shorter than {self.size} bytes")
                    self.update(start, memoryview(block)[:count])
                    start += count
        return self.hexdigest()

    def hexdigest(self) -> str:
        """Return 8 hexadecimal digits.

        Raises:
          ValueError: a byte was never added
        """
        if gaps := self.gaps():
            raise ValueError(f"bytes {gaps[0][0]} to {gaps[0][1]} were never added")
        total = 0
        for start, stop, crc in self._disjoint_ranges():
            total = _multiply(_shift(stop - start), total) ^ crc
        return f"{total:08x}"

    def _disjoint_ranges(self) -> list[tuple[int, int, int]]:
        """Return (start, stop, crc) in order, without ranges that begin within another range."""
        with self._lock:
            seen, ranges, offset = sorted(self._seen.items()), [], 0
        for start, (stop, crc) in seen:
            if start >= offset:
                ranges.append((start, stop, crc))
                offset = stop
        return ranges


def _multiply(a: int, b: int) -> int:
    """Multiply two polynomials over GF(2) modulo the CRC-32 polynomial; bit 31 is x^0."""
    product = 0
    while a:
        if a & 0x80000000:
            product ^= b
        a = a << 1 & 0xFFFFFFFF
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product


@functools.lru_cache(4096)
def _shift(count: int) -> int:
    """Return x^(8 count), the factor by which `count` following bytes multiply a CRC."""
    power, square = 0x80000000, 0x00800000  # x^0, x^8
    while count:
        if count & 1:
            power = _multiply(power, square)
        square, count = _multiply(square, square), count >> 1
    return power
