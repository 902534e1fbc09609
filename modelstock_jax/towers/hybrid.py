"""A hybrid (Dosovitskiy et al. 2021): convolutions make the tokens of a transformer."""

from __future__ import annotations

import jax
from flax import nnx

from modelstock_jax.clip.config import VisionConfig
from modelstock_jax.clip.transformer import Compute, layer_norm, make_blocks, normal, run_blocks
from modelstock_jax.towers.convolution import Convolution, group_norm

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
    """Two convolutions that halve the image, blocks over its places, and the mean of them."""

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
        """Maps images [B, 24, 24, 3] to features [B, 64]."""
        x = jax.nn.relu(self.stem1_norm(self.stem1(images)))
        x = jax.nn.relu(self.stem2_norm(self.stem2(x)))
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x = x + self.position_embedding[...].astype(x.dtype)[None]
        return self.post_layernorm(run_blocks(self.blocks, x, self.remat)).mean(1)
