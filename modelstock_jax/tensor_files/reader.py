"""Reads safetensors: one file, or the shards that an index names. Nothing is ever unpickled."""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from modelstock_jax.errors import UserError, listed
from modelstock_jax.tensor_files.header import Entry, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEAD = "head.safetensors"  # A classifier beside the model whose features it takes.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

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
        path: A ``.safetensors`` file, or a directory with ``model.safetensors``, with
            ``model.safetensors.index.json`` and its shards, or with one ``.safetensors`` alone.

    Raises:
        UserError: No such path, no safetensors in it, pickle files, or a file that is cut short,
            has a hostile header or lacks what the index promises; it names the file.

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
        promised = _locate(self.path)
        for file in dict.fromkeys(promised.values() if isinstance(promised, dict) else [promised]):
            try:
                self._open[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise UserError(f"{file}: cannot be read ({error.strerror}).") from None
            header = read_header(file, self._open[file])
            self._metadata.update(header.metadata)
            for name, entry in header.tensors.items():
                if isinstance(promised, dict) and promised.get(name) != file:
                    raise UserError(
                        f"{file}: holds {name!r}, which the index does not place there."
                    )
                self._entries[name] = entry
                self.files[name] = file
        if isinstance(promised, dict) and (lost := sorted(promised.keys() - self._entries.keys())):
            raise UserError(
                f"{self.path / INDEX}: promises tensors that no shard holds: {listed(lost)}."
            )

    def __getitem__(self, name: str) -> np.ndarray:
        """Reads one tensor."""
        shape = self.shape(name)
        return self.read(name, 0, math.prod(shape)).reshape(shape)

    def read(
        self, name: str, start: int, stop: int, into: np.ndarray | None = None
    ) -> np.ndarray:
        """Reads elements [start, stop) of a flattened tensor; any thread may.

        Args:
            name: Of the tensor.
            start: Index of the first element.
            stop: Index after the last.
            into: Bytes (uint8) to read into, enough of them; by default fresh memory.

        Returns:
            [stop - start], in the stored dtype.
        """
        entry, dtype = self._entries[name], self.dtype(name)
        if not 0 <= start <= stop <= math.prod(entry.shape):
            raise IndexError(f"{name}: [{start}, {stop}) of {math.prod(entry.shape)} elements")
        size = (stop - start) * dtype.itemsize
        raw = np.empty(size, np.uint8) if into is None else into[:size]
        values = raw.view(dtype)
        left, place = raw.data, entry.start + start * dtype.itemsize
        while left:
            try:
                count = os.preadv(self._open[self.files[name]], [left], place)
            except OSError as error:
                raise UserError(
                    f"{self.files[name]}: cannot be read ({error.strerror})."
                ) from None
            if not count:
                raise UserError(f"{self.files[name]}: was cut short while it was read.")
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
        """Dtype code of a tensor, as the format spells it: ``BF16``, ``F8_E4M3``, ..."""
        return self._entries[name].code

    def dtype(self, name: str) -> np.dtype:
        """Dtype of a tensor, from the header; bfloat16 is ml_dtypes'."""
        code = self._entries[name].code
        if code not in DTYPES:
            raise UserError(
                f"{self.files[name]}: {name!r} has dtype {code}, which is not supported."
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
        raise UserError(f"{path}: no such file.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}).") from None


def _locate(path: Path) -> Path | dict[str, Path]:
    """The one file, or where the index places each tensor."""
    if path.suffix in PICKLES:
        raise UserError(_pickled(path))
    # Not Path.is_file, which raises where a name is too long or a folder is closed to us.
    if os.path.isfile(path):
        return path
    if not os.path.isdir(path):
        raise UserError(f"{path}: no such file or directory.")
    if (path / INDEX).is_file():
        return _shards(path)
    if (path / SINGLE).is_file():
        return path / SINGLE
    found = sorted(p for p in path.iterdir() if p.suffix == ".safetensors")
    found = [p for p in found if p.name != HEAD] or found
    if len(found) == 1:
        return found[0]
    pickles = sorted(p for p in path.iterdir() if p.suffix in PICKLES)
    if not found and pickles:
        raise UserError(_pickled(pickles[0]))
    what = f"{len(found)} safetensors files and no index" if found else "no safetensors file"
    inside = sorted(p.parent for name in (SINGLE, INDEX) for p in path.glob(f"*/{name}"))
    meant = f" There is a model in {inside[0]}." if inside and not found else ""
    raise UserError(f"{path}: {what}; expected {SINGLE} or {INDEX}.{meant}")


def _shards(directory: Path) -> dict[str, Path]:
    index = directory / INDEX
    raw = read_json(index)
    places = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(places, dict) or not places:
        raise UserError(f"{index}: has no 'weight_map'.")
    for file in places.values():
        # A shard lies beside its index: a path could point anywhere on the machine.
        if not isinstance(file, str) or Path(file).name != file or "\\" in file:
            raise UserError(f"{index}: {file!r} is not the name of a file beside it.")
        if Path(file).suffix in PICKLES:
            raise UserError(_pickled(directory / file))
    if lost := sorted({f for f in places.values() if not os.path.isfile(directory / f)}):
        raise UserError(f"{index}: names files that are not there: {listed(lost)}.")
    return {name: directory / file for name, file in places.items()}


def _close(descriptors: dict[Path, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)


def _pickled(path: Path) -> str:
    return (
        f"{path}: a pickle file can run code when it is opened, so it is refused; convert it once "
        "where you trust it: safetensors.torch.save_file(torch.load(PATH, weights_only=True), OUT)."
    )
