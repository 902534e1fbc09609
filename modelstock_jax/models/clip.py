"""CLIP as pure functions of nested dictionaries of arrays.

The Flax NNX towers are split once; then a model is a tree of arrays and these functions.
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


class ImageTower(nnx.Module):
    """Vision transformer: patches, class token, blocks, projection of the class token."""

    def __init__(self, config: CLIPConfig, compute: Compute, rngs: nnx.Rngs):
        tower = config.vision
        width, size = tower.hidden_size, tower.patch_size
        self.patch_size, self.remat, self.dtype = size, compute.remat, compute.dtype
        self.grid = tower.image_size // size
        self.class_embedding = nnx.Param(normal(rngs, (width,), width**-0.5))
        # PyTorch's initialization of a convolution: uniform within 1 / sqrt(fan_in).
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
        """Map images [B, H, W, C] to tokens [B, T, D]: the class token, then the patches."""
        x = self.patch_embedding(patches(images.astype(self.dtype), self.patch_size))
        start = self.class_embedding[...].astype(x.dtype)
        start = jnp.broadcast_to(start[None, None], (x.shape[0], 1, x.shape[2]))
        grid = (images.shape[1] // self.patch_size, images.shape[2] // self.patch_size)
        positions = interpolate(self.position_embedding[...], (self.grid, self.grid), grid)
        return jnp.concatenate([start, x], axis=1) + positions.astype(x.dtype)[None]

    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images [B, H, W, C] to features [B, E]."""
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
        """Map token ids [B, L] to tokens [B, L, D]."""
        x = self.token_embedding[...][ids].astype(self.dtype)
        return x + self.position_embedding[...][None, : ids.shape[1]].astype(self.dtype)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Map token ids [B, L] to features [B, E]."""
        x = run_blocks(self.blocks, self.embed(ids), self.remat)
        end = end_of_text(ids, self.eos_token_id)
        x = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
        return _wide(self.projection(self.final_layernorm(x)))


class CLIP(nnx.Module):
    """Both towers and the logit scale."""

    def __init__(self, config: CLIPConfig, compute: Compute, rngs: nnx.Rngs):
        self.image_tower = ImageTower(config, compute, rngs)
        self.text_tower = TextTower(config, compute, rngs)
        self.logit_scale = nnx.Param(jnp.asarray(config.logit_scale_init_value, jnp.float32))


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


Params = dict[str, Any]


def init(config: CLIPConfig, key: jax.Array) -> Params:
    """Draw initial parameters as in the released CLIP code.

    Kernels are normal, with standard deviation D^-1/2 for queries, keys and values and
    D^-1/2 (2 layers)^-1/2 for projections into the residual stream; biases are zero.

    Args:
      config: sizes
      key: a JAX random key

    Returns:
      Nested dictionaries of float32 arrays: image_tower, text_tower, logit_scale

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
    """Return a module's structure and parameter shapes without drawing values."""
    return nnx.split(nnx.eval_shape(lambda: tower(config, compute, _OneKey())))


class _OneKey(nnx.Rngs):
    """One key for all draws: if only shapes are needed, splitting keys dominates the time."""

    def __init__(self) -> None:
        self.key = jax.random.key(0)

    def params(self) -> jax.Array:
        return self.key


def abstract_params(config: CLIPConfig) -> Params:
    """Return shapes and dtypes of the parameters, a tree of ShapeDtypeStruct; allocates nothing."""
    return nnx.to_pure_dict(_abstract(CLIP, config, DEFAULT_COMPUTE)[1])


def encode_image(
    config: CLIPConfig, tower_params: Params, images: jax.Array, compute: Compute = DEFAULT_COMPUTE
) -> jax.Array:
    """Compute image features, not normalized: projection(post_layernorm(class token)).

    Args:
      config: sizes
      tower_params: params["image_tower"]
      images: [B, H, W, C], float32, preprocessed; H and W are multiples of the patch size. If they
        differ from the config's image size, the position embedding is interpolated, as with
        transformers' `interpolate_pos_encoding=True`.
      compute: dtype, attention implementation and remat

    Returns:
      [B, E], float32 (float64 if `compute.dtype` is float64)

    Raises:
      UserError: images do not divide into patches, or have another number of channels
    """
    return image_tower(config, tower_params, images, compute)(images)


def encode_text(
    config: CLIPConfig, tower_params: Params, ids: jax.Array, compute: Compute = DEFAULT_COMPUTE
) -> jax.Array:
    """Compute text features, not normalized: projection(final_layernorm(end-of-text token)).

    Args:
      config: sizes and end-of-text rule
      tower_params: params["text_tower"]
      ids: token ids [B, L], integers, L at most max_position_embeddings
      compute: dtype, attention implementation and remat

    Returns:
      [B, E], float32 (float64 if `compute.dtype` is float64)

    Raises:
      UserError: more tokens than position embeddings
    """
    return text_tower(config, tower_params, ids, compute)(ids)


