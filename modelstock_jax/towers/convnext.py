"""A ConvNeXt (Liu et al. 2022) of two stages.

Windows are 5 x 5, for there are 8 x 8 places; a block has no layer scale, as in ConvNeXt V2.
"""

from __future__ import annotations

import jax
from flax import nnx

from modelstock_jax.clip.transformer import Compute, linear, patches
from modelstock_jax.towers.convolution import Depthwise, channel_norm

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
