"""Sizes of a CLIP model, as in config.json."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from modelstock_jax.errors import UserError

ACTIVATIONS = ("quick_gelu", "gelu")
# Checkpoints converted before 2023 have eos_token_id 2 regardless of their tokenizer. It is not a
# token but a flag: pool at the highest id.
LEGACY_EOS_TOKEN_ID = 2
MAX_SIZE = 2**31 - 1  # largest index of an array

_KINDS: dict[Any, Any] = {
    "int": (int,),
    "float": (float, int),
    "str": (str,),
    "int | None": (int, type(None)),
}


def _take(cls: type, values: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the entries of `values` that are fields of `cls`, with their types checked."""
    taken: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if field.name not in values or field.type not in _KINDS:
            continue
        value: Any = values[field.name]
        if isinstance(value, bool) or not isinstance(value, _KINDS[field.type]):
            raise UserError(f"{where}: {field.name} must be {field.type}, not {value!r}")
        taken[field.name] = float(value) if field.type == "float" else value
    return taken


def _check_tower(where: str, tower: VisionConfig | TextConfig) -> None:
    ids = ("pad_token_id", "bos_token_id", "eos_token_id")
    for field in dataclasses.fields(tower):
        value = getattr(tower, field.name)
        # The comparison is False for NaN, which JSON may contain.
        if field.name not in (*ids, "hidden_act") and not 0 < value <= MAX_SIZE:
            raise UserError(
                f"{where}: {field.name} must be positive and at most {MAX_SIZE}, not {value}"
            )
    if tower.hidden_size % tower.num_attention_heads:
        raise UserError(
            f"{where}: hidden_size {tower.hidden_size} is not a multiple of num_attention_heads "
            f"{tower.num_attention_heads}"
        )
    if tower.hidden_act not in ACTIVATIONS:
        raise UserError(
            f"{where}: hidden_act {tower.hidden_act!r} is not supported; choose one of "
            f"{', '.join(ACTIVATIONS)}"
        )


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes of the image tower; names and defaults as in Hugging Face's `vision_config`.

    Example:
      >>> VisionConfig(image_size=224, patch_size=32).num_tokens
      50
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        _check_tower("vision_config", self)
        if self.image_size % self.patch_size:
            raise UserError(
                f"vision_config: image_size {self.image_size} is not a multiple of patch_size "
                f"{self.patch_size}"
            )

    @property
    def num_tokens(self) -> int:
        """Number of tokens of an image of the configured size: class token and patches."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Sizes of the text tower; names and defaults as in Hugging Face's `text_config`.

    Example:
      >>> TextConfig().max_position_embeddings
      77
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    pad_token_id: int | None = 1
    bos_token_id: int | None = 49406
    eos_token_id: int = 49407

    def __post_init__(self) -> None:
        _check_tower("text_config", self)

    @property
    def pools_at_highest_id(self) -> bool:
        """Whether the end-of-text token has the highest id, so that argmax(ids) finds it."""
        return self.eos_token_id in (LEGACY_EOS_TOKEN_ID, self.vocab_size - 1)


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
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

    def __post_init__(self) -> None:
        if not 0 < self.projection_dim <= MAX_SIZE:
            raise UserError(
                f"config: projection_dim must be positive and at most {MAX_SIZE}, not "
                f"{self.projection_dim}"
            )
        if not math.isfinite(self.logit_scale_init_value):
            raise UserError(
                f"config: logit_scale_init_value must be finite, not {self.logit_scale_init_value}"
            )

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> CLIPConfig:
        """Read the dictionary of a `config.json`.

        Args:
          raw: the dictionary. Keys unrelated to the architecture are ignored, absent keys get
            Hugging Face's defaults, and the older `text_config_dict` and `vision_config_dict`, if
            present, replace `text_config` and `vision_config`, as in transformers.

        Returns:
          The configuration

        Raises:
          UserError: another architecture, a value of the wrong type, or impossible sizes
        """
        if not isinstance(raw, dict) or raw.get("model_type") != "clip":
            found = raw.get("model_type") if isinstance(raw, dict) else type(raw).__name__
            raise UserError(
                f"config: model_type is {found!r}, not 'clip'; only CLIP models with both "
                "towers are supported"
            )
        towers: dict[str, Any] = {}
        for name, tower in (("vision", VisionConfig), ("text", TextConfig)):
            key = (
                f"{name}_config"
                if raw.get(f"{name}_config_dict") is None
                else f"{name}_config_dict"
            )
            part = raw.get(key) or {}
            if not isinstance(part, dict):
                raise UserError(f"config: {key} must be a dictionary, not {part!r}")
            towers[name] = tower(**_take(tower, part, key))
        own = {k: raw[k] for k in ("projection_dim", "logit_scale_init_value") if k in raw}
        return cls(**towers, **_take(cls, own, "config"))

    def to_dict(self) -> dict[str, Any]:
        """Return the `config.json` that transformers opens as a `CLIPModel`."""
        shared = {"projection_dim": self.projection_dim}
        return {
            "architectures": ["CLIPModel"],
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
