"""Formats of quantized weights: what a config states, how a scale is laid out, what serves codes.

A weight is formed only where the meaning of its codes is certain: from a method whose layout is
known, and from shapes that fit in one way. Everything else is a problem, with how to fix it.
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
QUANT_FILE = "hf_quant_config.json"  # NVIDIA's ModelOpt
HOW_TO_FIX = "load it with transformers, call model.dequantize(), then save_pretrained"
FLOAT8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
INT8 = ("I8", "U8")
# Numbers of 4 or 6 bits in a container of their own.
PACKED = ("F4", "F6_E2M3", "F6_E3M2")
EXPONENTS = "F8_E8M0"
_SCALES = ("F64", "F32", "F16", "BF16")
# Method -> dtypes of codes whose layout is known: [out, in] as torch's Linear stores it, and a
# scale of one axis is that of the rows. EETQ stores [in, out]. The int8 of `fp8` is two FP4 numbers
# in a byte (DeepSeek-V4), that of ModelOpt and TensorRT-LLM was smoothed or interleaved.
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
# Sizes of blocks that libraries use; without a stated size no other is certain.
_COMMON = (16, 32, 64, 128, 256)
_MX = 32  # Codes that share one exponent in the formats of the OCP's microscaling (MX).
# What a config says of other things than weights.
_NOT_WEIGHTS = ("input_activations", "output_activations", "kv_cache_scheme")
# Words of a scale's name that do not say whose it is.
_PLAIN_WORDS = {"inv", "data", "qdata", "point", "factor"}
# Scales of activations and caches: no part of a weight.
_CACHE = {"k", "v", "q", "kv", "cache", "prob"}
_ACTIVATION = {"input", "output", "act", "activation", "quant", "ub"} | _CACHE
_KINDS = ("scal", "zero")
_OTHER_ROLES = re.compile(
    r"scal|zero|amax|absmax|codebook|centroid|smooth|shift|offset|hadamard|"
    r"g_idx|(?:^|_)perm(?:$|_)"
)
_WEIGHT = re.compile(r"\w*weight|\w*proj|w\d*|w[a-z]|q?code|q?data|block|packed|kernel|qidx")
# ComfyUI's markers; that of a layer is JSON in bytes.
OF_ALL_LAYERS, OF_A_LAYER = MARKERS = ("scaled_fp8", "comfy_quant")
_COMFY = {"format": ("float8_e4m3fn", "float8_e5m2"), "full_precision_matrix_mult": (True, False)}


@dataclasses.dataclass(frozen=True)
class Stated:
    """What the files next to a checkpoint say of its quantization.

    Attributes:
      file: The file that says that it is quantized; empty where none does.
      methods: Each `quant_method`, spelled with hyphens.
      blocks: Rows and columns that share one scale, as stated.
      strict: Whether `weight_block_size` is stated: of every weight, not of some.
      bits: Stated bits of a weight.
      problem: Why no weight is formed whatever its codes; empty where that is not so.
    """

    file: str = ""
    methods: frozenset[str] = frozenset()
    blocks: frozenset[tuple[int, int]] = frozenset()
    strict: bool = False
    bits: frozenset[int] = frozenset()
    problem: str = ""


def stated(directory: Path | None) -> Stated:
    """What config.json and hf_quant_config.json of a directory say."""
    if directory is None:
        return Stated()
    said = list(_said(read_config(directory) or {}))
    file = "config.json" if said else ""
    methods = {_method(value) for value in said}
    if (directory / QUANT_FILE).is_file():
        file = QUANT_FILE
        methods = {method for method in methods if method} | {"modelopt"}
        said.append(_quant_file(directory / QUANT_FILE))
    found = [item for value in said for item in _items(value)]
    blocks = {block for key, value in found if (block := _block(key, value))}
    return Stated(
        file,
        frozenset(methods),
        frozenset(blocks),
        any(key == "weight_block_size" and _block(key, value) for key, value in found),
        frozenset(
            value for key, value in found if key in ("bits", "num_bits") and isinstance(value, int)
        ),
        _trouble(found),
    )


def method_problem(said: Stated, info: TensorInfo) -> str:
    """Why the stated method does not tell what codes mean; empty where it does.

    Example:
      >>> method_problem(Stated(methods=frozenset({"eetq"})), TensorInfo((4, 4), "I8"))
      "quant_method 'eetq' is not read here"
      >>> method_problem(Stated(), TensorInfo((4, 4), "I8"))
      ''
    """
    if said.problem:
        return said.problem
    if unknown := sorted(said.methods - QUANT_METHODS.keys()):
        return f"quant_method {unknown[0]!r} is not read here"
    methods = said.methods or {""}
    if not all(info.code in QUANT_METHODS[method] for method in methods):
        return f"{info.code} of quant_method {sorted(methods)[0]!r} is not read here"
    if info.code in INT8 and methods == {""} and said.bits and 8 not in said.bits:
        return f"{info.code} holds {listed(map(str, sorted(said.bits)))} bits"
    return ""


def sizes(
    scale: Sequence[int], shape: Sequence[int], said: Stated | None = None
) -> tuple[int, ...] | str:
    """Numbers along each axis that share one scale; or why that is not certain.

    Example:
      >>> sizes((), (4, 6)), sizes((4,), (4, 6)), sizes((4, 1), (4, 6))
      ((4, 6), (1, 6), (1, 6))
      >>> sizes((2, 4), (256, 512)), sizes((3,), (288, 32))
      ((128, 128), 'its scale [3] does not fit [288, 32]')
    """
    said, scale, shape = said or Stated(), tuple(scale), tuple(shape)
    if all(length == 1 for length in scale):
        return shape
    misfit = f"its scale {list(scale)} does not fit {list(shape)}"
    if len(scale) < len(shape):  # [out] is a scale per row; it never divides the rows.
        rows = scale == shape[: len(scale)] and not said.strict
        return (1,) * len(scale) + shape[len(scale) :] if rows else misfit
    if len(scale) > len(shape):
        return misfit
    pairs = list(zip(scale, shape, strict=True))
    front = tuple(1 if parts == length else length for parts, length in pairs)
    if all(parts in (1, length) for parts, length in pairs) and not said.strict:
        return front
    if len(shape) < 2 or any(parts not in (1, length) for parts, length in pairs[:-2]):
        return misfit
    found = _fitting(pairs[-2:], said.blocks)
    if said.blocks and not found:
        asked = listed(f"{rows} x {columns}" for rows, columns in sorted(said.blocks))
        return f"{misfit} in blocks of {asked}, as {said.file or 'its config'} states"
    if len(found) > 1:
        return f"{misfit} in one way only ({listed(map(str, sorted(found)))})"
    return (*front[:-2], *found.pop()) if found else misfit


def scale_problem(
    local: str, scale: TensorInfo, info: TensorInfo, found: Sequence[int], said: Stated
) -> str:
    """Why a scale's numbers may mean something else; empty where their meaning is certain.

    Args:
      local: The name of the codes in their module.
      scale: The scale.
      info: The codes.
      found: Codes along each axis that share one scale.
      said: What the config states.
    """
    # torchao may store exponents in another order.
    plain = info.code in FLOAT8[:2] and not local.endswith("qdata")
    if scale.code == "U8" and plain and math.prod(scale.shape) > 1:  # MX: bytes are exponents.
        known = {(1, _MX), *(tuple(map(min, block, info.shape[-2:])) for block in said.blocks)}
        if tuple(found[-2:]) in known:
            return ""
    if scale.code == EXPONENTS and plain:
        return ""
    if scale.code in _SCALES:
        return ""
    return f"a scale in {scale.code} of codes in {info.code} is not read here"


def comfy_problem(data: bytes) -> str:
    """Why a layer that ComfyUI marked is not codes x scale; empty where it is.

    Example:
      >>> comfy_problem(b'{"format": "float8_e4m3fn"}'), comfy_problem(b'{"format": "nvfp4"}')
      ('', "comfy_quant says {'format': 'nvfp4'}, which is not read here")
    """
    try:
        said = json.loads(data)
    except ValueError:
        said = None
    if isinstance(said, dict) and all(value in _COMFY.get(key, ()) for key, value in said.items()):
        return ""
    return f"comfy_quant says {said}, which is not read here"


def partners(local: str, tensors: Mapping[str, TensorInfo], kind: str) -> list[str]:
    """Tensors of the same module that have the stem of a name and `kind` in theirs.

    Example:
      >>> module = dict.fromkeys(["weight", "weight_scale", "input_scale", "scale", "k_scale"])
      >>> partners("weight", module, "scal")
      ['scale', 'weight_scale']
    """
    own = words(local)
    return sorted(
        other
        for other in tensors
        if other != local and _has(other, kind) and _stem(other, kind) <= own
    )


def named_after(local: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether a scale or zero point has a tensor's own name in its name: `weight_scale`."""
    return any(_stem(other, kind) for kind in _KINDS for other in partners(local, tensors, kind))


