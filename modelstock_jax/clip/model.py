"""CLIP as pure functions of plain nested dictionaries of arrays.

The modules of `towers` are split once; after that a model is a tree of arrays and these functions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from modelstock_jax.clip.config import CLIPConfig
from modelstock_jax.clip.towers import CLIP, ImageTower, TextTower
from modelstock_jax.clip.transformer import DEFAULT_COMPUTE, Compute
from modelstock_jax.errors import UserError

Params = dict[str, Any]


def init(config: CLIPConfig, key: jax.Array) -> Params:
    """Draws the parameters from which CLIP's authors pretrain.

    Kernels are normal with the width's and depth's scales of the released code (queries, keys and
    values D^-1/2; what writes to the residual stream D^-1/2 (2 layers)^-1/2), biases zero.

    Args:
        config: Sizes.
        key: A JAX random key.

    Returns:
        Nested dictionaries of float32 arrays: image_tower, text_tower, logit_scale.

    Example:
        >>> from modelstock_jax.clip.config import TextConfig, VisionConfig
        >>> small = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        ...              num_attention_heads=2)
        >>> config = CLIPConfig(VisionConfig(**small, image_size=4, patch_size=2),
        ...                     TextConfig(**small, vocab_size=9), projection_dim=4)
        >>> params = jax.eval_shape(lambda key: init(config, key), jax.random.key(0))
        >>> params["image_tower"]["patch_embedding"]["kernel"].shape
        (12, 8)
    """

    @jax.jit
    def draw(key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(CLIP(config, Compute(), nnx.Rngs(key)), nnx.Param))

    return draw(key)


@functools.lru_cache(maxsize=64)
def _abstract(
    tower: Callable[..., nnx.Module], config: CLIPConfig, compute: Compute
) -> tuple[Any, Any]:
    """A module's structure and its parameters' shapes, with nothing drawn."""
    return nnx.split(nnx.eval_shape(lambda: tower(config, compute, _OneKey())))


class _OneKey(nnx.Rngs):
    """One key for all draws: where only shapes are wanted, splitting keys is most of the time."""

    def __init__(self) -> None:
        self.key = jax.random.key(0)

    def params(self) -> jax.Array:
        return self.key


def abstract_params(config: CLIPConfig) -> Params:
    """Shapes and dtypes of the parameters, with no memory spent: a tree of ShapeDtypeStruct."""
    return nnx.to_pure_dict(_abstract(CLIP, config, DEFAULT_COMPUTE)[1])


def encode_image(
    config: CLIPConfig, tower_params: Params, images: jax.Array, compute: Compute = DEFAULT_COMPUTE
) -> jax.Array:
    """Image features, not normalised: projection(post_layernorm(class token)).

    Args:
        config: Sizes.
        tower_params: params["image_tower"].
        images: [B, H, W, C], float32, mean and standard deviation of the preprocessor applied; H
            and W any multiples of the patch size. Where they are not the config's image size, the
            position embedding is interpolated, as transformers' ``interpolate_pos_encoding=True``.
        compute: Dtype, attention and remat.

    Returns:
        [B, E], float32 (float64 where that is computed in).

    Raises:
        UserError: Images that do not divide into patches, or of other channels.
    """
    return image_tower(config, tower_params, images, compute)(images)


def encode_text(
    config: CLIPConfig, tower_params: Params, ids: jax.Array, compute: Compute = DEFAULT_COMPUTE
) -> jax.Array:
    """Text features, not normalised: projection(final_layernorm(token at the end of text)).

    Args:
        config: Sizes, and the rule of the end of text.
        tower_params: params["text_tower"].
        ids: Token ids [B, L], integers, L at most max_position_embeddings.
        compute: Dtype, attention and remat.

    Returns:
        [B, E], float32 (float64 where that is computed in).

    Raises:
        UserError: More tokens than positions.
    """
    return text_tower(config, tower_params, ids, compute)(ids)


def image_tower(
    config: CLIPConfig, tower_params: Params, images: jax.Array, compute: Compute
) -> ImageTower:
    """The module that `encode_image` calls on images of this shape, which is checked here."""
    size, channels = config.vision.patch_size, config.vision.num_channels
    shape = tuple(images.shape)
    fits = len(shape) == 4 and shape[3] == channels and min(shape[1:3]) > 0
    if not fits or shape[1] % size or shape[2] % size:
        raise UserError(
            f"encode_image: images of shape {shape}; the model takes [B, H, W, {channels}] with H "
            f"and W multiples of the patch size {size}."
        )
    return nnx.merge(_abstract(ImageTower, config, compute)[0], _arrays(tower_params))


def text_tower(
    config: CLIPConfig, tower_params: Params, ids: jax.Array, compute: Compute
) -> TextTower:
    """The module that `encode_text` calls on ids of this shape, which is checked here."""
    most = config.text.max_position_embeddings
    if ids.ndim != 2 or ids.shape[1] > most:
        raise UserError(
            f"encode_text: ids of shape {tuple(ids.shape)}; the model takes [B, L <= {most}]."
        )
    return nnx.merge(_abstract(TextTower, config, compute)[0], _arrays(tower_params))


def classifier(
    config: CLIPConfig, compute: Compute = DEFAULT_COMPUTE
) -> Callable[[Params, jax.Array], jax.Array]:
    """The image tower under a linear head: logits = f / |f| W + b.

    Args:
        config: Sizes.
        compute: Dtype, attention and remat.

    Returns:
        apply(params, images) -> logits [B, K] with params {"image_tower", "head": {"kernel" [E, K],
        "bias" [K]}} and images as in `encode_image`.
    """

    def apply(params: Params, images: jax.Array) -> jax.Array:
        features = normalise(encode_image(config, params["image_tower"], images, compute))
        head = params["head"]
        # The head is small: full float32 here costs nothing, and TF32 would show in the logits.
        logits = jnp.matmul(features, head["kernel"], precision=jax.lax.Precision.HIGHEST)
        return logits + head["bias"][None]

    return apply


def normalise(x: jax.Array) -> jax.Array:
    """Divides by the norm, x / |x|, over the last axis.

    Example:
        >>> normalise(jnp.array([[0.0, 4.0]])).tolist()
        [[0.0, 1.0]]
    """
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _arrays(params: Params) -> Params:
    # A loaded checkpoint holds NumPy arrays, which cannot be indexed by a tracer.
    return jax.tree.map(jnp.asarray, params)
