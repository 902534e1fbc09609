"""ViT (Dosovitskiy et al. 2021), DeiT (Touvron et al. 2021), DINOv2 (Oquab et al. 2023)."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx

from modelstock_jax.models.compute import Compute
from modelstock_jax.models.config import (
    ImageModel,
    ModelConfig,
    check_image_size,
    check_size,
    check_sizes,
    describe_transformer,
    take,
)
from modelstock_jax.models.param_mapping import (
    LEAF,
    LINEAR,
    NORM,
    Line,
    Row,
    axes_added,
    linear_head,
    table_rows,
)
from modelstock_jax.models.transformer import (
    BlockSizes,
    VisionTransformer,
    block_name,
    linear,
    normal,
    widen,
)


class _VisionTransformerConfig(ModelConfig):
    """What the configs of this module share; each is a dataclass with these fields."""

    classifier: ClassVar[str] = "classifier."
    tokens: ClassVar[tuple[str, ...]] = ("class_embedding",)

    @property
    def num_registers(self) -> int:
        """Number of register tokens."""
        return 0

    @property
    def has_mask_token(self) -> bool:
        """Whether a checkpoint may contain a token for masked patches, which is not used."""
        return False

    @property
    @abc.abstractmethod
    def hidden_size(self) -> int:
        """Width D of the tokens."""

    @property
    @abc.abstractmethod
    def num_hidden_layers(self) -> int:
        """Number of blocks."""

    @property
    @abc.abstractmethod
    def num_attention_heads(self) -> int:
        """Number of heads."""

    @property
    @abc.abstractmethod
    def patch_size(self) -> int:
        """Side of a patch in pixels."""

    def __post_init__(self) -> None:
        check_sizes("config", self, skip=("layerscale_value",))
        check_image_size("config", self.image_size, self.patch_size)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """See `ModelConfig`; absent keys get transformers' defaults."""
        square = {key: _side(raw[key]) for key in ("image_size", "patch_size") if key in raw}
        return cls(**take(cls, {**raw, **square}, "config"))

    def to_dict(self) -> dict[str, Any]:
        """See `ModelConfig`."""
        return {"model_type": self.model_type, **dataclasses.asdict(self)}  # pyrefly: ignore

    @property
    def feature_size(self) -> int:
        """See `ModelConfig`."""
        return self.hidden_size

    @property
    def num_heads(self) -> int:
        """See `ModelConfig`."""
        return self.num_attention_heads

    @property
    def num_blocks(self) -> int:
        """See `ModelConfig`."""
        return self.num_hidden_layers

    @property
    def min_side(self) -> int:
        """See `ModelConfig`."""
        return self.patch_size

    @property
    def num_tokens(self) -> int:
        """Tokens of an image of the configured size."""
        patches = (self.image_size // self.patch_size) ** 2
        return patches + len(self.tokens) + self.num_registers

    def describe(self) -> str:
        """See `ModelConfig`."""
        return describe_transformer(self, self.num_tokens)

    def model(self, compute: Compute, rngs: nnx.Rngs) -> nnx.Module:
        """See `ModelConfig`."""
        return Model(self, compute, rngs)


def _side(size: Any) -> Any:
    """Return the side of a square that is given by both sides; else the value itself."""
    if isinstance(size, list | tuple) and len(size) == 2 and size[0] == size[1]:
        return size[0]
    return size


@dataclasses.dataclass(frozen=True)
class ViTConfig(_VisionTransformerConfig):
    """Sizes of a ViT; names and defaults as in Hugging Face's `ViTConfig`.

    Example:
      >>> ViTConfig.from_dict({"model_type": "vit", "image_size": 384}).num_tokens
      577
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    qkv_bias: bool = True
    pooler_output_size: int | None = None
    pooler_act: str = "tanh"

    model_type: ClassVar[str] = "vit"
    prefix: ClassVar[str] = "vit."
    base_class: ClassVar[str] = "ViTModel"
    classifier_class: ClassVar[str] = "ViTForImageClassification"
    base_only: ClassVar[tuple[str, ...]] = ("pooler",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pooler_output_size is not None:
            check_size("config", "pooler_output_size", self.pooler_output_size)

    def image_tower(self, compute: Compute, rngs: nnx.Rngs) -> nnx.Module:
        """See `ModelConfig`."""
        return ClassToken(BlockSizes.of(self), self, compute, rngs, tokens=self.tokens)

    def rows(self, column: str = "hugging_face") -> list[Row]:
        """Return the table of tensor names.

        Example:
          >>> len(ViTConfig().rows())
          200
        """
        return _rows(self, _VIT, _VIT_BLOCK)


@dataclasses.dataclass(frozen=True)
class DeiTConfig(ViTConfig):
    """Sizes of a distilled DeiT: a ViT with a distillation token after the class token.

    A DeiT without that token is a ViT, and its model_type is 'vit'. A checkpoint may have one
    classifier (of the class token) or two, whose logits are averaged.
    """

    model_type: ClassVar[str] = "deit"
    prefix: ClassVar[str] = "deit."
    base_class: ClassVar[str] = "DeiTModel"
    classifier_class: ClassVar[str] = "DeiTForImageClassification"
    tokens: ClassVar[tuple[str, ...]] = ("class_embedding", "distillation_embedding")

    def image_tower(self, compute: Compute, rngs: nnx.Rngs) -> nnx.Module:
        """See `ModelConfig`."""
        return BothTokens(BlockSizes.of(self), self, compute, rngs, tokens=self.tokens)

    def rows(self, column: str = "hugging_face") -> list[Row]:
        """Return the table of tensor names."""
        return _rows(self, (*_VIT, _DISTILLATION), _VIT_BLOCK)

    def stored_head(self, names: Collection[str]) -> list[Row]:
        """See `ModelConfig`."""
        both = _both_heads()
        return both if any(row.name in names for row in both) else super().stored_head(names)

    def head_rows(self, head: Mapping[str, Any] | None) -> list[Row]:
        """See `ModelConfig`."""
        return _both_heads() if head and "distillation" in head else super().head_rows(head)

    def classifier_name(self, head: Mapping[str, Any]) -> str:
        """See `ModelConfig`."""
        return self.classifier_class + ("WithTeacher" if "distillation" in head else "")

    def logits(self, features: jax.Array, head: Mapping[str, Any]) -> jax.Array:
        """See `ModelConfig`; with two classifiers, the mean of their logits."""
        width = self.hidden_size
        logits = super().logits(features[:, :width], head)
        if "distillation" not in head:
            return logits
        return (logits + super().logits(features[:, width:], head["distillation"])) / 2


def _both_heads() -> list[Row]:
    distillation = linear_head("distillation_classifier.", ("head", "distillation"))
    return [*linear_head("cls_classifier."), *distillation]


@dataclasses.dataclass(frozen=True)
class Dinov2Config(_VisionTransformerConfig):
    """Sizes of a DINOv2; names and defaults as in Hugging Face's `Dinov2Config`.

    Example:
      >>> config = Dinov2Config.from_dict({"model_type": "dinov2", "image_size": 518})
      >>> config.num_tokens, config.feature_size
      (1370, 1536)
    """

    hidden_size: int = 768
    mlp_ratio: int = 4
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    image_size: int = 224
    patch_size: int = 14
    num_channels: int = 3
    qkv_bias: bool = True
    layerscale_value: float = 1.0
    use_swiglu_ffn: bool = False
    use_mask_token: bool = True

    model_type: ClassVar[str] = "dinov2"
    prefix: ClassVar[str] = "dinov2."
    base_class: ClassVar[str] = "Dinov2Model"
    classifier_class: ClassVar[str] = "Dinov2ForImageClassification"
    resizes_images: ClassVar[bool] = True

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """See `ModelConfig`; the ratio may be written as a float."""
        ratio = raw.get("mlp_ratio")
        integer = isinstance(ratio, float) and ratio.is_integer()
        return super().from_dict({**raw, "mlp_ratio": int(ratio)} if integer else raw)

    @property
    def has_mask_token(self) -> bool:
        """Whether a checkpoint may contain a token for masked patches, which is not used."""
        return self.use_mask_token

    @property
    def feature_size(self) -> int:
        """See `ModelConfig`."""
        return 2 * self.hidden_size

    def _block_sizes(self) -> BlockSizes:
        inner = self.hidden_size * self.mlp_ratio
        if self.use_swiglu_ffn:  # Two thirds, rounded up to a multiple of 8.
            inner = (int(inner * 2 / 3) + 7) // 8 * 8
        return BlockSizes.of(
            self,
            intermediate_size=inner,
            layer_scale=self.layerscale_value,
            gated_mlp=self.use_swiglu_ffn,
        )

    def image_tower(self, compute: Compute, rngs: nnx.Rngs) -> nnx.Module:
        """See `ModelConfig`."""
        return ClassTokenAndMean(
            self._block_sizes(),
            self,
            compute,
            rngs,
            tokens=self.tokens,
            num_registers=self.num_registers,
            antialias=self.antialias,
        )

    def rows(self, column: str = "hugging_face") -> list[Row]:
        """Return the table of tensor names.

        Example:
          >>> len(Dinov2Config().rows())
          223
        """
        return _rows(self, _VIT, _DINOV2_BLOCK + _MLPS[self.use_swiglu_ffn])


@dataclasses.dataclass(frozen=True)
class Dinov2WithRegistersConfig(Dinov2Config):
    """Sizes of a DINOv2 with register tokens (Darcet et al. 2024), which are not pooled.

    Its position embeddings are interpolated with antialiasing, those of DINOv2 without.
    """

    patch_size: int = 16
    num_register_tokens: int = 4

    model_type: ClassVar[str] = "dinov2_with_registers"
    prefix: ClassVar[str] = "dinov2_with_registers."
    base_class: ClassVar[str] = "Dinov2WithRegistersModel"
    classifier_class: ClassVar[str] = "Dinov2WithRegistersForImageClassification"
    antialias: ClassVar[bool] = True

    def to_dict(self) -> dict[str, Any]:
        """See `ModelConfig`."""
        raw = super().to_dict()
        del raw["use_mask_token"]  # transformers' config has no such option.
        return raw

    @property
    def num_registers(self) -> int:
        """Number of register tokens."""
        return self.num_register_tokens

    def rows(self, column: str = "hugging_face") -> list[Row]:
        """Return the table of tensor names."""
        block = _DINOV2_BLOCK + _MLPS[self.use_swiglu_ffn]
        return _rows(self, (*_VIT, _REGISTERS), block)


class ClassToken(VisionTransformer):
    """Vision transformer with the class token as features."""

    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images [B, H, W, C] to features [B, D]."""
        return widen(self.post_layernorm(self.encode(images)[:, 0]))


class BothTokens(VisionTransformer):
    """Vision transformer with the class token and the distillation token as features."""

    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images [B, H, W, C] to features [B, 2 D]."""
        x = self.post_layernorm(self.encode(images)[:, :2])
        return widen(x.reshape(x.shape[0], -1))


class ClassTokenAndMean(VisionTransformer):
    """Vision transformer with the class token and the mean of the patches as features."""

    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images [B, H, W, C] to features [B, 2 D]."""
        x = widen(self.post_layernorm(self.encode(images)))
        first = len(self.tokens) + self.num_registers
        return jnp.concatenate([x[:, 0], x[:, first:].mean(1)], axis=-1)


class Model(ImageModel):
    """Image tower, and parameters of the checkpoint that it does not compute with."""

    def __init__(self, config: _VisionTransformerConfig, compute: Compute, rngs: nnx.Rngs):
        super().__init__(config, compute, rngs)
        width = config.hidden_size
        if isinstance(config, ViTConfig):
            size = config.pooler_output_size or width
            self.pooler = linear(width, size, width**-0.5, compute, rngs)
        if config.has_mask_token:
            self.mask_token = nnx.Param(normal(rngs, (width,), 0.02))


# Columns: ours; transformers' base model.
_VIT: tuple[Line, ...] = (
    (LEAF, "class_embedding", "embeddings.cls_token"),
    (LINEAR, "patch_embedding.", "embeddings.patch_embeddings.projection."),
    (LEAF, "position_embedding", "embeddings.position_embeddings"),
    (NORM, "post_layernorm.", "layernorm."),
)
_DISTILLATION: Line = (LEAF, "distillation_embedding", "embeddings.distillation_token")
_REGISTERS: Line = (LEAF, "register_tokens", "embeddings.register_tokens")
_ATTENTION: tuple[Line, ...] = (
    (
        LINEAR,
        "self_attn.q_proj. self_attn.k_proj. self_attn.v_proj.",
        "attention.attention.query. attention.attention.key. attention.attention.value.",
    ),
    (LINEAR, "self_attn.out_proj.", "attention.output.dense."),
)
_VIT_BLOCK: tuple[Line, ...] = (
    *_ATTENTION,
    (NORM, "layer_norm1.", "layernorm_before."),
    (NORM, "layer_norm2.", "layernorm_after."),
    (LINEAR, "mlp.fc1.", "intermediate.dense."),
    (LINEAR, "mlp.fc2.", "output.dense."),
)
_DINOV2_BLOCK: tuple[Line, ...] = (
    *_ATTENTION,
    (NORM, "layer_norm1.", "norm1."),
    (NORM, "layer_norm2.", "norm2."),
    (LEAF, "layer_scale1", "layer_scale1.lambda1"),
    (LEAF, "layer_scale2", "layer_scale2.lambda1"),
)
# By whether the MLP is gated.
_MLPS: dict[bool, tuple[Line, ...]] = {
    False: ((LINEAR, "mlp.fc1.", "mlp.fc1."), (LINEAR, "mlp.fc2.", "mlp.fc2.")),
    True: (
        (LINEAR, "mlp.weights_in.", "mlp.weights_in."),
        (LINEAR, "mlp.weights_out.", "mlp.weights_out."),
    ),
}
# Axes of length 1 in the checkpoint.
_AXES = {
    "class_embedding": axes_added(2),
    "distillation_embedding": axes_added(2),
    "position_embedding": axes_added(1),
    "register_tokens": axes_added(1),
    "mask_token": axes_added(1),
}


def _rows(
    config: Dinov2Config | ViTConfig, table: Sequence[Line], block: Sequence[Line]
) -> list[Row]:
    qkv = () if config.qkv_bias else ("query.bias", "key.bias", "value.bias")
    tower = ("image_tower",)
    rows = table_rows(table, 0, tower, patches=config, transforms=_AXES)
    for i in range(config.num_hidden_layers):
        path = (*tower, "blocks", block_name(i))
        layer = table_rows(block, 0, path, f"encoder.layer.{i}.")
        rows += [row for row in layer if not row.name.endswith(qkv)]
    if isinstance(config, ViTConfig):
        pooler = table_rows([(LINEAR, "pooler.", "pooler.dense.")], 0, ())
        rows += [dataclasses.replace(row, optional=True) for row in pooler]
    if config.has_mask_token:
        line: Line = (LEAF, "mask_token", "embeddings.mask_token")
        (mask,) = table_rows([line], 0, (), transforms=_AXES)
        rows.append(dataclasses.replace(mask, optional=True))
    return rows
