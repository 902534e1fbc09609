"""Hybrid (Dosovitskiy et al. 2021): the stem of a ResNet before the blocks of a ViT."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn

import jax
from flax import nnx

from modelstock_jax.errors import UserError
from modelstock_jax.models.compute import Compute
from modelstock_jax.models.config import ModelConfig, check_sizes
from modelstock_jax.models.convolution import Convolution, image_norm
from modelstock_jax.models.param_mapping import Row
from modelstock_jax.models.transformer import (
    BlockSizes,
    layer_norm,
    make_blocks,
    normal,
    run_blocks,
    widen,
)


@dataclasses.dataclass(frozen=True)
class HybridConfig(ModelConfig):
    """Sizes of a hybrid, trained from scratch: no checkpoint format stores it.

    Attributes:
      stem_width: channels after the first of two convolutions of stride 2; the second has the width
        of the transformer
      norm: 'batch' or 'group', see `convolution.image_norm`
    """

    hidden_size: int = 64
    intermediate_size: int = 256
    num_hidden_layers: int = 3
    num_attention_heads: int = 2
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    image_size: int = 24
    num_channels: int = 3
    stem_width: int = 32
    norm: str = "group"

    model_type: ClassVar[str] = "hybrid"
    base_class: ClassVar[str] = ""
    is_convolutional: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_sizes("config", self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> HybridConfig:
        """See `ModelConfig`."""
        _not_stored()

    def to_dict(self) -> dict[str, Any]:
        """See `ModelConfig`."""
        _not_stored()

    def rows(self, column: str = "hugging_face") -> list[Row]:
        """See `ModelConfig`."""
        _not_stored()

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

    def describe(self) -> str:
        """See `ModelConfig`."""
        return f"{self.num_hidden_layers} layers of width {self.hidden_size} after a ResNet stem"

    def image_tower(self, compute: Compute, rngs: nnx.Rngs) -> nnx.Module:
        """See `ModelConfig`."""
        return Hybrid(self, compute, rngs)


def _not_stored() -> NoReturn:
    raise UserError("no checkpoint format stores a hybrid; choose another model")


class Hybrid(nnx.Module):
    """Two convolutions of stride 2, transformer blocks, mean over the tokens."""

    def __init__(self, config: HybridConfig, compute: Compute, rngs: nnx.Rngs):
        sizes, stem, width = BlockSizes.of(config), config.stem_width, config.hidden_size
        self.remat = compute.remat
        self.stem1 = Convolution(config.num_channels, stem, 3, compute, rngs, stride=2)
        self.stem1_norm = image_norm(config.norm, stem, compute, rngs)
        self.stem2 = Convolution(stem, width, 3, compute, rngs, stride=2)
        self.stem2_norm = image_norm(config.norm, width, compute, rngs)
        tokens = (-(-config.image_size // 4)) ** 2
        self.position_embedding = nnx.Param(normal(rngs, (tokens, width), width**-0.5))
        self.blocks = make_blocks(sizes, compute, rngs)
        self.post_layernorm = layer_norm(sizes, compute, rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images [B, H, W, C] of the configured size to features [B, D]."""
        x = jax.nn.relu(self.stem1_norm(self.stem1(images)))
        x = jax.nn.relu(self.stem2_norm(self.stem2(x)))
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x = x + self.position_embedding[...].astype(x.dtype)[None]
        return widen(self.post_layernorm(run_blocks(self.blocks, x, self.remat)).mean(1))
