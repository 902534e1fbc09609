"""Arithmetic in float64 inside a float32 program."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def widened(function: Callable, derivative_of: Callable | None = None) -> Callable:
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
      >>> float(widened(jnp.sum)(big))
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
