"""SigLIP (Zhai et al. 2023) and SigLIP 2 of fixed resolution (Tschannen et al. 2025)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from modelstock_jax.errors import UserError
from modelstock_jax.models.clip import BLOCK, tower_section
from modelstock_jax.models.compute import Compute
from modelstock_jax.models.config import DualEncoderConfig, TextConfig, VisionConfig, take
from modelstock_jax.models.param_mapping import (
    LEAF,
    LINEAR,
    NORM,
    Line,
    Row,
    axes_added,
    table_rows,
)
from modelstock_jax.models.transformer import (
    AttentionPool,
    BlockSizes,
    TextTransformer,
    VisionTransformer,
    block_name,
    linear,
    widen,
)

# Defaults of SiglipVisionConfig and SiglipTextConfig in transformers.
_VISION: dict[str, Any] = {
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
_TEXT: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "max_position_embeddings": 64,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}


@dataclasses.dataclass(frozen=True)
class SiglipConfig(DualEncoderConfig):
    """Sizes of a SigLIP model: both towers, and the width of the joint space.

    Attributes:
      vision: sizes of the image tower; its width is the width of the features
      text: sizes of the text tower
      projection_size: output width of the text tower; equals the width of the image tower

    Example:
      >>> config = SiglipConfig.from_dict({"model_type": "siglip"})
      >>> config.vision.patch_size, config.text.max_position_embeddings, config.num_tokens
      (16, 64, 196)
      >>> SiglipConfig.from_dict(config.to_dict()) == config
      True
    """

    vision: VisionConfig = VisionConfig(**_VISION)
    text: TextConfig = TextConfig(**_TEXT)
    projection_size: int = 768

    model_type: ClassVar[str] = "siglip"
    base_class: ClassVar[str] = "SiglipModel"
    text_params: ClassVar[tuple[str, ...]] = ("text_tower", "logit_scale", "logit_bias")
    lower_case: ClassVar[bool] = True
    sigmoid: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.projection_size != self.vision.hidden_size:
            raise UserError(
                f"text_config: projection_size {self.projection_size} differs from the width "
                f"{self.vision.hidden_size} of the image tower"
            )

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> SiglipConfig:
        """See `ModelConfig`; absent keys get transformers' defaults."""
        sections = {name: tower_section(raw, name) for name in ("vision", "text")}
        values, key = sections["vision"]
        if values.get("vision_use_head", True) is not True:
            raise UserError(f"{key}: vision_use_head must be true; attention pooling is required")
        vision = VisionConfig(**{**_VISION, **take(VisionConfig, values, key)})
        values, key = sections["text"]
        # Texts are pooled at the last position: there is no rule that needs these ids.
        values = {k: v for k, v in values.items() if k != "eos_token_id" or type(v) is int}
        text = TextConfig(**{**_TEXT, **take(TextConfig, values, key)})
        size = values.get("projection_size")
        return cls(vision, text, text.hidden_size if size is None else size)

    def to_dict(self) -> dict[str, Any]:
        """See `ModelConfig`."""
        return {
            "model_type": "siglip",
            "text_config": {
                "model_type": "siglip_text_model",
                **dataclasses.asdict(self.text),
                "projection_size": self.projection_size,
            },
            "vision_config": {
                "model_type": "siglip_vision_model",
                **dataclasses.asdict(self.vision),
                "vision_use_head": True,
            },
        }

    @property
    def feature_size(self) -> int:
        """See `ModelConfig`."""
        return self.vision.hidden_size

    @property
    def num_tokens(self) -> int:
        """Tokens of an image: its patches."""
        return self.vision.grid**2

    def image_tower(self, compute: Compute, rngs: nnx.Rngs) -> nnx.Module:
        """See `ModelConfig`."""
        return ImageTower(self, compute, rngs)

    def text_tower(self, compute: Compute, rngs: nnx.Rngs) -> nnx.Module:
        """See `DualEncoderConfig`."""
        return TextTower(self, compute, rngs)

    def model(self, compute: Compute, rngs: nnx.Rngs) -> nnx.Module:
        """See `ModelConfig`."""
        return SigLIP(self, compute, rngs)

    def rows(self, column: str = "hugging_face") -> list[Row]:
        """Return the table of tensor names.

        Example:
          >>> len(SiglipConfig().rows())
          408
        """
        return _rows(self)

    def text_lengths(self, ids: np.ndarray) -> np.ndarray:
        """See `DualEncoderConfig`: attention is not causal, and padding is not masked."""
        return np.full(len(ids), self.text.max_position_embeddings)

    def check_ids(self, ids: np.ndarray, where: Any) -> None:
        """See `DualEncoderConfig`: every tokenizer is accepted; texts have no required token."""


