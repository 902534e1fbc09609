"""Any image model as pure functions of nested dictionaries of arrays.

The Flax NNX towers are split once; then a model is a tree of arrays and these functions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from modelstock_jax.errors import UserError
from modelstock_jax.models.clip import CLIPConfig
from modelstock_jax.models.compute import DEFAULT_COMPUTE, Compute
from modelstock_jax.models.config import DualEncoderConfig, ModelConfig
from modelstock_jax.models.convnext import ConvNeXtConfig, ConvNeXtV2Config
from modelstock_jax.models.param_mapping import Params
from modelstock_jax.models.positions import interpolate
from modelstock_jax.models.resnet import ResNetConfig
from modelstock_jax.models.siglip import SiglipConfig
from modelstock_jax.models.vit import (
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    ViTConfig,
)

# model_type of a config.json -> its config.
MODELS: dict[str, type[ModelConfig]] = {
    config.model_type: config
    for config in (
        CLIPConfig,
        SiglipConfig,
        ViTConfig,
        DeiTConfig,
        Dinov2Config,
        Dinov2WithRegistersConfig,
        ConvNeXtConfig,
        ConvNeXtV2Config,
        ResNetConfig,
    )
}
# Known architectures that are not supported -> why.
_UNSUPPORTED = {
    "siglip2": "a NaFlex SigLIP 2 has images of variable resolution; only SigLIP 2 checkpoints of "
    "fixed resolution, whose model_type is 'siglip', are supported",
    "siglip_vision_model": "the file has only the image tower of a SigLIP; pass the complete model",
    "clip_vision_model": "the file has only the image tower of a CLIP; pass the complete model",
}


def config_from_dict(raw: Any) -> ModelConfig:
    """Read the dictionary of a config.json of any supported architecture.

    Args:
      raw: the dictionary; its `model_type` selects one of `MODELS`

    Raises:
      UserError: another architecture, or see `ModelConfig.from_dict`

    Example:
      >>> config_from_dict({"model_type": "vit", "patch_size": 32}).num_tokens
      50
    """
    found = raw.get("model_type") if isinstance(raw, dict) else type(raw).__name__
    if isinstance(raw, dict) and found in MODELS:
        return MODELS[found].from_dict(raw)
    reason = _UNSUPPORTED.get(str(found), f"choose one of {', '.join(MODELS)}")
    raise UserError(f"config: model_type {found!r} is not supported: {reason}")


def init(config: ModelConfig, key: jax.Array) -> Params:
    """Draw initial parameters; transformers as in the released CLIP code.

    Their kernels are normal, with standard deviation D^-1/2 for queries, keys and values and
    D^-1/2 (2 layers)^-1/2 for projections into the residual stream; biases are zero.

    Args:
      config: sizes
      key: a JAX random key

    Returns:
      Nested dictionaries of float32 arrays: image_tower; for a model with texts also text_tower
      and logit_scale

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
    return _draw("model", config, key)


def init_image_tower(config: ModelConfig, key: jax.Array) -> Params:
    """Draw initial parameters of the image tower alone; see `init`."""
    return _draw("image_tower", config, key)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _draw(part: str, config: ModelConfig, key: jax.Array) -> Params:
    return nnx.to_pure_dict(nnx.state(getattr(config, part)(Compute(), nnx.Rngs(key))))


@functools.lru_cache(maxsize=64)
def _abstract(part: str, config: ModelConfig, compute: Compute) -> tuple[Any, Any]:
    """Return structure and parameter shapes of a part of a model without drawing values."""
    return nnx.split(nnx.eval_shape(lambda: getattr(config, part)(compute, _OneKey())))


class _OneKey(nnx.Rngs):
    """One key for all draws: if only shapes are needed, splitting keys dominates the time."""

    def __init__(self) -> None:
        self.key = jax.random.key(0)

    def params(self) -> jax.Array:
        return self.key


def abstract_params(config: ModelConfig) -> Params:
    """Return shapes and dtypes of the parameters, a tree of ShapeDtypeStruct; allocates nothing."""
    return nnx.to_pure_dict(_abstract("model", config, DEFAULT_COMPUTE)[1])


def encode_image(
    config: ModelConfig, tower_params: Params, images: jax.Array, compute: Compute = DEFAULT_COMPUTE
) -> jax.Array:
    """Compute image features, not normalized.

    | model | features |
    |---|---|
    | CLIP | projection(post_layernorm(class token)) |
    | SigLIP | attention pooling of post_layernorm(tokens) |
    | ViT | post_layernorm(class token) |
    | DeiT | post_layernorm of the class token and of the distillation token, [B, 2 D] |
    | DINOv2 | class token and mean of the patches after post_layernorm, [B, 2 D] |
    | ConvNeXt | post_layernorm(mean of the positions) |
    | ResNet | mean of the positions |

    Args:
      config: sizes
      tower_params: params["image_tower"]
      images: [B, H, W, C], float32, preprocessed. If H and W differ from the config's image size,
        the position embedding is interpolated, as with transformers'
        `interpolate_pos_encoding=True`. CLIP needs multiples of the patch size; the others drop the
        pixels that do not fill a patch.
      compute: dtype, attention implementation and remat

    Returns:
      [B, E], float32 (float64 if `compute.dtype` is float64)

    Raises:
      UserError: images do not divide into patches, or have another number of channels
    """
    return image_tower(config, tower_params, images, compute)(images)


