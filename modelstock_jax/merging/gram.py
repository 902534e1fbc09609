"""Operations on single tensors, and checks of the trees of anchor and replicas.

`in_float64` evaluates a function in float64 inside a float32 program. `gram_products` and
`add_task_vectors` are the two passes of a merge over a tensor. `pair_leaves` flattens anchor and
replicas into lists of named tensors and checks that they match.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from modelstock_jax.errors import UserError, listed
from modelstock_jax.merging import geometry
from modelstock_jax.merging.anchor_rounding import half_ulp

PyTree = Any  # nested containers with arrays as leaves, as `jax.tree` sees them


def in_float64(
    function: Callable, derivative_of: Callable | None = None, dtype: Any = None
) -> Callable:
    """Return a function that evaluates in float64 and is differentiated in the inputs' precision.

    The backend chooses the order of a float32 sum, and a sequential float32 sum of 10^8 terms loses
    1 to 10 %. In float64 neither the order nor the compiler's fusion is visible in the float32
    result, so a merge inside a training step equals the same merge outside of it.
    `jax_enable_x64` may be off: only values inside the function are float64.

    Args:
      function: maps arrays (or trees of arrays) to arrays or trees
      derivative_of: the same function in a form that is better to differentiate (default:
        `function`).
      dtype: dtype of the floating outputs (default: float32, or float64 if an argument is float64)

    Returns:
      A function of the same arguments.

    Example:
      >>> big = jnp.array([1e8, 1.0, -1e8], jnp.float32)
      >>> float(in_float64(jnp.sum)(big))
      1.0
    """

    @jax.custom_jvp
    def evaluate(*args):
        result_dtype = dtype or compute_dtype(*(leaf.dtype for leaf in jax.tree.leaves(args)))
        with jax.enable_x64(True):
            result = function(*jax.tree.map(lambda x: _convert(x, jnp.floating, "float64"), args))
            return jax.tree.map(lambda x: _convert(x, jnp.float64, result_dtype), result)

    @evaluate.defjvp
    def _differentiate(primals, tangents):
        # The value at a non-finite weight is discarded, but 0 * inf would make the derivative NaN.
        safe = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x)), primals)
        return evaluate(*primals), jax.jvp(derivative_of or function, safe, tangents)[1]

    return evaluate


def compute_dtype(*dtypes):
    """Return the dtype of statistics: float64 if one of the dtypes is float64, else float32."""
    return jnp.dtype("float64" if any(d == jnp.float64 for d in dtypes) else "float32")


def _convert(array, kind, dtype):
    array = jnp.asarray(array)
    if jnp.issubdtype(array.dtype, kind):
        return jax.lax.convert_element_type(array, dtype)
    return array


# Sums per pass over a tensor. All pairs of up to four replicas are 10.
_SUMS_PER_PASS = 10


def _add_pairwise(left, right):
    return [a + b for a, b in zip(left, right, strict=True)]


def pairs(num_replicas: int) -> list[tuple[int, int]]:
    """Return the pairs i <= j of replicas, in the order of `gram_products`.

    Example:
      >>> pairs(2)
      [(0, 0), (0, 1), (1, 1)]
    """
    rows = range(num_replicas)
    return [(i, j) for i in rows for j in rows[i:]]


def gram_products(pretrained, finetuned, unit_view):
    """Return d_i . d_j of all pairs i <= j, of one tensor, for each of its units.

    The products are elementwise and the sum is over the tensor's own axes. A dot would run in TF32
    on GPUs and in bfloat16 on TPUs, and raveling a sharded tensor would gather it.

    Args:
      pretrained: w0, [...], any floating dtype
      finetuned: [N, ...]
      unit_view: how the tensor is split into units

    Returns:
      [N (N + 1) / 2, *unit shape], float32 (float64 for float64 weights)

    Example:
      >>> from modelstock_jax.merging.units import UnitView
      >>> gram_products(jnp.zeros(2), jnp.eye(2), UnitView("w", (2,), (0,))).tolist()
      [1.0, 0.0, 1.0]
    """

    def one_by_one(*products):
        zero = np.zeros((), products[0].dtype)
        return [jax.lax.reduce(x, zero, jax.lax.add, unit_view.axes) for x in products]

    def in_one_pass(*products):
        sums = []
        for first in range(0, len(products), _SUMS_PER_PASS):
            some = list(products[first : first + _SUMS_PER_PASS])
            zeros = [np.zeros((), products[0].dtype)] * len(some)
            sums += jax.lax.reduce(some, zeros, _add_pairwise, unit_view.axes)
        return sums

    def sums(anchor, tuned, *, add_up):
        deltas = [jax.lax.sub(replica, anchor) for replica in tuned]
        products = [jax.lax.mul(deltas[i], deltas[j]) for i, j in pairs(len(deltas))]
        return jax.lax.concatenate([unit_view.swap(x)[None] for x in add_up(*products)], 0)

    def by_platform(*products):
        # TPUs emulate float64. Of the reductions, only plain sums are known to be emulated.
        return jax.lax.platform_dependent(*products, default=in_one_pass, tpu=one_by_one)

    views = to_unit_shape(pretrained, finetuned, unit_view)
    return in_float64(
        functools.partial(sums, add_up=by_platform),
        derivative_of=functools.partial(sums, add_up=one_by_one),
    )(*views)


def gram_matrix(products):
    """Return the Gram matrix from the products of `gram_products`, NumPy or JAX.

    Args:
      products: [N (N + 1) / 2, ...]

    Returns:
      [N, N, ...]

    Example:
      >>> gram_matrix(np.array([4.0, 1.0, 9.0])).tolist()
      [[4.0, 1.0], [1.0, 9.0]]
    """
    xp = geometry.namespace(products)
    num_replicas = math.isqrt(2 * len(products))
    index = {pair: k for k, pair in enumerate(pairs(num_replicas))}
    rows = range(num_replicas)
    return xp.stack([xp.stack([products[index[min(i, j), max(i, j)]] for j in rows]) for i in rows])


def rounding_energy(pretrained, unit_view):
    """Return the expected squared rounding error of one tensor of the anchor, for each unit.

        E = sum of (half ulp)^2 / 3

    Args:
      pretrained: w0, [...], any floating dtype
      unit_view: how the tensor is split into units

    Returns:
      [*unit shape], float32, with a derivative of 0

    Example:
      >>> from modelstock_jax.merging.units import UnitView
      >>> w0 = jnp.ones(3, jnp.bfloat16)  # an ulp is 2^-7
      >>> float(rounding_energy(w0, UnitView("w", (3,), (0,)))) == 2.0**-16
      True
    """
    halves = half_ulp(jax.lax.stop_gradient(pretrained)).reshape(unit_view.view)
    energy = in_float64(lambda half: jnp.sum(half * half, axis=unit_view.axes) / 3.0)(halves)
    return unit_view.swap(energy)


class Update(NamedTuple):
    """How the merged weights of a unit follow from its tensors.

    Attributes:
      coefficient: a_i, [N, ...], float32 (float64 for float64 weights)
      residual: the rounding error of a_i, [N, ...]: coefficient + residual has 48 bits
      source: the result is computed (`COMPUTED`), replica 0 .. N - 1, or the anchor (N); [...]
    """

    coefficient: Any
    residual: Any
    source: Any


COMPUTED = -1.0


def add_task_vectors(pretrained, finetuned, update: Update, *, unit_view, dtype):
    """Return w0 + sum_i a_i d_i of one tensor, rounded once to `dtype`.

    If the result equals one of the inputs, it is copied from the input, not computed.

    Args:
      pretrained: w0, [...]
      finetuned: [N, ...]
      update: coefficients of the tensor's units, [N, *unit shape]
      unit_view: how the tensor is split into units
      dtype: dtype of the result; None for the anchor's

    Returns:
      [...]
    """
    dtype = pretrained.dtype if dtype is None else jnp.dtype(dtype)
    # Without this barrier XLA merges these with the float64 task vectors of `gram_products` and
    # keeps all of them alive.
    finetuned = jax.lax.optimization_barrier(finetuned)

    unit_axes = [axis for axis in range(len(unit_view.view)) if axis not in unit_view.axes]

    def expand(values):
        return jax.lax.broadcast_in_dim(unit_view.swap(values), unit_view.view, unit_axes)

    def combine(anchor, tuned, coefficient, residual):
        total = anchor
        for a, rest, replica in zip(coefficient, residual, tuned, strict=True):
            delta = jax.lax.sub(replica, anchor)
            total = jax.lax.add(total, jax.lax.mul(expand(a + rest), delta))
        return cast(total, dtype)

    merged = in_float64(combine)(
        *to_unit_shape(pretrained, finetuned, unit_view), update.coefficient, update.residual
    ).astype(dtype)
    inputs = [cast(x, dtype).reshape(unit_view.view) for x in (*finetuned, pretrained)]
    choice = jax.lax.convert_element_type(update.source - COMPUTED, "int32")
    merged = jax.lax.select_n(expand(choice), merged, *inputs)
    return merged.reshape(pretrained.shape)


def to_unit_shape(pretrained, finetuned, unit_view):
    """Reshape anchor and replicas to the unit view, in float32 or wider for the derivatives."""
    wide = [x.astype(compute_dtype(x.dtype)) for x in (pretrained, finetuned)]
    return wide[0].reshape(unit_view.view), wide[1].reshape((len(finetuned), *unit_view.view))


def cast(array, dtype):
    """Cast to a dtype; values outside a smaller range saturate instead of becoming infinite."""
    target, source = jnp.finfo(dtype), jnp.finfo(array.dtype)
    if float(target.max) < float(source.max):
        low, high = (np.asarray(x, array.dtype) for x in (float(target.min), float(target.max)))
        array = jax.lax.clamp(low, array, high)
    return array.astype(dtype)


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
        return jax.tree.map(lambda *leaves: jnp.stack([to_array(x) for x in leaves]), *replicas)


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
    anchor, tuned = named_leaves(pretrained), named_leaves(finetuned)
    if not anchor:
        raise UserError("pretrained contains no tensor; pass a tree with at least one array")
    _check_names(anchor, tuned, "pretrained", "finetuned")
    _check_containers(pretrained, finetuned, "pretrained", "finetuned")
    check_leaves(pretrained, "pretrained")
    check_leaves(finetuned, "finetuned")
    anchor = {name: to_array(leaf) for name, leaf in anchor.items()}
    tuned = {name: to_array(leaf) for name, leaf in tuned.items()}
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
        return f"is of type {type(leaf).__name__}, which NumPy cannot convert; pass an array"
    kinds = (jnp.floating, jnp.integer, jnp.bool_, jax.dtypes.prng_key)
    if any(jnp.issubdtype(dtype, kind) for kind in kinds):
        return "" if _is_exact(leaf) else "has integers beyond int32; enable jax_enable_x64"
    if not isinstance(leaf, np.ndarray) and dtype.kind in "OSU":
        return f"is of type {type(leaf).__name__}; pass a tree that contains only arrays"
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
