"""Trees of replicas, and the reduction that all need: task vectors' products, summed in float64.

Arithmetic in float64 inside a float32 program, what a merge computes of each tensor, and trees as
lists of named tensors that are checked against each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from modelstock_jax.errors import UserError, listed
from modelstock_jax.merging.anchor_rounding import half_ulp

# Arithmetic in float64 inside a float32 program.

PyTree = Any  # nested containers with arrays as leaves, as `jax.tree` sees them


def in_float64(function: Callable, derivative_of: Callable | None = None) -> Callable:
    """Evaluate a function in float64 and differentiate it in its inputs' own precision.

    How a backend orders a float32 sum is not ours to choose, and 10^8 terms one after the other
    lose 1 to 10 %. In float64 neither that order nor what a compiler fuses can be seen in the
    float32 result, so that a merge inside a training step equals the same merge outside of it.
    `jax_enable_x64` may be off: only values inside the function are wide.

    Args:
      function: of arrays (or trees of them), to arrays or trees.
      derivative_of: the same function in a form that is better differentiated; `function` where
        nothing is given.

    Returns:
      A function that takes float32 arrays and narrower and returns float32 where the function
      gives float64; or float64 where an argument is float64.

    Example:
      >>> big = jnp.array([1e8, 1.0, -1e8], jnp.float32)
      >>> float(in_float64(jnp.sum)(big))
      1.0
    """

    @jax.custom_jvp
    def evaluate(*args):
        dtype = compute_dtype(*(leaf.dtype for leaf in jax.tree.leaves(args)))
        with jax.enable_x64(True):
            result = function(*jax.tree.map(lambda x: _convert(x, jnp.floating, "float64"), args))
            return jax.tree.map(lambda x: _convert(x, jnp.float64, dtype), result)

    @evaluate.defjvp
    def _differentiate(primals, tangents):
        # At an infinite weight the function is not used, but 0 * inf would be.
        safe = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x)), primals)
        return evaluate(*primals), jax.jvp(derivative_of or function, safe, tangents)[1]

    return evaluate


def compute_dtype(*dtypes):
    """Dtype of measures: float32, or float64 where one of the dtypes is."""
    return jnp.dtype("float64" if any(d == jnp.float64 for d in dtypes) else "float32")


def _convert(array, kind, dtype):
    array = jnp.asarray(array)
    if jnp.issubdtype(array.dtype, kind):
        return jax.lax.convert_element_type(array, dtype)
    return array


# Sums that are made in one pass over the tensors: all of up to four replicas'.
_SUMS = 10


def gram_matrix(pretrained, finetuned, unit_view):
    """G_ij = d_i . d_j of one tensor, for each of its units.

    Elementwise products and one sum over the tensor's own axes: a dot would be TF32 on GPUs and
    bfloat16 on TPUs, and to ravel a sharded tensor would gather it.

    Args:
      pretrained: w0, [...], any floating dtype.
      finetuned: [N, ...].
      unit_view: `units.UnitView`, which says how the tensor is cut into units.

    Returns:
      [N, N, *unit shape], float32 (float64 for float64 weights).

    Example:
      >>> from modelstock_jax.merging.units import Part
      >>> gram_matrix(jnp.zeros(2), jnp.eye(2), Part("w", (2,), (0,))).tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """

    def products(anchor, tuned):
        deltas = tuned - anchor[None]
        return jnp.sum(
            deltas[:, None] * deltas[None], axis=tuple(2 + axis for axis in unit_view.axes)
        )

    def in_one_pass(anchor, tuned):
        deltas = [replica - anchor for replica in tuned]
        rows = range(len(deltas))
        pairs = [(i, j) for i in rows for j in rows[i:]]
        sums = []
        for first in range(0, len(pairs), _SUMS):
            terms = [deltas[i] * deltas[j] for i, j in pairs[first : first + _SUMS]]
            zeros = [np.zeros((), anchor.dtype)] * len(terms)
            sums += jax.lax.reduce(terms, zeros, _add_each, unit_view.axes)
        place = dict(zip(pairs, sums, strict=True))
        return jnp.stack([jnp.stack([place[min(i, j), max(i, j)] for j in rows]) for i in rows])

    def by_platform(anchor, tuned):
        # On a TPU float64 is emulated, and of reductions the plain ones are known to be.
        return jax.lax.platform_dependent(anchor, tuned, default=in_one_pass, tpu=products)

    seen = to_unit_shape(pretrained, finetuned, unit_view)
    return in_float64(by_platform, derivative_of=products)(*seen)


def rounding_energy(pretrained, unit_view):
    """Expected squared rounding error of one tensor of the anchor, for each of its units.

        E = sum of (half ulp)^2 / 3

    Args:
      pretrained: w0, [...], any floating dtype.
      unit_view: `units.UnitView`, which says how the tensor is cut into units.

    Returns:
      [*unit shape], float32, without derivatives.

    Example:
      >>> from modelstock_jax.merging.units import Part
      >>> w0 = jnp.ones(3, jnp.bfloat16)  # an ulp is 2^-7
      >>> float(rounding_energy(w0, Part("w", (3,), (0,)))) == 2.0**-16
      True
    """
    halves = half_ulp(jax.lax.stop_gradient(pretrained)).reshape(unit_view.view)
    return in_float64(lambda half: jnp.sum(half * half, axis=unit_view.axes) / 3.0)(halves)


def _add_each(left, right):
    return [a + b for a, b in zip(left, right, strict=True)]


def add_task_vectors(
    pretrained, finetuned, coefficient, copy_replica, keep_anchor, *, unit_view, dtype
):
    """w0 + sum_i a_i d_i of one tensor, rounded once to `dtype`.

    Where the answer is one of the inputs it is selected, not computed.

    Args:
      pretrained: w0, [...].
      finetuned: [N, ...].
      coefficient: a_i, [N, *unit shape].
      copy_replica: [N, *unit shape] bool: this replica's weights.
      keep_anchor: [*unit shape] bool: the anchor's weights.
      unit_view: `units.UnitView` of the tensor.
      dtype: of the result; None for the anchor's.

    Returns:
      [...].
    """
    dtype = pretrained.dtype if dtype is None else jnp.dtype(dtype)
    # Else a compiler finds the Gram matrix's task vectors here again, and keeps those of the whole
    # model in float64 from there to here.
    finetuned = jax.lax.optimization_barrier(finetuned)

    def spread(values):
        return jnp.expand_dims(values, unit_view.axes)

    def combine(anchor, tuned, coefficient):
        deltas = [replica - anchor for replica in tuned]
        moved = sum(spread(a) * d for a, d in zip(coefficient, deltas, strict=True))
        return cast(anchor + moved, dtype)

    merged = in_float64(combine)(
        *to_unit_shape(pretrained, finetuned, unit_view), coefficient
    ).astype(dtype)
    for chosen, replica in zip(copy_replica, finetuned, strict=True):
        merged = jnp.where(spread(chosen), cast(replica, dtype).reshape(unit_view.view), merged)
    anchor = cast(pretrained, dtype).reshape(unit_view.view)
    return jnp.where(spread(keep_anchor), anchor, merged).reshape(pretrained.shape)


def to_unit_shape(pretrained, finetuned, unit_view):
    """Anchor and replicas as the unit sees them, float32 at least (derivatives are in that)."""
    wide = [x.astype(compute_dtype(x.dtype)) for x in (pretrained, finetuned)]
    return wide[0].reshape(unit_view.view), wide[1].reshape((len(finetuned), *unit_view.view))


def cast(array, dtype):
    """To a dtype of smaller range by saturation: an overflow would be a non-finite weight."""
    limits, own = jnp.finfo(dtype), jnp.finfo(array.dtype)
    if float(limits.max) < float(own.max):
        array = jnp.clip(array, float(limits.min), float(limits.max))
    return array.astype(dtype)


# Trees of replicas: stacked on axis 0, and checked against the anchor.

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


def check_alike(a: PyTree, b: PyTree, a_side: str, b_side: str) -> None:
    """Raise a UserError that names what differs in the names or shapes of two trees' tensors."""
    named_a, named_b = named_leaves(a), named_leaves(b)
    _same_names(named_a, named_b, a_side, b_side)
    wrong = [n for n in named_a if np.shape(named_a[n]) != np.shape(named_b[n])]
    _refuse(wrong, f"{b_side} differs from {a_side} in the shape of")


