"""Detect quantized checkpoints by their structure; reject them, or read them as codes x scale."""

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
from modelstock_jax.checkpoint_merge.matching import bitwise_equal
from modelstock_jax.checkpoint_merge.quantized_formats import (
    CONFIG_KEYS,
    FLOAT8,
    HOW_TO_FIX,
    INT8,
    PACKED,
    QUANT_FILE,
    QuantizationConfig,
    read_quantization_config,
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
    "quantization_error",
    "has_quantization_config",
    "without_keys",
)
DEFAULT_CODE = "BF16"
# Tensors that bitsandbytes, GPTQ and compressed-tensors store next to packed weights.
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
      name: name of the weight: `q.weight` for `q._weight_qdata`
      stored: name of the tensor with the codes
      scale: name of the tensor with the scale; None if there is none
      zero: name of the tensor with the zero point; None if there is none
      problem: why the weight cannot be dequantized; empty if it can
      sizes: number of codes along each axis that share one scale
      zero_sizes: number of codes along each axis that share one zero point
      either: whether, by its shape, the scale may apply to the rows or to the columns
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
    """The quantized tensors of a checkpoint.

    Attributes:
      codes: the quantized tensors
      dropped: tensors that are only needed for the codes: scales, zero points, markers
      unused: tensors of `dropped` that no weight depends on: scales of activations and caches
    """

    codes: tuple[Codes, ...] = ()
    dropped: frozenset[str] = frozenset()
    unused: frozenset[str] = frozenset()

    @property
    def problems(self) -> list[str]:
        """Reasons why tensors cannot be dequantized, one line per reason."""
        names_of: dict[str, list[str]] = defaultdict(list)
        for codes in self.codes:
            if codes.problem:
                names_of[codes.problem].append(codes.stored)
        return [f"{listed(names, _MAX_NAMED)}: {why}" for why, names in names_of.items()]


@dataclasses.dataclass
class _Module:
    """The tensors of one module by their names in it, and its quantization config."""

    prefix: str
    config: QuantizationConfig
    marked: bool
    tensors: dict[str, TensorInfo] = dataclasses.field(default_factory=dict)


