"""Small image towers for the synthetic benchmark: the models of the package at small sizes."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from modelstock_jax.errors import UserError
from modelstock_jax.models import model
from modelstock_jax.models.clip import CLIPConfig
from modelstock_jax.models.compute import Compute
from modelstock_jax.models.config import ModelConfig, VisionConfig
from modelstock_jax.models.convnext import ConvNeXtConfig
from modelstock_jax.models.hybrid import HybridConfig
from modelstock_jax.models.param_mapping import Params
from modelstock_jax.models.resnet import ResNetConfig

IMAGE_SIZE = 24
# Norms: the towers are trained from scratch, so there are no statistics for batch norms.
TOWERS: dict[str, ModelConfig] = {
    # Image tower of the small CLIP that the package contains.
    "vit": CLIPConfig(
        VisionConfig(
            hidden_size=96,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=3,
            image_size=IMAGE_SIZE,
            patch_size=6,
        ),
        projection_dim=64,
    ),
    "hybrid": HybridConfig(),
    "resnet": ResNetConfig(
        embedding_size=32,
        hidden_sizes=(32, 64, 128),
        depths=(1, 1, 1),
        layer_type="basic",
        downsample_in_first_stage=True,
        image_size=IMAGE_SIZE,
        norm="group",
        stem_size=3,
        stem_pool=False,
    ),
    "convnext": ConvNeXtConfig(
        patch_size=3,
        hidden_sizes=(48, 96),
        depths=(2, 2),
        layer_norm_eps=1e-6,
        layer_scale_init_value=0,
        image_size=IMAGE_SIZE,
        window=5,
    ),
}


def tower(name: str) -> ModelConfig:
    """Return the sizes of the tower of this name.

    Raises:
      UserError: unknown name
    """
    if name not in TOWERS:
        raise UserError(f"tower:{name}: choose one of {', '.join(TOWERS)}")
    return TOWERS[name]


def init(name: str, num_classes: int, key: jax.Array) -> Params:
    """Draw initial parameters {"image_tower", "head": {"kernel" [E, K], "bias" [K]}}, float32.

    Example:
      >>> params = jax.eval_shape(lambda key: init("resnet", 62, key), jax.random.key(0))
      >>> params["image_tower"]["stem"]["kernel"].shape, params["head"]["kernel"].shape
      ((27, 32), (128, 62))
    """
    config = tower(name)
    first, second = jax.random.split(key)
    width = config.feature_size
    kernel = width**-0.5 * jax.random.normal(second, (width, num_classes))
    return {
        "image_tower": model.init_image_tower(config, first),
        "head": {"kernel": kernel, "bias": jnp.zeros(num_classes)},
    }


def classifier(name: str, compute: Compute) -> Callable[[Params, jax.Array], jax.Array]:
    """Return a tower with a linear head: logits = f W + b; f is not normalized, even in a ViT.

    Args:
      name: name of the tower
      compute: dtype and remat

    Returns:
      apply(params, images) -> logits [B, K], float32; images float [B, 24, 24, 3]
    """
    return model.classifier(tower(name), compute, unit_features=False)
