"""ConvNeXt (Liu et al. 2022), and the convolutions and norms of all small towers.

Convolutions are written as matrix products: with vmapped weights a convolution becomes a grouped
convolution, which is several times slower. Norms are over channels or groups of channels of one
image: running statistics get no gradient, so a merge would have to treat them separately.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from modelstock_jax.models.transformer import Compute, linear, normal, patches

_GROUPS = 8


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


def _shifted(x: jax.Array, size: int, stride: int) -> Iterator[jax.Array]:
    """Yield the input at each offset of the window, [B, H / stride, W / stride, C], row by row."""
    _, height, width, _ = x.shape
    pad = size // 2
    x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    for row in range(size):
        for column in range(size):
            yield x[:, row : row + height : stride, column : column + width : stride]


def group_norm(channels: int, compute: Compute, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """Create a group norm over space and 8 groups of channels (Wu and He 2018)."""
    return nnx.GroupNorm(channels, num_groups=_GROUPS, dtype=compute.dtype, rngs=rngs)


def channel_norm(channels: int, compute: Compute, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Create a layer norm over the channels of each position."""
    return nnx.LayerNorm(channels, dtype=compute.dtype, use_fast_variance=False, rngs=rngs)


WIDTHS = (48, 96)
BLOCKS = 2  # per stage
_WINDOW, _STEM = 5, 3


class ConvNeXtBlock(nnx.Module):
    """Depthwise convolution and MLP on each position, with a residual connection."""

    def __init__(self, width: int, compute: Compute, rngs: nnx.Rngs):
        self.depthwise = Depthwise(width, _WINDOW, compute, rngs)
        self.norm = channel_norm(width, compute, rngs)
        self.fc1 = linear(width, 4 * width, width**-0.5, compute, rngs)
        self.fc2 = linear(4 * width, width, 0.5 * (4 * width) ** -0.5, compute, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x [B, H, W, C] to [B, H, W, C]."""
        y = self.fc2(jax.nn.gelu(self.fc1(self.norm(self.depthwise(x))), approximate=False))
        return x + y


class Stage(nnx.Module):
    """Patch downsampling followed by blocks."""

    def __init__(self, patch: int, inputs: int, width: int, compute: Compute, rngs: nnx.Rngs):
        self.patch = patch
        size = patch * patch * inputs
        self.downsample = linear(size, width, size**-0.5, compute, rngs)
        self.downsample_norm = channel_norm(width, compute, rngs)
        self.blocks = nnx.Dict(
            {f"block_{i:02d}": ConvNeXtBlock(width, compute, rngs) for i in range(BLOCKS)}
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x [B, H, W, I] to [B, H/P, W/P, O]."""
        count, height, width, _ = x.shape
        x = self.downsample_norm(self.downsample(patches(x, self.patch)))
        x = x.reshape(count, height // self.patch, width // self.patch, -1)
        for i in range(BLOCKS):
            x = self.blocks[f"block_{i:02d}"](x)
        return x


class ConvNeXt(nnx.Module):
    """Two stages, global average pooling, norm."""

    def __init__(self, compute: Compute, rngs: nnx.Rngs):
        self.stage_00 = Stage(_STEM, 3, WIDTHS[0], compute, rngs)
        self.stage_01 = Stage(2, *WIDTHS, compute, rngs)
        self.norm = channel_norm(WIDTHS[1], compute, rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images [B, H, W, 3], H and W multiples of 6, to features [B, 96]."""
        return self.norm(self.stage_01(self.stage_00(images)).mean((1, 2)))
