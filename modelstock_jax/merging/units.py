"""What a tensor's name says: its role, its place, and the merge unit that it lies in.

A merge unit holds the numbers of a model that share one angle. It is defined on a tensor's name and
shape alone, so that training and the command line cut a model in the same places. Nothing here
needs an array, or JAX.
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
# In the order of tables and legends.
ROLES = ("attention", "MLP", "norms", "biases", "embeddings and head", "other")

# The first that is found in a name is its role.
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
# Any number is a block's place in its tower: enough for a picture, too much for a merge unit.
_PLACE = re.compile(r"(?P<tower>.*?)\.(?:block_)?(?P<block>\d+)(?:\.|$)")
_BEFORE = re.compile(r"embed|wte|wpe|patch|conv1|conv_in|pre_l|ln_pre|class_token|time_")
# q, k, v and output projections, in the names of this project, of Hugging Face (CLIP, Llama) and
# of OpenAI and OpenCLIP (`attn.in_proj_weight`).
_ATTENTION = re.compile(
    r"(?P<module>(?:.*\.)?\w*att(?:n|ention))\."
    r"(?P<role>q_proj|k_proj|v_proj|in_proj|out_proj|o_proj)[._](?P<kind>kernel|weight|bias)"
)
_BLOCK = re.compile(r"(?P<block>(?:.*?\.)?(?:layers|layer|blocks|resblocks|h)\.(?:block_)?\d+)\.")
# Tables and bare matrices that PyTorch, too, stores with the output axis last.
_OUTPUT_LAST = re.compile(r"(?:.*\.)?(?:(?:\w*embed\w*|wte|wpe)(?:\.weight)?|text_projection|proj)")


def role(name: str) -> str:
    """What a tensor does: attention, MLP, norms, biases, ..., by its name.

    Example:
      >>> role("model.layers.3.self_attn.q_proj.weight"), role("h.0.ln_1.weight")
      ('attention', 'norms')
    """
    return next((role for role, pattern in _ROLES if pattern.search(name)), "other")


class BlockPosition(NamedTuple):
    """A tensor's tower, and its depth there."""

    tower: str
    depth: float  # the block's number; -1 before the blocks, inf after them


def block_position(names: Sequence[str]) -> list[BlockPosition]:
    """Give each tensor its tower (what stands before the first number) and its block there.

    A tensor with no number goes before or after the blocks of the tower whose name is most alike.

    Args:
      names: of all tensors of a model.

    Returns:
      A `BlockPosition` for each, in order.

    Example:
      >>> names = ["model.embed.weight", "model.layers.0.w", "model.layers.1.w", "model.norm.w"]
      >>> [p.depth for p in block_position(names)]
      [-1.0, 0.0, 1.0, inf]
    """
    found = [_PLACE.match(name) for name in names]
    blocks = defaultdict(set)
    for match in found:
        if match:
            blocks[match["tower"]].add(match["block"])
    towers = [tower for tower, numbers in blocks.items() if len(numbers) > 1] or list(blocks)
    places = []
    for name, match in zip(names, found, strict=True):
        if match and match["tower"] in towers:
            places.append(BlockPosition(match["tower"], float(match["block"])))
        else:
            nearest = max(towers, key=lambda tower: len(commonprefix((tower, name))), default="")
            places.append(BlockPosition(nearest, -1.0 if _BEFORE.search(name) else math.inf))
    return places


@dataclasses.dataclass(frozen=True)
class UnitView:
    """A tensor's part in its unit: seen as `view`, summed over `axes`, it joins the unit `key`.

    The axes of the view that are not summed over are the unit's own shape: `()` where the whole
    tensor lies in one unit, `(F,)` where it lies in F of them.
    """

    key: str
    view: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """Shape of the unit: the lengths of the axes that are kept."""
        return tuple(n for axis, n in enumerate(self.view) if axis not in self.axes)

    @property
    def count(self) -> int:
        """Numbers that this tensor gives to each of its units."""
        return math.prod(self.view[axis] for axis in self.axes)


def assign(
    tensors: Sequence[tuple[str, Sequence[int]]],
    unit: str = "tensor",
    *,
    num_heads: int | Mapping[str, int] | None = None,
    filter_axis: int = -1,
) -> list[UnitView]:
    """Give each tensor its part in a merge unit.

    | `unit` | numbers that share one angle |
    |---|---|
    | `tensor` | each tensor for itself |
    | `layer` | each tensor, with q, k, v of one attention joined: the paper's own unit |
    | `filter` | each output channel; a tensor of one axis is one unit |
    | `head` | the q, k, v and output kernels of one attention head; its q, k, v biases |
    | `block` | a transformer block; the rest as `tensor` |
    | `global` | all |

    Args:
      tensors: names (tree paths joined with dots) and shapes.
      unit: one of `UNITS`.
      num_heads: query heads, for `head`: one number, or a mapping from the beginning of a name
        (`"image_tower"`) to a number. With fewer key-value heads than query heads the unit is a
        key-value head with the query heads that it serves.
      filter_axis: the output axis of kernels: -1 in JAX's layout, 0 in PyTorch's. Embedding
        tables keep theirs last in both.

    Returns:
      One `UnitView` for each tensor, in order.

    Raises:
      UserError: unknown unit, or one that needs names that are not there, or head counts that are
        missing or do not divide the tensor.

    Example:
      >>> names = ["attn.q_proj.kernel", "attn.k_proj.kernel", "mlp.kernel"]
      >>> [part.key for part in assign([(name, (4, 4)) for name in names], "layer")]
      ['attn.in_proj.kernel', 'attn.in_proj.kernel', 'mlp.kernel']
    """
    if unit not in UNITS:
        raise UserError(f"unknown merge unit {unit!r}; one of {', '.join(UNITS)}")
    if filter_axis not in (0, -1):
        raise UserError(f"filter_axis is 0 (PyTorch's layout) or -1 (JAX's), not {filter_axis!r}")
    shaped = [(name, tuple(shape)) for name, shape in tensors]
    if unit == "filter":
        return [_filters(name, shape, filter_axis) for name, shape in shaped]
    if unit == "head":
        return _heads(shaped, num_heads, filter_axis)
    if unit == "global":
        return [_whole("global", shape) for _, shape in shaped]
    if unit == "layer":
        return [_whole(_layer_key(name), shape) for name, shape in shaped]
    if unit == "block":
        known = _transformer_blocks([name for name, _ in shaped])
        if not known:
            raise UserError("unit 'block': no transformer block known by name; take 'tensor'")
        return [_whole(_block(name, known) or name, shape) for name, shape in shaped]
    return [_whole(name, shape) for name, shape in shaped]


