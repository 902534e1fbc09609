"""ConvNeXt (Liu et al. 2022) and ConvNeXt V2 (Woo et al. 2023)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx

from modelstock_jax.errors import UserError
from modelstock_jax.models.compute import Compute
from modelstock_jax.models.config import ModelConfig, check_sizes, take
from modelstock_jax.models.convolution import Depthwise, channel_norm
from modelstock_jax.models.param_mapping import (
    LEAF,
    LINEAR,
    NORM,
    Line,
    Row,
    axes_added,
    convolution,
    linear_head,
    table_rows,
)
from modelstock_jax.models.transformer import (
    activation,
    block_name,
    linear,
    named_blocks,
    patches,
    run_block,
    widen,
)

_STAGE_PATCH = 2  # side of the patches between stages
_EPS = 1e-6  # of all norms except the last


@dataclasses.dataclass(frozen=True)
class ConvNeXtConfig(ModelConfig):
    """Sizes of a ConvNeXt; names and defaults as in Hugging Face's `ConvNextConfig`.

    The last two fields are not in its config.json, or fixed there: models of the Hugging Face hub
    have their defaults.

    Attributes:
      num_channels: color channels of an image
      patch_size: side of the stem's patches
      hidden_sizes: channels of each stage
      depths: blocks of each stage
      hidden_act: activation
      layer_norm_eps: epsilon of the last norm
      layer_scale_init_value: initial factor per channel on each residual branch; 0 has no factor
      image_size: side of the images; any size from `patch_size` on is possible
      window: side of the depthwise convolutions

    Example:
      >>> ConvNeXtConfig().feature_size, ConvNeXtConfig().num_blocks
      (768, 18)
    """

    num_channels: int = 3
    patch_size: int = 4
    hidden_sizes: tuple[int, ...] = (96, 192, 384, 768)
    depths: tuple[int, ...] = (3, 3, 9, 3)
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    layer_scale_init_value: float = 1e-6
    image_size: int = 224
    window: int = 7

    model_type: ClassVar[str] = "convnext"
    prefix: ClassVar[str] = "convnext."
    base_class: ClassVar[str] = "ConvNextModel"
    classifier_class: ClassVar[str] = "ConvNextForImageClassification"
    resizes_images: ClassVar[bool] = True
    is_convolutional: ClassVar[bool] = True
    response_norm: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_sizes("config", self, skip=("layer_scale_init_value",))
        if len(self.hidden_sizes) != len(self.depths):
            raise UserError(
                f"config: hidden_sizes {self.hidden_sizes} and depths {self.depths} must have one "
                "value per stage"
            )

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """See `ModelConfig`; absent keys get transformers' defaults."""
        values = take(cls, {k: v for k, v in raw.items() if k != "window"}, "config")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """See `ModelConfig`."""
        values = {k: v for k, v in dataclasses.asdict(self).items() if k != "window"}
        return {"model_type": self.model_type, "num_stages": len(self.depths), **values}

    @property
    def has_layer_scale(self) -> bool:
        """Whether each residual branch has a factor per channel."""
        return self.layer_scale_init_value > 0

    @property
    def feature_size(self) -> int:
        """See `ModelConfig`."""
        return self.hidden_sizes[-1]

    @property
    def num_blocks(self) -> int:
        """See `ModelConfig`."""
        return sum(self.depths)

    @property
    def min_side(self) -> int:
        """See `ModelConfig`; the last stage has at least one position."""
        return self.patch_size * _STAGE_PATCH ** (len(self.depths) - 1)

    def describe(self) -> str:
        """See `ModelConfig`."""
        widths, side = ", ".join(map(str, self.hidden_sizes)), self.image_size
        return (
            f"{self.num_blocks} blocks in stages of width {widths}, images {side} x {side}, "
            f"patch size {self.patch_size}"
        )

    def with_image_size(self, size: int) -> Self:
        """See `ModelConfig`."""
        return dataclasses.replace(self, image_size=size)

    def image_tower(self, compute: Compute, rngs: nnx.Rngs) -> nnx.Module:
        """See `ModelConfig`."""
        return ConvNeXt(self, compute, rngs)

    def model(self, compute: Compute, rngs: nnx.Rngs) -> nnx.Module:
        """See `ModelConfig`."""
        return Model(self, compute, rngs)

    def rows(self, column: str = "hugging_face") -> list[Row]:
        """Return the table of tensor names.

        Example:
          >>> len(ConvNeXtConfig().rows())
          180
        """
        return _rows(self)

    def head_rows(self, names: Sequence[str] | Mapping[str, Any]) -> list[Row]:
        """See `ModelConfig`."""
        present = "classifier.weight" in names or "kernel" in names
        return linear_head("classifier.") if present else []


