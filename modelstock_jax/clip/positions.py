"""Position embeddings of an image tower on another grid of patches: PyTorch's bicubic."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from modelstock_jax.clip.config import CLIPConfig

# The cubic kernel's free parameter: PyTorch's, and with it transformers'. jax.image has -0.5.
A = -0.75


@functools.lru_cache(maxsize=64)
def bicubic(old: int, new: int) -> np.ndarray:
    """The matrix that resizes one axis, as ``torch.nn.functional.interpolate(mode="bicubic")``.

    Output i lies at s = (i + 1/2) old / new - 1/2 (``align_corners=False``) and takes the four
    inputs around it by Keys' kernel with a = -3/4; inputs beyond the border are the border's. No
    antialiasing.

    Args:
        old: Length of the axis.
        new: Length that is wanted.

    Returns:
        [new, old], float64; each row sums to 1.

    Example:
        >>> bicubic(2, 2)
        array([[1., 0.],
               [0., 1.]])
        >>> bicubic(4, 2)[0]
        array([ 0.5    ,  0.59375, -0.09375,  0.     ])
    """
    at = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(at).astype(int)
    matrix = np.zeros((new, old))
    for tap in range(-1, 3):
        column = np.clip(first + tap, 0, old - 1)
        # Taps that were clamped to one column add up.
        np.add.at(matrix, (np.arange(new), column), _keys(np.abs(at - (first + tap))))
    matrix.setflags(write=False)
    return matrix


def _keys(x: np.ndarray) -> np.ndarray:
    near = (A + 2) * x**3 - (A + 3) * x**2 + 1
    far = A * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, far)


def interpolate(positions: jax.Array, old: tuple[int, int], new: tuple[int, int]) -> jax.Array:
    """Position embeddings on another grid: q[h, w] = sum_ij R[h, i] C[w, j] p[i, j].

    The class token keeps its own. What transformers' CLIP computes with
    ``interpolate_pos_encoding=True``.

    Args:
        positions: [1 + H W, D], the class token first, then the patches row by row.
        old: (H, W), patches.
        new: (H', W').

    Returns:
        [1 + H' W', D], of the same dtype; `positions` itself where the grid is the same.

    Example:
        >>> interpolate(jnp.arange(10.0).reshape(5, 2), (2, 2), (3, 2)).shape
        (7, 2)
    """
    if new == old:
        return positions
    grid = positions[1:].reshape(*old, -1)
    rows, columns = (
        jnp.asarray(bicubic(*sizes), positions.dtype) for sizes in zip(old, new, strict=True)
    )
    # Full precision: TF32 would move every token, and the product is small.
    grid = jnp.einsum("hi,wj,ijd->hwd", rows, columns, grid, precision=jax.lax.Precision.HIGHEST)
    return jnp.concatenate([positions[:1], grid.reshape(-1, positions.shape[1])])


def resize_positions(
    params: dict[str, Any], config: CLIPConfig, image_size: int
) -> tuple[CLIPConfig, dict[str, Any]]:
    """Moves a model to another training resolution, before it is fine-tuned there.

    The interpolated position embedding takes the place of the old one, so that the features of
    images of the new size are what they were through interpolation at the call. (OpenCLIP resizes
    with antialiasing, whose kernel has a = -1/2: its embedding differs a little.)

    Args:
        params: A tree with "image_tower" in it: CLIP's, or a replica's. It is not changed.
        config: Its sizes.
        image_size: Side of the images to come, in pixels; a multiple of the patch size.

    Returns:
        The config with that image size; the tree with a new position embedding (a NumPy array),
        its other leaves shared.

    Raises:
        UserError: `image_size` is no positive multiple of the patch size.

    Example:
        >>> from modelstock_jax.clip.config import VisionConfig
        >>> config = CLIPConfig(VisionConfig(hidden_size=12, image_size=64, patch_size=32))
        >>> params = {"image_tower": {"position_embedding": np.ones((5, 12), np.float32)}}
        >>> config, params = resize_positions(params, config, 96)
        >>> config.vision.image_size, params["image_tower"]["position_embedding"].shape
        (96, (10, 12))
    """
    vision = dataclasses.replace(config.vision, image_size=image_size)
    old, new = (size.image_size // size.patch_size for size in (config.vision, vision))
    tower = params["image_tower"]
    positions = interpolate(jnp.asarray(tower["position_embedding"]), (old, old), (new, new))
    tower = {**tower, "position_embedding": np.asarray(positions)}
    return dataclasses.replace(config, vision=vision), {**params, "image_tower": tower}