def pair_leaves(pretrained: PyTree, finetuned: PyTree, min_replicas: int = 2) -> Leaves:
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
        raise UserError(
            "pretrained and finetuned have the same names in different containers: "
            f"{treedef} and {jax.tree.structure(finetuned)}"
        )
    anchor = {name: _array(leaf, name, "pretrained") for name, leaf in anchor.items()}
    tuned = {name: _array(leaf, name, "finetuned") for name, leaf in tuned.items()}
    wrong = [
        n
        for n in anchor
        if tuned[n].ndim != anchor[n].ndim + 1 or tuned[n].shape[1:] != anchor[n].shape
    ]
    _refuse(
        [f"{n} ({anchor[n].shape} and {tuned[n].shape})" for n in wrong],
        "finetuned must have the shapes of pretrained behind a leading replica axis, as "
        "stack_replicas makes it; not so",
    )
    counts = {tuned[n].shape[0] for n in tuned}
    if len(counts) > 1:
        raise UserError(
            f"the replica axis has different lengths in different tensors: {sorted(counts)}"
        )
    if min(counts) < min_replicas:
        raise UserError(
            f"this merge needs at least {min_replicas} fine-tuned replicas, not {min(counts)}"
        )
    wrong = [n for n in anchor if is_float(anchor[n]) != is_float(tuned[n])]
    _refuse(
        [f"{n} ({anchor[n].dtype} and {tuned[n].dtype})" for n in wrong],
        "floating point on one side and not on the other",
    )
    return Leaves(tuple(anchor), list(anchor.values()), list(tuned.values()), treedef, min(counts))


