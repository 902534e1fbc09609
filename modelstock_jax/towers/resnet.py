"""A residual network (He et al. 2016) of three blocks, with group norms for batch norms."""

from __future__ import annotations

import jax
from flax import nnx

from modelstock_jax.clip.transformer import Compute
from modelstock_jax.towers.convolution import Convolution, group_norm

WIDTHS = (32, 64, 128)


class ResidualBlock(nnx.Module):
    """Two convolutions of 3 x 3, the first of which halves the image, and a projected shortcut."""

    def __init__(self, inputs: int, outputs: int, compute: Compute, rngs: nnx.Rngs):
        self.conv1 = Convolution(inputs, outputs, 3, compute, rngs, stride=2)
        self.norm1 = group_norm(outputs, compute, rngs)
        self.conv2 = Convolution(outputs, outputs, 3, compute, rngs)
        self.norm2 = group_norm(outputs, compute, rngs)
        self.shortcut = Convolution(inputs, outputs, 1, compute, rngs, stride=2)
        self.shortcut_norm = group_norm(outputs, compute, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B, H, W, I] to [B, H/2, W/2, O]."""
        y = jax.nn.relu(self.norm1(self.conv1(x)))
        return jax.nn.relu(self.norm2(self.conv2(y)) + self.shortcut_norm(self.shortcut(x)))


class ResNet(nnx.Module):
    """A stem, blocks, and the mean over all places."""

    def __init__(self, compute: Compute, rngs: nnx.Rngs):
        self.stem = Convolution(3, WIDTHS[0], 3, compute, rngs)
        self.stem_norm = group_norm(WIDTHS[0], compute, rngs)
        inputs = (WIDTHS[0], *WIDTHS)
        self.blocks = nnx.Dict(
            {
                f"block_{i:02d}": ResidualBlock(inputs[i], width, compute, rngs)
                for i, width in enumerate(WIDTHS)
            }
        )

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images [B, H, W, 3] to features [B, 128]."""
        x = jax.nn.relu(self.stem_norm(self.stem(images)))
        for i in range(len(WIDTHS)):
            x = self.blocks[f"block_{i:02d}"](x)
        return x.mean((1, 2))
