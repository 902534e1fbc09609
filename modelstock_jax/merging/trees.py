"""Trees of anchor and replicas: stacking, names of the leaves, checks that the trees match.

`pair_leaves` flattens anchor and replicas into lists of named tensors.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from modelstock_jax.errors import UserError, listed
from modelstock_jax.merging.placement import place_like

PyTree = Any  # nested containers with arrays as leaves, as `jax.tree` sees them

# A flax.nnx state wraps each array in a variable, whose key is not part of the tensor's name.
_VARIABLE = jax.tree_util.GetAttrKey("value")
# Maximum number of characters of one name in a message, and of a list of names.
_NAME_LENGTH = 60
_NAMES_LENGTH = 100
_CONVERSIONS = {"FrozenDict": "flax.core.unfreeze", "State": "flax.nnx.to_pure_dict"}


class Leaves(NamedTuple):
    """Anchor and replicas as flat lists, in the order of the tree's leaves.

    Attributes:
      names: names of the tensors
      pretrained: arrays [...]
      finetuned: arrays [N, ...]
      treedef: structure of `pretrained`
      num_replicas: N
    """

    names: tuple[str, ...]
    pretrained: list
    finetuned: list
    treedef: Any
    num_replicas: int


def stack_replicas(replicas: Iterable[Any], *more: Any) -> PyTree:
    """Stack trees of equal structure into one tree with a leading replica axis.

    Floating arrays of different dtype are promoted to their common dtype. Typed PRNG keys
    (`jax.random.key`) are stacked like integers. Arrays in host memory are copied to the device.

    Args:
      replicas: one or more trees with the same structure and shapes: a list, a generator, or any
        other sequence
      *more: raises an error that explains `stack_replicas([a, b])`

    Returns:
      a tree of [N, ...] arrays

    Raises:
      UserError: no tree, one tree instead of a sequence, trees of different structure, or tensors
        of different shape or kind

    Example:
      >>> stack_replicas([{"w": jnp.zeros(3)}, {"w": jnp.ones(3)}])["w"].shape
      (2, 3)
    """
    if more or not is_sequence(replicas):
        raise UserError("stack_replicas needs a list of trees: stack_replicas([a, b])")
    replicas = list(replicas)
    if not replicas:
        raise UserError("stack_replicas got an empty sequence; pass at least one tree")
    for index, replica in enumerate(replicas):
        check_leaves(replica, f"replica {index}")
        check_alike(replicas[0], replica, "replica 0", f"replica {index}")
    # The promotion is explicit here, so it is also allowed under strict promotion.
    with jax.numpy_dtype_promotion("standard"):
        return jax.tree.map(_stack, *replicas)


def _stack(*leaves):
    first, *others = (to_array(x) for x in leaves)
    return jnp.stack([first, *(place_like(x, first) for x in others)])


def is_sequence(value: Any) -> bool:
    """Return whether a value is a sequence of trees: a list, a tuple, or a non-pytree iterable.

    Example:
      >>> is_sequence(["a", "b"]), is_sequence(x for x in "ab"), is_sequence({"w": 1.0})
      (True, True, False)
    """
    if type(value) in (list, tuple):
        return True
    if isinstance(value, str | Mapping | jax.Array) or not jax.tree_util.all_leaves([value]):
        return False  # a mapping, a named tuple or a module is one tree
    if isinstance(value, np.ndarray):
        return value.dtype == object and value.ndim == 1
    return isinstance(value, Iterable)


def check_alike(a: PyTree, b: PyTree, a_side: str, b_side: str) -> None:
    """Raise a UserError if two trees differ in structure, in shapes or in the kinds of dtypes.

    Args:
      a: a tree whose leaves `check_leaves` accepts, or `jax.ShapeDtypeStruct` leaves
      b: another one
      a_side: what the message calls `a`
      b_side: what the message calls `b`

    Raises:
      UserError: the message names the tensors or the container
    """
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=False)
    if jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.shape(x) == np.shape(y) and _kind(x) == _kind(y) for x, y in pairs
    ):
        return
    named_a, named_b = named_leaves(a), named_leaves(b)
    _check_names(named_a, named_b, a_side, b_side)
    _check_containers(a, b, a_side, b_side)
    for what, property_of in (("shape", np.shape), ("kind of dtype", _kind)):
        values = {n: (property_of(named_a[n]), property_of(named_b[n])) for n in named_a}
        different = [f"{n} ({x} and {y})" for n, (x, y) in values.items() if x != y]
        _raise_if_any(different, f"{a_side} and {b_side} differ in the {what} of")


def pair_leaves(pretrained: PyTree, finetuned: PyTree, min_replicas: int = 2) -> Leaves:
    """Flatten anchor and replicas.

    Args:
      pretrained: a tree of arrays [...]
      finetuned: the same tree of arrays [N, ...]
      min_replicas: minimum of N

    Raises:
      UserError: the trees do not match; the message names the tensors
    """
    treedef = jax.tree.structure(pretrained)
    if is_sequence(finetuned) and _holds_replicas(finetuned, pretrained):
        raise UserError(
            "finetuned is a sequence of trees: pass stack_replicas(finetuned), one tree with a "
            "leading replica axis"
        )
    if (
        isinstance(finetuned, Mapping)
        and finetuned
        and all(jax.tree.structure(model) == treedef for model in finetuned.values())
    ):
        raise UserError(
            f"finetuned is a mapping of models ({listed(map(str, finetuned), 5)}): pass "
            "stack_replicas(finetuned.values()), one tree with a leading replica axis"
        )
    anchor, tuned = named_leaves(pretrained), named_leaves(finetuned)
    if not anchor:
        raise UserError("pretrained contains no tensor; pass a tree with at least one array")
    _check_names(anchor, tuned, "pretrained", "finetuned")
    _check_containers(pretrained, finetuned, "pretrained", "finetuned")
    check_leaves(pretrained, "pretrained")
    check_leaves(finetuned, "finetuned")
    anchor = {name: to_array(leaf) for name, leaf in anchor.items()}
    tuned = {name: to_array(leaf) for name, leaf in tuned.items()}
    _check_replica_axis(anchor, tuned)
    _raise_if_any(
        [
            f"{n} ({anchor[n].shape} and {tuned[n].shape})"
            for n in anchor
            if tuned[n].ndim == 0 or tuned[n].shape[1:] != anchor[n].shape
        ],
        "finetuned must have the shapes of pretrained with a leading replica axis; use "
        "stack_replicas; shapes that do not match",
    )
    num_replicas = _num_replicas(tuned, min_replicas)
    different = [n for n in anchor if is_float(anchor[n]) != is_float(tuned[n])]
    _raise_if_any(
        [f"{n} ({anchor[n].dtype} and {tuned[n].dtype})" for n in different],
        "tensors that are floating point in only one of pretrained and finetuned",
    )
    return Leaves(tuple(anchor), list(anchor.values()), list(tuned.values()), treedef, num_replicas)


def _check_replica_axis(anchor: dict[str, jax.Array], tuned: dict[str, jax.Array]) -> None:
    """Raise a UserError if `finetuned` is one model, or the arguments are swapped."""
    pairs = [(anchor[name].shape, tuned[name].shape) for name in anchor]
    if all(a == b for a, b in pairs):
        raise UserError(
            "finetuned has no replica axis: its shapes are those of pretrained; pass "
            "stack_replicas([a, b]), or stack_replicas([a]) for one model"
        )
    if all(a[1:] == b for a, b in pairs):
        raise UserError(
            "pretrained has a leading axis that finetuned lacks: the arguments are swapped; pass "
            "the pretrained model first, then stack_replicas([a, b])"
        )


def is_float(array) -> bool:
    """Return whether a merge changes this tensor: any floating dtype, including float8."""
    return jnp.issubdtype(array.dtype, jnp.floating)


def named_leaves(tree: PyTree, separator: str = ".") -> dict[str, Any]:
    """Return the leaves of a tree by name: the path, joined with dots, as merge units use it.

    Args:
      tree: any pytree
      separator: string that joins the keys of a path

    Returns:
      {name: leaf}, in the order of the tree's leaves

    Example:
      >>> list(named_leaves({"mlp": {"kernel": 1.0, "bias": 2.0}, "layers": [3.0]}))
      ['layers.0', 'mlp.bias', 'mlp.kernel']
    """
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if len(path) > 1 and path[-1] == _VARIABLE:
            path = path[:-1]
        name = jax.tree_util.keystr(path, simple=True, separator=separator) or "(root)"
        while name in named:  # a key that contains a dot may equal another tensor's path
            name += "'"
        named[name] = leaf
    return named


def check_leaves(tree: PyTree, side: str, *, allow_shapes: bool = False) -> None:
    """Raise a UserError if a leaf is not an array or scalar of a dtype that merges support.

    Floating arrays are merged; integers, booleans and typed PRNG keys (`jax.random.key`) are
    copied.

    Args:
      tree: any pytree
      side: what the message calls it
      allow_shapes: whether `jax.ShapeDtypeStruct` leaves are allowed

    Raises:
      UserError: the message names the tensor
    """
    if not any(_problem(leaf, allow_shapes) for leaf in jax.tree.leaves(tree)):
        return
    for name, leaf in named_leaves(tree).items():
        if problem := _problem(leaf, allow_shapes):
            raise UserError(f"{side}: tensor {shortened(name)!r} {problem}")


def _problem(leaf: Any, allow_shapes: bool) -> str:
    if isinstance(leaf, jax.ShapeDtypeStruct) and not allow_shapes:
        return "is a jax.ShapeDtypeStruct, which has a shape but no values; pass an array"
    try:
        dtype = leaf.dtype if isinstance(leaf, _TYPED) else np.asarray(leaf).dtype
    except (TypeError, ValueError, RuntimeError):  # for example a tensor of another library
        kind = f"is of type {type(leaf).__name__}, which NumPy cannot convert; pass "
        is_torch = type(leaf).__module__.partition(".")[0] == "torch"
        return kind + ("tensor.detach().float().cpu().numpy()" if is_torch else "an array")
    kinds = (jnp.floating, jnp.integer, jnp.bool_, jax.dtypes.prng_key)
    if any(jnp.issubdtype(dtype, kind) for kind in kinds):
        return "" if _is_exact(leaf) else "has integers beyond int32; enable jax_enable_x64"
    if not isinstance(leaf, np.ndarray) and dtype.kind in "OSU":
        if hasattr(leaf, "state_dict"):
            return f"is of type {type(leaf).__name__}; pass its state_dict()"
        files = " (files: `modelstock merge`)" * isinstance(leaf, str | os.PathLike)
        return f"is of type {type(leaf).__name__}; pass a tree that contains only arrays{files}"
    return f"has dtype {dtype}; use a floating, integer or boolean dtype"


def _is_exact(leaf: Any) -> bool:
    """Return whether JAX keeps the integers of a leaf: it converts int64 to int32 by default."""
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return True
    array = np.asarray(leaf)
    dtype = jnp.result_type(array)
    is_kept = array.dtype == dtype or not jnp.issubdtype(dtype, jnp.integer)
    return is_kept or np.array_equal(array.astype(dtype), array)


# np.asarray raises an error for typed keys, and copies arrays from the device.
_TYPED = (jax.Array, jax.ShapeDtypeStruct, np.ndarray)


def to_array(leaf: Any) -> jax.Array:
    """Return a leaf that passed `check_leaves` as an array in device memory.

    NumPy arrays and Python scalars are converted as JAX does: float64 becomes float32 unless
    `jax_enable_x64` is on.
    """
    if not isinstance(leaf, jax.Array):
        # An explicit transfer, which `jax.transfer_guard("disallow")` allows. On a CPU it may share
        # NumPy's memory, hence the copy.
        return jax.device_put(np.array(leaf))
    if jax.typeof(leaf).memory_space == jax.memory.Space.Host:
        return jax.device_put(leaf, jax.memory.Space.Device)
    return leaf


def to_arrays(tree: PyTree, side: str) -> PyTree:
    """Return a tree with every leaf as an array, or raise the UserError of `check_leaves`."""
    check_leaves(tree, side)
    return jax.tree.map(to_array, tree)


def shortened(text: str, max_chars: int = _NAME_LENGTH) -> str:
    """Return a name of at most `max_chars` characters, without its middle if it is longer.

    Example:
      >>> shortened("encoder.kernel", 9)
      'enc...nel'
    """
    text = text if text.isprintable() else repr(text)
    if len(text) <= max_chars:
        return text
    end = (max_chars - 3) // 2
    return f"{text[: max_chars - 3 - end]}...{text[-end:]}"


def _kind(leaf: Any) -> str:
    """Return the kind of a leaf's dtype: arrays of one kind can be stacked and averaged."""
    dtype = leaf.dtype if isinstance(leaf, _TYPED) else np.asarray(leaf).dtype
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return str(dtype)
    return "floating" if jnp.issubdtype(dtype, jnp.floating) else "integer"


