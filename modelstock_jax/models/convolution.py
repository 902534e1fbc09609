"""Convolutions as matrix products, and the norms of convolutional nets.

With vmapped weights a convolution becomes a grouped convolution, and in the loop of
`compute.replica_mode='map'` XLA's CPU backend computes it without Eigen: both are several times
slower than the product of a window with a matrix (benchmarks/convolutions.py).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from modelstock_jax.errors import check_choice
from modelstock_jax.models.compute import Compute
from modelstock_jax.models.transformer import normal

_GROUPS = 8
NORMS = ("batch", "group")


class Convolution(nnx.Module):
    """Square convolution without bias, zero-padded; kernel [K K I, O] in (row, column, channel)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        compute: Compute,
        rngs: nnx.Rngs,
        stride: int = 1,
    ):
        self.size, self.stride, self.dtype = size, stride, compute.dtype
        fan_in = size * size * inputs
        self.kernel = nnx.Param(normal(rngs, (fan_in, outputs), (2 / fan_in) ** 0.5))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x [B, H, W, I] to [B, ceil(H / stride), ceil(W / stride), O]."""
        x = x.astype(self.dtype)
        windows = jnp.concatenate(list(_shifted(x, self.size, self.stride)), axis=-1)
        return windows @ self.kernel[...].astype(self.dtype)


class Depthwise(nnx.Module):
    """Depthwise square convolution, zero-padded; kernel [K K, C], bias [C]."""

    def __init__(self, channels: int, size: int, compute: Compute, rngs: nnx.Rngs):
        self.size, self.dtype = size, compute.dtype
        self.kernel = nnx.Param(normal(rngs, (size * size, channels), 1 / size))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x [B, H, W, C] to [B, H, W, C]."""
        x = x.astype(self.dtype)
        kernel, bias = (p[...].astype(self.dtype) for p in (self.kernel, self.bias))
        shifts = _shifted(x, self.size, 1)
        total = sum(x * k[None, None, None] for x, k in zip(shifts, kernel, strict=True))
        return total + bias[None, None, None]


def max_pool(x: jax.Array, size: int, stride: int) -> jax.Array:
    """Return the maximum of each window, [B, ceil(H / stride), ceil(W / stride), C].

    The gradient of `lax.reduce_window` would be gathered across the replicas of a mesh.

    Args:
      x: [B, H, W, C]
      size: side of the window; the window of an output is centered and clipped to the image
      stride: step between windows
    """
    return functools.reduce(jnp.maximum, _shifted(x, size, stride, -jnp.inf))


def _shifted(x: jax.Array, size: int, stride: int, fill: float = 0.0) -> Iterator[jax.Array]:
    """Yield the input at each offset of the window, [B, H / stride, W / stride, C], row by row."""
    _, height, width, _ = x.shape
    pad = size // 2
    x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)), constant_values=fill)
    for row in range(size):
        for column in range(size):
            yield x[:, row : row + height : stride, column : column + width : stride]


def image_norm(kind: str, channels: int, compute: Compute, rngs: nnx.Rngs) -> nnx.Module:
    """Create a norm over the positions of an image.

    Args:
      kind: 'batch', with the stored statistics of the pretrained model; or 'group', over 8 groups
        of channels of one image (Wu and He 2018), for models that are trained from scratch
      channels: C
      compute: its dtype is used
      rngs: random keys

    Raises:
      UserError: unknown kind
    """
    check_choice("norm", kind, NORMS)
    if kind == "group":
        return nnx.GroupNorm(channels, num_groups=_GROUPS, dtype=compute.dtype, rngs=rngs)
    # 1e-5 is torch's default epsilon; transformers has no option for it.
    return nnx.BatchNorm(
        channels, use_running_average=True, epsilon=1e-5, dtype=compute.dtype, rngs=rngs
    )


def channel_norm(channels: int, epsilon: float, compute: Compute, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Create a layer norm over the channels of each position."""
    return nnx.LayerNorm(
        channels, epsilon=epsilon, dtype=compute.dtype, use_fast_variance=False, rngs=rngs
    )
