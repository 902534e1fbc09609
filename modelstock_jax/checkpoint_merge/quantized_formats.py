"""Formats of quantized weights: config entries, shapes of scales, and names of related tensors.

A weight is dequantized only if the meaning of its codes is certain: the layout of the method is
known, and the shapes match in exactly one way. Everything else is a problem, and the message says
how to fix it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from modelstock_jax.checkpoint_merge.hf_config import read_config
from modelstock_jax.checkpoint_merge.tensor_names import TensorInfo
from modelstock_jax.errors import UserError, listed
from modelstock_jax.tensor_files.reader import read_json

CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")
QUANT_FILE = "hf_quant_config.json"  # of NVIDIA's ModelOpt
HOW_TO_FIX = "load it with transformers, call model.dequantize(), then save_pretrained"
FLOAT8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
INT8 = ("I8", "U8")
# Packed elements of 4 or 6 bits.
PACKED = ("F4", "F6_E2M3", "F6_E3M2")
EXPONENTS = "F8_E8M0"
_SCALES = ("F64", "F32", "F16", "BF16")
# Method -> dtypes of codes whose layout is known: [out, in], as torch's Linear stores it, where a
# scale with one axis applies to the rows. Left out: EETQ stores [in, out]. int8 of `fp8` is two FP4
# values per byte (DeepSeek-V4); int8 of ModelOpt and TensorRT-LLM was smoothed or interleaved.
QUANT_METHODS = {
    "": (*FLOAT8, *INT8),
    "fp8": FLOAT8,
    "mxfp8": FLOAT8,
    "fbgemm-fp8": FLOAT8,
    "modelopt": FLOAT8,
    "compressed-tensors": (*FLOAT8, "I8"),
    "torchao": (*FLOAT8, *INT8),
    "quanto": (*FLOAT8, "I8"),
}
# Block sizes that libraries use; if no size is configured, no other size is certain.
_COMMON_BLOCK_SIZES = (16, 32, 64, 128, 256)
_MX = 32  # codes that share one exponent in the OCP microscaling (MX) formats
# Config entries that do not describe weights.
_NOT_WEIGHTS = ("input_activations", "output_activations", "kv_cache_scheme")
# Words in the name of a scale that do not identify its tensor.
_GENERIC_WORDS = {"inv", "data", "qdata", "point", "factor"}
# Words in the names of scales of activations and caches, which do not belong to a weight.
_CACHE = {"k", "v", "q", "kv", "cache", "prob"}
_ACTIVATION = {"input", "output", "act", "activation", "quant", "ub"} | _CACHE
_KINDS = ("scal", "zero")
_OTHER_ROLES = re.compile(
    r"scal|zero|amax|absmax|codebook|centroid|smooth|shift|offset|hadamard|"
    r"g_idx|(?:^|_)perm(?:$|_)"
)
_WEIGHT = re.compile(r"\w*weight|\w*proj|w\d*|w[a-z]|q?code|q?data|block|packed|kernel|qidx")
# Marker tensors of ComfyUI; the marker of a layer contains JSON as bytes.
OF_ALL_LAYERS, OF_A_LAYER = MARKERS = ("scaled_fp8", "comfy_quant")
_COMFY = {"format": ("float8_e4m3fn", "float8_e5m2"), "full_precision_matrix_mult": (True, False)}


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
    """The quantization that the files next to a checkpoint describe.

    Attributes:
      file: the file that describes a quantization; empty if none does
      methods: every `quant_method`, spelled with hyphens
      blocks: rows and columns that share one scale
      strict: whether `weight_block_size` is set, which applies to every weight, not only to some
      bits: bits per weight
      problem: why no weight can be dequantized, whatever its codes; empty if there is no reason
    """

    file: str = ""
    methods: frozenset[str] = frozenset()
    blocks: frozenset[tuple[int, int]] = frozenset()
    strict: bool = False
    bits: frozenset[int] = frozenset()
    problem: str = ""


def read_quantization_config(directory: Path | None) -> QuantizationConfig:
    """Read the quantization in config.json and hf_quant_config.json of a directory."""
    if directory is None:
        return QuantizationConfig()
    entries = list(_quantization_entries(read_config(directory) or {}))
    file = "config.json" if entries else ""
    methods = {_method(entry) for entry in entries}
    if (directory / QUANT_FILE).is_file():
        file = QUANT_FILE
        methods = {method for method in methods if method} | {"modelopt"}
        entries.append(_read_quant_file(directory / QUANT_FILE))
    items = [item for entry in entries for item in _items(entry)]
    blocks = {block for key, value in items if (block := _block(key, value))}
    return QuantizationConfig(
        file,
        frozenset(methods),
        frozenset(blocks),
        any(key == "weight_block_size" and _block(key, value) for key, value in items),
        frozenset(
            value for key, value in items if key in ("bits", "num_bits") and isinstance(value, int)
        ),
        _transform_problem(items),
    )


def method_problem(config: QuantizationConfig, info: TensorInfo) -> str:
    """Return why the configured method does not define the meaning of codes, or ''.

    Example:
      >>> method_problem(QuantizationConfig(methods=frozenset({"eetq"})), TensorInfo((4, 4), "I8"))
      "quant_method 'eetq' is not supported"
      >>> method_problem(QuantizationConfig(), TensorInfo((4, 4), "I8"))
      ''
    """
    if config.problem:
        return config.problem
    if unknown := sorted(config.methods - QUANT_METHODS.keys()):
        return f"quant_method {unknown[0]!r} is not supported"
    methods = config.methods or {""}
    if not all(info.code in QUANT_METHODS[method] for method in methods):
        return f"{info.code} of quant_method {sorted(methods)[0]!r} is not supported"
    if info.code in INT8 and methods == {""} and config.bits and 8 not in config.bits:
        return f"{info.code} contains codes of {listed(map(str, sorted(config.bits)))} bits"
    return ""


def sizes(
    scale: Sequence[int], shape: Sequence[int], config: QuantizationConfig | None = None
) -> tuple[int, ...] | str:
    """Return the number of codes along each axis that share one scale.

    If it is not certain, return the reason as text.

    Example:
      >>> sizes((), (4, 6)), sizes((4,), (4, 6)), sizes((4, 1), (4, 6))
      ((4, 6), (1, 6), (1, 6))
      >>> sizes((2, 4), (256, 512)), sizes((3,), (288, 32))
      ((128, 128), 'its scale [3] does not match [288, 32]')
    """
    config, scale, shape = config or QuantizationConfig(), tuple(scale), tuple(shape)
    if all(length == 1 for length in scale):
        return shape
    mismatch = f"its scale {list(scale)} does not match {list(shape)}"
    if len(scale) < len(shape):  # [out] is one scale per row; it never divides the rows.
        per_row = scale == shape[: len(scale)] and not config.strict
        return (1,) * len(scale) + shape[len(scale) :] if per_row else mismatch
    if len(scale) > len(shape):
        return mismatch
    pairs = list(zip(scale, shape, strict=True))
    leading = tuple(1 if parts == length else length for parts, length in pairs)
    if all(parts in (1, length) for parts, length in pairs) and not config.strict:
        return leading
    if len(shape) < 2 or any(parts not in (1, length) for parts, length in pairs[:-2]):
        return mismatch
    blocks = _matching_blocks(pairs[-2:], config.blocks)
    if config.blocks and not blocks:
        expected = listed(f"{rows} x {columns}" for rows, columns in sorted(config.blocks))
        return f"{mismatch} in blocks of {expected}, as in {config.file or 'its config'}"
    if len(blocks) > 1:
        return f"{mismatch} in one way only ({listed(map(str, sorted(blocks)))})"
    return (*leading[:-2], *blocks.pop()) if blocks else mismatch


def scale_problem(
    local: str,
    scale: TensorInfo,
    info: TensorInfo,
    scale_sizes: Sequence[int],
    config: QuantizationConfig,
) -> str:
    """Return why the values of a scale may mean something else, or '' if they are certain.

    Args:
      local: the name of the codes in their module
      scale: the scale
      info: the codes
      scale_sizes: number of codes along each axis that share one scale
      config: the quantization config
    """
    # torchao may store exponents in another order.
    plain = info.code in FLOAT8[:2] and not local.endswith("qdata")
    if scale.code == "U8" and plain and math.prod(scale.shape) > 1:  # In MX, bytes are exponents.
        known = {(1, _MX), *(tuple(map(min, block, info.shape[-2:])) for block in config.blocks)}
        if tuple(scale_sizes[-2:]) in known:
            return ""
    if scale.code == EXPONENTS and plain:
        return ""
    if scale.code in _SCALES:
        return ""
    return f"a scale in {scale.code} for codes in {info.code} is not supported"


def comfy_problem(data: bytes) -> str:
    """Return why a layer with a ComfyUI marker is not codes x scale, or ''.

    Example:
      >>> comfy_problem(b'{"format": "float8_e4m3fn"}'), comfy_problem(b'{"format": "nvfp4"}')
      ('', "comfy_quant is {'format': 'nvfp4'}, which is not supported")
    """
    try:
        marker = json.loads(data)
    except ValueError:
        marker = None
    if isinstance(marker, dict) and all(v in _COMFY.get(key, ()) for key, v in marker.items()):
        return ""
    return f"comfy_quant is {marker}, which is not supported"


def partners(local: str, tensors: Mapping[str, TensorInfo], kind: str) -> list[str]:
    """Return the tensors of the same module with the stem of a name and `kind` in their names.

    Example:
      >>> module = dict.fromkeys(["weight", "weight_scale", "input_scale", "scale", "k_scale"])
      >>> partners("weight", module, "scal")
      ['scale', 'weight_scale']
    """
    local_words = words(local)
    return sorted(
        other
        for other in tensors
        if other != local and _has(other, kind) and _stem(other, kind) <= local_words
    )


def named_after(local: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """Return whether the name of a scale or zero point contains a tensor's name: `weight_scale`."""
    return any(_stem(other, kind) for kind in _KINDS for other in partners(local, tensors, kind))


