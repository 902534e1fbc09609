"""Read safetensors: one file, or shards with or without an index. Nothing is unpickled."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from modelstock_jax.errors import UserError, listed
from modelstock_jax.tensor_files import formats
from modelstock_jax.tensor_files.formats import PICKLES, content_error, read_head, shown

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEAD = "head.safetensors"  # a classifier next to the model whose features it uses
_SUFFIX = ".safetensors"
# The index of NAME.safetensors; that of a variant "fp16" may also be named
# NAME.safetensors.index.fp16.json.
_INDEX = re.compile(r"(?P<stem>.+)\.safetensors\.index(?P<variant>\.[\w-]+)?\.json")
_SHARD = re.compile(
    r"(?P<stem>.+)-(?P<number>\d{1,6})-of-(?P<total>\d{1,6})(?P<variant>\.[\w-]+)?\.safetensors"
)

# The dtypes that NumPy and ml_dtypes support; the format defines a few more.
DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "BOOL": np.dtype(np.bool_),
    "C64": np.dtype(np.complex64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    **{f"F{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
}


class TensorFiles(Mapping[str, np.ndarray]):
    """The tensors of a safetensors file or directory, each read on access.

    Shapes and dtypes come from the headers, so checking names reads no tensor data.

    Args:
      path: a `.safetensors` file, or a directory with `NAME.safetensors`, with
        `NAME.safetensors.index.json` and its shards, or with all shards and no index. NAME is
        `model` if such files exist, else the only name in the directory. A variant such as
        `NAME.fp16` is read only if `NAME` does not exist.

    Attributes:
      stem: NAME; for a path to one file, its name without the suffix
      aliases: name of a tensor that was not stored because it shares memory with another -> name of
        the stored tensor, as `safetensors.torch.save_model` writes it

    Raises:
      UserError: the path does not exist, contains no safetensors or another format, shards are
        missing, or a file is truncated, has an invalid header or lacks a tensor that the index
        lists. The message names the file.

    Example:
      >>> import tempfile
      >>> from modelstock_jax.tensor_files.writer import write_tensors
      >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
      >>> write_tensors(path, {"w": np.ones((2, 3), np.float32)})
      >>> tensors = TensorFiles(path.parent)
      >>> tensors.shape("w"), tensors.dtype("w").name, float(tensors["w"].sum())
      ((2, 3), 'float32', 6.0)
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.files: dict[str, Path] = {}
        self._entries: dict[str, Entry] = {}
        self._metadata: dict[str, str] = {}
        self._open: dict[Path, int] = {}
        weakref.finalize(self, _close, self._open)
        model = _locate(self.path)
        self.stem = model.stem
        aliases: dict[str, str] = {}
        for file in model.files:
            try:
                self._open[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise UserError(f"{shown(file)}: cannot be read ({error.strerror})") from None
            header = read_header(file, self._open[file])
            self._metadata.update(header.metadata)
            aliases |= {a: n for a, n in header.metadata.items() if n in header.tensors}
            for name, entry in header.tensors.items():
                if model.file_of is not None and model.file_of.get(name) != file:
                    raise UserError(
                        f"{shown(file)}: contains {name!r}, but the index does not assign it to "
                        "this file"
                    )
                if name in self.files:
                    raise UserError(
                        f"{shown(file)}: contains {name!r}, and so does {self.files[name].name}; "
                        "these shards do not belong to one model"
                    )
                self._entries[name] = entry
                self.files[name] = file
        self.aliases = {a: n for a, n in aliases.items() if a not in self._entries}
        if model.file_of and (missing := sorted(model.file_of.keys() - self._entries.keys())):
            raise UserError(
                f"{shown(model.index)}: lists tensors that no shard contains: {listed(missing)}"
            )

    def __getitem__(self, name: str) -> np.ndarray:
        """Read one tensor."""
        shape = self.shape(name)
        return self.read(name, 0, math.prod(shape)).reshape(shape)

    def read(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Read elements [start, stop) of a flattened tensor. Thread-safe.

        Args:
          name: name of the tensor
          start: index of the first element
          stop: index after the last element
          out: uint8 buffer to read into, at least as large as the range; by default a new one

        Returns:
          [stop - start], in the stored dtype
        """
        entry, dtype = self._entries[name], self.dtype(name)
        if not 0 <= start <= stop <= math.prod(entry.shape):
            raise IndexError(f"{name}: [{start}, {stop}) of {math.prod(entry.shape)} elements")
        size = (stop - start) * dtype.itemsize
        raw = np.empty(size, np.uint8) if out is None else out[:size]
        values = raw.view(dtype)
        left, offset = raw.data, entry.start + start * dtype.itemsize
        while left:
            try:
                count = os.preadv(self._open[self.files[name]], [left], offset)
            except OSError as error:
                raise UserError(
                    f"{shown(self.files[name])}: cannot be read ({error.strerror})"
                ) from None
            if not count:
                raise UserError(f"{shown(self.files[name])}: was truncated while it was read")
            left, offset = left[count:], offset + count
        return values

    def file_offset(self, name: str, start: int) -> tuple[Path, int]:
        """Return the file and the byte offset of an element of a flattened tensor."""
        return self.files[name], self._entries[name].start + start * self.dtype(name).itemsize

    def __iter__(self) -> Iterator[str]:
        """Iterate over the sorted names."""
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, from the header."""
        return self._entries[name].shape

    def code(self, name: str) -> str:
        """Return the dtype code of a tensor in the format's spelling: `BF16`, `F8_E4M3`, ...."""
        return self._entries[name].code

    def dtype(self, name: str) -> np.dtype:
        """Return the dtype of a tensor, from the header; bfloat16 is that of ml_dtypes.

        Raises:
          UserError: NumPy and ml_dtypes do not support the dtype
        """
        code = self._entries[name].code
        if code not in DTYPES:
            raise UserError(
                f"{shown(self.files[name])}: {name!r} has dtype {code}, which is not supported"
            )
        return DTYPES[code]

    def metadata(self) -> dict[str, str]:
        """Return the `__metadata__` text of the headers of all files together."""
        return dict(self._metadata)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
      UserError: the file is missing or is not JSON; the message names it
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{shown(path)}: no such file") from None
    except OSError as error:
        raise UserError(f"{shown(path)}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        other = formats.content_error(path, formats.read_head(path))
        raise UserError(other or f"{shown(path)}: not JSON ({error})") from None


class _ModelFiles(NamedTuple):
    """The files of a model, in order; with an index also its path and the file of each tensor."""

    stem: str
    files: Sequence[Path]
    index: Path = Path()
    file_of: Mapping[str, Path] | None = None


def _locate(path: Path) -> _ModelFiles:
    """Find the files of the model at a path."""
    # Path.is_file raises if a name is too long or a directory cannot be searched.
    if os.path.isfile(path):
        if (other := formats.suffix_error(path)) is not None:
            raise UserError(other)
        return _ModelFiles(path.name.removesuffix(_SUFFIX), [path])
    if not os.path.isdir(path):
        if path.suffix in PICKLES:
            raise UserError(formats.pickle_error(path))
        raise UserError(f"{shown(path)}: no such file or directory")
    try:
        names = sorted(name for name in os.listdir(path) if not os.path.isdir(path / name))
    except OSError as error:
        raise UserError(f"{shown(path)}: cannot be read ({error.strerror})") from None
    # Files that begin with a dot are temporary or from macOS ("._model.safetensors").
    candidates = _candidates(path, [name for name in names if not name.startswith(".")])
    if not candidates:
        _raise_without_safetensors(path)
    return _open_candidate(path, *_choose(path, candidates))


def _candidates(path: Path, names: Sequence[str]) -> dict[str, list[Path]]:
    """Map each stem to its single file, else its index, else its shards.

    Like transformers, prefer a single file to an index, which an older save may have left. A single
    file that the index itself lists is one of its shards.
    """
    indexes, singles, shards = {}, {}, {}
    for name in names:
        if match := _INDEX.fullmatch(name):
            indexes.setdefault(match["stem"] + (match["variant"] or ""), [path / name])
        elif match := _SHARD.fullmatch(name):
            shards.setdefault(match["stem"] + (match["variant"] or ""), []).append(path / name)
        elif name.endswith(_SUFFIX):
            singles[name.removesuffix(_SUFFIX)] = [path / name]
    for stem in singles.keys() & indexes.keys():
        if _is_named(singles[stem][0].name, indexes[stem][0]):
            del singles[stem]
    return shards | indexes | singles


def _is_named(file: str, index: Path) -> bool:
    try:
        return json.dumps(file) in index.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def _choose(path: Path, candidates: Mapping[str, list[Path]]) -> tuple[str, list[Path]]:
    """Choose `model`, else the only stem that is neither a variant of another nor a classifier."""
    model = SINGLE.removesuffix(_SUFFIX)
    if model in candidates:
        return model, candidates[model]
    heads = {HEAD.removesuffix(_SUFFIX)} if len(candidates) > 1 else set()
    stems = [
        stem for stem in candidates if stem not in heads
        and not any(stem.startswith(f"{other}.") for other in candidates)
    ]  # fmt: skip
    indexed = [stem for stem in stems if _INDEX.fullmatch(candidates[stem][0].name)]
    if len(stems) > 1 and len(indexed) == 1:
        stems = indexed
    if len(stems) > 1:
        files = [candidates[stem][0].name for stem in stems]
        count = sum(len(candidates[stem]) for stem in stems)
        what = "several indexes" if indexed else f"{count} safetensors files and no index"
        raise UserError(
            f"{shown(path)}: {what} ({listed(files, 3)}); pass the path of the one to read"
        )
    return stems[0], candidates[stems[0]]


def _open_candidate(path: Path, stem: str, files: Sequence[Path]) -> _ModelFiles:
    if _INDEX.fullmatch(files[0].name):
        file_of = _read_index(files[0])
        return _ModelFiles(stem, list(dict.fromkeys(file_of.values())), files[0], file_of)
    shards = [match for file in files if (match := _SHARD.fullmatch(file.name))]
    if not shards:
        return _ModelFiles(stem, files)
    totals = {int(match["total"]) for match in shards}
    if len(totals) > 1:
        raise UserError(
            f"{shown(path)}: shards of {' and of '.join(map(str, sorted(totals)))} files and no "
            "index; leave only the shards of one model in the directory"
        )
    (total,), numbers = totals, {int(match["number"]) for match in shards}
    # Shards are numbered from 1, by a few writers from 0.
    missing = sorted(set(range(total) if 0 in numbers else range(1, total + 1)) - numbers)
    if missing:
        raise UserError(
            f"{shown(path)}: of {total} shards of {listed([stem])}, these are missing: "
            f"{listed(map(str, missing))}; copy or download them"
        )
    return _ModelFiles(stem, files)


def _raise_without_safetensors(path: Path) -> None:
    if (other := formats.directory_without_safetensors(path)) is not None:
        raise UserError(other)
    below = [os.fspath(directory) for directory in formats.find_models(path)]
    hint = f"; there is a model in {listed(below, 3)}" if below else ""
    raise UserError(f"{shown(path)}: no safetensors file; expected {SINGLE} or {INDEX}{hint}")


def _read_index(index: Path) -> dict[str, Path]:
    """Return the file of each tensor that an index lists."""
    raw = read_json(index)
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{shown(index)}: has no 'weight_map'")
    for file in weight_map.values():
        # Shards must be in the directory of their index: a path could point anywhere.
        if not isinstance(file, str) or Path(file).name != file or "\\" in file:
            raise UserError(f"{shown(index)}: {file!r} is not the name of a file next to it")
        if Path(file).suffix in PICKLES:
            raise UserError(formats.pickle_error(index.parent / file))
    files = set(weight_map.values())
    if missing := sorted(file for file in files if not os.path.isfile(index.parent / file)):
        raise UserError(
            f"{shown(index)}: lists files that do not exist: {listed(missing)}; copy or download "
            "them"
        )
    return {name: index.parent / file for name, file in weight_map.items()}


def _close(descriptors: dict[Path, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)


# Bits per element of each dtype of the format.
BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E8M0": 8,
    "C64": 64,
    **{code: 8 for code in ("F8_E5M2", "F8_E4M3", "F8_E5M2FNUZ", "F8_E4M3FNUZ", "I8", "U8")},
    **{code: 16 for code in ("BF16", "F16", "I16", "U16")},
    **{f"{kind}{bits}": bits for kind in "FIU" for bits in (32, 64)},
}
MAX_HEADER = 100 * 10**6  # bytes; limit of the format
MAX_AXES = 64  # limit of NumPy
_METADATA = "__metadata__"
# JSON text of this length parses into about 200 MB of objects at most, whatever it contains.
_ALWAYS_SAFE_BYTES = 8 * 10**6


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor: dtype code, shape, and its bytes [start, stop) in the file."""

    code: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Header:
    """The tensors of a file by name, and its `__metadata__` text."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]


class _InvalidHeader(ValueError):
    """The file violates a rule of the format."""


def read_header(path: str | os.PathLike[str], descriptor: int | None = None) -> Header:
    """Read and validate the header of a file; no tensor is read.

    The first 8 bytes give the length of a JSON object that maps each name to a dtype, shape and
    offsets. The tensors follow without gaps, up to the last byte of the file. Every rule is checked
    before memory is allocated for tensors.

    Args:
      path: a `.safetensors` file
      descriptor: file descriptor if the file is open already; its path may refer to another file
        by now

    Returns:
      the `Header`, with offsets from the beginning of the file

    Raises:
      UserError: the file cannot be read or violates the format; the message names the file and the
        reason
    """
    path = Path(path)
    try:
        opened = path if descriptor is None else descriptor
        with open(opened, "rb", closefd=descriptor is None) as file:
            return _parse(file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except _InvalidHeader as reason:
        other = content_error(path, read_head(path))
        raise UserError(other or f"{path}: not a valid safetensors file ({reason})") from None


def num_bytes(code: str, shape: tuple[int, ...]) -> int:
    """Return the size of a tensor in bytes.

    Example:
      >>> num_bytes("BF16", (3, 5))
      30
    """
    bits = BITS[code]
    for length in shape:
        bits *= length
        if bits >= 2**66:
            raise _InvalidHeader(f"its size overflows: {code}{_short(list(shape))}")
    if bits % 8:
        raise _InvalidHeader(f"its size is not a multiple of 8 bits: {code}{_short(list(shape))}")
    return bits // 8


def _parse(file: Any, size: int) -> Header:
    if size < 8:
        raise _InvalidHeader(
            "it is empty" if size == 0 else f"it has {size} bytes, too few for a header"
        )
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER:
        raise _InvalidHeader(f"its header length is {length} bytes, the format allows {MAX_HEADER}")
    if length > size - 8:
        raise _InvalidHeader(
            f"its header length is {length} bytes, the file has {size - 8}; truncated?"
        )
    raw = file.read(length)
    if len(raw) < length or raw[:1] != b"{":
        raise _InvalidHeader("its header is not a JSON object")
    if length > _ALWAYS_SAFE_BYTES and raw.count(b"[") + raw.count(b"{") > length // 10:
        raise _InvalidHeader("its header has too many entries to parse safely")
    top = _json(raw)
    metadata = top.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _InvalidHeader(f"{_METADATA} does not map text to text")
    tensors = {}
    for name, entry in top.items():
        try:
            tensors[name] = _entry(entry, 8 + length)
        except _InvalidHeader as reason:
            raise _InvalidHeader(f"tensor {_short(name)}: {reason}") from None
    _check_offsets(tensors, 8 + length, size)
    return Header(tensors, metadata)


def _json(raw: bytes) -> dict[str, Any]:
    try:
        top = json.loads(raw.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise _InvalidHeader("its header is not UTF-8") from None
    except RecursionError:
        raise _InvalidHeader("its header is nested too deeply") from None
    except _InvalidHeader:
        raise
    except ValueError as error:
        raise _InvalidHeader(f"its header is not JSON: {_short(str(error))}") from None
    if not isinstance(top, dict):
        raise _InvalidHeader("its header is not a JSON object")
    return top


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        seen: set[str] = set()
        duplicate = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _InvalidHeader(f"its header contains {_short(duplicate)} twice")
    for key, value in pairs:
        # JSON can encode a lone surrogate, which terminals and files cannot encode.
        if not (key + value if isinstance(value, str) else key).isascii():
            try:
                f"{key}{value if isinstance(value, str) else ''}".encode()
            except UnicodeEncodeError:
                raise _InvalidHeader(f"its header is not UTF-8: {_short(key)}") from None
    return unique


def _no_constant(text: str) -> None:
    raise _InvalidHeader(f"its header is not JSON: {text}")


def _entry(entry: Any, begin: int) -> Entry:
    if not isinstance(entry, dict):
        raise _InvalidHeader("is not an object")
    if missing := [key for key in ("dtype", "shape", "data_offsets") if key not in entry]:
        raise _InvalidHeader(f"has no {missing[0]}")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in BITS:
        raise _InvalidHeader(f"dtype {_short(code)} is unknown")
    if not _naturals(shape):
        raise _InvalidHeader(f"shape {_short(shape)} is not a list of integers >= 0")
    if len(shape) > MAX_AXES:
        raise _InvalidHeader(f"has {len(shape)} axes; {MAX_AXES} are supported")
    if not _naturals(offsets) or len(offsets) != 2:
        raise _InvalidHeader(f"data_offsets {_short(offsets)} are not two integers >= 0")
    start, stop = offsets
    if (size := num_bytes(code, tuple(shape))) != stop - start:
        raise _InvalidHeader(
            f"{code}{_short(shape)} needs {size} bytes, data_offsets "
            f"{_short(offsets)} give {_short(stop - start)}"
        )
    return Entry(code, tuple(shape), begin + start, begin + stop)


def _naturals(values: Any) -> bool:
    """Whether `values` is a list of integers from 0 to 2^64 - 1 (booleans do not count)."""
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 2**64 for n in values)


def _check_offsets(tensors: dict[str, Entry], begin: int, size: int) -> None:
    offset = begin
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.stop > size:
            raise _InvalidHeader(
                f"tensor {_short(name)} ends at byte {entry.stop}, the file at {size}; truncated?"
            )
        if entry.start != offset:
            overlaps = entry.start < offset
            what = "overlaps the one before it" if overlaps else "leaves a gap before it"
            raise _InvalidHeader(f"tensor {_short(name)} {what}")
        offset = entry.stop
    if offset != size:
        raise _InvalidHeader(f"{size - offset} bytes follow the last tensor")


def _short(value: Any, max_length: int = 60) -> str:
    """Format any value of a header on one line."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # integers of thousands of digits; deeply nested lists
        return "(too long to show)"
    text = text.encode("ascii", "backslashreplace").decode()
    return text if len(text) <= max_length else text[: max_length - 3] + "..."