def is_weight_name(local: str) -> bool:
    """Whether a name is one that libraries give to weights or their codes.

    Example:
      >>> [is_weight_name(name) for name in ("qweight", "W_q", "codes", "buckets", "table")]
      [True, True, True, False, False]
    """
    return any(_WEIGHT.fullmatch(word) for word in words(local))


def serves(local: str) -> bool:
    """Whether a name is that of a scale, a zero point, a shift or an order of groups."""
    return any(_has(local, kind) for kind in (*_KINDS, "shift")) or local.endswith("g_idx")


def is_activation(local: str, info: TensorInfo, stored: Collection[str]) -> bool:
    """Whether a tensor is the scale of an activation or cache, next to the codes `stored`.

    It has one element, or one per expert (`gate_up_proj_activation_scale`): the scale of each
    input of a layer, which smooths it, changes the weight too.
    """
    if not any(_has(local, kind) for kind in (*_KINDS, "amax")):
        return False
    rest = {word for word in words(local) if not re.search("scal|zero|amax", word)} - _PLAIN_WORDS
    one = math.prod(info.shape) <= 1
    return any(
        rest & _ACTIVATION
        and rest - words(own) <= _ACTIVATION
        and (one or len(info.shape) == 1 and rest & words(own))
        for own in stored
    )


