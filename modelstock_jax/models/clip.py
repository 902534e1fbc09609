"""CLIP as pure functions of plain nested dictionaries of arrays.

The Flax NNX towers are split once; after that a model is a tree of arrays and these functions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from modelstock_jax.errors import UserError
from modelstock_jax.models.config import CLIPConfig
from modelstock_jax.models.transformer import (
    DEFAULT_COMPUTE,
    Compute,
    end_of_text,
    interpolate,
    layer_norm,
    linear,
    make_blocks,
    normal,
    patches,
    run_blocks,
)

# CLIP's image and text towers as Flax NNX modules; the functions around them come after.


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
        >>> from modelstock_jax.models.config import TextConfig, VisionConfig
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
    """Image features, not normalized: projection(post_layernorm(class token)).

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
    """Text features, not normalized: projection(final_layernorm(token at the end of text)).

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
        features = l2_normalize(encode_image(config, params["image_tower"], images, compute))
        head = params["head"]
        # The head is small: full float32 here costs nothing, and TF32 would show in the logits.
        logits = jnp.matmul(features, head["kernel"], precision=jax.lax.Precision.HIGHEST)
        return logits + head["bias"][None]

    return apply


def l2_normalize(x: jax.Array) -> jax.Array:
    """Divides by the norm, x / |x|, over the last axis.

    Example:
        >>> normalize(jnp.array([[0.0, 4.0]])).tolist()
        [[0.0, 1.0]]
    """
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _arrays(params: Params) -> Params:
    # A loaded checkpoint holds NumPy arrays, which cannot be indexed by a tracer.
    return jax.tree.map(jnp.asarray, params)


# What each layer of a tower gives: for research, and for parity layer by layer.


Activations = dict[str, jax.Array]


def image_activations(
    config: CLIPConfig, tower_params: Params, images: jax.Array, compute: Compute = DEFAULT_COMPUTE
) -> Activations:
    """The output of every layer of the image tower.

    The names are those of the parameters: ``blocks.block_03.self_attn.q_proj`` [B, T, D] beside
    the kernel of that name, ``blocks.block_03.self_attn`` and ``.mlp`` (what they add to the
    residual stream), ``blocks.block_03`` (the stream after the block), ``post_layernorm`` [B, D],
    ``projection`` [B, E]; and ``embed`` [B, T, D], the tokens with their positions. `encode_image`
    is not made slower: the layers are instrumented (by `flax.nnx.capture`, process-wide: not from
    two threads at once) only while this function is called or traced.

    Args:
        config: Sizes.
        tower_params: params["image_tower"].
        images: As in `encode_image`.
        compute: As in `encode_image`; remat is left out.

    Returns:
        Name -> activation.

    Raises:
        UserError: As `encode_image`.

    Example:
        >>> import jax.numpy as jnp
        >>> from modelstock_jax.models.config import TextConfig, VisionConfig
        >>> from modelstock_jax.models.clip import abstract_params
        >>> config = CLIPConfig(VisionConfig(num_hidden_layers=1), TextConfig(num_hidden_layers=1))
        >>> outputs = jax.eval_shape(
        ...     lambda tower, images: image_activations(config, tower, images),
        ...     abstract_params(config)["image_tower"],
        ...     jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32))
        >>> outputs["blocks.block_00.mlp.fc1"].shape
        (2, 50, 3072)
    """
    return _capture(image_tower(config, tower_params, images, _kept(compute)), images)


def text_activations(
    config: CLIPConfig, tower_params: Params, ids: jax.Array, compute: Compute = DEFAULT_COMPUTE
) -> Activations:
    """The output of every layer of the text tower, as `image_activations` has them.

    Args:
        config: Sizes.
        tower_params: params["text_tower"].
        ids: As in `encode_text`.
        compute: As in `encode_text`; remat is left out.

    Returns:
        Name -> activation; ``final_layernorm`` [B, D] is of the token at the end of text.

    Raises:
        UserError: As `encode_text`.
    """
    return _capture(text_tower(config, tower_params, ids, _kept(compute)), ids)


def _kept(compute: Compute) -> Compute:
    return dataclasses.replace(compute, remat=False)


def _capture(tower: nnx.Module, inputs: jax.Array) -> Activations:
    _, captured = nnx.capture(tower, nnx.Intermediate, method_outputs=nnx.Intermediate)(inputs)
    return dict(_named(nnx.to_pure_dict(captured)))


def _named(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _named(value, (*prefix, name))
        else:
            (output,) = value  # Each layer is called once.
            path = prefix if name == "__call__" else (*prefix, name)
            if path:  # The tower's own output is its projection's.
                yield ".".join(path), output