@dataclasses.dataclass(frozen=True)
class ConvNeXtV2Config(ConvNeXtConfig):
    """Sizes of a ConvNeXt V2, which has a global response norm instead of the layer scale."""

    layer_scale_init_value: float = 0.0

    model_type: ClassVar[str] = "convnextv2"
    prefix: ClassVar[str] = "convnextv2."
    base_class: ClassVar[str] = "ConvNextV2Model"
    classifier_class: ClassVar[str] = "ConvNextV2ForImageClassification"
    response_norm: ClassVar[bool] = True

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """See `ModelConfig`; transformers ignores a layer scale."""
        return super().from_dict({k: v for k, v in raw.items() if k != "layer_scale_init_value"})

    def to_dict(self) -> dict[str, Any]:
        """See `ModelConfig`."""
        return {k: v for k, v in super().to_dict().items() if k != "layer_scale_init_value"}


class GlobalResponseNorm(nnx.Module):
    """x + scale x n + bias, n the L2 norm of a channel over all positions, divided by its mean."""

    def __init__(self, channels: int, compute: Compute):
        self.dtype = compute.dtype
        self.scale, self.bias = (nnx.Param(jnp.zeros(channels)) for _ in range(2))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x [B, H, W, C] to [B, H, W, C]."""
        norm = jnp.sqrt(jnp.square(widen(x)).sum((1, 2), keepdims=True))
        norm = (norm / (norm.mean(-1, keepdims=True) + _EPS)).astype(x.dtype)
        scale, bias = (p[...].astype(x.dtype)[None, None, None] for p in (self.scale, self.bias))
        return x + scale * (x * norm) + bias


class ConvNeXtBlock(nnx.Module):
    """Depthwise convolution and MLP on each position, with a residual connection."""

    def __init__(self, config: ConvNeXtConfig, width: int, compute: Compute, rngs: nnx.Rngs):
        self.activation = activation(config.hidden_act)
        self.has_layer_scale, self.has_grn = config.has_layer_scale, config.response_norm
        self.depthwise = Depthwise(width, config.window, compute, rngs)
        self.norm = channel_norm(width, _EPS, compute, rngs)
        self.fc1 = linear(width, 4 * width, width**-0.5, compute, rngs)
        if self.has_grn:
            self.grn = GlobalResponseNorm(4 * width, compute)
        self.fc2 = linear(4 * width, width, 0.5 * (4 * width) ** -0.5, compute, rngs)
        if self.has_layer_scale:
            self.layer_scale = nnx.Param(jnp.full(width, config.layer_scale_init_value))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x [B, H, W, C] to [B, H, W, C]."""
        y = self.activation(self.fc1(self.norm(self.depthwise(x))))
        y = self.fc2(self.grn(y) if self.has_grn else y)
        return x + (y * self.layer_scale[...].astype(y.dtype) if self.has_layer_scale else y)