def encode_text(
    config: DualEncoderConfig,
    tower_params: Params,
    ids: jax.Array,
    compute: Compute = DEFAULT_COMPUTE,
) -> jax.Array:
    """Compute text features, not normalized: projection(final_layernorm(pooled token)).

    CLIP pools at the end of the text; SigLIP at the last position, so its texts must be padded to
    max_position_embeddings.

    Args:
      config: sizes and pooling
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
    config: ModelConfig, tower_params: Params, images: jax.Array, compute: Compute
) -> Any:
    """Return the module that `encode_image` calls, after checking the shape of the images."""
    shape, channels = tuple(images.shape), config.num_channels
    sides = shape[1:3]
    fits = len(shape) == 4 and shape[3] == channels and min(sides) >= config.min_side
    if not fits or any(side % config.multiple_of for side in sides):
        size = config.min_side
        rule = f"multiples of the patch size {size}"
        raise UserError(
            f"encode_image: images of shape {shape}; expected [B, H, W, {channels}] with H and W "
            f"{rule if config.multiple_of > 1 else f'at least {size}'}"
        )
    return nnx.merge(_abstract("image_tower", config, compute)[0], _arrays(tower_params))


def text_tower(
    config: DualEncoderConfig, tower_params: Params, ids: jax.Array, compute: Compute
) -> Any:
    """Return the module that `encode_text` calls, after checking the shape of the ids."""
    max_length = config.text.max_position_embeddings
    if ids.ndim != 2 or ids.shape[1] > max_length:
        raise UserError(
            f"encode_text: ids of shape {tuple(ids.shape)}; expected [B, L <= {max_length}]"
        )
    return nnx.merge(_abstract("text_tower", config, compute)[0], _arrays(tower_params))


def batch_statistics(config: ModelConfig, tower_params: Params, images: jax.Array) -> Params:
    """Return the statistics of all batch norms over a batch of images.

    Every batch norm normalizes with the statistics of the batch, not with the stored ones.

    Args:
      config: sizes
      tower_params: params["image_tower"]
      images: [B, H, W, C], float32, preprocessed

    Returns:
      The part of the tower's tree that contains statistics: {"mean" [C], "var" [C]} per batch norm,
      float32; the variance is over n = B H W values, divided by n. Empty without batch norms
    """
    tower = image_tower(config, tower_params, images, DEFAULT_COMPUTE)
    # With momentum 0 the new running average is that of the batch.
    tower.set_attributes(
        nnx.BatchNorm, use_running_average=False, momentum=0.0, raise_if_not_found=False
    )
    tower(images)
    return nnx.to_pure_dict(nnx.state(tower, nnx.BatchStat))


def classifier(
    config: ModelConfig, compute: Compute = DEFAULT_COMPUTE
) -> Callable[[Params, jax.Array], jax.Array]:
    """Return the image tower with a linear head: logits = f W + b.

    f are the features of `encode_image`; those of CLIP and SigLIP are divided by their norm. A
    DeiT with two classifiers has the mean of both logits.

    Args:
      config: sizes
      compute: dtype, attention implementation and remat

    Returns:
      apply(params, images) -> logits [B, K] with params {"image_tower", "head": {"kernel" [E, K],
      "bias" [K]}} and images as in `encode_image`
    """

    def apply(params: Params, images: jax.Array) -> jax.Array:
        features = encode_image(config, params["image_tower"], images, compute)
        if config.unit_features:
            features = l2_normalize(features)
        return config.logits(features, params["head"])

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
    config: ModelConfig, tower_params: Params, images: jax.Array, compute: Compute = DEFAULT_COMPUTE
) -> Activations:
    """Return the output of every layer of the image tower.

    Names are those of the parameters:

    - `blocks.block_03.self_attn.q_proj` [B, T, D]: output of the layer with that kernel
    - `blocks.block_03.self_attn` and `.mlp`: their contribution to the residual stream
    - `blocks.block_03`: the residual stream after the block
    - `post_layernorm`, `projection` [B, E], or the pooling of the model
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
    config: DualEncoderConfig,
    tower_params: Params,
    ids: jax.Array,
    compute: Compute = DEFAULT_COMPUTE,
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


def resize_positions(
    params: Params, config: ModelConfig, image_size: int
) -> tuple[ModelConfig, Params]:
    """Change the training resolution of a model before fine-tuning.

    Replaces the position embedding, if there is one, by the interpolated one, so that features of
    images of the new size equal those that interpolation at every call gives. (OpenCLIP resizes
    with antialiasing and a = -1/2: its embedding differs slightly.)

    Args:
      params: tree with "image_tower", of a model or a replica; not modified
      config: its configuration
      image_size: new side of the images in pixels; for CLIP, a multiple of the patch size

    Returns:
      The config with the new image size, and the tree with the new position embedding (a NumPy
      array); all other leaves are shared

    Raises:
      UserError: `image_size` is too small or, for CLIP, not a multiple of the patch size

    Example:
      >>> from modelstock_jax.models.config import VisionConfig
      >>> config = CLIPConfig(VisionConfig(hidden_size=12, image_size=64, patch_size=32))
      >>> params = {"image_tower": {"position_embedding": np.ones((5, 12), np.float32)}}
      >>> config, params = resize_positions(params, config, 96)
      >>> config.image_size, params["image_tower"]["position_embedding"].shape
      (96, (10, 12))
    """
    resized, tower = config.with_image_size(image_size), params["image_tower"]
    if "position_embedding" not in tower:
        return resized, params
    old, new = (size.image_size // size.min_side for size in (config, resized))
    positions = interpolate(
        jnp.asarray(tower["position_embedding"]),
        (old, old),
        (new, new),
        antialias=config.antialias,
    )
    tower = {**tower, "position_embedding": np.asarray(positions)}
    return resized, {**params, "image_tower": tower}
