"""Quantized checkpoints: found by their structure, refused, or read as codes times scale."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from modelstock_jax.checkpoint_merge import quantized_formats as formats
from modelstock_jax.checkpoint_merge.matching import same_numbers
from modelstock_jax.checkpoint_merge.quantized_formats import (
    CONFIG_KEYS,
    FLOAT8,
    HOW_TO_FIX,
    INT8,
    PACKED,
    QUANT_FILE,
    Stated,
    stated,
)
from modelstock_jax.checkpoint_merge.sources import Source, prefix_of
from modelstock_jax.checkpoint_merge.tensor_names import TensorInfo, is_index
from modelstock_jax.errors import UserError, listed
from modelstock_jax.merging.anchor_rounding import half_ulp_square

__all__ = (
    "CONFIG_KEYS",
    "HOW_TO_FIX",
    "QUANT_FILE",
    "DequantizedSource",
    "as_stored",
    "as_weights",
    "codes_that_differ",
    "detect",
    "refusal",
    "said_only",
    "without_keys",
)
DEFAULT_CODE = "BF16"
# What bitsandbytes, GPTQ and compressed-tensors keep next to packed weights under other names.
_OTHER_PARTNERS = re.compile(
    r".*(?:\.(?:SCB|qweight|qzeros|absmax|weight_format|weight_scale(?:_inv)?)|weight_packed|"
    r"\.(?:quant_map|nested_absmax|nested_quant_map)|quant_state\..*|\._data\._data|\._shift)"
)
_LOCAL = re.compile(r"[^./:]*\Z")
_MAX_NAMED = 3


@dataclasses.dataclass(frozen=True)
class Codes:
    """A quantized tensor and the weight that it encodes.

    Attributes:
      name: Of the weight: `q.weight` for `q._weight_qdata`.
      stored: The tensor that holds the codes.
      scale: The tensor with its scale; None where there is none.
      zero: The tensor with its zero point; None where there is none.
      problem: Why the weight cannot be formed; empty where it can.
      sizes: Codes along each axis that share one scale.
      zero_sizes: Codes along each axis that share one zero point.
      either: Whether the scale may be that of the rows or of the columns, by its shape.
    """

    name: str
    stored: str
    scale: str | None = None
    zero: str | None = None
    problem: str = ""
    sizes: tuple[int, ...] = ()
    zero_sizes: tuple[int, ...] = ()
    either: bool = False


@dataclasses.dataclass(frozen=True)
class Quantization:
    """What is quantized in a checkpoint.

    Attributes:
      codes: The quantized tensors.
      dropped: Tensors that only serve the codes: scales, zero points, markers.
      unused: Those of `dropped` that no weight is formed from: of activations and caches.
    """

    codes: tuple[Codes, ...] = ()
    dropped: frozenset[str] = frozenset()
    unused: frozenset[str] = frozenset()

    @property
    def problems(self) -> list[str]:
        """Why some of it cannot be dequantized here, a line per reason."""
        found: dict[str, list[str]] = defaultdict(list)
        for one in self.codes:
            if one.problem:
                found[one.problem].append(one.stored)
        return [f"{listed(names, _MAX_NAMED)}: {why}" for why, names in found.items()]


@dataclasses.dataclass
class _Module:
    """The tensors of one module by their own names, and what its files state."""

    prefix: str
    said: Stated
    marked: bool
    tensors: dict[str, TensorInfo] = dataclasses.field(default_factory=dict)


def detect(source: Source) -> Quantization | None:
    """What is quantized in a source; None where nothing is.

    A float8 or packed integer tensor is quantized where its module has a scale for it, or where
    config.json or hf_quant_config.json says that the checkpoint is. float8 without either is a
    plain number.
    """
    modules = _modules(source)
    codes, dropped = [], set()
    for module in modules.values():
        found = [one for local in module.tensors if (one := _codes(module, local)) is not None]
        if not found:
            continue
        serving = {
            module.prefix + other
            for one in found
            for kind in ("scal", "zero", "shape")
            for other in formats.partners(one.stored[len(module.prefix) :], module.tensors, kind)
        }
        codes += _checked(source, module, found, serving)
        dropped |= serving
    unused = _unused(modules, codes)
    stored = {one.stored for one in codes}
    codes += [
        Codes(name, name, problem="serves codes that are not read here")
        for name in source.tensors
        if _OTHER_PARTNERS.fullmatch(name) and name not in stored | dropped | unused
    ]
    if not codes:
        return None
    unused |= {name for name in source.tensors if _local(name) in formats.MARKERS}
    return Quantization(
        tuple(_by_rows(codes, source)),
        frozenset((dropped | unused) - stored),
        frozenset(unused - dropped - stored),
    )


def refusal(source: Source) -> str | None:
    """Why a quantized source is not merged as it is, and what to do; None for any other."""
    found = detect(source)
    if found is None:
        return None
    names = listed(sorted(one.stored for one in found.codes), _MAX_NAMED)
    what = f"{source.label} is quantized ({names})"
    if problems := found.problems:
        return f"{what} in a format that is not read here, {problems[0]}; {HOW_TO_FIX}"
    return (
        f"{what}: codes without their scales have no mean; pass --dequantize to merge codes x "
        f"scale, written in bfloat16 or --dtype, or {HOW_TO_FIX}"
    )


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
    found = detect(source)
    return source if found is None else DequantizedSource(source, found)


def codes_that_differ(sources: Sequence[Source]) -> str | None:
    """Why models whose configs say quantized, and whose integers differ, are not merged.

    Codes in a format that is not recognized: other integers of a model are the same in all.
    """
    said = next(
        (
            source
            for source in sources
            if source.directory is not None and not _is_read(source) and said_only(source.directory)
        ),
        None,
    )
    if said is None:
        return None
    for name, info in said.tensors.items():
        infos = [source.tensors.get(name) for source in sources]
        if info.code[0] not in "IU" or math.prod(info.shape) <= 1 or None in infos:
            continue
        alike = all((i.shape, i.code) == (info.shape, info.code) for i in infos if i is not None)
        if is_index(name, info.shape) and not alike:
            continue  # Position ids of a longer context.
        if not alike or not same_numbers(*((source, name) for source in sources)):
            return (
                f"{said.label} is quantized, as its config says, in a format that is not read "
                f"here ({name} is {info.code} and differs between models); {HOW_TO_FIX}"
            )
    return None


def said_only(directory: Path | None) -> bool:
    """Whether a directory's config names a quantization."""
    return bool(stated(directory).file)


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
            raise UserError(
                f"{source.label}: --dequantize cannot form {'; '.join(problems)}; {HOW_TO_FIX}"
            )
        self.label, self.directory = source.label, source.directory
        self.source = source
        self.components, self.aliases = source.components, source.aliases
        self._codes = {one.name: one for one in found.codes}
        hidden = {one.stored for one in found.codes} | found.dropped
        self.tensors = {n: i for n, i in source.tensors.items() if n not in hidden}
        for one in found.codes:
            shape = source.tensors[one.stored].shape
            self.tensors[one.name] = TensorInfo(shape, "F32", DEFAULT_CODE)
        left = (
            f"; left out: {len(found.unused)} scales of activations and caches, and markers "
            f"({listed(sorted(found.unused), _MAX_NAMED)})"
            if found.unused
            else ""
        )
        self.notes = [
            *source.notes,
            f"{source.label}: {len(found.codes)} quantized tensors read as codes x scale{left}",
        ]
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

    def read(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Elements [start, stop); float32 where they are formed."""
        if name not in self._codes:
            return self.source.read(name, start, stop, out)
        one = self._codes[name]
        codes = self.source.read(one.stored, start, stop)
        self.source.note(one.stored, start, codes)
        wide = codes.astype(np.float64)
        scale, zero = self._load(name)
        shape = self.tensors[name].shape
        if zero is not None:
            wide -= spread(zero, one.zero_sizes, shape, start, stop)
        wide *= spread(scale, one.sizes, shape, start, stop)
        return wide.astype(np.float32)

    def stored_dtype(self, name: str) -> np.dtype:
        """Dtype of the codes."""
        return self.source.stored_dtype(self._codes[name].stored if name in self._codes else name)

    def half_ulp_squares(self, name: str, start: int, stop: int) -> np.ndarray:
        """Largest squared rounding error: that of the codes, times the squared scale."""
        if name not in self._codes:
            return self.source.half_ulp_squares(name, start, stop)
        one = self._codes[name]
        codes = self.source.read(one.stored, start, stop)
        whole = codes.dtype.kind in "iu"
        squares = np.full(len(codes), 0.25) if whole else half_ulp_square(codes)
        scale, _ = self._load(name)
        return squares * spread(scale, one.sizes, self.tensors[name].shape, start, stop) ** 2

    def note(self, name: str, start: int, values: np.ndarray) -> None:
        """As a plain source's; codes are noted where they are read."""
        if name not in self._codes:
            self.source.note(name, start, values)

    def watch(self) -> None:
        """As a plain source's."""
        self.source.watch()

    def checksums(self, kind: str = "crc32") -> dict[str, str]:
        """As a plain source's."""
        return self.source.checksums(kind)

    def _load_scale(self, name: str) -> tuple[np.ndarray, np.ndarray | None]:
        one, shape = self._codes[name], self.tensors[name].shape
        assert one.scale is not None, "`detect` names a problem where there is none"
        zero = None if one.zero is None else fitted(self._whole(one.zero), shape)
        scale = self._whole(one.scale)
        if scale.dtype == np.uint8:  # An exponent, as `formats.scale_problem` makes sure.
            scale = scale.view(ml_dtypes.float8_e8m0fnu)
        return fitted(scale.astype(np.float64), shape), zero

    def _whole(self, name: str) -> np.ndarray:
        shape = self.source.tensors[name].shape
        count = int(np.prod(shape, dtype=np.int64))
        values = self.source.read(name, 0, count)
        self.source.note(name, 0, values)
        return values.reshape(shape)


def fitted(scale: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """A scale with as many axes as its weight."""
    if scale.size == 1:
        return scale.reshape((1,) * len(shape))
    return scale.reshape(scale.shape + (1,) * (len(shape) - scale.ndim))


def spread(
    scale: np.ndarray, sizes: Sequence[int], shape: Sequence[int], start: int, stop: int
) -> np.ndarray:
    """The scale of each of the elements [start, stop) of a flattened weight.

    Example:
      >>> spread(np.array([[1.0], [2.0]]), (1, 3), (2, 3), 1, 5).tolist()
      [1.0, 1.0, 2.0, 2.0]
    """
    if scale.size == 1:
        return np.broadcast_to(scale.reshape(-1), stop - start)
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
    return {
        key: without_keys(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in CONFIG_KEYS
    }


def _modules(source: Source) -> dict[str, _Module]:
    """The modules of a source by the beginning of their tensors' names."""
    said = {prefix: stated(_folder(source.directory, prefix)) for prefix in {*source.components}}
    whole = stated(source.directory)
    marked = {
        prefix_of(name, source.components)
        for name in source.tensors
        if _local(name) == formats.OF_ALL_LAYERS
    }
    modules: dict[str, _Module] = {}
    for name, info in source.tensors.items():
        local = _local(name)
        prefix = name[: len(name) - len(local)]
        if prefix not in modules:
            component = prefix_of(name, source.components)
            own = said.get(component, whole)
            modules[prefix] = _Module(prefix, own if own.file else whole, component in marked)
        modules[prefix].tensors[local] = info
    return modules


def _folder(directory: Path | None, prefix: str) -> Path | None:
    """Where the config of a component is."""
    return directory if directory is None or not prefix.endswith("/") else directory / prefix


def _codes(module: _Module, local: str) -> Codes | None:
    """The weight that a tensor holds the codes of; None where it holds no codes."""
    info, name = module.tensors[local], module.prefix + local
    packed = Codes(name, name, problem=f"{info.code} is packed")
    if info.code in PACKED:
        return packed
    serves = formats.serves(local) or local in formats.MARKERS
    if serves or is_index(name, info.shape) or math.prod(info.shape) <= 1:
        return None
    said = bool(module.said.file) or module.marked or formats.OF_A_LAYER in module.tensors
    scales = [
        other
        for other in formats.partners(local, module.tensors, "scal")
        if module.tensors[other].code not in FLOAT8 or info.code == "U8"
    ]
    zeros = formats.partners(local, module.tensors, "zero")
    if info.code in FLOAT8:
        extended = [
            other
            for other, i in module.tensors.items()
            if local.endswith("weight") and other.startswith(f"{local}_") and i.code not in FLOAT8
        ]
        if not (scales or said or extended):
            return None
    elif info.code[0] not in "IU" or not _may_be_codes(module, local, said, scales, zeros):
        return None
    elif info.code not in INT8:
        return packed
    if not scales:
        return Codes(name, name, problem="no scale found")
    return _formed(module, local, scales, zeros)


def _may_be_codes(
    module: _Module, local: str, said: bool, scales: Sequence[str], zeros: Sequence[str]
) -> bool:
    """Whether integers are codes, and not a buffer next to some learned scale."""
    info = module.tensors[local]
    named = formats.named_after(local, module.tensors)
    alike = len(info.shape) > 1 and (
        formats.is_weight_name(local) or said and bool(scales or zeros)
    )
    if not named and not alike:
        return False
    if info.code in INT8:
        return bool(said or scales or zeros)
    grouped = any(math.prod(module.tensors[other].shape) > 1 for other in scales)
    return bool(said or named or zeros or grouped)


def _formed(module: _Module, local: str, scales: Sequence[str], zeros: Sequence[str]) -> Codes:
    """Codes with a scale: how they make a weight, or why that is not certain."""
    name, info, tensors = module.prefix + local, module.tensors[local], module.tensors
    why = formats.method_problem(module.said, info)
    if not why and (len(scales) > 1 or len(zeros) > 1):
        why = f"{max(len(scales), len(zeros))} scales of one weight"
    if not why and any(tensors[zero].code[0] not in "IU" for zero in zeros):
        why = "a zero point that is no integer"
    if not why and info.code == "U8" and not zeros:
        why = "U8 without a whole zero point is packed"
    found = [
        formats.sizes(tensors[other].shape, info.shape, module.said) for other in (*scales, *zeros)
    ]
    why = why or next((size for size in found if isinstance(size, str)), "")
    fits = [size for size in found if not isinstance(size, str)]
    why = why or formats.scale_problem(local, tensors[scales[0]], info, fits[0], module.said)
    if why:
        return Codes(name, name, problem=why)
    scale = tensors[scales[0]].shape
    either = (
        not module.said.methods - {""}
        and len(scale) < len(info.shape)
        and math.prod(scale) > 1
        and scale[-1] in info.shape[len(scale) :]
    )
    return Codes(
        _weight_name(name),
        name,
        module.prefix + scales[0],
        module.prefix + zeros[0] if zeros else None,
        "",
        fits[0],
        fits[1] if zeros else (),
        either,
    )


def _checked(source: Source, module: _Module, found: list[Codes], serving: set[str]) -> list[Codes]:
    """Codes, refused where their module has tensors that may serve them in an unknown way."""
    prefix, tensors = module.prefix, module.tensors
    owns = [one.stored[len(prefix) :] for one in found]
    known = (
        {name[len(prefix) :] for name in serving}
        | {*owns}
        | {other for other, info in tensors.items() if formats.is_activation(other, info, owns)}
    )
    why = ""
    if others := formats.other_roles(tensors, known):
        why = f"{listed(others, _MAX_NAMED)} next to it: what it is for is not known"
    elif formats.OF_A_LAYER in tensors:
        count = math.prod(tensors[formats.OF_A_LAYER].shape)
        marker = source.read(f"{prefix}{formats.OF_A_LAYER}", 0, count)
        why = formats.comfy_problem(marker.tobytes())
    return [dataclasses.replace(one, problem=one.problem or why) for one in found]


def _unused(modules: Mapping[str, _Module], codes: Sequence[Codes]) -> set[str]:
    """Scales of activations and caches, in and above the modules that hold codes."""
    holding: dict[str, set[str]] = defaultdict(set)
    for one in codes:
        for name in (one.stored, one.name):
            local = _local(name)
            holding[name[: len(name) - len(local)]].add(local)
    found = set()
    for prefix in holding.keys() & modules.keys():
        found |= {
            prefix + other
            for other, info in modules[prefix].tensors.items()
            if formats.is_activation(other, info, holding[prefix])
        }
    above = {prefix[: len(prefix) - 1 - len(_local(prefix[:-1]))] for prefix in holding}
    for prefix in above & modules.keys():
        found |= {prefix + other for other in formats.cache_scales(modules[prefix].tensors)}
    return found


def _by_rows(codes: Sequence[Codes], source: Source) -> Iterable[Codes]:
    """Codes; a scale of a square weight is that of its rows where others like it show that."""

    def kind(one: Codes) -> tuple[str, str, str]:
        return _local(one.stored), _local(one.scale or ""), source.tensors[one.stored].code

    shown = {
        kind(one)
        for one in codes
        if one.scale
        and not one.either
        and len(source.tensors[one.scale].shape) == 1
        and len(one.sizes) > 1
        and math.prod(source.tensors[one.scale].shape) > 1
    }
    for one in codes:
        if one.either and kind(one) not in shown:
            shapes = [list(source.tensors[own].shape) for own in (one.scale, one.stored) if own]
            one = dataclasses.replace(
                one,
                problem=(
                    f"its scale {shapes[0]} may be that of the rows or of the columns of {shapes[1]}"
                ),
            )
        yield one


def _is_read(source: Source) -> bool:
    """Whether a source, or the base of an adapter, is read as codes x scale."""
    return isinstance(getattr(source, "base", source), DequantizedSource)


def _local(name: str) -> str:
    """A tensor's name in its module."""
    found = _LOCAL.search(name)
    return found[0] if found else name


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