def image_tower(
    config: CLIPConfig, tower_params: Params, images: jax.Array, compute: Compute
) -> ImageTower:
    """Return the module that `encode_image` calls, after checking the shape of the images."""
    size, channels = config.vision.patch_size, config.vision.num_channels
    shape = tuple(images.shape)
    fits = len(shape) == 4 and shape[3] == channels and min(shape[1:3]) > 0
    if not fits or shape[1] % size or shape[2] % size:
        raise UserError(
            f"encode_image: images of shape {shape}; expected [B, H, W, {channels}] with H and W "
            f"multiples of the patch size {size}"
        )
    return nnx.merge(_abstract(ImageTower, config, compute)[0], _arrays(tower_params))


def text_tower(
    config: CLIPConfig, tower_params: Params, ids: jax.Array, compute: Compute
) -> TextTower:
    """Return the module that `encode_text` calls, after checking the shape of the ids."""
    max_length = config.text.max_position_embeddings
    if ids.ndim != 2 or ids.shape[1] > max_length:
        raise UserError(
            f"encode_text: ids of shape {tuple(ids.shape)}; expected [B, L <= {max_length}]"
        )
    return nnx.merge(_abstract(TextTower, config, compute)[0], _arrays(tower_params))


def classifier(
    config: CLIPConfig, compute: Compute = DEFAULT_COMPUTE
) -> Callable[[Params, jax.Array], jax.Array]:
    """Return the image tower with a linear head: logits = f / |f| W + b.

    Args:
      config: sizes
      compute: dtype, attention implementation and remat

    Returns:
      apply(params, images) -> logits [B, K] with params {"image_tower", "head": {"kernel" [E, K],
      "bias" [K]}} and images as in `encode_image`
    """

    def apply(params: Params, images: jax.Array) -> jax.Array:
        features = l2_normalize(encode_image(config, params["image_tower"], images, compute))
        head = params["head"]
        # The head is small: full float32 costs nothing, and TF32 would be visible in the logits.
        logits = jnp.matmul(features, head["kernel"], precision=jax.lax.Precision.HIGHEST)
        return logits + head["bias"][None]

    return apply


def l2_normalize(x: jax.Array) -> jax.Array:
    """Divide by the L2 norm over the last axis: x / |x|.

    Example:
      >>> l2_normalize(jnp.array([[0.0, 4.0]])).tolist()
      [[0.0, 1.0]]
    """
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _arrays(params: Params) -> Params:
    # A loaded checkpoint has NumPy arrays, which a tracer cannot index.
    return jax.tree.map(jnp.asarray, params)


Activations = dict[str, jax.Array]


def image_activations(
    config: CLIPConfig, tower_params: Params, images: jax.Array, compute: Compute = DEFAULT_COMPUTE
) -> Activations:
    """Return the output of every layer of the image tower.

    Names are those of the parameters:

    - `blocks.block_03.self_attn.q_proj` [B, T, D]: output of the layer with that kernel
    - `blocks.block_03.self_attn` and `.mlp`: their contribution to the residual stream
    - `blocks.block_03`: the residual stream after the block
    - `post_layernorm` [B, D], `projection` [B, E]
    - `embed` [B, T, D]: tokens with position embeddings

    `encode_image` is not slowed down: layers are instrumented (by `flax.nnx.capture`, for the whole
    process, so not from two threads at once) only while this function is called or traced.

    Args:
      config: sizes
      tower_params: params["image_tower"]
      images: as in `encode_image`
      compute: as in `encode_image`; remat is ignored

    Returns:
      Name -> activation

    Raises:
      UserError: as `encode_image`

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
    return _capture(image_tower(config, tower_params, images, _without_remat(compute)), images)


def text_activations(
    config: CLIPConfig, tower_params: Params, ids: jax.Array, compute: Compute = DEFAULT_COMPUTE
) -> Activations:
    """Return the output of every layer of the text tower; see `image_activations`.

    Args:
      config: sizes
      tower_params: params["text_tower"]
      ids: as in `encode_text`
      compute: as in `encode_text`; remat is ignored

    Returns:
      Name -> activation; `final_layernorm` [B, D] is that of the end-of-text token

    Raises:
      UserError: as `encode_text`
    """
    return _capture(text_tower(config, tower_params, ids, _without_remat(compute)), ids)


def _without_remat(compute: Compute) -> Compute:
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
            if path:  # The output of the tower is that of its projection.
                yield ".".join(path), output