def is_float(array) -> bool:
    """Whether a merge moves this tensor: any floating dtype, down to float8."""
    return jnp.issubdtype(array.dtype, jnp.floating)


def named_leaves(tree: PyTree, separator: str = ".") -> dict[str, Any]:
    """Leaves by their names: paths joined with dots, as merge units know them.

    Args:
      tree: a pytree of anything.
      separator: what joins a path's keys.

    Returns:
      Name -> leaf, in the order of the tree's leaves.

    Example:
      >>> list(named_leaves({"mlp": {"kernel": 1.0, "bias": 2.0}, "layers": [3.0]}))
      ['layers.0', 'mlp.bias', 'mlp.kernel']
    """
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if len(path) > 1 and path[-1] == _VARIABLE:
            path = path[:-1]
        name = jax.tree_util.keystr(path, simple=True, separator=separator) or "(root)"
        while name in named:  # a key that holds a dot may spell another tensor's path
            name += "'"
        named[name] = leaf
    return named


def _array(leaf: Any, name: str, side: str):
    array = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
    kinds = (jnp.floating, jnp.integer, jnp.bool_)
    if not any(jnp.issubdtype(array.dtype, kind) for kind in kinds):
        raise UserError(
            f"{side}: tensor {name!r} is {array.dtype}; merging takes floating point, "
            "and keeps integers and booleans"
        )
    # As JAX would take it: float64 is float32 unless jax_enable_x64 is on.
    return jnp.asarray(array)


def _same_names(a: dict, b: dict, a_side: str, b_side: str) -> None:
    if a.keys() == b.keys():
        return
    missing, extra = [n for n in a if n not in b], [n for n in b if n not in a]
    told = [
        f"only in {side}: {listed(names, 5)}"
        for side, names in ((a_side, missing), (b_side, extra))
        if names
    ]
    raise UserError(f"{a_side} and {b_side} differ in structure; {'; '.join(told)}")


def _refuse(names: list[str], message: str) -> None:
    if names:
        raise UserError(f"{message}: {listed(names, 5)}")
