"""ResNet (He et al. 2016) with group norms; hybrid of a convolutional stem and a transformer."""

from __future__ import annotations

import jax
from flax import nnx

from modelstock_jax.models.config import VisionConfig
from modelstock_jax.models.convnext import Convolution, group_norm
from modelstock_jax.models.transformer import Compute, layer_norm, make_blocks, normal, run_blocks

WIDTHS = (32, 64, 128)


class ResidualBlock(nnx.Module):
    """Two 3 x 3 convolutions, the first with stride 2, and a projection shortcut."""

    def __init__(self, inputs: int, outputs: int, compute: Compute, rngs: nnx.Rngs):
        self.conv1 = Convolution(inputs, outputs, 3, compute, rngs, stride=2)
        self.norm1 = group_norm(outputs, compute, rngs)
        self.conv2 = Convolution(outputs, outputs, 3, compute, rngs)
        self.norm2 = group_norm(outputs, compute, rngs)
        self.shortcut = Convolution(inputs, outputs, 1, compute, rngs, stride=2)
        self.shortcut_norm = group_norm(outputs, compute, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x [B, H, W, I] to [B, H/2, W/2, O]."""
        y = jax.nn.relu(self.norm1(self.conv1(x)))
        return jax.nn.relu(self.norm2(self.conv2(y)) + self.shortcut_norm(self.shortcut(x)))


class ResNet(nnx.Module):
    """Stem, blocks, global average pooling."""

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
        """Map images [B, H, W, 3] to features [B, 128]."""
        x = jax.nn.relu(self.stem_norm(self.stem(images)))
        for i in range(len(WIDTHS)):
            x = self.blocks[f"block_{i:02d}"](x)
        return x.mean((1, 2))


STEM = 32
SIZES = VisionConfig(
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=24,
    patch_size=4,
)


class Hybrid(nnx.Module):
    """Hybrid (Dosovitskiy et al. 2021): two stride-2 convolutions, transformer blocks, mean."""

    def __init__(self, compute: Compute, rngs: nnx.Rngs):
        width, tokens = SIZES.hidden_size, (SIZES.image_size // SIZES.patch_size) ** 2
        self.remat = compute.remat
        self.stem1 = Convolution(3, STEM, 3, compute, rngs, stride=2)
        self.stem1_norm = group_norm(STEM, compute, rngs)
        self.stem2 = Convolution(STEM, width, 3, compute, rngs, stride=2)
        self.stem2_norm = group_norm(width, compute, rngs)
        self.position_embedding = nnx.Param(normal(rngs, (tokens, width), width**-0.5))
        self.blocks = make_blocks(SIZES, False, compute, rngs)
        self.post_layernorm = layer_norm(SIZES, compute, rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images [B, 24, 24, 3] to features [B, 64]."""
        x = jax.nn.relu(self.stem1_norm(self.stem1(images)))
        x = jax.nn.relu(self.stem2_norm(self.stem2(x)))
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x = x + self.position_embedding[...].astype(x.dtype)[None]
        return self.post_layernorm(run_blocks(self.blocks, x, self.remat)).mean(1)
