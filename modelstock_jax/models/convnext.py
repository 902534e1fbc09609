"""ConvNeXt (Liu et al. 2022), and the convolutions and norms that all small towers use.

Under vmapped weights a convolution becomes a grouped one, which is several times slower than these.
Norms are over an image's own channels or groups of them: running statistics would be numbers that
no gradient moves, and a merge of models would have to treat them apart.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from modelstock_jax.models.transformer import Compute, linear, normal, patches

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


# A ConvNeXt (Liu et al. 2022) of two stages.


WIDTHS = (48, 96)
BLOCKS = 2  # of each stage
_WINDOW, _STEM = 5, 3


class ConvNeXtBlock(nnx.Module):
    """A depthwise convolution and a perceptron on each place, plus the input."""

    def __init__(self, width: int, compute: Compute, rngs: nnx.Rngs):
        self.depthwise = Depthwise(width, _WINDOW, compute, rngs)
        self.norm = channel_norm(width, compute, rngs)
        self.fc1 = linear(width, 4 * width, width**-0.5, compute, rngs)
        self.fc2 = linear(4 * width, width, 0.5 * (4 * width) ** -0.5, compute, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B, H, W, C] to [B, H, W, C]."""
        y = self.fc2(jax.nn.gelu(self.fc1(self.norm(self.depthwise(x))), approximate=False))
        return x + y


class Stage(nnx.Module):
    """Patches made channels, and blocks."""

    def __init__(self, patch: int, inputs: int, width: int, compute: Compute, rngs: nnx.Rngs):
        self.patch = patch
        size = patch * patch * inputs
        self.downsample = linear(size, width, size**-0.5, compute, rngs)
        self.downsample_norm = channel_norm(width, compute, rngs)
        self.blocks = nnx.Dict(
            {f"block_{i:02d}": ConvNeXtBlock(width, compute, rngs) for i in range(BLOCKS)}
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B, H, W, I] to [B, H/P, W/P, O]."""
        count, height, width, _ = x.shape
        x = self.downsample_norm(self.downsample(patches(x, self.patch)))
        x = x.reshape(count, height // self.patch, width // self.patch, -1)
        for i in range(BLOCKS):
            x = self.blocks[f"block_{i:02d}"](x)
        return x


class ConvNeXt(nnx.Module):
    """Two stages, the mean over all places, a norm."""

    def __init__(self, compute: Compute, rngs: nnx.Rngs):
        self.stage_00 = Stage(_STEM, 3, WIDTHS[0], compute, rngs)
        self.stage_01 = Stage(2, *WIDTHS, compute, rngs)
        self.norm = channel_norm(WIDTHS[1], compute, rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images [B, H, W, 3], H and W multiples of 6, to features [B, 96]."""
        return self.norm(self.stage_01(self.stage_00(images)).mean((1, 2)))