class Downsample(nnx.Module):
    """Norm, then patches of the previous stage mapped to the width of the next."""

    def __init__(self, inputs: int, outputs: int, compute: Compute, rngs: nnx.Rngs):
        size = _STAGE_PATCH**2 * inputs
        self.norm = channel_norm(inputs, _EPS, compute, rngs)
        self.conv = linear(size, outputs, size**-0.5, compute, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x [B, H, W, I] to [B, H // 2, W // 2, O]."""
        return _grid(self.conv, self.norm(x), _STAGE_PATCH)


def _downsample_name(depths: Sequence[int], stage: int) -> str:
    """Return the name of the downsampling before a stage: it has the number of the next block."""
    return f"downsample_{sum(depths[:stage]):02d}"


def _grid(layer: nnx.Linear, x: jax.Array, size: int) -> jax.Array:
    """Map patches of x [B, H, W, I] to [B, H // size, W // size, O]."""
    batch, height, width, _ = x.shape
    return layer(patches(x, size)).reshape(batch, height // size, width // size, -1)


class ConvNeXt(nnx.Module):
    """Stem, stages of blocks with downsampling in between, global average pooling, norm."""

    def __init__(self, config: ConvNeXtConfig, compute: Compute, rngs: nnx.Rngs):
        self.patch_size, self.dtype, self.remat = config.patch_size, compute.dtype, compute.remat
        self.depths, sizes = config.depths, config.hidden_sizes
        patch = config.patch_size**2 * config.num_channels
        self.patch_embedding = linear(patch, sizes[0], patch**-0.5, compute, rngs)
        self.patch_norm = channel_norm(sizes[0], _EPS, compute, rngs)
        for stage in range(1, len(sizes)):
            downsample = Downsample(sizes[stage - 1], sizes[stage], compute, rngs)
            setattr(self, _downsample_name(config.depths, stage), downsample)
        self.blocks = named_blocks(
            ConvNeXtBlock(config, width, compute, rngs)
            for width, depth in zip(sizes, self.depths, strict=True)
            for _ in range(depth)
        )
        self.post_layernorm = channel_norm(sizes[-1], config.layer_norm_eps, compute, rngs)

    def embed(self, images: jax.Array) -> jax.Array:
        """Map images [B, H, W, C] to the input of the first block."""
        x = images.astype(self.dtype)
        return self.patch_norm(_grid(self.patch_embedding, x, self.patch_size))

    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images [B, H, W, C] to features [B, E]."""
        x, first = self.embed(images), 0
        for stage, depth in enumerate(self.depths):
            x = getattr(self, _downsample_name(self.depths, stage))(x) if stage else x
            for index in range(first, first + depth):
                x = run_block(self.blocks[block_name(index)], x, self.remat)
            first += depth
        return widen(self.post_layernorm(x.mean((1, 2))))


class Model(nnx.Module):
    """The complete model: its image tower."""

    def __init__(self, config: ConvNeXtConfig, compute: Compute, rngs: nnx.Rngs):
        self.image_tower = ConvNeXt(config, compute, rngs)


# Columns: ours; transformers' ConvNextModel and ConvNextV2Model.
_TOWER: tuple[Line, ...] = (
    (LINEAR, "patch_embedding.", "embeddings.patch_embeddings."),
    (NORM, "patch_norm.", "embeddings.layernorm."),
    (NORM, "post_layernorm.", "layernorm."),
)
_DOWNSAMPLE: tuple[Line, ...] = ((NORM, "norm.", "0."), (LINEAR, "conv.", "1."))
_BLOCK: tuple[Line, ...] = (
    (LINEAR, "depthwise.", "dwconv."),
    (NORM, "norm.", "layernorm."),
    (LINEAR, "fc1.", "pwconv1."),
    (LINEAR, "fc2.", "pwconv2."),
)
_SCALE: Line = (LEAF, "layer_scale", "layer_scale_parameter")
_GRN: Line = (NORM, "grn.", "grn.")


def _rows(config: ConvNeXtConfig) -> list[Row]:
    tower = ("image_tower",)
    rows = table_rows(_TOWER, 0, tower, patches=config)
    block = list(_BLOCK) + [_SCALE] * config.has_layer_scale + [_GRN] * config.response_norm
    transforms = {
        "depthwise.kernel": convolution(config.window, 1),
        "grn.scale": axes_added(3),
        "grn.bias": axes_added(3),
    }
    for index, (stage, layer) in enumerate(_layers(config)):
        path, name = (*tower, "blocks", block_name(index)), f"encoder.stages.{stage}."
        rows += table_rows(block, 0, path, f"{name}layers.{layer}.", transforms=transforms)
        if stage and not layer:
            kernel = convolution(_STAGE_PATCH, config.hidden_sizes[stage - 1])
            path = (*tower, _downsample_name(config.depths, stage))
            rows += table_rows(
                _DOWNSAMPLE,
                0,
                path,
                f"{name}downsampling_layer.",
                transforms={"conv.kernel": kernel},
            )
    return rows


def _layers(config: ConvNeXtConfig) -> Iterator[tuple[int, int]]:
    """Yield stage and index in the stage of every block."""
    for stage, depth in enumerate(config.depths):
        yield from ((stage, layer) for layer in range(depth))