def detect(source: Source) -> Quantization | None:
    """Return the quantized tensors of a source, or None if there are none.

    A float8 or packed integer tensor is quantized if its module has a scale for it, or if
    config.json or hf_quant_config.json describes a quantization. float8 without either is a plain
    floating-point tensor.
    """
    modules = _modules(source)
    codes, dropped = [], set()
    for module in modules.values():
        in_module = [c for local in module.tensors if (c := _codes(module, local)) is not None]
        if not in_module:
            continue
        partners = {
            module.prefix + other
            for tensor in in_module
            for kind in ("scal", "zero", "shape")
            for other in formats.partners(tensor.stored[len(module.prefix) :], module.tensors, kind)
        }
        codes += _checked(source, module, in_module, partners)
        dropped |= partners
    unused = _unused(modules, codes)
    stored = {tensor.stored for tensor in codes}
    codes += [
        Codes(name, name, problem="belongs to codes in a format that is not supported")
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


def quantization_error(source: Source) -> str | None:
    """Return why a quantized source cannot be merged, and how to fix it; None for other sources."""
    quantized = detect(source)
    if quantized is None:
        return None
    names = listed(sorted(codes.stored for codes in quantized.codes), _MAX_NAMED)
    what = f"{source.label} is quantized ({names})"
    if problems := quantized.problems:
        return f"{what} in a format that is not supported, {problems[0]}; {HOW_TO_FIX}"
    return (
        f"{what}: codes without their scales have no mean; pass --dequantize to merge codes x "
        f"scale, written in bfloat16 or --dtype, or {HOW_TO_FIX}"
    )


def as_stored(source: Source) -> Source:
    """Return the source if it is not quantized.

    Raises:
      UserError: the source is quantized; the message says how to fix it
    """
    if problem := quantization_error(source):
        raise UserError(problem)
    return source


def as_weights(source: Source) -> Source:
    """Return a source that reads codes x scale if it is quantized, else the source itself."""
    quantized = detect(source)
    return source if quantized is None else DequantizedSource(source, quantized)


def codes_that_differ(sources: Sequence[Source]) -> str | None:
    """Return why models with a quantization config and different integers cannot be merged.

    Such integers are codes in a format that is not recognized: other integers of a model are equal
    in all models.
    """
    quantized = next(
        (
            source
            for source in sources
            if source.directory is not None
            and not _is_dequantized(source)
            and has_quantization_config(source.directory)
        ),
        None,
    )
    if quantized is None:
        return None
    for name, info in quantized.tensors.items():
        infos = [source.tensors.get(name) for source in sources]
        if info.code[0] not in "IU" or math.prod(info.shape) <= 1 or None in infos:
            continue
        alike = all((i.shape, i.code) == (info.shape, info.code) for i in infos if i is not None)
        if is_index(name, info.shape) and not alike:
            continue  # Position ids of a longer context.
        if not alike or not bitwise_equal(*((source, name) for source in sources)):
            return (
                f"{quantized.label} is quantized according to its config, in a format that is not "
                f"supported ({name} is {info.code} and differs between models); {HOW_TO_FIX}"
            )
    return None


def has_quantization_config(directory: Path | None) -> bool:
    """Return whether the config of a directory describes a quantization."""
    return bool(read_quantization_config(directory).file)


class DequantizedSource(Source):
    """A quantized checkpoint, read as weights: codes x scale, computed for the requested range.

    Args:
      source: the checkpoint as it is stored
      quantized: its quantized tensors

    Raises:
      UserError: the format is not supported
    """

    def __init__(self, source: Source, quantized: Quantization):
        if problems := quantized.problems:
            raise UserError(
                f"{source.label}: --dequantize does not support {'; '.join(problems)}; {HOW_TO_FIX}"
            )
        self.label, self.directory = source.label, source.directory
        self.source = source
        self.components, self.aliases = source.components, source.aliases
        self._codes = {codes.name: codes for codes in quantized.codes}
        hidden = {codes.stored for codes in quantized.codes} | quantized.dropped
        self.tensors = {n: i for n, i in source.tensors.items() if n not in hidden}
        for codes in quantized.codes:
            shape = source.tensors[codes.stored].shape
            self.tensors[codes.name] = TensorInfo(shape, "F32", DEFAULT_CODE)
        left_out = (
            f"; left out: {len(quantized.unused)} scales of activations and caches, and markers "
            f"({listed(sorted(quantized.unused), _MAX_NAMED)})"
            if quantized.unused
            else ""
        )
        num_codes = len(quantized.codes)
        self.notes = [
            *source.notes,
            f"{source.label}: {num_codes} quantized tensors read as codes x scale{left_out}",
        ]
        self.formed = frozenset(self._codes)
        # Several tensors are processed at the same time, each piece by piece.
        self._load = functools.lru_cache(maxsize=16)(self._load_scale)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that are read."""
        return self.source.files

    @property
    def codes(self) -> Mapping[str, Codes]:
        """Name of a dequantized weight -> the names of its codes and scale."""
        return self._codes

    def read(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Read elements [start, stop), as `Source.read`; dequantized elements are float32."""
        if name not in self._codes:
            return self.source.read(name, start, stop, out)
        tensor = self._codes[name]
        codes = self.source.read(tensor.stored, start, stop)
        self.source.note(tensor.stored, start, codes)
        wide = codes.astype(np.float64)
        scale, zero = self._load(name)
        shape = self.tensors[name].shape
        if zero is not None:
            wide -= expand_scale(zero, tensor.zero_sizes, shape, start, stop)
        wide *= expand_scale(scale, tensor.sizes, shape, start, stop)
        return wide.astype(np.float32)

    def stored_dtype(self, name: str) -> np.dtype:
        """Return the dtype in which a tensor is stored; for a quantized tensor, of its codes."""
        return self.source.stored_dtype(self._codes[name].stored if name in self._codes else name)

    def half_ulp_squares(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return the maximum squared rounding errors: of the codes, times the squared scale."""
        if name not in self._codes:
            return self.source.half_ulp_squares(name, start, stop)
        tensor = self._codes[name]
        codes = self.source.read(tensor.stored, start, stop)
        is_integer = codes.dtype.kind in "iu"
        squares = np.full(len(codes), 0.25) if is_integer else half_ulp_square(codes)
        scale, _ = self._load(name)
        return (
            squares * expand_scale(scale, tensor.sizes, self.tensors[name].shape, start, stop) ** 2
        )

    def note(self, name: str, start: int, values: np.ndarray) -> None:
        """Add values to a checksum, as `Source.note`; `read` has already added the codes."""
        if name not in self._codes:
            self.source.note(name, start, values)

    def watch(self) -> None:
        """Start the checksums, as `Source.watch`."""
        self.source.watch()

    def checksums(self, kind: str = "crc32") -> dict[str, str]:
        """Return the checksum of each file, as `Source.checksums`."""
        return self.source.checksums(kind)

    def _load_scale(self, name: str) -> tuple[np.ndarray, np.ndarray | None]:
        tensor, shape = self._codes[name], self.tensors[name].shape
        assert tensor.scale is not None, "`detect` adds a problem if there is no scale"
        zero = None if tensor.zero is None else fit_scale(self._read_tensor(tensor.zero), shape)
        scale = self._read_tensor(tensor.scale)
        if scale.dtype == np.uint8:  # `formats.scale_problem` ensures that it is an exponent.
            scale = scale.view(ml_dtypes.float8_e8m0fnu)
        return fit_scale(scale.astype(np.float64), shape), zero

    def _read_tensor(self, name: str) -> np.ndarray:
        shape = self.source.tensors[name].shape
        count = int(np.prod(shape, dtype=np.int64))
        values = self.source.read(name, 0, count)
        self.source.note(name, 0, values)
        return values.reshape(shape)


def fit_scale(scale: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Reshape a scale to the number of axes of its weight."""
    if scale.size == 1:
        return scale.reshape((1,) * len(shape))
    return scale.reshape(scale.shape + (1,) * (len(shape) - scale.ndim))


def expand_scale(
    scale: np.ndarray, sizes: Sequence[int], shape: Sequence[int], start: int, stop: int
) -> np.ndarray:
    """Return the scale of each of the elements [start, stop) of a flattened weight.

    Example:
      >>> expand_scale(np.array([[1.0], [2.0]]), (1, 3), (2, 3), 1, 5).tolist()
      [1.0, 1.0, 2.0, 2.0]
    """
    if scale.size == 1:
        return np.broadcast_to(scale.reshape(-1), stop - start)
    columns = shape[-1]
    first, last = start // columns, -(-stop // columns)
    indices = np.unravel_index(np.arange(first, last), shape[:-1]) if len(shape) > 1 else ()
    rows = scale[tuple(index // size for index, size in zip(indices, sizes, strict=False))]
    rows = np.repeat(rows.reshape(last - first, -1), sizes[-1], axis=1)[:, :columns]
    return rows.reshape(-1)[start - first * columns : stop - first * columns]


def without_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without its quantization entries, including those of its towers.

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
    """Return the modules of a source by the prefix of their tensor names."""
    configs = {
        prefix: read_quantization_config(_folder(source.directory, prefix))
        for prefix in {*source.components}
    }
    model_config = read_quantization_config(source.directory)
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
            config = configs.get(component, model_config)
            config = config if config.file else model_config
            modules[prefix] = _Module(prefix, config, component in marked)
        modules[prefix].tensors[local] = info
    return modules


def _folder(directory: Path | None, prefix: str) -> Path | None:
    """Return the directory of the config of a component."""
    return directory if directory is None or not prefix.endswith("/") else directory / prefix


def _codes(module: _Module, local: str) -> Codes | None:
    """Return the weight whose codes a tensor contains, or None if it contains no codes."""
    info, name = module.tensors[local], module.prefix + local
    packed = Codes(name, name, problem=f"{info.code} is packed")
    if info.code in PACKED:
        return packed
    serves = formats.serves(local) or local in formats.MARKERS
    if serves or is_index(name, info.shape) or math.prod(info.shape) <= 1:
        return None
    marked = bool(module.config.file) or module.marked or formats.OF_A_LAYER in module.tensors
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
        if not (scales or marked or extended):
            return None
    elif info.code[0] not in "IU" or not _may_be_codes(module, local, marked, scales, zeros):
        return None
    elif info.code not in INT8:
        return packed
    if not scales:
        return Codes(name, name, problem="no scale found")
    return _with_scale(module, local, scales, zeros)


def _may_be_codes(
    module: _Module, local: str, marked: bool, scales: Sequence[str], zeros: Sequence[str]
) -> bool:
    """Return whether integers are codes, and not a buffer next to a learned scale."""
    info = module.tensors[local]
    named = formats.named_after(local, module.tensors)
    weight_like = len(info.shape) > 1 and (
        formats.is_weight_name(local) or marked and bool(scales or zeros)
    )
    if not named and not weight_like:
        return False
    if info.code in INT8:
        return bool(marked or scales or zeros)
    grouped = any(math.prod(module.tensors[other].shape) > 1 for other in scales)
    return bool(marked or named or zeros or grouped)


def _with_scale(module: _Module, local: str, scales: Sequence[str], zeros: Sequence[str]) -> Codes:
    """Return codes with their scale, or with the problem if their meaning is not certain."""
    name, info, tensors = module.prefix + local, module.tensors[local], module.tensors
    config = module.config
    why = formats.method_problem(config, info)
    if not why and (len(scales) > 1 or len(zeros) > 1):
        why = f"{max(len(scales), len(zeros))} scales of one weight"
    if not why and any(tensors[zero].code[0] not in "IU" for zero in zeros):
        why = "a zero point that is not an integer"
    if not why and info.code == "U8" and not zeros:
        why = "U8 without an integer zero point is packed"
    results = [
        formats.sizes(tensors[other].shape, info.shape, config) for other in (*scales, *zeros)
    ]
    why = why or next((result for result in results if isinstance(result, str)), "")
    sizes = [result for result in results if not isinstance(result, str)]
    why = why or formats.scale_problem(local, tensors[scales[0]], info, sizes[0], config)
    if why:
        return Codes(name, name, problem=why)
    scale = tensors[scales[0]].shape
    either = (
        not config.methods - {""}
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
        sizes[0],
        sizes[1] if zeros else (),
        either,
    )


def _checked(
    source: Source, module: _Module, codes: list[Codes], partners: set[str]
) -> list[Codes]:
    """Return codes, with a problem if their module has related tensors of an unknown role."""
    prefix, tensors = module.prefix, module.tensors
    stored = [tensor.stored[len(prefix) :] for tensor in codes]
    known = (
        {name[len(prefix) :] for name in partners}
        | {*stored}
        | {other for other, info in tensors.items() if formats.is_activation(other, info, stored)}
    )
    why = ""
    if others := formats.other_roles(tensors, known):
        why = f"{listed(others, _MAX_NAMED)} next to it has an unknown role"
    elif formats.OF_A_LAYER in tensors:
        count = math.prod(tensors[formats.OF_A_LAYER].shape)
        marker = source.read(f"{prefix}{formats.OF_A_LAYER}", 0, count)
        why = formats.comfy_problem(marker.tobytes())
    return [dataclasses.replace(tensor, problem=tensor.problem or why) for tensor in codes]


def _unused(modules: Mapping[str, _Module], codes: Sequence[Codes]) -> set[str]:
    """Return the scales of activations and caches, in and above the modules with codes."""
    with_codes: dict[str, set[str]] = defaultdict(set)
    for tensor in codes:
        for name in (tensor.stored, tensor.name):
            local = _local(name)
            with_codes[name[: len(name) - len(local)]].add(local)
    unused = set()
    for prefix in with_codes.keys() & modules.keys():
        unused |= {
            prefix + other
            for other, info in modules[prefix].tensors.items()
            if formats.is_activation(other, info, with_codes[prefix])
        }
    parents = {prefix[: len(prefix) - 1 - len(_local(prefix[:-1]))] for prefix in with_codes}
    for prefix in parents & modules.keys():
        unused |= {prefix + other for other in formats.cache_scales(modules[prefix].tensors)}
    return unused


def _by_rows(codes: Sequence[Codes], source: Source) -> Iterable[Codes]:
    """Yield codes; the scale of a square weight applies to rows if other weights show it."""

    def kind(tensor: Codes) -> tuple[str, str, str]:
        return (
            _local(tensor.stored),
            _local(tensor.scale or ""),
            source.tensors[tensor.stored].code,
        )

    scaled_by_row = {
        kind(tensor)
        for tensor in codes
        if tensor.scale
        and not tensor.either
        and len(source.tensors[tensor.scale].shape) == 1
        and len(tensor.sizes) > 1
        and math.prod(source.tensors[tensor.scale].shape) > 1
    }
    for tensor in codes:
        if tensor.either and kind(tensor) not in scaled_by_row:
            names = (tensor.scale, tensor.stored)
            scale, shape = (list(source.tensors[name].shape) for name in names if name)
            problem = f"its scale {scale} may apply to the rows or to the columns of {shape}"
            tensor = dataclasses.replace(tensor, problem=problem)
        yield tensor


def _is_dequantized(source: Source) -> bool:
    """Return whether a source, or the base of an adapter, is read as codes x scale."""
    return isinstance(getattr(source, "base", source), DequantizedSource)


def _local(name: str) -> str:
    """Return the name of a tensor in its module."""
    match = _LOCAL.search(name)
    return match[0] if match else name


def _weight_name(name: str) -> str:
    """Return the name of the weight that codes encode, also in the naming of torchao and quanto.

    Example:
      >>> [_weight_name(f"q.{local}") for local in ("_weight_qdata", "weight._data", "weight")]
      ['q.weight', 'q.weight', 'q.weight']
    """
    match = re.fullmatch(r"(.*\.)?_(\w+)_qdata|(.+)\._q?data", name)
    if match is None:
        return name
    return match[3] or f"{match[1] or ''}{match[2]}"
