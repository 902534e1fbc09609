"""Reads safetensors: one file, or the shards that an index names. Nothing is ever unpickled."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from modelstock_jax.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

_DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "BOOL": np.dtype(np.bool_),
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
        self._headers: dict[str, tuple[tuple[int, ...], str]] = {}
        promised = _locate(self.path)
        handles = {}
        for file in dict.fromkeys(promised.values() if isinstance(promised, dict) else [promised]):
            handles[file] = _open(file)
            with _naming(file):
                for name in handles[file].keys():
                    if isinstance(promised, dict) and promised.get(name) != file:
                        raise UserError(
                            f"{file}: holds {name!r}, which the index does not place there."
                        )
                    view = handles[file].get_slice(name)
                    self._headers[name] = (tuple(view.get_shape()), view.get_dtype())
                    self.files[name] = file
        if isinstance(promised, dict) and (lost := sorted(promised.keys() - self._headers.keys())):
            raise UserError(
                f"{self.path / INDEX}: promises tensors that no shard holds: {_some(lost)}."
            )
        self._handles = handles

    def __getitem__(self, name: str) -> np.ndarray:
        """Reads one tensor."""
        self.dtype(name)
        with _naming(self.files[name]):
            return self._handles[self.files[name]].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        """Names, sorted."""
        return iter(sorted(self._headers))

    def __len__(self) -> int:
        """How many tensors there are."""
        return len(self._headers)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self._headers[name][0]

    def dtype(self, name: str) -> np.dtype:
        """Dtype of a tensor, from the header; bfloat16 is ml_dtypes'."""
        code = self._headers[name][1]
        if code not in _DTYPES:
            raise UserError(
                f"{self.files[name]}: {name!r} has dtype {code}, which is not supported."
            )
        return _DTYPES[code]

    def metadata(self) -> dict[str, str]:
        """The free text of the headers, of all files together."""
        merged: dict[str, str] = {}
        for handle in self._handles.values():
            merged.update(handle.metadata() or {})
        return merged


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
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such file or directory.")
    if (path / INDEX).is_file():
        return _shards(path)
    if (path / SINGLE).is_file():
        return path / SINGLE
    found = sorted(p for p in path.iterdir() if p.suffix == ".safetensors")
    if len(found) == 1:
        return found[0]
    pickles = sorted(p for p in path.iterdir() if p.suffix in PICKLES)
    if not found and pickles:
        raise UserError(_pickled(pickles[0]))
    what = f"{len(found)} safetensors files and no index" if found else "no safetensors file"
    raise UserError(f"{path}: {what}; expected {SINGLE} or {INDEX}.")


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
    if lost := sorted({f for f in places.values() if not (directory / f).is_file()}):
        raise UserError(f"{index}: names files that are not there: {_some(lost)}.")
    return {name: directory / file for name, file in places.items()}


def _open(file: Path) -> Any:
    with _naming(file):
        return safe_open(file, framework="numpy")


@contextlib.contextmanager
def _naming(file: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"{file}: not a whole safetensors file ({error}).") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error}).") from None


def _pickled(path: Path) -> str:
    return (
        f"{path}: a pickle file can run code when it is opened, so it is refused; convert it once "
        "where you trust it: safetensors.torch.save_file(torch.load(PATH, weights_only=True), OUT)."
    )


def _some(names: list[str], most: int = 10) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