def output_axis(name: str, shape: Sequence[int], filter_axis: int = -1) -> int:
    """Index of the output axis of a tensor of two or more axes.

    Example:
      >>> output_axis("mlp.fc1.weight", (8, 2), filter_axis=0)
      0
      >>> output_axis("token_embedding.weight", (8, 2), filter_axis=0)
      1
    """
    last = filter_axis == -1 or (len(shape) < 4 and _OUTPUT_LAST.fullmatch(name))
    return len(shape) - 1 if last else 0


def _whole(key: str, shape: tuple[int, ...]) -> UnitView:
    return UnitView(key, shape, tuple(range(len(shape))))


def _layer_key(name: str) -> str:
    found = _ATTENTION.fullmatch(name)
    if found and found["role"] in ("q_proj", "k_proj", "v_proj"):
        return f"{found['module']}.in_proj.{found['kind']}"
    return name


def _filters(name: str, shape: tuple[int, ...], filter_axis: int) -> UnitView:
    if len(shape) < 2:
        return _whole(name, shape)
    kept = output_axis(name, shape, filter_axis)
    return UnitView(name, shape, tuple(axis for axis in range(len(shape)) if axis != kept))


def _block(name: str, known: frozenset[str]) -> str | None:
    found = _BLOCK.match(name)
    return found["block"] if found and found["block"] in known else None


def _transformer_blocks(names: Sequence[str]) -> frozenset[str]:
    """Blocks that hold an attention: a convolutional `stages.0.blocks.1` is not one."""
    found = (_BLOCK.match(name) for name in names if _ATTENTION.fullmatch(name))
    return frozenset(match["block"] for match in found if match)


def _heads(tensors, num_heads, filter_axis: int) -> list[UnitView]:
    found = [_ATTENTION.fullmatch(name) for name, _ in tensors]
    if not any(found):
        raise UserError("unit 'head': no attention known by name; take 'tensor'")
    if num_heads is None:
        raise UserError("unit 'head' needs num_heads: a number, or a mapping from name to number")
    shapes = {
        (match["module"], match["role"]): shape
        for match, (_, shape) in zip(found, tensors, strict=True)
        if match and match["kind"] != "bias"
    }
    parts = []
    for match, (name, shape) in zip(found, tensors, strict=True):
        if match is None or (match["kind"] == "bias" and match["role"] in ("out_proj", "o_proj")):
            parts.append(_whole(name, shape))
        else:
            heads = _units_of(match["module"], shapes, _lookup(num_heads, name), filter_axis)
            parts.append(_head_part(name, shape, match, heads, filter_axis))
    return parts


def _units_of(module: str, shapes: dict, heads: int, filter_axis: int) -> int:
    """Heads of one attention; key-value heads where they are fewer (grouped queries)."""
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


def _head_part(name: str, shape: tuple[int, ...], match, heads: int, filter_axis: int) -> UnitView:
    bias = match["kind"] == "bias"
    if len(shape) != (1 if bias else 2):
        raise UserError(f"unit 'head': {name} has shape {shape}, not that of an attention tensor")
    output = 0 if bias else filter_axis % 2
    # The output projection is cut along its input: that is where the heads arrive.
    axis = 1 - output if match["role"] in ("out_proj", "o_proj") else output
    joined = (3,) if match["role"] == "in_proj" else ()
    if shape[axis] % (heads * math.prod(joined)):
        raise UserError(f"num_heads = {heads} does not divide {name} of shape {shape}")
    split = (*joined, heads, shape[axis] // (heads * math.prod(joined)))
    view = shape[:axis] + split + shape[axis + 1 :]
    kept = axis + len(joined)
    key = f"{match['module']}.{'head_biases' if bias else 'head_kernels'}"
    return UnitView(key, view, tuple(a for a in range(len(view)) if a != kept))


def _lookup(num_heads: int | Mapping[str, int], name: str) -> int:
    if isinstance(num_heads, Mapping):
        fitting = [p for p in num_heads if p in ("", name) or name.startswith(p + ".")]
        if not fitting:
            raise UserError(
                f"num_heads has no entry for {name}; its keys begin names, like "
                f"{name.split('.')[0]!r}"
            )
        num_heads = num_heads[max(fitting, key=len)]
    if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1:
        raise UserError(f"num_heads must be a positive whole number, not {num_heads!r}")
    return num_heads
