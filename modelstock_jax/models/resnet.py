"""ResNet (He et al. 2016) of either kind of block, with batch norms or group norms."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from modelstock_jax.errors import UserError
from modelstock_jax.models.compute import Compute
from modelstock_jax.models.config import ImageModel, ModelConfig, check_sizes, check_stages, take
from modelstock_jax.models.convolution import Convolution, image_norm, max_pool
from modelstock_jax.models.param_mapping import (
    KERNEL,
    SAME,
    Line,
    Row,
    convolution,
    table_rows,
)
from modelstock_jax.models.transformer import (
    activation,
    block_name,
    named_blocks,
    run_blocks,
    widen,
)

LAYER_TYPES = ("basic", "bottleneck")
_REDUCTION = 4  # of the width inside a bottleneck block


class _BlockSize(NamedTuple):
    """Sizes of one residual block, and where its tensors are stored."""

    stage: int
    layer: int
    inputs: int
    outputs: int
    stride: int

    @property
    def has_shortcut(self) -> bool:
        return self.inputs != self.outputs or self.stride != 1


@dataclasses.dataclass(frozen=True)
class ResNetConfig(ModelConfig):
    """Sizes of a ResNet; names and defaults as in Hugging Face's `ResNetConfig`.

    The last four fields are not in config.json: models of the Hugging Face hub have their defaults.

    Attributes:
      embedding_size: output channels of the stem
      hidden_sizes: output channels of each stage
      depths: blocks of each stage
      layer_type: 'basic' (two 3 x 3 convolutions) or 'bottleneck' (1 x 1, 3 x 3, 1 x 1)
      hidden_act: activation of the stem and after each block; inside a block it is relu, as in
        transformers
      downsample_in_first_stage: whether the first stage halves the image
      downsample_in_bottleneck: whether the first convolution of a bottleneck has the stride instead
        of the second
      num_channels: color channels of an image
      image_size: side of the images; any size is possible
      norm: 'batch' or 'group', see `convolution.image_norm`
      stem_size: side of the stem's window
      stem_pool: whether the stem halves the image twice, by its stride and by a max pooling

    Example:
      >>> ResNetConfig().feature_size, ResNetConfig().num_blocks
      (2048, 16)
    """

    embedding_size: int = 64
    hidden_sizes: tuple[int, ...] = (256, 512, 1024, 2048)
    depths: tuple[int, ...] = (3, 4, 6, 3)
    layer_type: str = "bottleneck"
    hidden_act: str = "relu"
    downsample_in_first_stage: bool = False
    downsample_in_bottleneck: bool = False
    num_channels: int = 3
    image_size: int = 224
    norm: str = "batch"
    stem_size: int = 7
    stem_pool: bool = True

    model_type: ClassVar[str] = "resnet"
    prefix: ClassVar[str] = "resnet."
    classifier: ClassVar[str] = "classifier.1."
    base_class: ClassVar[str] = "ResNetModel"
    classifier_class: ClassVar[str] = "ResNetForImageClassification"
    resizes_images: ClassVar[bool] = True
    is_convolutional: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_sizes("config", self)
        check_stages(self.hidden_sizes, self.depths)
        if self.layer_type not in LAYER_TYPES:
            raise UserError(
                f"config: layer_type {self.layer_type!r} is not supported; choose one of "
                f"{', '.join(LAYER_TYPES)}"
            )
        if self.layer_type == "bottleneck" and min(self.hidden_sizes) < _REDUCTION:
            raise UserError(
                f"config: hidden_sizes {self.hidden_sizes} of bottleneck blocks must be at least "
                f"{_REDUCTION}"
            )

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ResNetConfig:
        """See `ModelConfig`; absent keys get transformers' defaults."""
        return cls(**take(cls, {k: v for k, v in raw.items() if k not in _OURS}, "config"))

    def to_dict(self) -> dict[str, Any]:
        """See `ModelConfig`."""
        values = dataclasses.asdict(self)
        return {"model_type": "resnet", **{k: v for k, v in values.items() if k not in _OURS}}

    @property
    def feature_size(self) -> int:
        """See `ModelConfig`."""
        return self.hidden_sizes[-1]

    @property
    def num_blocks(self) -> int:
        """See `ModelConfig`."""
        return sum(self.depths)

    def describe(self) -> str:
        """See `ModelConfig`."""
        widths, side = ", ".join(map(str, self.hidden_sizes)), self.image_size
        return (
            f"{self.num_blocks} {self.layer_type} blocks in stages of width {widths}, images "
            f"{side} x {side}"
        )

    def block_sizes(self) -> Iterator[_BlockSize]:
        """Yield the sizes of all blocks in order."""
        inputs = self.embedding_size
        for stage, (width, depth) in enumerate(zip(self.hidden_sizes, self.depths, strict=True)):
            for layer in range(depth):
                halves = layer == 0 and (stage > 0 or self.downsample_in_first_stage)
                yield _BlockSize(stage, layer, inputs, width, 2 if halves else 1)
                inputs = width

    def image_tower(self, compute: Compute, rngs: nnx.Rngs) -> nnx.Module:
        """See `ModelConfig`."""
        return ResNet(self, compute, rngs)

    def model(self, compute: Compute, rngs: nnx.Rngs) -> nnx.Module:
        """See `ModelConfig`."""
        return Model(self, compute, rngs)

    def rows(self, column: str = "hugging_face") -> list[Row]:
        """Return the table of tensor names.

        Example:
          >>> len(ResNetConfig().rows())
          318
        """
        return _rows(self)