def _holds_replicas(sequence: Iterable[Any], pretrained: PyTree) -> bool:
    """Return whether a sequence contains replicas and is not itself a tree like `pretrained`."""
    if type(sequence) is not type(pretrained):
        return True
    structure = jax.tree.structure(pretrained)
    return all(jax.tree.structure(element) == structure for element in sequence)


def _num_replicas(tuned: dict[str, jax.Array], min_replicas: int) -> int:
    counts: dict[int, str] = {}
    for name, array in tuned.items():
        counts.setdefault(len(array), name)
    if len(counts) > 1:
        lengths = [f"{length} in {name}" for length, name in sorted(counts.items())]
        _raise_if_any(lengths, "the replica axis has different lengths in different tensors")
    count = min(counts)
    if count < min_replicas:
        hint = "; to interpolate between one model and the base, use wise_ft"
        raise UserError(
            f"this merge needs at least {min_replicas} fine-tuned "
            f"replica{'s' * (min_replicas > 1)}, not {count}" + hint * (count == 1)
        )
    return count


def _check_names(a: dict, b: dict, a_side: str, b_side: str) -> None:
    if a.keys() == b.keys():
        return
    only_a, only_b = [n for n in a if n not in b], [n for n in b if n not in a]
    differences = [
        f"only in {side}: {_short_list(names, _NAME_LENGTH)}"
        for side, names in ((a_side, only_a), (b_side, only_b))
        if names
    ]
    raise UserError(f"{a_side} and {b_side} differ in structure; {'; '.join(differences)}")