def is_weight_name(local: str) -> bool:
    """Return whether libraries use a name for weights or their codes.

    Example:
      >>> [is_weight_name(name) for name in ("qweight", "W_q", "codes", "buckets", "table")]
      [True, True, True, False, False]
    """
    return any(_WEIGHT.fullmatch(word) for word in words(local))


def serves(local: str) -> bool:
    """Return whether a name is that of a scale, a zero point, a shift or an order of groups."""
    return any(_has(local, kind) for kind in (*_KINDS, "shift")) or local.endswith("g_idx")


def is_activation(local: str, info: TensorInfo, stored: Collection[str]) -> bool:
    """Return whether a tensor is the scale of an activation or cache, next to the codes `stored`.

    It has one element, or one per expert (`gate_up_proj_activation_scale`). A scale per input of a
    layer (smoothing) does not count, because it also changes the weight.
    """
    if not any(_has(local, kind) for kind in (*_KINDS, "amax")):
        return False
    rest = {word for word in words(local) if not re.search("scal|zero|amax", word)} - _GENERIC_WORDS
    scalar = math.prod(info.shape) <= 1
    return any(
        rest & _ACTIVATION
        and rest - words(codes) <= _ACTIVATION
        and (scalar or len(info.shape) == 1 and rest & words(codes))
        for codes in stored
    )


