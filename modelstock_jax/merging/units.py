"""Role, block position and merge unit of a tensor, from its name and shape.

A merge unit is the set of elements that share one angle. It depends only on names and shapes, so
training and the command line split a model identically. This module needs neither arrays nor JAX.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from os.path import commonprefix
from typing import NamedTuple

from modelstock_jax.errors import UserError

UNITS = ("tensor", "layer", "filter", "head", "block", "global")
# Roles of tensors, in the order of tables and legends.
ROLES = ("attention", "MLP", "norms", "biases", "embeddings and head", "other")

# The first pattern that matches a name determines its role.
_ROLES = (
    ("norms", re.compile(r"norm|(?:^|[._])ln(?:[._]|$)|ln_\w+|\bbn\d*\b|layer_scale")),
    ("biases", re.compile(r"bias$|_b$")),
    ("attention", re.compile(r"att(?:n|ention)|[._][qkv]_?proj|\bto_[qkv]\b")),
    ("MLP", re.compile(r"mlp|feed_?forward|\bff\b|\bffn\b|fc\d|experts|dense|c_proj|c_fc")),
    (
        "embeddings and head",
        re.compile(r"embed|wte|wpe|lm_head|classifier|projection|head|\bproj$"),
    ),
)
# Takes any number as the block index. This is enough for figures, but too loose for merge units.
_BLOCK_INDEX = re.compile(r"(?P<tower>.*?)\.(?:block_)?(?P<block>\d+)(?:\.|$)")
_BEFORE_BLOCKS = re.compile(r"embed|wte|wpe|patch|conv1|conv_in|pre_l|ln_pre|class_token|time_")
# q, k, v and output projections as named by this project, Hugging Face (CLIP, Llama), OpenAI and
# OpenCLIP (`attn.in_proj_weight`).
_ATTENTION = re.compile(
    r"(?P<module>(?:.*\.)?\w*att(?:n|ention))\."
    r"(?P<role>q_proj|k_proj|v_proj|in_proj|out_proj|o_proj)[._](?P<kind>kernel|weight|bias)"
)
_BLOCK = re.compile(r"(?P<block>(?:.*?\.)?(?:layers|layer|blocks|resblocks|h)\.(?:block_)?\d+)\.")
# Embedding tables and bare matrices: the output axis is last in PyTorch too.
_OUTPUT_LAST = re.compile(r"(?:.*\.)?(?:(?:\w*embed\w*|wte|wpe)(?:\.weight)?|text_projection|proj)")


def role(name: str) -> str:
    """Return the role of a tensor (one of `ROLES`) from its name.

    Example:
      >>> role("model.layers.3.self_attn.q_proj.weight"), role("h.0.ln_1.weight")
      ('attention', 'norms')
    """
    return next((role for role, pattern in _ROLES if pattern.search(name)), "other")


class BlockPosition(NamedTuple):
    """Position of a tensor in a model.

    Attributes:
      tower: name prefix of the tower
      depth: index of the block in the tower; -1 before the blocks, inf after them
    """

    tower: str
    depth: float


def block_position(names: Sequence[str]) -> list[BlockPosition]:
    """Return the tower (the name before the first number) and the block index of each tensor.

    A tensor without a number is placed before or after the blocks of the tower with the longest
    common name prefix.

    Args:
      names: names of all tensors of a model

    Returns:
      one `BlockPosition` per tensor, in order

    Example:
      >>> names = ["model.embed.weight", "model.layers.0.w", "model.layers.1.w", "model.norm.w"]
      >>> [p.depth for p in block_position(names)]
      [-1.0, 0.0, 1.0, inf]
    """
    matches = [_BLOCK_INDEX.match(name) for name in names]
    blocks = defaultdict(set)
    for match in matches:
        if match:
            blocks[match["tower"]].add(match["block"])
    towers = [tower for tower, indices in blocks.items() if len(indices) > 1] or list(blocks)
    positions = []
    for name, match in zip(names, matches, strict=True):
        if match and match["tower"] in towers:
            positions.append(BlockPosition(match["tower"], float(match["block"])))
        else:
            nearest = max(towers, key=lambda tower: len(commonprefix((tower, name))), default="")
            depth = -1.0 if _BEFORE_BLOCKS.search(name) else math.inf
            positions.append(BlockPosition(nearest, depth))
    return positions


@dataclasses.dataclass(frozen=True)
class UnitView:
    """How a tensor contributes to merge units: reshape it to `view`, then sum over `axes`.

    The remaining axes of the view are the unit shape: `()` if the entire tensor belongs to one
    unit, `(F,)` if it is split over F units.

    Attributes:
      key: name of the unit; tensors with the same key share their units
      view: shape to reshape the tensor to
      axes: axes of the view that a unit sums over
    """

    key: str
    view: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """Shape of the unit: the lengths of the axes that are not summed over."""
        return tuple(n for axis, n in enumerate(self.view) if axis not in self.axes)

    @property
    def count(self) -> int:
        """Number of elements of this tensor in each of its units."""
        return math.prod(self.view[axis] for axis in self.axes)


def assign(
    tensors: Sequence[tuple[str, Sequence[int]]],
    unit: str = "tensor",
    *,
    num_heads: int | Mapping[str, int] | None = None,
    filter_axis: int = -1,
) -> list[UnitView]:
    """Return the merge unit of each tensor.

    | `unit` | elements that share one angle |
    |---|---|
    | `tensor` | each tensor |
    | `layer` | each tensor, with q, k and v of one attention joined: the paper's own unit |
    | `filter` | each output channel; a tensor of one axis is one unit |
    | `head` | the q, k, v and output kernels of one attention head; its q, k, v biases |
    | `block` | a transformer block; other tensors as in `tensor` |
    | `global` | all elements |

    Args:
      tensors: names (tree paths joined with dots) and shapes
      unit: one of `UNITS`
      num_heads: number of query heads, for `head`: an integer, or a mapping from name prefix
        (`"image_tower"`) to integer. If there are fewer key-value heads than query heads, a unit is
        a key-value head with the query heads that use it.
      filter_axis: output axis of kernels: -1 in JAX's layout, 0 in PyTorch's. The output axis of
        embedding tables is last in both.

    Returns:
      one `UnitView` per tensor, in order

    Raises:
      UserError: an unknown unit; a unit that requires names that do not occur; head counts that
        are missing or do not divide the tensor.

    Example:
      >>> names = ["attn.q_proj.kernel", "attn.k_proj.kernel", "mlp.kernel"]
      >>> [view.key for view in assign([(name, (4, 4)) for name in names], "layer")]
      ['attn.in_proj.kernel', 'attn.in_proj.kernel', 'mlp.kernel']
    """
    if unit not in UNITS:
        hint = "" if isinstance(unit, str) else " (the third argument is the unit)"
        raise UserError(f"unknown merge unit {unit!r}{hint}; choose one of {', '.join(UNITS)}")
    if filter_axis not in (0, -1):
        raise UserError(f"filter_axis must be 0 (PyTorch) or -1 (JAX), not {filter_axis!r}")
    shaped = [(name, tuple(shape)) for name, shape in tensors]
    if unit == "filter":
        return [_filter_view(name, shape, filter_axis) for name, shape in shaped]
    if unit == "head":
        return _head_views(shaped, num_heads, filter_axis)
    if unit == "global":
        return [_one_unit("global", shape) for _, shape in shaped]
    if unit == "layer":
        return [_one_unit(_layer_key(name), shape) for name, shape in shaped]
    if unit == "block":
        blocks = _transformer_blocks([name for name, _ in shaped])
        if not blocks:
            raise UserError(
                "unit 'block': no tensor has the name of a supported transformer block; use unit "
                "'tensor'"
            )
        return [_one_unit(_block_key(name, blocks) or name, shape) for name, shape in shaped]
    return [_one_unit(name, shape) for name, shape in shaped]


def output_axis(name: str, shape: Sequence[int], filter_axis: int = -1) -> int:
    """Return the index of the output axis of a tensor of two or more axes.

    Example:
      >>> output_axis("mlp.fc1.weight", (8, 2), filter_axis=0)
      0
      >>> output_axis("token_embedding.weight", (8, 2), filter_axis=0)
      1
    """
    last = filter_axis == -1 or (len(shape) < 4 and _OUTPUT_LAST.fullmatch(name))
    return len(shape) - 1 if last else 0


def _one_unit(key: str, shape: tuple[int, ...]) -> UnitView:
    return UnitView(key, shape, tuple(range(len(shape))))


def _layer_key(name: str) -> str:
    match = _ATTENTION.fullmatch(name)
    if match and match["role"] in ("q_proj", "k_proj", "v_proj"):
        return f"{match['module']}.in_proj.{match['kind']}"
    return name


def _filter_view(name: str, shape: tuple[int, ...], filter_axis: int) -> UnitView:
    if len(shape) < 2:
        return _one_unit(name, shape)
    output = output_axis(name, shape, filter_axis)
    return UnitView(name, shape, tuple(axis for axis in range(len(shape)) if axis != output))


def _block_key(name: str, blocks: frozenset[str]) -> str | None:
    match = _BLOCK.match(name)
    return match["block"] if match and match["block"] in blocks else None


def _transformer_blocks(names: Sequence[str]) -> frozenset[str]:
    """Return the blocks that contain an attention; a convolutional `stages.0.blocks.1` does not."""
    matches = (_BLOCK.match(name) for name in names if _ATTENTION.fullmatch(name))
    return frozenset(match["block"] for match in matches if match)


def _head_views(tensors, num_heads, filter_axis: int) -> list[UnitView]:
    matches = [_ATTENTION.fullmatch(name) for name, _ in tensors]
    if not any(matches):
        raise UserError(
            "unit 'head': no tensor has the name of a supported attention; use unit 'tensor'"
        )
    if num_heads is None:
        raise UserError(
            "unit 'head' needs num_heads: an integer, or a mapping from name prefix to integer"
        )
    shapes = {
        (match["module"], match["role"]): shape
        for match, (_, shape) in zip(matches, tensors, strict=True)
        if match and match["kind"] != "bias"
    }
    views = []
    for match, (name, shape) in zip(matches, tensors, strict=True):
        if match is None or (match["kind"] == "bias" and match["role"] in ("out_proj", "o_proj")):
            views.append(_one_unit(name, shape))
        else:
            heads = _num_head_units(
                match["module"], shapes, _heads_of(num_heads, name), filter_axis
            )
            views.append(_head_view(name, shape, match, heads, filter_axis))
    return views


def _num_head_units(module: str, shapes: dict, heads: int, filter_axis: int) -> int:
    """Return the number of heads, or of key-value heads if there are fewer (grouped queries)."""
    query, key = shapes.get((module, "q_proj")), shapes.get((module, "k_proj"))
    if query is None or key is None or len(query) != 2 or len(key) != 2:
        return heads
    width = query[filter_axis]
    if width % heads or key[filter_axis] % (width // heads):
        raise UserError(
            f"num_heads = {heads} does not divide {module}: query width {width}, "
            f"key width {key[filter_axis]}"
        )
    return key[filter_axis] // (width // heads)


def _head_view(name: str, shape: tuple[int, ...], match, heads: int, filter_axis: int) -> UnitView:
    bias = match["kind"] == "bias"
    if len(shape) != (1 if bias else 2):
        raise UserError(
            f"unit 'head': {name} has shape {shape}, not the shape of an attention tensor"
        )
    output = 0 if bias else filter_axis % 2
    # The output projection is split along its input axis, where the heads are concatenated.
    axis = 1 - output if match["role"] in ("out_proj", "o_proj") else output
    qkv = (3,) if match["role"] == "in_proj" else ()
    if shape[axis] % (heads * math.prod(qkv)):
        raise UserError(f"num_heads = {heads} does not divide {name} of shape {shape}")
    split = (*qkv, heads, shape[axis] // (heads * math.prod(qkv)))
    view = shape[:axis] + split + shape[axis + 1 :]
    head_axis = axis + len(qkv)
    key = f"{match['module']}.{'head_biases' if bias else 'head_kernels'}"
    return UnitView(key, view, tuple(a for a in range(len(view)) if a != head_axis))


def _heads_of(num_heads: int | Mapping[str, int], name: str) -> int:
    if isinstance(num_heads, Mapping):
        prefixes = [p for p in num_heads if p in ("", name) or name.startswith(p + ".")]
        if not prefixes:
            raise UserError(
                f"num_heads has no entry for {name}; add a name prefix such as "
                f"{name.split('.')[0]!r}"
            )
        num_heads = num_heads[max(prefixes, key=len)]
    if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1:
        raise UserError(f"num_heads must be a positive integer, not {num_heads!r}")
    return num_heads
