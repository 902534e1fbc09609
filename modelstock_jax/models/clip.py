"""CLIP (Radford et al. 2021): sizes, both towers and tensor names."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from modelstock_jax.errors import UserError
from modelstock_jax.models.compute import Compute
from modelstock_jax.models.config import (
    LEGACY_EOS_TOKEN_ID,
    DualEncoderConfig,
    ModelConfig,
    TextConfig,
    VisionConfig,
    check_size,
    take,
)
from modelstock_jax.models.param_mapping import LEAF, LINEAR, NORM, SAME, Line, Row, table_rows
from modelstock_jax.models.transformer import (
    BlockSizes,
    TextTransformer,
    VisionTransformer,
    block_name,
    end_of_text,
    linear,
    widen,
)


@dataclasses.dataclass(frozen=True)
class CLIPConfig(DualEncoderConfig):
    """Sizes of a CLIP model: both towers, the joint embedding, the initial temperature.

    Example:
      >>> config = CLIPConfig.from_dict({"model_type": "clip", "projection_dim": 64})
      >>> config.projection_dim, config.vision.hidden_size
      (64, 768)
      >>> CLIPConfig.from_dict(config.to_dict()) == config
      True
    """

    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592

    model_type: ClassVar[str] = "clip"
    base_class: ClassVar[str] = "CLIPModel"

    def __post_init__(self) -> None:
        _check_multiple(self.vision.image_size, self.vision.patch_size)
        check_size("config", "projection_dim", self.projection_dim)
        if not math.isfinite(self.logit_scale_init_value):
            raise UserError(
                f"config: logit_scale_init_value must be finite, not {self.logit_scale_init_value}"
            )

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> CLIPConfig:
        """Read the dictionary of a `config.json`.

        Args:
          raw: the dictionary. Keys unrelated to the architecture are ignored, absent keys get
            Hugging Face's defaults, and the older `text_config_dict` and `vision_config_dict`, if
            present, replace `text_config` and `vision_config`, as in transformers.

        Returns:
          The configuration

        Raises:
          UserError: a value of the wrong type, or impossible sizes
        """
        vision = VisionConfig(**take(VisionConfig, *tower_section(raw, "vision")))
        text = TextConfig(**take(TextConfig, *tower_section(raw, "text")))
        own = {k: raw[k] for k in ("projection_dim", "logit_scale_init_value") if k in raw}
        return cls(vision, text, **take(cls, own, "config"))

    def to_dict(self) -> dict[str, Any]:
        """See `ModelConfig`."""
        shared = {"projection_dim": self.projection_dim}
        return {
            "model_type": "clip",
            "projection_dim": self.projection_dim,
            "logit_scale_init_value": self.logit_scale_init_value,
            "text_config": {
                "model_type": "clip_text_model",
                **dataclasses.asdict(self.text),
                **shared,
            },
            "vision_config": {
                "model_type": "clip_vision_model",
                **dataclasses.asdict(self.vision),
                **shared,
            },
        }

    @property
    def feature_size(self) -> int:
        """See `ModelConfig`."""
        return self.projection_dim

    @property
    def num_tokens(self) -> int:
        """Tokens of an image: class token and patches."""
        return self.vision.grid**2 + 1

    @property
    def multiple_of(self) -> int:
        """See `ModelConfig`."""
        return self.vision.patch_size

    def image_tower(self, compute: Compute, rngs: nnx.Rngs) -> nnx.Module:
        """See `ModelConfig`."""
        return ImageTower(self, compute, rngs)

    def text_tower(self, compute: Compute, rngs: nnx.Rngs) -> nnx.Module:
        """See `DualEncoderConfig`."""
        return TextTower(self, compute, rngs)

    def model(self, compute: Compute, rngs: nnx.Rngs) -> nnx.Module:
        """See `ModelConfig`."""
        return CLIP(self, compute, rngs)

    def rows(self, column: str = "hugging_face") -> list[Row]:
        """Return the table of tensor names.

        Args:
          column: transformers' `CLIPModel` ('hugging_face'), or the state dict of OpenAI, which
            OpenCLIP and Model Soups use too ('openai')

        Example:
          >>> [len(CLIPConfig().rows(column)) for column in COLUMNS]
          [398, 302]
        """
        return _rows(self, column)

    def text_lengths(self, ids: np.ndarray) -> np.ndarray:
        """See `DualEncoderConfig`: attention is causal, and a text is pooled at its end."""
        return 1 + np.asarray(end_of_text(jnp.asarray(ids), self.text.eos_token_id))

    def check_ids(self, ids: np.ndarray, where: Any) -> None:
        """See `DualEncoderConfig`."""
        end = self.text.eos_token_id
        if end != LEGACY_EOS_TOKEN_ID and not (ids == end).any(1).all():
            raise UserError(
                f"{where}: the tokenizer does not add eos_token_id {end} of the config, at which "
                "texts are pooled"
            )


def require_clip(config: ModelConfig, format: str) -> CLIPConfig:
    """Return the config of a CLIP, for checkpoint formats that store no other model.

    Raises:
      UserError: the model is not a CLIP
    """
    if not isinstance(config, CLIPConfig):
        raise UserError(
            f"format {format} stores only CLIP models, not {config.model_type}; choose hugging_face"
        )
    return config


def _check_multiple(image_size: int, patch_size: int) -> None:
    if image_size % patch_size:
        raise UserError(
            f"vision_config: image_size {image_size} is not a multiple of patch_size {patch_size}"
        )


def tower_section(raw: Mapping[str, Any], tower: str) -> tuple[dict[str, Any], str]:
    """Return a tower's section of a config.json, and the name of the section.

    Args:
      raw: the dictionary of a config.json
      tower: 'vision' or 'text'

    Raises:
      UserError: the section is not a dictionary
    """
    older = f"{tower}_config_dict"
    key = f"{tower}_config" if raw.get(older) is None else older
    section = raw.get(key) or {}
    if not isinstance(section, dict):
        raise UserError(f"config: {key} must be a dictionary, not {section!r}")
    return section, key


class ImageTower(VisionTransformer):
    """Vision transformer: patches, class token, blocks, projection of the class token."""

    def __init__(self, config: CLIPConfig, compute: Compute, rngs: nnx.Rngs):
        tower = config.vision
        super().__init__(
            BlockSizes.of(tower),
            tower,
            compute,
            rngs,
            tokens=("class_embedding",),
            patch_bias=False,
            pre_norm=True,
        )
        width = tower.hidden_size
        self.projection = linear(
            width, config.projection_dim, width**-0.5, compute, rngs, bias=False
        )

    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images [B, H, W, C] to features [B, E]."""
        return widen(self.projection(self.post_layernorm(self.encode(images)[:, 0])))


