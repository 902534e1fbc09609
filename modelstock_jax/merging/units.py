"""Merge unit of a tensor, from its name and shape.

A merge unit is the set of elements that share one angle. It depends only on names and shapes, so
training and the command line split a model identically. This module needs neither arrays nor JAX.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import re
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from modelstock_jax.errors import UserError, listed
from modelstock_jax.merging.attention_names import (
    QKV_NAMES,
    Projection,
    is_fused,
    network_blocks,
    projections,
    residual_blocks,
)

# A unit of the user's own: tensors with equal keys are one unit; None is the tensor by itself.
UnitFunction = Callable[[str, tuple[int, ...]], Hashable]
Shaped = list[tuple[str, tuple[int, ...]]]

UNITS = ("tensor", "layer", "filter", "head", "block", "global")
# Embedding tables and bare matrices: the output axis is last in PyTorch too.
_OUTPUT_LAST = re.compile(
    r"(?:.*\.)?(?:(?:\w*embed\w*|wte|wpe)(?:\.weight)?|text_projection|proj|register_tokens)"
)
# One vector, which some libraries store with axes of length 1.
_VECTOR = re.compile(r"(?:.*[./])?(?:(?:cls|mask|distillation)_token|probe|grn[./]\w+)")


@dataclasses.dataclass(frozen=True)
class UnitView:
    """How a tensor contributes to merge units: reshape it to `view`, then sum over `axes`.

    The remaining axes of the view are the unit shape: `()` if the entire tensor belongs to one
    unit, `(F,)` if it is split over F units.

    Attributes:
      key: name of the unit; tensors with the same key share their units
      view: shape to reshape the tensor to
      axes: axes of the view that a unit sums over
      swapped: whether the two remaining axes of the view are in the opposite order of the unit
        shape: heads before layers, in a tensor that stacks layers
    """

    key: str
    view: tuple[int, ...]
    axes: tuple[int, ...]
    swapped: bool = False

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """Shape of the unit: the lengths of the axes that are not summed over."""
        shape = tuple(n for axis, n in enumerate(self.view) if axis not in self.axes)
        return shape[::-1] if self.swapped else shape

    @property
    def count(self) -> int:
        """Number of elements of this tensor in each of its units."""
        return math.prod(self.view[axis] for axis in self.axes)

    def swap(self, values: Any) -> Any:
        """Convert [..., *unit shape] to the axis order of the view, or back."""
        return values.swapaxes(-1, -2) if self.swapped else values


def assign(
    tensors: Sequence[tuple[str, Sequence[int]]],
    unit: str | UnitFunction = "tensor",
    *,
    num_heads: int | Mapping[str, int] | None = None,
    filter_axis: int = -1,
    scan_axes: Mapping[str, int] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> list[UnitView]:
    """Return the merge unit of each tensor.

    | `unit` | elements that share one angle |
    |---|---|
    | `tensor` | each tensor |
    | `layer` | each tensor, with q, k and v of one attention joined: the paper's own unit |
    | `filter` | each output channel, or head of an attention; a tensor of one axis is one unit |
    | `head` | the q, k, v and output kernels of one attention head; its q, k, v biases |
    | `block` | a transformer block, a residual block of a ConvNeXt or ResNet; others: `tensor` |
    | `global` | all elements |
    | a function | the tensors for which `function(name, shape)` returns the same key |

    Attention kernels of flax have the shape [D, H, head dim] (the output kernel [H, head dim, D]),
    their biases [H, head dim]. H is the unit axis of query, key and value under `filter` and of all
    of them under `head`.

    Args:
      tensors: names (tree paths joined with dots) and shapes
      unit: one of `UNITS`, or a function of name and shape that returns a hashable key. None as key
        is the tensor by itself.
      num_heads: number of query heads, for `head`: an integer, or a mapping from name prefix
        (`"image_tower"`) to integer. If there are fewer key-value heads than query heads, a unit is
        a key-value head with the query heads that use it. Not needed if heads are an axis.
      filter_axis: output axis of kernels: -1 in JAX's layout, 0 in PyTorch's. The output axis of
        embedding tables is last in both.
      scan_axes: for tensors that stack layers (`nn.scan`, MaxText): a mapping from name prefix
        (`""` for all) to the axis of the layers. Each layer then has its own units, and that axis
        is part of the unit shape. Names and shapes are otherwise those of one layer.
      on_note: receives a note if the unit joined nothing; default: `warnings.warn`, once per model

    Returns:
      one `UnitView` per tensor, in order

    Raises:
      UserError: an unknown unit; a unit that requires names that do not occur; head counts that
        are missing or do not divide the tensor; a prefix or an axis of `scan_axes` that does not
        exist; a function that raises an error or returns a key that is not hashable.

    Example:
      >>> names = ["attn.q_proj.kernel", "attn.k_proj.kernel", "mlp.kernel"]
      >>> [view.key for view in assign([(name, (4, 4)) for name in names], "layer")]
      ['attn.in_proj.kernel', 'attn.in_proj.kernel', 'mlp.kernel']
      >>> assign([("layers.kernel", (12, 4, 4))], scan_axes={"layers": 0})[0].unit_shape
      (12,)
    """
    check_unit(unit)
    if filter_axis not in (0, -1):
        raise UserError(f"filter_axis must be 0 (PyTorch) or -1 (JAX), not {filter_axis!r}")
    if unit == "global" and scan_axes:
        raise UserError(
            "unit 'global' is one unit of all layers, so scan_axes does not apply to it; leave out "
            "scan_axes, or use another unit"
        )
    shaped = [(name, tuple(shape)) for name, shape in tensors]
    stacks = _layer_axes(shaped, {} if scan_axes is None else scan_axes)
    layers = [
        (name, shape[:axis] + shape[axis + 1 :]) if axis is not None else (name, shape)
        for (name, shape), (_, axis) in zip(shaped, stacks, strict=True)
    ]
    found = projections(dict(layers)) if unit in ("layer", "filter", "head", "block") else {}
    if callable(unit):
        views = _views_of_function(layers, unit)
    elif unit == "filter":
        views = [_filter_view(name, shape, filter_axis, found.get(name)) for name, shape in layers]
    elif unit == "head":
        views = _head_views(layers, found, num_heads, filter_axis)
    elif unit == "block":
        views = _block_views(layers, found, [prefix for prefix, _ in stacks])
    else:
        keys = {"global": dict.fromkeys(dict(layers), "global"), "layer": _layer_keys(found)}
        views = [_one_unit(keys.get(unit, {}).get(name, name), shape) for name, shape in layers]
    views = [
        view if axis is None else _stack(view, shape, axis, layers_first=unit == "head")
        for view, (_, shape), (_, axis) in zip(views, shaped, stacks, strict=True)
    ]
    _check_unit_shapes(shaped, views)
    if unit == "layer" and not joined(views) and not any(is_fused(name) for name, _ in layers):
        (on_note or _warn_once)(_nothing_joined(tuple(name for name, _ in layers)))
    return views


def check_unit(unit: Any) -> None:
    """Raise a UserError if `unit` is neither one of `UNITS` nor a function."""
    if not callable(unit) and not (isinstance(unit, str) and unit in UNITS):
        raise UserError(
            f"unknown merge unit {unit!r}; choose one of {', '.join(UNITS)}, or pass a function of "
            "name and shape"
        )


def unit_name(unit: str | UnitFunction) -> str:
    """Return the name of a unit for reports: the unit, or the name of the function.

    Example:
      >>> def experts(name, shape): return None
      >>> unit_name("layer"), unit_name(experts)
      ('layer', 'experts')
    """
    return unit if isinstance(unit, str) else getattr(unit, "__name__", type(unit).__name__)


def joined(views: Iterable[UnitView | None]) -> int:
    """Return the number of units that consist of more than one tensor.

    Args:
      views: as returned by `assign`; None for tensors that are not merged

    Example:
      >>> joined(assign([(f"attn.{name}_proj.kernel", (4, 4)) for name in "qkv"], "layer"))
      1
    """
    counts = Counter(view.key for view in views if view is not None)
    return sum(count > 1 for count in counts.values())


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


def layer_axes(
    tensors: Sequence[tuple[str, Sequence[int]]], scan_axes: Mapping[str, int] | None
) -> list[int | None]:
    """Return the axis of the stacked layers of each tensor, or None.

    Args:
      tensors: names and shapes
      scan_axes: as in `assign`

    Example:
      >>> layer_axes([("layers.kernel", (12, 4, 4)), ("head.kernel", (4, 2))], {"layers": 0})
      [0, None]
    """
    shaped = [(name, tuple(shape)) for name, shape in tensors]
    return [axis for _, axis in _layer_axes(shaped, {} if scan_axes is None else scan_axes)]


def _nothing_joined(names: tuple[str, ...]) -> str:
    known = "; ".join(", ".join(names) for names in QKV_NAMES)
    return (
        "unit 'layer' found no attention whose query, key and value it can join, so it equals unit "
        f"'tensor'; names that it knows: {known}; the first tensor here is {names[0]!r}; to join "
        "others, the library takes a function as unit"
    )


@functools.lru_cache(maxsize=256)
def _warn_once(message: str) -> None:
    # A series of merges of one model warns once; the message contains a name of the model.
    warnings.warn(message, UserWarning, stacklevel=3)


def _one_unit(key: str, shape: tuple[int, ...]) -> UnitView:
    return UnitView(key, shape, tuple(range(len(shape))))


def _all_but(key: str, view: tuple[int, ...], unit_axis: int) -> UnitView:
    return UnitView(key, view, tuple(axis for axis in range(len(view)) if axis != unit_axis))


def _layer_keys(found: Mapping[str, Projection]) -> dict[str, str]:
    return {
        name: f"{p.attention}.in_proj.{p.kind}" if p.attention else f"in_proj.{p.kind}"
        for name, p in found.items()
        if p.role in ("q", "k", "v")
    }


def _filter_view(
    name: str, shape: tuple[int, ...], filter_axis: int, projection: Projection | None
) -> UnitView:
    if len(shape) < 2 or _VECTOR.fullmatch(name):
        return _one_unit(name, shape)
    if projection is not None and projection.per_head and projection.role != "out":
        return _all_but(name, shape, len(shape) - 2)
    return _all_but(name, shape, output_axis(name, shape, filter_axis))


def _block_views(
    tensors: Shaped, found: Mapping[str, Projection], stacks: Sequence[str | None]
) -> list[UnitView]:
    names = [name for name, _ in tensors]
    stacked = {n: stack for n, stack in zip(names, stacks, strict=True) if stack is not None}
    blocks = network_blocks(names, found, stacked)
    if not blocks:
        raise UserError(
            "unit 'block': no tensor has the name of a supported transformer block; use unit "
            "'tensor'"
        )
    return [
        _one_unit((blocks[name] or "(root)") if name in blocks else name, shape)
        for name, shape in tensors
    ]


def _views_of_function(tensors: Shaped, function: UnitFunction) -> list[UnitView]:
    keys = [_key_of_function(function, name, shape) for name, shape in tensors]
    names = {name for (name, _), key in zip(tensors, keys, strict=True) if key is None}
    name_of_key: dict[Hashable, str] = {}
    for key in dict.fromkeys(keys):
        if key is not None:
            text = str(key)
            while text in names:  # 1 and "1" are different keys
                text += "'"
            names.add(text)
            name_of_key[key] = text
    return [
        _one_unit(name if key is None else name_of_key[key], shape)
        for (name, shape), key in zip(tensors, keys, strict=True)
    ]


def _key_of_function(function: UnitFunction, name: str, shape: tuple[int, ...]) -> Hashable:
    what = f"unit {unit_name(function)!r}"
    try:
        key = function(name, shape)
    except Exception as error:
        raise UserError(
            f"{what}: the function raised {type(error).__name__} ({error}) for tensor {name!r} of "
            f"shape {shape}; it must return a hashable key, or None"
        ) from error
    try:
        hash(key)
    except TypeError:
        raise UserError(
            f"{what}: the function returned a {type(key).__name__} for tensor {name!r}, which is "
            "not hashable; return a string, a number, a tuple or None"
        ) from None
    return key


def _head_views(
    tensors: Shaped, found: Mapping[str, Projection], num_heads: Any, filter_axis: int
) -> list[UnitView]:
    split = {  # attentions of a new name whose tensors are convolutions are not split
        name: found[name]
        for name, shape in tensors
        if name in found
        and not (found[name].is_bias and found[name].role == "out")
        and (found[name].known_alone or found[name].per_head or len(shape) < 3)
    }
    if not split:
        if residual_blocks(name for name, _ in tensors):
            raise UserError(
                "unit 'head': this network of convolutions has no attention; use unit 'block', "
                "'filter' or 'tensor'"
            )
        raise UserError(
            "unit 'head': no tensor has the name of a supported attention; use unit 'tensor'"
        )
    if num_heads is None and not all(p.per_head for p in split.values()):
        raise UserError(
            "unit 'head' needs num_heads: an integer, or a mapping from name prefix to integer"
        )
    shapes = {
        (p.attention, p.role): shape
        for name, shape in tensors
        if (p := split.get(name)) and not p.is_bias
    }
    views = []
    for name, shape in tensors:
        if (p := split.get(name)) is None:
            views.append(_one_unit(name, shape))
        elif p.per_head:
            views.append(_per_head_view(name, shape, p, shapes, num_heads))
        else:
            heads = _num_head_units(p.attention, shapes, _heads_of(num_heads, name), filter_axis)
            views.append(_head_view(name, shape, p, heads, filter_axis))
    return views


def _per_head_view(
    name: str, shape: tuple[int, ...], p: Projection, shapes: Mapping, num_heads: Any
) -> UnitView:
    """Return the view of a tensor with an axis of heads."""
    heads, key_value_heads = (shapes[p.attention, role][1] for role in "qk")
    if num_heads is not None and _heads_of(num_heads, name, heads) != heads:
        raise UserError(
            f"num_heads = {_heads_of(num_heads, name)}, but {name} has {heads} query heads; leave "
            "out num_heads"
        )
    axis = 0 if p.role == "out" or p.is_bias else 1
    view = shape[:axis] + (key_value_heads, shape[axis] // key_value_heads) + shape[axis + 1 :]
    return _all_but(_head_key(p), view, axis)


def _head_key(p: Projection) -> str:
    kind = "head_biases" if p.is_bias else "head_kernels"
    return f"{p.attention}.{kind}" if p.attention else kind


def _num_head_units(attention: str, shapes: Mapping, heads: int, filter_axis: int) -> int:
    """Return the number of heads, or of key-value heads if there are fewer (grouped queries)."""
    query, key = shapes.get((attention, "q")), shapes.get((attention, "k"))
    if query is None or key is None or len(query) != 2 or len(key) != 2:
        return heads
    width = query[filter_axis]
    if width % heads or key[filter_axis] % (width // heads):
        raise UserError(
            f"num_heads = {heads} does not divide {attention}: query width {width}, "
            f"key width {key[filter_axis]}"
        )
    return key[filter_axis] // (width // heads)


def _head_view(
    name: str, shape: tuple[int, ...], p: Projection, heads: int, filter_axis: int
) -> UnitView:
    if len(shape) != (1 if p.is_bias else 2):
        raise UserError(
            f"unit 'head': {name} has shape {shape}, not the shape of an attention tensor"
        )
    output = 0 if p.is_bias else filter_axis % 2
    # The output projection is split along its input axis, where the heads are concatenated.
    axis = 1 - output if p.role == "out" else output
    qkv = (3,) if p.role == "qkv" else ()
    if shape[axis] % (heads * math.prod(qkv)):
        raise UserError(f"num_heads = {heads} does not divide {name} of shape {shape}")
    split = (*qkv, heads, shape[axis] // (heads * math.prod(qkv)))
    view = shape[:axis] + split + shape[axis + 1 :]
    return _all_but(_head_key(p), view, axis + len(qkv))


def _heads_of(num_heads: int | Mapping[str, int], name: str, default: int | None = None) -> int:
    if isinstance(num_heads, Mapping):
        prefix = _longest_prefix(num_heads, name)
        if prefix is None and default is not None:
            return default
        if prefix is None:
            raise UserError(
                f"num_heads has no entry for {name}; add a name prefix such as "
                f"{name.split('.')[0]!r}"
            )
        num_heads = num_heads[prefix]
    heads = _as_integer(num_heads)
    if heads is None or heads < 1:
        raise UserError(f"num_heads must be a positive integer, not {num_heads!r}")
    return heads


def _as_integer(value: Any) -> int | None:
    """Return a Python, NumPy or JAX integer as int; None for anything else, also for bools."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _longest_prefix(mapping: Mapping[str, Any], name: str) -> str | None:
    if wrong := [p for p in mapping if not isinstance(p, str)]:
        raise UserError(f"a name prefix must be a string, such as 'layers', not {wrong[0]!r}")
    prefixes = [p for p in mapping if p in ("", name) or name.startswith((p + ".", p + "/"))]
    return max(prefixes, key=len, default=None)


