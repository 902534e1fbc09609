"""Quantized checkpoints: found by their structure, refused, or read as codes times scale."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modelstock_jax.checkpoint_merge.buffers import is_index
from modelstock_jax.checkpoint_merge.config import read_config
from modelstock_jax.checkpoint_merge.names import TensorInfo
from modelstock_jax.checkpoint_merge.sources import Source
from modelstock_jax.errors import UserError, listed
from modelstock_jax.merging.anchor_rounding import half_ulp_square

CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")
QUANT_FILE = "hf_quant_config.json"  # NVIDIA's ModelOpt
DEFAULT_CODE = "BF16"
HOW_TO_FIX = "load it with transformers, call model.dequantize(), then save_pretrained"
_FLOAT8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_INT8, _INT16_32 = ("I8", "U8"), ("I16", "U16", "I32", "U32")
# Numbers of 4 or 6 bits in a container of their own.
_PACKED = ("F4", "F6_E2M3", "F6_E3M2")
# What bitsandbytes, GPTQ and compressed-tensors keep next to packed weights under other names.
_OTHER_PARTNERS = re.compile(
    r".*(?:\.(?:SCB|qweight|qzeros|absmax|weight_format|weight_scale(?:_inv)?)|weight_packed|"
    r"\.(?:quant_map|nested_absmax|nested_quant_map)|quant_state\..*|\._data\._data|\._shift)"
)
_MARKER = "scaled_fp8"
# Scales of activations and caches: no part of a weight.
_ACTIVATION = {"input", "output", "act", "activation", "in", "out", "k", "v", "q", "kv", "cache"}
_DTYPE_WORDS = {"inv", "data", "qdata", "q"}
_MAX_NAMED = 3


@dataclasses.dataclass(frozen=True)
class Codes:
    """A quantized tensor and what stands for it.

    Attributes:
        name: Of the weight that the codes stand for: `q.weight` for `q._weight_qdata`.
        stored: The tensor that holds the codes.
        scale: The tensor with its scale; None where there is none.
        zero: The tensor with its zero point; None where there is none.
        problem: Why the weight cannot be formed; empty where it can.
    """

    name: str
    stored: str
    scale: str | None = None
    zero: str | None = None
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class Quantization:
    """What is quantized in a checkpoint.

    Attributes:
        codes: The quantized tensors.
        dropped: Tensors that only serve the codes: scales, zero points, markers.
        said_by: The file that says that the checkpoint is quantized; empty where none does.
    """

    codes: tuple[Codes, ...] = ()
    dropped: frozenset[str] = frozenset()
    said_by: str = ""

    @property
    def problems(self) -> list[str]:
        """Why some of it cannot be dequantized here, a line per reason."""
        found: dict[str, list[str]] = defaultdict(list)
        for one in self.codes:
            if one.problem:
                found[one.problem].append(one.stored)
        return [f"{listed(names, _MAX_NAMED)}: {why}" for why, names in found.items()]


def find(source: Source) -> Quantization | None:
    """What is quantized in a source; None where nothing is.

    A float8 or packed integer tensor is quantized where a tensor of its module has its name's stem
    with 'scale' in it, or where config.json or hf_quant_config.json says that the checkpoint is.
    float8 without either is a plain number.
    """
    modules: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for name, info in source.tensors.items():
        module, _, local = name.rpartition(".")
        modules[module][local] = info
    said_by = _said_by(source.directory)
    marked = [name for name in source.tensors if name.rpartition(".")[2] == _MARKER]
    codes: list[Codes] = []
    dropped = set(marked)
    for module, tensors in modules.items():
        prefix = f"{module}." if module else ""
        for local, info in tensors.items():
            one = _codes(prefix, local, info, tensors, bool(said_by or marked))
            if one is not None:
                codes.append(one)
                dropped |= {prefix + other for other in _served_by(local, tensors)}
    others = [name for name in source.tensors if _OTHER_PARTNERS.fullmatch(name)]
    if others and not codes:
        codes = [Codes(name, name, problem=HOW_TO_FIX) for name in others]
    if not codes:
        return None
    dropped |= _activation_scales(source.tensors)
    stored = {one.stored for one in codes}
    return Quantization(tuple(codes), frozenset(dropped - stored), said_by)


def refusal(source: Source) -> str | None:
    """Why a quantized source is not merged as it is, and what to do; None for any other."""
    found = find(source)
    if found is None:
        return None
    names = listed(sorted(one.stored for one in found.codes), _MAX_NAMED)
    what = f"{source.label} is quantized ({names})"
    if problems := found.problems:
        return f"{what} in a format that is not read here, {problems[0]}"
    return (f"{what}: codes without their scales have no mean; pass --dequantize to merge codes x "
            f"scale, written in bfloat16 or --dtype, or {HOW_TO_FIX}")


def as_stored(source: Source) -> Source:
    """A source that is not quantized.

    Raises:
        UserError: It is; the message offers what can be done.
    """
    if problem := refusal(source):
        raise UserError(problem)
    return source


def as_weights(source: Source) -> Source:
    """A source that reads codes x scale where the checkpoint is quantized; any other as it is."""
    found = find(source)
    return source if found is None else DequantizedSource(source, found)


def said_only(directory: Path | None) -> bool:
    """Whether a directory's config names a quantization."""
    return bool(_said_by(directory))


