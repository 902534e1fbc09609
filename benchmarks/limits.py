"""Limits of the device for `turns.take_turns`: a large matrix product and a copy."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def product(dtype: str, side: int = 0) -> tuple[Callable[[int], None], float]:
    """Return a product of two square matrices of random values (zeros are faster).

    Args:
      dtype: dtype of the matrices
      side: size of the matrices; 0 uses one that fills the device

    Returns:
      a function for `take_turns`, and its operations per call
    """
    side = side or (2048 if jax.default_backend() == "cpu" else 8192)
    left, right = (
        jax.random.normal(jax.random.key(seed), (side, side), jnp.dtype(dtype)) for seed in range(2)
    )
    return _repeated(jax.jit(jnp.matmul), left, right), 2.0 * side**3


def copy(size: int) -> tuple[Callable[[int], None], float]:
    """Return a copy: one array is read and another is written.

    Args:
      size: bytes of the float32 array

    Returns:
      a function for `take_turns`, and the bytes moved per call: twice the size
    """
    array = jnp.arange(size // 4, dtype=jnp.float32)
    # XLA can remove a copy, but not a change of sign.
    return _repeated(jax.jit(jnp.negative), array), 2.0 * 4 * (size // 4)


def _repeated(function: Callable[..., jax.Array], *arguments: jax.Array) -> Callable[[int], None]:
    def run(count: int) -> None:
        for _ in range(count):
            result = function(*arguments)
        result.block_until_ready()

    return run