class TextTower(TextTransformer):
    """Causal transformer over token ids, pooled at the end-of-text token."""

    def __init__(self, config: CLIPConfig, compute: Compute, rngs: nnx.Rngs):
        super().__init__(config.text, True, compute, rngs)
        width, self.eos_token_id = config.text.hidden_size, config.text.eos_token_id
        self.projection = linear(
            width, config.projection_dim, width**-0.5, compute, rngs, bias=False
        )

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Map token ids [B, L] to features [B, E]."""
        x, end = self.encode(ids), end_of_text(ids, self.eos_token_id)
        x = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
        return widen(self.projection(self.final_layernorm(x)))


class CLIP(nnx.Module):
    """Both towers and the logit scale."""

    def __init__(self, config: CLIPConfig, compute: Compute, rngs: nnx.Rngs):
        self.image_tower = ImageTower(config, compute, rngs)
        self.text_tower = TextTower(config, compute, rngs)
        self.logit_scale = nnx.Param(jnp.asarray(config.logit_scale_init_value, jnp.float32))


# Columns: ours; transformers' CLIPModel; OpenAI's state dict, also used by OpenCLIP and Model
# Soups. If a row has fewer checkpoint names than ours, the checkpoint joins our tensors.
COLUMNS = ("hugging_face", "openai")
_IMAGE: tuple[Line, ...] = (
    (LEAF, "class_embedding", "vision_model.embeddings.class_embedding", "visual.class_embedding"),
    (
        LEAF,
        "patch_embedding.kernel",
        "vision_model.embeddings.patch_embedding.weight",
        "visual.conv1.weight",
    ),
    (
        LEAF,
        "position_embedding",
        "vision_model.embeddings.position_embedding.weight",
        "visual.positional_embedding",
    ),
    # Spelled so in the files.
    (NORM, "pre_layernorm.", "vision_model.pre_layrnorm.", "visual.ln_pre."),
    (NORM, "post_layernorm.", "vision_model.post_layernorm.", "visual.ln_post."),
    (LEAF, "projection.kernel", "visual_projection.weight", "visual.proj"),
)
_TEXT: tuple[Line, ...] = (
    (
        LEAF,
        "token_embedding",
        "text_model.embeddings.token_embedding.weight",
        "token_embedding.weight",
    ),
    (
        LEAF,
        "position_embedding",
        "text_model.embeddings.position_embedding.weight",
        "positional_embedding",
    ),
    (NORM, "final_layernorm.", "text_model.final_layer_norm.", "ln_final."),
    (LEAF, "projection.kernel", "text_projection.weight", "text_projection"),
)
_QKV = "self_attn.q_proj. self_attn.k_proj. self_attn.v_proj."
BLOCK: tuple[Line, ...] = (
    (NORM, "layer_norm1.", "layer_norm1.", "ln_1."),
    (LINEAR, _QKV, _QKV, "attn.in_proj_"),
    (LINEAR, "self_attn.out_proj.", "self_attn.out_proj.", "attn.out_proj."),
    (NORM, "layer_norm2.", "layer_norm2.", "ln_2."),
    (LINEAR, "mlp.fc1.", "mlp.fc1.", "mlp.c_fc."),
    (LINEAR, "mlp.fc2.", "mlp.fc2.", "mlp.c_proj."),
)
_TOWERS = (
    ("image_tower", _IMAGE, "vision_model.encoder.layers.{}.", "visual.transformer.resblocks.{}."),
    ("text_tower", _TEXT, "text_model.encoder.layers.{}.", "transformer.resblocks.{}."),
)


def _rows(config: CLIPConfig, column: str) -> list[Row]:
    index = COLUMNS.index(column)
    rows = [Row((("logit_scale",),), "logit_scale", SAME)]
    # OpenAI stores its projections as [in, out].
    same = {"projection.kernel": SAME} if column == "openai" else {}
    vision = config.vision
    for tower, table, *blocks in _TOWERS:
        rows += table_rows(table, index, (tower,), patches=vision, transforms=same)
        for i in range((vision if tower == "image_tower" else config.text).num_hidden_layers):
            path = (tower, "blocks", block_name(i))
            rows += table_rows(BLOCK, index, path, blocks[index].format(i))
    return rows
