"""Trees of replicas: stacked on axis 0, and checked against the anchor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from modelstock_jax.errors import UserError, listed

# A flax.nnx state wraps each array in a variable, which is no part of its name.
_VARIABLE = jax.tree_util.GetAttrKey("value")


class Leaves(NamedTuple):
    """An anchor and its replicas as flat lists, in the order of the tree's leaves."""

    names: tuple[str, ...]
    pretrained: list
    finetuned: list
    treedef: Any
    num_replicas: int


def stack_replicas(replicas: Sequence[Any]):
    """One tree with a leading replica axis from a sequence of trees of like structure.

    Returns:
      A tree of [N, ...] arrays.

    Raises:
      UserError: trees of different structure, or tensors of different shape.

    Example:
      >>> stack_replicas([{"w": jnp.zeros(3)}, {"w": jnp.ones(3)}])["w"].shape
      (2, 3)
    """
    replicas = list(replicas)
    if not replicas:
        raise UserError("stack_replicas was given no replica")
    for index, replica in enumerate(replicas[1:], 1):
        check_alike(replicas[0], replica, "replica 0", f"replica {index}")
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(x) for x in leaves]), *replicas)


def check_alike(a: Any, b: Any, a_side: str, b_side: str) -> None:
    """Raise a UserError that names what differs in the names or shapes of two trees' tensors."""
    named_a, named_b = named_leaves(a), named_leaves(b)
    _same_names(named_a, named_b, a_side, b_side)
    wrong = [n for n in named_a if np.shape(named_a[n]) != np.shape(named_b[n])]
    _refuse(wrong, f"{b_side} differs from {a_side} in the shape of")


def pair_leaves(pretrained: Any, finetuned: Any, least: int = 2) -> Leaves:
    """Flatten the two trees side by side, or say what does not fit."""
    if isinstance(finetuned, list | tuple) and not isinstance(pretrained, type(finetuned)):
        raise UserError(
            "finetuned is a sequence of trees: pass stack_replicas(finetuned), one tree with a "
            "leading replica axis"
        )
    anchor, tuned = named_leaves(pretrained), named_leaves(finetuned)
    if not anchor:
        raise UserError("pretrained holds no tensor")
    _same_names(anchor, tuned, "pretrained", "finetuned")
    treedef = jax.tree.structure(pretrained)
    if treedef != jax.tree.structure(finetuned):
        raise UserError("pretrained and finetuned have the same names in different containers: "
                        f"{treedef} and {jax.tree.structure(finetuned)}")
    anchor = {name: _array(leaf, name, "pretrained") for name, leaf in anchor.items()}
    tuned = {name: _array(leaf, name, "finetuned") for name, leaf in tuned.items()}
    wrong = [n for n in anchor if tuned[n].ndim != anchor[n].ndim + 1
             or tuned[n].shape[1:] != anchor[n].shape]
    _refuse([f"{n} ({anchor[n].shape} and {tuned[n].shape})" for n in wrong],
            "finetuned must have the shapes of pretrained behind a leading replica axis, as "
            "stack_replicas makes it; not so")
    counts = {tuned[n].shape[0] for n in tuned}
    if len(counts) > 1:
        raise UserError(f"the replica axis has different lengths in different tensors: "
                        f"{sorted(counts)}")
    if min(counts) < least:
        raise UserError(f"this merge needs at least {least} fine-tuned replicas, not {min(counts)}")
    wrong = [n for n in anchor if is_float(anchor[n]) != is_float(tuned[n])]
    _refuse([f"{n} ({anchor[n].dtype} and {tuned[n].dtype})" for n in wrong],
            "floating point on one side and not on the other")
    return Leaves(tuple(anchor), list(anchor.values()), list(tuned.values()), treedef, min(counts))


def is_float(array) -> bool:
    """Whether a merge moves this tensor: any floating dtype, down to float8."""
    return jnp.issubdtype(array.dtype, jnp.floating)


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by their names: paths joined with dots, as merge units know them.

    Example:
      >>> list(named_leaves({"mlp": {"kernel": 1.0, "bias": 2.0}, "layers": [3.0]}))
      ['layers.0', 'mlp.bias', 'mlp.kernel']
    """
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if len(path) > 1 and path[-1] == _VARIABLE:
            path = path[:-1]
        name = jax.tree_util.keystr(path, simple=True, separator=".") or "(root)"
        while name in named:  # a key that holds a dot may spell another tensor's path
            name += "'"
        named[name] = leaf
    return named


def _array(leaf: Any, name: str, side: str):
    array = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
    kinds = (jnp.floating, jnp.integer, jnp.bool_)
    if not any(jnp.issubdtype(array.dtype, kind) for kind in kinds):
        raise UserError(f"{side}: tensor {name!r} is {array.dtype}; merging takes floating point, "
                        "and keeps integers and booleans")
    # As JAX would take it: float64 is float32 unless jax_enable_x64 is on.
    return jnp.asarray(array)


def _same_names(a: dict, b: dict, a_side: str, b_side: str) -> None:
    if a.keys() == b.keys():
        return
    missing, extra = [n for n in a if n not in b], [n for n in b if n not in a]
    told = [f"only in {side}: {listed(names, 5)}"
            for side, names in ((a_side, missing), (b_side, extra)) if names]
    raise UserError(f"{a_side} and {b_side} differ in structure; {'; '.join(told)}")


def _refuse(names: list[str], message: str) -> None:
    if names:
        raise UserError(f"{message}: {listed(names, 5)}")