def _layer_axes(
    tensors: Shaped, scan_axes: Mapping[str, int]
) -> list[tuple[str | None, int | None]]:
    """Return the prefix in `scan_axes` and the axis of the layers of each tensor, or Nones."""
    if not isinstance(scan_axes, Mapping):
        raise UserError(
            "scan_axes must be a mapping from name prefix to axis, for example "
            f"{{'layers': 0}}, not {scan_axes!r}"
        )
    stacks: list[tuple[str | None, int | None]] = []
    for name, shape in tensors:
        prefix = _longest_prefix(scan_axes, name)
        if prefix is None:
            stacks.append((None, None))
            continue
        axis = _as_integer(scan_axes[prefix])
        if axis is None:
            raise UserError(f"scan_axes[{prefix!r}] must be an integer, not {scan_axes[prefix]!r}")
        if not -len(shape) <= axis < len(shape):
            raise UserError(
                f"scan_axes[{prefix!r}] = {axis} is out of range for tensor {name!r} of shape "
                f"{shape}; choose the axis of its layers, or a longer prefix"
            )
        stacks.append((prefix, axis % len(shape)))
    if unused := scan_axes.keys() - {prefix for prefix, _ in stacks}:
        raise UserError(
            f"scan_axes: no tensor's name starts with {listed(map(repr, sorted(unused)))}; the "
            f"first tensor is {tensors[0][0] if tensors else '(none)'!r}"
        )
    return stacks


def _stack(view: UnitView, shape: tuple[int, ...], axis: int, layers_first: bool) -> UnitView:
    """Add the axis of the layers to the view of one layer."""
    position = axis
    if len(view.view) != len(shape) - 1:  # an axis is split into heads
        before = math.prod(shape[:axis])
        position = next(k for k in range(len(view.view)) if math.prod(view.view[:k]) == before)
    axes = tuple(a + (a >= position) for a in view.axes)
    stacked = UnitView(view.key, view.view[:position] + (shape[axis],) + view.view[position:], axes)
    unit_axes = [a for a in range(len(stacked.view)) if a not in axes]
    return dataclasses.replace(stacked, swapped=layers_first and unit_axes[0] != position)


def _check_unit_shapes(tensors: Shaped, views: Sequence[UnitView]) -> None:
    first: dict[str, tuple[str, UnitView]] = {}
    for (name, _), view in zip(tensors, views, strict=True):
        other, other_view = first.setdefault(view.key, (name, view))
        if view.unit_shape != other_view.unit_shape:
            raise UserError(
                f"unit {view.key!r} joins tensors that stack different numbers of layers: {other} "
                f"{other_view.unit_shape} and {name} {view.unit_shape}; check scan_axes"
            )
