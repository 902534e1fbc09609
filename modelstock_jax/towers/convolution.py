"""Convolutions as products and sums, and the norms that go with them.

Under vmapped weights a convolution becomes a grouped one, which is several times slower than these.
Norms are over an image's own channels or groups of them: running statistics would be numbers that
no gradient moves, and a merge of models would have to treat them apart.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from modelstock_jax.clip.transformer import Compute, normal

_GROUPS = 8


class Convolution(nnx.Module):
    """A square convolution without bias, zero-padded: kernel [K K I, O], (row, column, channel)."""

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
        """Maps x [B, H, W, I] to [B, ceil(H / stride), ceil(W / stride), O]."""
        x = x.astype(self.dtype)
        windows = jnp.concatenate(list(_shifted(x, self.size, self.stride)), axis=-1)
        return windows @ self.kernel[...].astype(self.dtype)


class Depthwise(nnx.Module):
    """A square convolution of each channel by itself, zero-padded: kernel [K K, C], bias [C]."""

    def __init__(self, channels: int, size: int, compute: Compute, rngs: nnx.Rngs):
        self.size, self.dtype = size, compute.dtype
        self.kernel = nnx.Param(normal(rngs, (size * size, channels), 1 / size))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B, H, W, C] to [B, H, W, C]."""
        x = x.astype(self.dtype)
        kernel, bias = (p[...].astype(self.dtype) for p in (self.kernel, self.bias))
        shifts = _shifted(x, self.size, 1)
        total = sum(one * k[None, None, None] for one, k in zip(shifts, kernel, strict=True))
        return total + bias[None, None, None]


def _shifted(x: jax.Array, size: int, stride: int) -> Iterator[jax.Array]:
    """The input under each place of a window, row by row: [B, H / stride, W / stride, C] each."""
    _, height, width, _ = x.shape
    pad = size // 2
    x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    for row in range(size):
        for column in range(size):
            yield x[:, row : row + height : stride, column : column + width : stride]


def group_norm(channels: int, compute: Compute, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """Over space and each of 8 groups of channels (Wu and He 2018), with scale and bias."""
    return nnx.GroupNorm(channels, num_groups=_GROUPS, dtype=compute.dtype, rngs=rngs)


def channel_norm(channels: int, compute: Compute, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Over the channels of each place, with scale and bias."""
    return nnx.LayerNorm(channels, dtype=compute.dtype, use_fast_variance=False, rngs=rngs)
