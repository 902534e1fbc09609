"""Reads safetensors: one file, or shards with or without an index. Nothing is unpickled."""

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
HEAD = "head.safetensors"  # A classifier beside the model whose features it takes.
_SUFFIX = ".safetensors"
# The index of NAME.safetensors; of a variant "fp16" it is NAME.safetensors.index.fp16.json, too.
_INDEX = re.compile(r"(?P<stem>.+)\.safetensors\.index(?P<variant>\.[\w-]+)?\.json")
_SHARD = re.compile(
    r"(?P<stem>.+)-(?P<number>\d{1,6})-of-(?P<total>\d{1,6})(?P<variant>\.[\w-]+)?\.safetensors"
)

# What NumPy and ml_dtypes can hold; the format knows a few more.
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
    """The tensors of a safetensors file or directory, each read when it is asked for.

    Shapes and dtypes are known from the headers, so a check of names costs no reading.

    Args:
      path: A `.safetensors` file, or a directory with `NAME.safetensors`, with
          `NAME.safetensors.index.json` and its shards, or with all shards and no index. NAME
          is `model` where there is one, else any name that is the only one. Variants such as
          `NAME.fp16` are read only where there is no `NAME`.

    Attributes:
      stem: NAME; of a path to one file, its name without the suffix.
      aliases: Names of tensors that were not stored because they share the memory of another ->
          the name of the stored one, as `safetensors.torch.save_model` writes it.

    Raises:
      UserError: No such path, no safetensors in it, another format, shards that are missing, or
          a file that is cut short, has a hostile header or lacks what the index promises; it
          names the file.

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
        found = _locate(self.path)
        self.stem = found.stem
        aliases: dict[str, str] = {}
        for file in found.files:
            try:
                self._open[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise UserError(f"{shown(file)}: cannot be read ({error.strerror}).") from None
            header = read_header(file, self._open[file])
            self._metadata.update(header.metadata)
            aliases |= {a: n for a, n in header.metadata.items() if n in header.tensors}
            for name, entry in header.tensors.items():
                if found.places is not None and found.places.get(name) != file:
                    raise UserError(
                        f"{shown(file)}: holds {name!r}, which the index does not place there."
                    )
                if name in self.files:
                    raise UserError(
                        f"{shown(file)}: holds {name!r}, and so does {self.files[name].name}; "
                        "these shards are not of one model."
                    )
                self._entries[name] = entry
                self.files[name] = file
        self.aliases = {a: n for a, n in aliases.items() if a not in self._entries}
        if found.places and (lost := sorted(found.places.keys() - self._entries.keys())):
            raise UserError(
                f"{shown(found.index)}: promises tensors that no shard holds: {listed(lost)}."
            )

    def __getitem__(self, name: str) -> np.ndarray:
        """Reads one tensor."""
        shape = self.shape(name)
        return self.read(name, 0, math.prod(shape)).reshape(shape)

    def read(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Reads elements [start, stop) of a flattened tensor; any thread may.

        Args:
          name: Of the tensor.
          start: Index of the first element.
          stop: Index after the last.
          out: Bytes (uint8) to read into, enough of them; by default fresh memory.

        Returns:
          [stop - start], in the stored dtype.
        """
        entry, dtype = self._entries[name], self.dtype(name)
        if not 0 <= start <= stop <= math.prod(entry.shape):
            raise IndexError(f"{name}: [{start}, {stop}) of {math.prod(entry.shape)} elements")
        size = (stop - start) * dtype.itemsize
        raw = np.empty(size, np.uint8) if out is None else out[:size]
        values = raw.view(dtype)
        left, place = raw.data, entry.start + start * dtype.itemsize
        while left:
            try:
                count = os.preadv(self._open[self.files[name]], [left], place)
            except OSError as error:
                raise UserError(
                    f"{shown(self.files[name])}: cannot be read ({error.strerror})."
                ) from None
            if not count:
                raise UserError(f"{shown(self.files[name])}: was cut short while it was read.")
            left, place = left[count:], place + count
        return values

    def place(self, name: str, start: int) -> tuple[Path, int]:
        """The file and the byte at which an element of a flattened tensor begins."""
        return self.files[name], self._entries[name].start + start * self.dtype(name).itemsize

    def __iter__(self) -> Iterator[str]:
        """Names, sorted."""
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        """How many tensors there are."""
        return len(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self._entries[name].shape

    def code(self, name: str) -> str:
        """Dtype code of a tensor, as the format spells it: `BF16`, `F8_E4M3`, ..."""
        return self._entries[name].code

    def dtype(self, name: str) -> np.dtype:
        """Dtype of a tensor, from the header; bfloat16 is ml_dtypes'."""
        code = self._entries[name].code
        if code not in DTYPES:
            raise UserError(
                f"{shown(self.files[name])}: {name!r} has dtype {code}, which is not supported."
            )
        return DTYPES[code]

    def metadata(self) -> dict[str, str]:
        """The free text of the headers, of all files together."""
        return dict(self._metadata)


def read_json(path: Path) -> Any:
    """Reads a JSON file; a missing or broken one is a UserError that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{shown(path)}: no such file.") from None
    except OSError as error:
        raise UserError(f"{shown(path)}: cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError) as error:
        other = formats.content_error(path, formats.read_head(path))
        raise UserError(other or f"{shown(path)}: not JSON ({error}).") from None


class _Found(NamedTuple):
    """The files of a model, in order; with an index also that and the file of each tensor."""

    stem: str
    files: Sequence[Path]
    index: Path = Path()
    places: Mapping[str, Path] | None = None


def _locate(path: Path) -> _Found:
    """The files of the model at a path."""
    # Not Path.is_file, which raises where a name is too long or a directory cannot be searched.
    if os.path.isfile(path):
        if (other := formats.suffix_error(path)) is not None:
            raise UserError(other)
        return _Found(path.name.removesuffix(_SUFFIX), [path])
    if not os.path.isdir(path):
        if path.suffix in PICKLES:
            raise UserError(formats.pickle_error(path))
        raise UserError(f"{shown(path)}: no such file or directory.")
    try:
        names = sorted(name for name in os.listdir(path) if not os.path.isdir(path / name))
    except OSError as error:
        raise UserError(f"{shown(path)}: cannot be read ({error.strerror}).") from None
    # Files that begin with a dot are temporary, or macOS's ("._model.safetensors").
    candidates = _candidates(path, [name for name in names if not name.startswith(".")])
    if not candidates:
        _raise_without_safetensors(path)
    return _open_candidate(path, *_choose(path, candidates))


def _candidates(path: Path, names: Sequence[str]) -> dict[str, list[Path]]:
    """Stem -> the single file, or the index, or the shards, whatever there is first of these.

    transformers, too, opens a single file before an index, which an older save may have left; but
    not a file that the index itself names.
    """
    indexes, singles, shards = {}, {}, {}
    for name in names:
        if found := _INDEX.fullmatch(name):
            indexes.setdefault(found["stem"] + (found["variant"] or ""), [path / name])
        elif found := _SHARD.fullmatch(name):
            shards.setdefault(found["stem"] + (found["variant"] or ""), []).append(path / name)
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
    """`model`, or else the only stem that is no variant of another and no classifier."""
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
            f"{shown(path)}: {what} ({listed(files, 3)}); give the path of the one to read."
        )
    return stems[0], candidates[stems[0]]


def _open_candidate(path: Path, stem: str, files: Sequence[Path]) -> _Found:
    if _INDEX.fullmatch(files[0].name):
        places = _places(files[0])
        return _Found(stem, list(dict.fromkeys(places.values())), files[0], places)
    shards = [match for file in files if (match := _SHARD.fullmatch(file.name))]
    if not shards:
        return _Found(stem, files)
    totals = {int(match["total"]) for match in shards}
    if len(totals) > 1:
        raise UserError(
            f"{shown(path)}: shards of {' and of '.join(map(str, sorted(totals)))} files and no "
            "index; keep those of one model."
        )
    (total,), numbers = totals, {int(match["number"]) for match in shards}
    # Numbers begin at 1, with few writers at 0.
    missing = sorted(set(range(total) if 0 in numbers else range(1, total + 1)) - numbers)
    if missing:
        raise UserError(
            f"{shown(path)}: of {total} shards of {listed([stem])}, these are missing: "
            f"{listed(map(str, missing))}; copy or download them."
        )
    return _Found(stem, files)


def _raise_without_safetensors(path: Path) -> None:
    if (other := formats.directory_without_safetensors(path)) is not None:
        raise UserError(other)
    below = [os.fspath(directory) for directory in formats.models_below(path)]
    meant = f" There is a model in {listed(below, 3)}." if below else ""
    raise UserError(f"{shown(path)}: no safetensors file; expected {SINGLE} or {INDEX}.{meant}")


def _places(index: Path) -> dict[str, Path]:
    """The file of each tensor, as an index names it."""
    raw = read_json(index)
    places = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(places, dict) or not places:
        raise UserError(f"{shown(index)}: has no 'weight_map'.")
    for file in places.values():
        # A shard is in the directory of its index: a path could point anywhere on the machine.
        if not isinstance(file, str) or Path(file).name != file or "\\" in file:
            raise UserError(f"{shown(index)}: {file!r} is not the name of a file beside it.")
        if Path(file).suffix in PICKLES:
            raise UserError(formats.pickle_error(index.parent / file))
    if lost := sorted({f for f in places.values() if not os.path.isfile(index.parent / f)}):
        raise UserError(
            f"{shown(index)}: names files that are not there: {listed(lost)}; copy or download "
            "them."
        )
    return {name: index.parent / file for name, file in places.items()}


def _close(descriptors: dict[Path, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)


# The header of a safetensors file, read by the format's own rules before anything is allocated.

# Bits of a number of each dtype of the format.
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
      path: A `.safetensors` file.
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
        other = content_error(path, read_head(path))
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
        raise _Broken(
            f"{code}{_short(shape)} takes {size} bytes, data_offsets "
            f"{_short(offsets)} give {_short(stop - start)}"
        )
    return Entry(code, tuple(shape), begin + start, begin + stop)


def _naturals(values: Any) -> bool:
    """A list of whole numbers from 0 to 2^64 - 1; True is no number."""
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 2**64 for n in values)


def _check_places(tensors: dict[str, Entry], begin: int, size: int) -> None:
    place = begin
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.stop > size:
            raise _Broken(
                f"tensor {_short(name)} ends at byte {entry.stop}, the file at {size}; cut short?"
            )
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