class DequantizedSource(Source):
    """A quantized checkpoint, read as weights: codes x scale, formed for the range asked for.

    Args:
        source: The checkpoint as it is stored.
        found: What is quantized in it.

    Raises:
        UserError: A format that is not formed here.
    """

    def __init__(self, source: Source, found: Quantization):
        if problems := found.problems:
            raise UserError(f"{source.label}: --dequantize cannot form {'; '.join(problems)}")
        self.label, self.directory = source.label, source.directory
        self.source = source
        self.components, self.aliases = source.components, source.aliases
        self._codes = {one.name: one for one in found.codes}
        hidden = {one.stored for one in found.codes} | found.dropped
        self.tensors = {n: i for n, i in source.tensors.items() if n not in hidden}
        for one in found.codes:
            shape = source.tensors[one.stored].shape
            self.tensors[one.name] = TensorInfo(shape, "F32", DEFAULT_CODE)
        self.notes = [*source.notes, f"{source.label}: {len(found.codes)} quantized tensors read "
                                     "as codes x scale"]
        self.formed = frozenset(self._codes)
        # Several tensors are in work at once, each asked for piece by piece.
        self._load = functools.lru_cache(maxsize=16)(self._load_scale)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that are read."""
        return self.source.files

    @property
    def codes(self) -> Mapping[str, Codes]:
        """Name of a formed weight -> where its codes and scale are."""
        return self._codes

    def read(
        self, name: str, start: int, stop: int, into: np.ndarray | None = None
    ) -> np.ndarray:
        """Elements [start, stop); float32 where they are formed."""
        if name not in self._codes:
            return self.source.read(name, start, stop, into)
        one = self._codes[name]
        codes = self.source.read(one.stored, start, stop)
        self.source.note(one.stored, start, codes)
        wide = codes.astype(np.float64)
        scale, zero = self._load(name)
        shape = self.tensors[name].shape
        if zero is not None:
            wide -= spread(zero, shape, start, stop)
        wide *= spread(scale, shape, start, stop)
        return wide.astype(np.float32)

    def stored_dtype(self, name: str) -> np.dtype:
        """Dtype of the codes."""
        return self.source.stored_dtype(self._codes[name].stored if name in self._codes else name)

    def half_ulp_squares(self, name: str, start: int, stop: int) -> np.ndarray:
        """Largest squared rounding error: that of the codes, times the squared scale."""
        if name not in self._codes:
            return self.source.half_ulp_squares(name, start, stop)
        codes = self.source.read(self._codes[name].stored, start, stop)
        whole = codes.dtype.kind in "iu"
        squares = np.full(len(codes), 0.25) if whole else half_ulp_square(codes)
        return squares * spread(self._load(name)[0], self.tensors[name].shape, start, stop) ** 2

    def note(self, name: str, start: int, values: np.ndarray) -> None:
        """As a plain source's; codes are noted where they are read."""
        if name not in self._codes:
            self.source.note(name, start, values)

    def watch(self) -> None:
        """As a plain source's."""
        self.source.watch()

    def digests(self, kind: str = "crc32") -> dict[str, str]:
        """As a plain source's."""
        return self.source.digests(kind)

    def _load_scale(self, name: str) -> tuple[np.ndarray, np.ndarray | None]:
        one, shape = self._codes[name], self.tensors[name].shape
        assert one.scale is not None, "`find` names a problem where there is none"
        zero = None if one.zero is None else fitted(self._whole(one.zero), shape)
        return fitted(self._whole(one.scale), shape), zero

    def _whole(self, name: str) -> np.ndarray:
        shape = self.source.tensors[name].shape
        count = int(np.prod(shape, dtype=np.int64))
        values = self.source.read(name, 0, count)
        self.source.note(name, 0, values)
        return values.astype(np.float64).reshape(shape)