# Fields that transformers' config does not have.
_OURS = ("image_size", "norm", "stem_size", "stem_pool")


class ResidualBlock(nnx.Module):
    """Convolutions with norms, and a shortcut that is a projection if the shape changes."""

    def __init__(self, config: ResNetConfig, sizes: _BlockSize, compute: Compute, rngs: nnx.Rngs):
        self.activation = activation(config.hidden_act)
        inputs, outputs, stride = sizes.inputs, sizes.outputs, sizes.stride
        inner = outputs // _REDUCTION
        first = config.downsample_in_bottleneck
        # (inputs, outputs, side of the window, stride) of each convolution.
        layers = {
            "basic": [(inputs, outputs, 3, stride), (outputs, outputs, 3, 1)],
            "bottleneck": [
                (inputs, inner, 1, stride if first else 1),
                (inner, inner, 3, 1 if first else stride),
                (inner, outputs, 1, 1),
            ],
        }[config.layer_type]
        self.depth = len(layers)
        for i, (i_size, o_size, size, step) in enumerate(layers, 1):
            conv = Convolution(i_size, o_size, size, compute, rngs, stride=step)
            setattr(self, f"conv{i}", conv)
            setattr(self, f"norm{i}", image_norm(config.norm, o_size, compute, rngs))
        self.has_shortcut = sizes.has_shortcut
        if self.has_shortcut:
            self.shortcut = Convolution(inputs, outputs, 1, compute, rngs, stride=stride)
            self.shortcut_norm = image_norm(config.norm, outputs, compute, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x [B, H, W, I] to [B, H / stride, W / stride, O]."""
        y = x
        for i in range(1, self.depth + 1):
            y = getattr(self, f"norm{i}")(getattr(self, f"conv{i}")(y))
            y = jax.nn.relu(y) if i < self.depth else y
        return self.activation(
            y + (self.shortcut_norm(self.shortcut(x)) if self.has_shortcut else x)
        )


class ResNet(nnx.Module):
    """Stem, blocks, global average pooling."""

    def __init__(self, config: ResNetConfig, compute: Compute, rngs: nnx.Rngs):
        self.activation, self.pools = activation(config.hidden_act), config.stem_pool
        self.remat, width = compute.remat, config.embedding_size
        self.stem = Convolution(
            config.num_channels,
            width,
            config.stem_size,
            compute,
            rngs,
            stride=2 if self.pools else 1,
        )
        self.stem_norm = image_norm(config.norm, width, compute, rngs)
        self.blocks = named_blocks(
            ResidualBlock(config, sizes, compute, rngs) for sizes in config.block_sizes()
        )

    def embed(self, images: jax.Array) -> jax.Array:
        """Map images [B, H, W, C] to the input of the first block."""
        x = self.activation(self.stem_norm(self.stem(images)))
        if self.pools:
            x = max_pool(x, 3, stride=2)
        return x

    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images [B, H, W, C] to features [B, E]."""
        return widen(run_blocks(self.blocks, self.embed(images), self.remat)).mean((1, 2))


class Model(ImageModel):
    """Image tower, and the number of batches of each norm, which torch stores."""

    def __init__(self, config: ResNetConfig, compute: Compute, rngs: nnx.Rngs):
        super().__init__(config, compute, rngs)
        if config.norm == "batch":
            names = [name for _, name in _norms(config)]
            self.num_batches_tracked = nnx.Dict(
                {name.replace(".", "_"): nnx.Variable(jnp.zeros((), jnp.int32)) for name in names}
            )


# Columns: ours; transformers' ResNetModel.
_NORM: tuple[tuple[str, str], ...] = (
    ("scale", "weight"),
    ("bias", "bias"),
    ("mean", "running_mean"),
    ("var", "running_var"),
)
_EMBEDDER = "embedder.embedder"


def _layers(config: ResNetConfig) -> Iterator[tuple[str, str, str, int, int]]:
    """Yield our conv and norm, the checkpoint's layer, and the kernel's size and input channels."""
    yield "stem", "stem_norm", _EMBEDDER, config.stem_size, config.num_channels
    depth = 2 if config.layer_type == "basic" else 3
    for i, sizes in enumerate(config.block_sizes()):
        ours = f"blocks.{block_name(i)}."
        theirs = f"encoder.stages.{sizes.stage}.layers.{sizes.layer}."
        inner = sizes.outputs // _REDUCTION
        kernels = [(3, sizes.inputs), (3, sizes.outputs)]
        if config.layer_type == "bottleneck":
            kernels = [(1, sizes.inputs), (3, inner), (1, inner)]
        for k in range(depth):
            yield f"{ours}conv{k + 1}", f"{ours}norm{k + 1}", f"{theirs}layer.{k}", *kernels[k]
        if sizes.has_shortcut:
            name = f"{ours}shortcut"
            yield name, f"{name}_norm", f"{theirs}shortcut", 1, sizes.inputs


def _norms(config: ResNetConfig) -> Iterator[tuple[str, str]]:
    """Yield the checkpoint's name and our name of each norm."""
    for _, norm, layer, *_ in _layers(config):
        yield f"{layer}.normalization.", norm


def _rows(config: ResNetConfig) -> list[Row]:
    if config.norm != "batch":
        raise UserError(f"a ResNet with norm={config.norm!r} cannot be stored; set norm='batch'")
    tower, rows = ("image_tower",), []
    for conv, norm, layer, size, channels in _layers(config):
        lines: list[Line] = [
            (KERNEL, f"{conv}.", f"{layer}.convolution."),
            (_NORM, f"{norm}.", f"{layer}.normalization."),
        ]
        kernel = {f"{conv}.kernel": convolution(size, channels)}
        rows += [
            dataclasses.replace(row, nonnegative=row.name.endswith("running_var"))
            for row in table_rows(lines, 0, tower, transforms=kernel)
        ]
    for layer, norm in _norms(config):
        path = ("num_batches_tracked", norm.replace(".", "_"))
        rows.append(Row((path,), f"{layer}num_batches_tracked", SAME, optional=True, integer=True))
    return rows
