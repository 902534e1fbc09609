"""The header of a safetensors file, read by the format's own rules before anything is allocated."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from modelstock_jax.errors import UserError
from modelstock_jax.tensor_files.formats import by_content, head_of

# Bits of a number of each dtype of the format.
BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8, "C64": 64,
    **{code: 8 for code in ("F8_E5M2", "F8_E4M3", "F8_E5M2FNUZ", "F8_E4M3FNUZ", "I8", "U8")},
    **{code: 16 for code in ("BF16", "F16", "I16", "U16")},
    **{f"{kind}{bits}": bits for kind in "FIU" for bits in (32, 64)},
}
MAX_HEADER = 100 * 10**6  # the format's own limit
MAX_AXES = 64  # NumPy's
_METADATA = "__metadata__"
# Text of this length, whatever it holds, parses into some 200 MB of objects at most.
_PLAIN = 8 * 10**6


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor: dtype code, shape, and its bytes [start, stop) in the file."""

    code: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file holds, by name, and its free text."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]


class _Broken(ValueError):
    """A rule of the format that does not hold."""


def read_header(path: str | os.PathLike[str], descriptor: int | None = None) -> Header:
    """Reads and checks a file's header; no tensor is read.

    8 bytes give the length of a JSON object, name -> dtype, shape and offsets; the tensors follow
    without holes, to the last byte of the file.

    Args:
        path: A ``.safetensors`` file.
        descriptor: Of the file, where it is open already: by its path it may be another by now.

    Returns:
        The `Header`, with offsets from the file's beginning.

    Raises:
        UserError: A file that cannot be read, or that breaks a rule; it names both.
    """
    path = Path(path)
    try:
        opened = path if descriptor is None else descriptor
        with open(opened, "rb", closefd=descriptor is None) as file:
            return _parse(file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}).") from None
    except _Broken as broken:
        other = by_content(path, head_of(path))
        raise UserError(other or f"{path}: not a whole safetensors file ({broken}).") from None


def num_bytes(code: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor.

    Example:
        >>> num_bytes("BF16", (3, 5))
        30
    """
    bits = BITS[code]
    for length in shape:
        bits *= length
        if bits >= 2**66:
            raise _Broken(f"its size overflows: {code}{_short(list(shape))}")
    if bits % 8:
        raise _Broken(f"its size is no whole number of bytes: {code}{_short(list(shape))}")
    return bits // 8


def _parse(file: Any, size: int) -> Header:
    if size < 8:
        raise _Broken("it is empty" if size == 0 else f"it has {size} bytes, too few for a header")
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER:
        raise _Broken(f"its header claims {length} bytes, the format allows {MAX_HEADER}")
    if length > size - 8:
        raise _Broken(f"its header claims {length} bytes, the file has {size - 8}; cut short?")
    raw = file.read(length)
    if len(raw) < length or raw[:1] != b"{":
        raise _Broken("its header is not a JSON object")
    if length > _PLAIN and raw.count(b"[") + raw.count(b"{") > length // 10:
        raise _Broken("its header is too large for what it can hold")
    top = _json(raw)
    metadata = top.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _Broken(f"{_METADATA} is not text -> text")
    tensors = {}
    for name, entry in top.items():
        try:
            tensors[name] = _entry(entry, 8 + length)
        except _Broken as broken:
            raise _Broken(f"tensor {_short(name)}: {broken}") from None
    _check_places(tensors, 8 + length, size)
    return Header(tensors, metadata)


def _json(raw: bytes) -> dict[str, Any]:
    try:
        top = json.loads(raw.decode(), object_pairs_hook=_once, parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise _Broken("its header is not UTF-8") from None
    except RecursionError:
        raise _Broken("its header is nested too deeply") from None
    except _Broken:
        raise
    except ValueError as error:
        raise _Broken(f"its header is not JSON: {_short(str(error))}") from None
    if not isinstance(top, dict):
        raise _Broken("its header is not a JSON object")
    return top


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _Broken(f"its header says {_short(twice)} twice")
    for key, value in pairs:
        # JSON may spell half a surrogate pair, which no terminal or file can take.
        if not (key + value if isinstance(value, str) else key).isascii():
            try:
                f"{key}{value if isinstance(value, str) else ''}".encode()
            except UnicodeEncodeError:
                raise _Broken(f"its header is not UTF-8: {_short(key)}") from None
    return found


def _no_constant(text: str) -> None:
    raise _Broken(f"its header is not JSON: {text}")


def _entry(entry: Any, begin: int) -> Entry:
    if not isinstance(entry, dict):
        raise _Broken("is not an object")
    if lost := [key for key in ("dtype", "shape", "data_offsets") if key not in entry]:
        raise _Broken(f"has no {lost[0]}")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in BITS:
        raise _Broken(f"dtype {_short(code)} is not known")
    if not _naturals(shape):
        raise _Broken(f"shape {_short(shape)} is no list of numbers of at least 0")
    if len(shape) > MAX_AXES:
        raise _Broken(f"has {len(shape)} axes; {MAX_AXES} are supported")
    if not _naturals(offsets) or len(offsets) != 2:
        raise _Broken(f"data_offsets {_short(offsets)} are no two numbers of at least 0")
    start, stop = offsets
    if (size := num_bytes(code, tuple(shape))) != stop - start:
        raise _Broken(f"{code}{_short(shape)} takes {size} bytes, data_offsets "
                      f"{_short(offsets)} give {_short(stop - start)}")
    return Entry(code, tuple(shape), begin + start, begin + stop)


def _naturals(values: Any) -> bool:
    """A list of whole numbers from 0 to 2^64 - 1; True is no number."""
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 2**64 for n in values)


def _check_places(tensors: dict[str, Entry], begin: int, size: int) -> None:
    place = begin
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.stop > size:
            raise _Broken(f"tensor {_short(name)} ends at byte {entry.stop}, the file at {size}; "
                          "cut short?")
        if entry.start != place:
            what = "overlaps the one before it" if entry.start < place else "leaves a hole before"
            raise _Broken(f"tensor {_short(name)} {what}")
        place = entry.stop
    if place != size:
        raise _Broken(f"{size - place} bytes follow the last tensor")


def _short(value: Any, most: int = 60) -> str:
    """A value on one line, whatever a file says it is."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Whole numbers of thousands of digits; deep lists.
        return "(too long to show)"
    text = text.encode("ascii", "backslashreplace").decode()
    return text if len(text) <= most else text[: most - 3] + "..."
