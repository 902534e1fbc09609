"""Short texts of statistics and states, which contain as many arrays as a model has tensors."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from modelstock_jax.merging.placement import on_this_host

# Maximum number of elements of an array that is printed with its values.
_MAX_ELEMENTS = 8


def summarize(value: Any) -> str:
    """Return a text of at most one line per field for a named tuple whose fields are trees.

    Example:
      >>> from collections import namedtuple
      >>> State = namedtuple("State", "mean count")
      >>> print(summarize(State({"w": np.zeros((2, 3), np.float32)}, np.int32(4))))
      State(
        mean=<1 tensor, 6 elements, float32>,
        count=4)
    """
    fields = (f"  {name}={_field(getattr(value, name))}" for name in value._fields)
    return f"{type(value).__name__}(\n" + ",\n".join(fields) + ")"


def tree_size(tree: Any) -> str:
    """Return the size of a tree in words.

    Example:
      >>> tree_size({"a": np.zeros(3, np.float32), "b": np.zeros((2, 2), np.int32)})
      '2 tensors, 7 elements, float32 and int32'
    """
    leaves = jax.tree.leaves(tree)
    count = sum(math.prod(np.shape(x)) for x in leaves)
    dtypes = sorted({str(getattr(x, "dtype", type(x).__name__)) for x in leaves})
    tensors = f"{len(leaves):,} tensor{'s' * (len(leaves) != 1)}"
    return ", ".join([tensors, f"{count:,} elements", " and ".join(dtypes)]).rstrip(", ")


def has_values(tree: Any) -> bool:
    """Return whether this process can read all leaves: no tracers, shapes, None, deleted arrays."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: x is None)
    return on_this_host(leaves) and all(
        isinstance(x, np.ndarray | np.generic)
        or (isinstance(x, jax.Array) and not x.is_deleted())  # donated to a compiled function
        for x in leaves
    )


def _field(value: Any) -> str:
    if isinstance(value, bool | int | float | str | None):
        return repr(value)
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        if has_values(value) and value.size <= _MAX_ELEMENTS and value.ndim <= 1:
            return str(np.asarray(value).tolist())
        return f"<{value.dtype} {list(value.shape)}>"
    if hasattr(value, "_fields") and type(value).__repr__ is not tuple.__repr__:
        return repr(value).replace("\n", "\n  ")
    return f"<{tree_size(value)}>"