def cache_scales(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Return the scales of an attention cache in a module; those of keys and values are a pair."""
    stems = {
        other: _stem(other, "scal")
        for other, info in tensors.items()
        if _has(other, "scal") and math.prod(info.shape) <= 1
    }
    stems = {other: stem for other, stem in stems.items() if stem and stem <= _CACHE}
    values = list(stems.values())
    paired = {"k"} in values and {"v"} in values or any("kv" in stem for stem in values)
    return sorted(stems) if paired else []


def other_roles(tensors: Collection[str], known: Collection[str]) -> list[str]:
    """Return the tensors of a module that seem to belong to codes in an unknown way."""
    return sorted(
        other for other in tensors if other not in known and _OTHER_ROLES.search(other.lower())
    )


@functools.lru_cache(maxsize=1 << 16)
def words(local: str) -> frozenset[str]:
    """Return the words of a name, in the singular."""
    parts = (
        word for word in re.split(r"[^A-Za-z0-9]+", local.lower()) if word and not word.isdigit()
    )
    return frozenset(word[:-1] if len(word) > 2 and word.endswith("s") else word for word in parts)


def _has(local: str, kind: str) -> bool:
    return any(kind in word for word in words(local))


def _stem(local: str, kind: str) -> set[str]:
    return {word for word in words(local) if kind not in word} - _GENERIC_WORDS


def _matching_blocks(
    pairs: Sequence[tuple[int, int]], blocks: Collection[tuple[int, int]]
) -> set[tuple[int, ...]]:
    """Return the blocks that match the number of scales along two axes; several if uncertain."""
    common = _COMMON_BLOCK_SIZES
    candidates = blocks or [*((size, size) for size in common), *((1, size) for size in common)]
    lengths = [length for _, length in pairs]
    matching = {
        tuple(map(min, block, lengths))
        for block in candidates
        if all(
            -(-length // size) == parts for (parts, length), size in zip(pairs, block, strict=True)
        )
    }
    if matching and not blocks and all(length % parts == 0 for parts, length in pairs):
        matching.add(tuple(length // parts for parts, length in pairs))
    return matching


def _quantization_entries(config: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the quantization entries of a config, including those of its towers."""
    for key, value in config.items():
        if key in CONFIG_KEYS:
            if value:
                yield value
        elif isinstance(value, dict):
            yield from _quantization_entries(value)


def _method(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value).lower()
    method = value.get("quant_method") or ("modelopt" if "quant_algo" in value else "")
    return str(method).lower().replace("_", "-")


def _read_quant_file(path: Path) -> Any:
    try:
        return read_json(path)
    except UserError:
        return {}


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield keys and values at any depth, without those of activations and caches."""
    if isinstance(value, list):
        for inner in value:
            yield from _items(inner)
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key not in _NOT_WEIGHTS:
                yield key, inner
                yield from _items(inner)


def _block(key: str, value: Any) -> tuple[int, int] | None:
    """Return the block shape of a config entry, or None if it has none.

    Example:
      >>> _block("group_size", 64), _block("block_structure", "128x64"), _block("bits", 4)
      ((1, 64), (128, 64), None)
    """
    if key == "group_size" and isinstance(value, int) and value > 0:
        return 1, value
    if key not in ("weight_block_size", "block_structure", "block_size"):
        return None
    if isinstance(value, str):
        value = [int(size) for size in re.findall(r"\d+", value)]
    positive = isinstance(value, list) and all(isinstance(x, int) and x > 0 for x in value)
    return (value[0], value[1]) if positive and len(value) == 2 else None


def _transform_problem(items: Sequence[tuple[str, Any]]) -> str:
    """Return what a model uses in addition to codes x scale: rotations, sparse storage; or ''."""
    for key, value in items:
        if key == "transform_config" and any(inner for _, inner in _items(value)):
            return "its weights are rotated (transform_config)"
        if (
            key == "sparsity_config"
            and isinstance(value, dict)
            and value.get("format", "dense") not in (None, "dense")
        ):
            return f"its weights are stored sparse ({value['format']})"
    return ""