def blocks(scale: Sequence[int], shape: Sequence[int]) -> tuple[int, ...] | None:
    """Numbers along each axis that share one scale; None where the shapes do not fit.

    Example:
        >>> blocks((), (4, 6)), blocks((4,), (4, 6)), blocks((4, 1), (4, 6))
        ((4, 6), (1, 6), (1, 6))
        >>> blocks((2, 3), (256, 300)), blocks((2, 3), (256, 7)) is None
        ((128, 128), True)
    """
    if all(length == 1 for length in scale):
        return tuple(shape)
    scale = (*scale, *(1,) * (len(shape) - len(scale)))  # [out] is a scale per row.
    if len(scale) != len(shape):
        return None
    found = []
    for parts, length in zip(scale, shape, strict=True):
        if parts == length:
            found.append(1)
        elif parts == 1:
            found.append(length)
        elif -(-length // 128) == parts:
            found.append(128)
        elif length % parts == 0:
            found.append(length // parts)
        else:
            return None
    return tuple(found)


def fitted(scale: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """A scale with as many axes as its weight."""
    if scale.size == 1:
        return scale.reshape((1,) * len(shape))
    return scale.reshape(scale.shape + (1,) * (len(shape) - scale.ndim))


def spread(scale: np.ndarray, shape: Sequence[int], start: int, stop: int) -> np.ndarray:
    """The scale of each of the elements [start, stop) of a flattened weight.

    Example:
        >>> spread(np.array([[1.0], [2.0]]), (2, 3), 1, 5).tolist()
        [1.0, 1.0, 2.0, 2.0]
    """
    if scale.size == 1:
        return np.broadcast_to(scale.reshape(-1), stop - start)
    sizes = blocks(scale.shape, shape)
    assert sizes is not None, "`find` lets only scales that fit through"
    columns = shape[-1]
    first, last = start // columns, -(-stop // columns)
    places = np.unravel_index(np.arange(first, last), shape[:-1]) if len(shape) > 1 else ()
    rows = scale[tuple(place // size for place, size in zip(places, sizes, strict=False))]
    rows = np.repeat(rows.reshape(last - first, -1), sizes[-1], axis=1)[:, :columns]
    return rows.reshape(-1)[start - first * columns : stop - first * columns]


def without_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what it says of a quantization, in its towers too.

    Example:
        >>> without_keys({"a": 1, "quantization_config": {}, "text_config": {"quantization": 1}})
        {'a': 1, 'text_config': {}}
    """
    return {key: without_keys(value) if isinstance(value, dict) else value
            for key, value in config.items() if key not in CONFIG_KEYS}


def _codes(
    prefix: str, local: str, info: TensorInfo, tensors: Mapping[str, TensorInfo], said: bool
) -> Codes | None:
    """What a tensor is the codes of; None where it is no codes."""
    name = prefix + local
    if info.code in _PACKED:
        return Codes(name, name, problem=f"{info.code} is packed: {HOW_TO_FIX}")
    eight = info.code in (*_FLOAT8, *_INT8)
    if not eight and info.code not in _INT16_32:
        return None
    serves = any(kind in local.lower() for kind in ("scale", "zero", "shift"))
    if is_index(name, info.shape) or serves or not np.prod(info.shape) > 1:
        return None
    scales = [other for other in _partners(local, tensors, "scale")
              if tensors[other].code not in (*_FLOAT8, *_INT16_32) or info.code == "U8"]
    zeros = _partners(local, tensors, "zero")
    if info.code in _INT16_32:
        grouped = [other for other in scales if np.prod(tensors[other].shape) > 1]
        if not zeros and not grouped:
            return None if not said or len(info.shape) < 2 else Codes(
                name, name, problem=f"{info.code} is packed: {HOW_TO_FIX}")
        return Codes(name, name, problem=f"{info.code} is packed: {HOW_TO_FIX}")
    if not scales:
        plain = not said or (info.code in _INT8 and len(info.shape) < 2)
        return None if plain else Codes(name, name, problem=f"no scale found: {HOW_TO_FIX}")
    return Codes(_weight_name(name), name, prefix + scales[0],
                 prefix + zeros[0] if zeros else None,
                 _problem(info, [tensors[s] for s in scales], [tensors[z] for z in zeros]))


def _problem(info: TensorInfo, scales: list[TensorInfo], zeros: list[TensorInfo]) -> str:
    """Why codes and scale make no weight here; empty where they do."""
    if len(scales) > 1 or len(zeros) > 1:
        return f"{max(len(scales), len(zeros))} scales of one weight: {HOW_TO_FIX}"
    if info.code == "U8" and not any(zero.code[0] in "IU" for zero in zeros):
        return f"U8 without a whole zero point is packed: {HOW_TO_FIX}"
    for partner in (*scales, *zeros):
        if blocks(partner.shape, info.shape) is None:
            return (f"its scale {list(partner.shape)} does not fit {list(info.shape)}: "
                    f"{HOW_TO_FIX}")
    return ""


def _partners(local: str, tensors: Mapping[str, TensorInfo], kind: str) -> list[str]:
    """Tensors of the same module that have the stem of a name and `kind` ('scale') in theirs."""
    own = _words(local)
    return sorted(
        other for other in tensors
        if other != local and kind in other.lower()
        and {w for w in _words(other) if kind not in w} - _DTYPE_WORDS - {"point"} <= own
    )


def _served_by(local: str, tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Scales, zero points and shapes that only serve the codes."""
    found = [*_partners(local, tensors, "scale"), *_partners(local, tensors, "zero"),
             *_partners(local, tensors, "shape")]
    return [*found, *(other for other in tensors if _is_activation_scale(other))]


def _activation_scales(tensors: Mapping[str, TensorInfo]) -> set[str]:
    return {name for name, info in tensors.items()
            if _is_activation_scale(name.rpartition(".")[2]) and np.prod(info.shape) <= 1}


def _is_activation_scale(local: str) -> bool:
    words = _words(local)
    scales = {word for word in words if "scale" in word}
    return bool(scales) and bool(words - scales) and words - scales <= _ACTIVATION


def _words(local: str) -> set[str]:
    return {word for word in re.split(r"[^A-Za-z0-9]+", local.lower()) if word
            and not word.isdigit()}


def _weight_name(name: str) -> str:
    """The weight that codes stand for: torchao's, quanto's, and those that keep its name.

    Example:
        >>> [_weight_name(f"q.{own}") for own in ("_weight_qdata", "weight._data", "weight")]
        ['q.weight', 'q.weight', 'q.weight']
    """
    found = re.fullmatch(r"(.*\.)?_(\w+)_qdata|(.+)\._q?data", name)
    if found is None:
        return name
    return found[3] or f"{found[1] or ''}{found[2]}"


def _said_by(directory: Path | None) -> str:
    if directory is None:
        return ""
    if (directory / QUANT_FILE).is_file():
        return QUANT_FILE
    return "config.json" if _says(read_config(directory) or {}) else ""


def _says(config: Mapping[str, Any]) -> bool:
    return any(key in CONFIG_KEYS and bool(value) or isinstance(value, dict) and _says(value)
               for key, value in config.items())