class ImageTower(VisionTransformer):
    """Vision transformer without class token, pooled by attention."""

    def __init__(self, config: SiglipConfig, compute: Compute, rngs: nnx.Rngs):
        sizes = BlockSizes.of(config.vision)
        super().__init__(sizes, config.vision, compute, rngs)
        self.pool = AttentionPool(sizes, compute, rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images [B, H, W, C] to features [B, D]."""
        return widen(self.pool(self.post_layernorm(self.encode(images))))


class TextTower(TextTransformer):
    """Transformer over token ids without a mask, pooled at the last position."""

    def __init__(self, config: SiglipConfig, compute: Compute, rngs: nnx.Rngs):
        super().__init__(config.text, False, compute, rngs)
        width = config.text.hidden_size
        self.projection = linear(width, config.projection_size, width**-0.5, compute, rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Map token ids [B, L] to features [B, E]."""
        return widen(self.projection(self.final_layernorm(self.encode(ids)[:, -1])))


class SigLIP(nnx.Module):
    """Both towers, the logit scale and the logit bias; initial values as in the paper."""

    def __init__(self, config: SiglipConfig, compute: Compute, rngs: nnx.Rngs):
        self.image_tower = ImageTower(config, compute, rngs)
        self.text_tower = TextTower(config, compute, rngs)
        self.logit_scale = nnx.Param(jnp.log(jnp.float32(10)))
        self.logit_bias = nnx.Param(jnp.float32(-10))


# Columns: ours; transformers' SiglipModel.
_IMAGE: tuple[Line, ...] = (
    (LINEAR, "patch_embedding.", "embeddings.patch_embedding."),
    (LEAF, "position_embedding", "embeddings.position_embedding.weight"),
    (NORM, "post_layernorm.", "post_layernorm."),
    (LEAF, "pool.probe", "head.probe"),
    (LEAF, "pool.in_proj.kernel", "head.attention.in_proj_weight"),
    (LEAF, "pool.in_proj.bias", "head.attention.in_proj_bias"),
    (LINEAR, "pool.out_proj.", "head.attention.out_proj."),
    (NORM, "pool.layer_norm.", "head.layernorm."),
    (LINEAR, "pool.mlp.fc1.", "head.mlp.fc1."),
    (LINEAR, "pool.mlp.fc2.", "head.mlp.fc2."),
)
_TEXTS: tuple[Line, ...] = (
    (LEAF, "token_embedding", "embeddings.token_embedding.weight"),
    (LEAF, "position_embedding", "embeddings.position_embedding.weight"),
    (NORM, "final_layernorm.", "final_layer_norm."),
    (LINEAR, "projection.", "head."),
)
_SCALARS: tuple[Line, ...] = (
    (LEAF, "logit_scale", "logit_scale"),
    (LEAF, "logit_bias", "logit_bias"),
)


def _rows(config: SiglipConfig) -> list[Row]:
    # Stored with one axis of length 1.
    one = axes_added(1)
    rows = table_rows(_SCALARS, 0, (), transforms={"logit_scale": one, "logit_bias": one})
    vision = config.vision
    for tower, table, sizes, prefix in (
        ("image_tower", _IMAGE, vision, "vision_model."),
        ("text_tower", _TEXTS, config.text, "text_model."),
    ):
        rows += table_rows(
            table,
            0,
            (tower,),
            prefix,
            patches=vision,
            transforms={"pool.probe": axes_added(2)},
        )
        for i in range(sizes.num_hidden_layers):
            path, layer = (tower, "blocks", block_name(i)), f"{prefix}encoder.layers.{i}."
            rows += table_rows(BLOCK, 0, path, layer)
    return rows