def cache_scales(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Scales of an attention's cache in a module: those of keys and of values come together."""
    found = {
        other: _stem(other, "scal")
        for other, info in tensors.items()
        if _has(other, "scal") and math.prod(info.shape) <= 1
    }
    found = {other: rest for other, rest in found.items() if rest and rest <= _CACHE}
    rests = list(found.values())
    paired = {"k"} in rests and {"v"} in rests or any("kv" in rest for rest in rests)
    return sorted(found) if paired else []


def other_roles(tensors: Collection[str], known: Collection[str]) -> list[str]:
    """Tensors of a module that seem to serve codes too, in a way that is not known."""
    return sorted(
        other for other in tensors if other not in known and _OTHER_ROLES.search(other.lower())
    )


@functools.lru_cache(maxsize=1 << 16)
def words(local: str) -> frozenset[str]:
    """Words of a name, in the singular."""
    found = (
        word for word in re.split(r"[^A-Za-z0-9]+", local.lower()) if word and not word.isdigit()
    )
    return frozenset(word[:-1] if len(word) > 2 and word.endswith("s") else word for word in found)


def _has(local: str, kind: str) -> bool:
    return any(kind in word for word in words(local))


def _stem(local: str, kind: str) -> set[str]:
    return {word for word in words(local) if kind not in word} - _PLAIN_WORDS


def _fitting(
    pairs: Sequence[tuple[int, int]], blocks: Collection[tuple[int, int]]
) -> set[tuple[int, ...]]:
    """Blocks that give the number of scales along two axes; several where it is not certain."""
    asked = blocks or [*((size, size) for size in _COMMON), *((1, size) for size in _COMMON)]
    lengths = [length for _, length in pairs]
    found = {
        tuple(map(min, block, lengths))
        for block in asked
        if all(
            -(-length // size) == parts for (parts, length), size in zip(pairs, block, strict=True)
        )
    }
    if found and not blocks and all(length % parts == 0 for parts, length in pairs):
        found.add(tuple(length // parts for parts, length in pairs))
    return found


def _said(config: Mapping[str, Any]) -> Iterator[Any]:
    """What a config says of a quantization, in its towers too."""
    for key, value in config.items():
        if key in CONFIG_KEYS:
            if value:
                yield value
        elif isinstance(value, dict):
            yield from _said(value)


def _method(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value).lower()
    method = value.get("quant_method") or ("modelopt" if "quant_algo" in value else "")
    return str(method).lower().replace("_", "-")


def _quant_file(path: Path) -> Any:
    try:
        return read_json(path)
    except UserError:
        return {}


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    """Keys and values at any depth, but for what is said of activations and caches."""
    if isinstance(value, list):
        for inner in value:
            yield from _items(inner)
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key not in _NOT_WEIGHTS:
                yield key, inner
                yield from _items(inner)


def _block(key: str, value: Any) -> tuple[int, int] | None:
    """A stated block of a weight.

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
    whole = isinstance(value, list) and all(isinstance(x, int) and x > 0 for x in value)
    return (value[0], value[1]) if whole and len(value) == 2 else None


def _trouble(found: Sequence[tuple[str, Any]]) -> str:
    """What a model computes beside codes x scale: rotations, sparse storage."""
    for key, value in found:
        if key == "transform_config" and any(inner for _, inner in _items(value)):
            return "its weights are rotated (transform_config)"
        if (
            key == "sparsity_config"
            and isinstance(value, dict)
            and value.get("format", "dense") not in (None, "dense")
        ):
            return f"its weights are stored sparse ({value['format']})"
    return ""
