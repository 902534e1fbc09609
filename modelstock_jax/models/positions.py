"""Bicubic interpolation of position embeddings, as torch computes it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

# Free parameter of the cubic kernel in PyTorch and transformers; jax.image uses -0.5, as PyTorch
# does with antialiasing.
A = -0.75
ANTIALIAS_A = -0.5


@functools.lru_cache(maxsize=64)
def bicubic(old: int, new: int, antialias: bool = False) -> np.ndarray:
    """Return the matrix that resizes one axis as torch's bicubic `interpolate` does.

    Output i samples the input at s = (i + 1/2) old / new - 1/2 (`align_corners=False`) from its
    four neighbors with Keys' kernel, a = -3/4; indices are clamped at the border.

    With `antialias`, the kernel has a = -1/2 and, if the axis shrinks, is stretched by old / new.
    Neighbors outside of the axis are left out, and each row is divided by its sum.

    Args:
      old: current length of the axis
      new: new length
      antialias: as in torch's `interpolate`

    Returns:
      [new, old], float64; each row sums to 1

    Example:
      >>> bicubic(2, 2)
      array([[1., 0.],
             [0., 1.]])
      >>> bicubic(4, 2)[0]
      array([ 0.5    ,  0.59375, -0.09375,  0.     ])
    """
    sample = (np.arange(new) + 0.5) * old / new - 0.5
    if antialias:
        distance = np.abs(np.arange(old) - sample[:, None]) / max(old / new, 1)
        matrix = np.where(distance < 2, _keys(distance, ANTIALIAS_A), 0.0)
        matrix /= matrix.sum(1, keepdims=True)
    else:
        first = np.floor(sample).astype(int)
        matrix = np.zeros((new, old))
        for tap in range(-1, 3):
            column = np.clip(first + tap, 0, old - 1)
            weights = _keys(np.abs(sample - (first + tap)), A)
            # Add: several taps may be clamped to the same column.
            np.add.at(matrix, (np.arange(new), column), weights)
    matrix.setflags(write=False)
    return matrix


def _keys(x: np.ndarray, a: float) -> np.ndarray:
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, far)


def interpolate(
    positions: jax.Array,
    old: tuple[int, int],
    new: tuple[int, int],
    *,
    antialias: bool = False,
) -> jax.Array:
    """Resize position embeddings to another grid: q[h, w] = sum_ij R[h, i] C[w, j] p[i, j].

    The embeddings of tokens before the patches (class token) are unchanged. Equal to transformers
    with `interpolate_pos_encoding=True`.

    Args:
      positions: [T + H W, D], tokens first, then patches row by row
      old: (H, W), patches
      new: (H', W')
      antialias: see `bicubic`

    Returns:
      [T + H' W', D], of the same dtype; `positions` itself if the grid is unchanged

    Example:
      >>> interpolate(jnp.arange(10.0).reshape(5, 2), (2, 2), (3, 2)).shape
      (7, 2)
    """
    if new == old:
        return positions
    first = positions.shape[0] - old[0] * old[1]
    grid = positions[first:].reshape(*old, -1)
    rows, columns = (
        jnp.asarray(bicubic(*sizes, antialias), positions.dtype)
        for sizes in zip(old, new, strict=True)
    )
    # Full precision: TF32 would change every token, and the product is small.
    grid = jnp.einsum("hi,wj,ijd->hwd", rows, columns, grid, precision=jax.lax.Precision.HIGHEST)
    return jnp.concatenate([positions[:first], grid.reshape(-1, positions.shape[1])])
