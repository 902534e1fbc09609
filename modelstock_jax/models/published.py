"""Sizes of published models, for a dry run without their files."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from modelstock_jax.models.clip import CLIPConfig
from modelstock_jax.models.config import ModelConfig, TextConfig, VisionConfig
from modelstock_jax.models.convnext import ConvNeXtConfig
from modelstock_jax.models.resnet import ResNetConfig
from modelstock_jax.models.siglip import SiglipConfig
from modelstock_jax.models.vit import Dinov2Config, ViTConfig


class Sizes(NamedTuple):
    """Sizes of a model, and of its input.

    Attributes:
      model: sizes of the towers
      image_size: side of the images after preprocessing, in pixels
    """

    model: ModelConfig
    image_size: int


_LARGE_VISION = VisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    patch_size=14,
)
_LARGE_TEXT = TextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
_SIGLIP = SiglipConfig()
# CLIP: Radford et al. 2021, table 20; the others: config.json on the Hugging Face hub.
PUBLISHED = {
    "openai/clip-vit-base-patch32": Sizes(CLIPConfig(), 224),
    "openai/clip-vit-base-patch16": Sizes(CLIPConfig(VisionConfig(patch_size=16)), 224),
    "openai/clip-vit-large-patch14": Sizes(CLIPConfig(_LARGE_VISION, _LARGE_TEXT, 768), 224),
    "openai/clip-vit-large-patch14-336": Sizes(
        CLIPConfig(dataclasses.replace(_LARGE_VISION, image_size=336), _LARGE_TEXT, 768), 336
    ),
    "google/siglip-base-patch16-224": Sizes(_SIGLIP, 224),
    # The vocabulary of Gemma.
    "google/siglip2-base-patch16-224": Sizes(
        dataclasses.replace(_SIGLIP, text=dataclasses.replace(_SIGLIP.text, vocab_size=256000)), 224
    ),
    "google/vit-base-patch16-224": Sizes(ViTConfig(), 224),
    "google/vit-base-patch16-224-in21k": Sizes(ViTConfig(), 224),
    # Its position embeddings are those of 518 pixels.
    "facebook/dinov2-base": Sizes(Dinov2Config(image_size=518), 224),
    "facebook/convnext-base-224-22k": Sizes(
        ConvNeXtConfig(hidden_sizes=(128, 256, 512, 1024), depths=(3, 3, 27, 3)), 224
    ),
    "microsoft/resnet-50": Sizes(ResNetConfig(), 224),
}
