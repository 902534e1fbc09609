"""CLIP's image and text towers as Flax NNX modules; `model` holds the functions around them.

Kernels are [in, out]; a patch is flattened as (row, column, channel).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from modelstock_jax.clip.config import CLIPConfig
from modelstock_jax.clip.positions import interpolate
from modelstock_jax.clip.transformer import (
    Compute,
    end_of_text,
    layer_norm,
    linear,
    make_blocks,
    normal,
    patches,
    run_blocks,
)


class ImageTower(nnx.Module):
    """Vision transformer: patches, class token, blocks, projection of the class token."""

    def __init__(self, config: CLIPConfig, compute: Compute, rngs: nnx.Rngs):
        tower = config.vision
        width, size = tower.hidden_size, tower.patch_size
        self.patch_size, self.remat, self.dtype = size, compute.remat, compute.dtype
        self.grid = tower.image_size // size
        self.class_embedding = nnx.Param(normal(rngs, (width,), width**-0.5))
        # As PyTorch starts a convolution: uniform within 1 / sqrt(fan_in).
        self.patch_embedding = nnx.Linear(
            size * size * tower.num_channels,
            width,
            use_bias=False,
            dtype=compute.dtype,
            kernel_init=nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
            rngs=rngs,
        )
        self.position_embedding = nnx.Param(normal(rngs, (tower.num_tokens, width), width**-0.5))
        self.pre_layernorm = layer_norm(tower, compute, rngs)
        self.blocks = make_blocks(tower, False, compute, rngs)
        self.post_layernorm = layer_norm(tower, compute, rngs)
        self.projection = linear(
            width, config.projection_dim, width**-0.5, compute, rngs, bias=False
        )

    def embed(self, images: jax.Array) -> jax.Array:
        """Maps images [B, H, W, C] to tokens [B, T, D]: the class token, then the patches."""
        x = self.patch_embedding(patches(images.astype(self.dtype), self.patch_size))
        start = self.class_embedding[...].astype(x.dtype)
        start = jnp.broadcast_to(start[None, None], (x.shape[0], 1, x.shape[2]))
        grid = (images.shape[1] // self.patch_size, images.shape[2] // self.patch_size)
        positions = interpolate(self.position_embedding[...], (self.grid, self.grid), grid)
        return jnp.concatenate([start, x], axis=1) + positions.astype(x.dtype)[None]

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images [B, H, W, C] to features [B, E]."""
        x = run_blocks(self.blocks, self.pre_layernorm(self.embed(images)), self.remat)
        return _wide(self.projection(self.post_layernorm(x[:, 0])))


class TextTower(nnx.Module):
    """Causal transformer over token ids, pooled at the end-of-text token."""

    def __init__(self, config: CLIPConfig, compute: Compute, rngs: nnx.Rngs):
        tower = config.text
        width = tower.hidden_size
        self.eos_token_id, self.remat, self.dtype = tower.eos_token_id, compute.remat, compute.dtype
        self.token_embedding = nnx.Param(normal(rngs, (tower.vocab_size, width), 0.02))
        self.position_embedding = nnx.Param(
            normal(rngs, (tower.max_position_embeddings, width), 0.01)
        )
        self.blocks = make_blocks(tower, True, compute, rngs)
        self.final_layernorm = layer_norm(tower, compute, rngs)
        self.projection = linear(
            width, config.projection_dim, width**-0.5, compute, rngs, bias=False
        )

    def embed(self, ids: jax.Array) -> jax.Array:
        """Maps token ids [B, L] to tokens [B, L, D]."""
        x = self.token_embedding[...][ids].astype(self.dtype)
        return x + self.position_embedding[...][None, : ids.shape[1]].astype(self.dtype)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Maps token ids [B, L] to features [B, E]."""
        x = run_blocks(self.blocks, self.embed(ids), self.remat)
        end = end_of_text(ids, self.eos_token_id)
        x = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
        return _wide(self.projection(self.final_layernorm(x)))


class CLIP(nnx.Module):
    """Both towers and the temperature."""

    def __init__(self, config: CLIPConfig, compute: Compute, rngs: nnx.Rngs):
        self.image_tower = ImageTower(config, compute, rngs)
        self.text_tower = TextTower(config, compute, rngs)
        self.logit_scale = nnx.Param(jnp.asarray(config.logit_scale_init_value, jnp.float32))


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