def _check_containers(a: PyTree, b: PyTree, a_side: str, b_side: str) -> None:
    if jax.tree.structure(a) == jax.tree.structure(b):
        return
    path, types = _first_difference(a, b)
    where = f"at {shortened(path)!r}" if path else "at the root"
    if types[0] == types[1]:
        problem = f"both are {types[0]}, but their static fields differ (train and eval mode?)"
    else:
        tool = next((_CONVERSIONS[name] for name in types if name in _CONVERSIONS), None)
        convert = "convert one" + (f", for example with {tool}" if tool else "")
        problem = f"{types[0]} and {types[1]}; {convert}"
    raise UserError(f"{a_side} and {b_side} differ in containers {where}: {problem}")


def _first_difference(a: PyTree, b: PyTree, path: str = "") -> tuple[str, tuple[str, str]]:
    """Return the path at which the containers of two trees first differ, and their types."""
    children_a, children_b = _children(a), _children(b)
    if type(a) is type(b) and children_a.keys() == children_b.keys():
        for key, child in children_a.items():
            if jax.tree.structure(child) != jax.tree.structure(children_b[key]):
                return _first_difference(child, children_b[key], f"{path}.{key}".lstrip("."))
    return path, (shortened(type(a).__name__), shortened(type(b).__name__))


def _children(tree: PyTree) -> dict[str, Any]:
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)[0]
    return {jax.tree_util.keystr(path, simple=True): child for path, child in flat}


def _short_list(names: list[str], max_chars: int = _NAMES_LENGTH) -> str:
    """Return the first names, at most five and `max_chars` characters, and how many are left."""
    names = [shortened(name, max_chars) for name in names[:5]] + names[5:]
    shown = 1
    while shown < min(5, len(names)) and sum(map(len, names[: shown + 1])) <= max_chars:
        shown += 1
    return listed(names, shown)


def _raise_if_any(names: list[str], message: str) -> None:
    if names:
        raise UserError(f"{message}: {_short_list(names)}")
