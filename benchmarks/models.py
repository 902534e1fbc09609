"""The benchmarked models: true sizes, random weights, and the operations of a step."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from configs import glyphs, vitb16, vitb32, vitl14  # noqa: E402
from modelstock_jax.models.clip import CLIPConfig  # noqa: E402
from modelstock_jax.models.compute import Compute  # noqa: E402
from modelstock_jax.models.config import TextConfig, VisionConfig  # noqa: E402
from modelstock_jax.models.model import abstract_params, classifier  # noqa: E402
from modelstock_jax.models.preprocessor import CLIP_MEAN, CLIP_STD, Preprocessor  # noqa: E402
from modelstock_jax.training.losses import Loss, cross_entropy  # noqa: E402
from modelstock_jax.training.step_fns import StepFunctions, Task  # noqa: E402

CONFIGS = {"tiny": glyphs, "glyph": glyphs, "b32": vitb32, "b16": vitb16, "l14": vitl14}
CONFIGS["l14-336"] = vitl14
# Width, blocks, heads, patch, image, features, classes; `tiny` compiles quickly.
SIZES = {
    "tiny": (8, 1, 2, 4, 8, 4, 3),
    "glyph": (96, 4, 3, 6, 24, 64, 62),
    "b32": (768, 12, 12, 32, 224, 512, 1000),
    "b16": (768, 12, 12, 16, 224, 512, 1000),
    "l14": (1024, 24, 16, 14, 224, 768, 1000),
    "l14-336": (1024, 24, 16, 14, 336, 768, 1000),
}


def clip_config(size: str) -> CLIPConfig:
    """Return the sizes of the model; the text tower is not trained and has minimum size."""
    width, blocks, heads, patch, image, features, _ = SIZES[size]
    vision = VisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        image_size=image,
        patch_size=patch,
    )
    text = TextConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        vocab_size=9, max_position_embeddings=4,
    )  # fmt: skip
    return CLIPConfig(vision, text, projection_dim=features)


def run_config(size: str, dtype: str = ""):
    """Return the options of the size's config on one device; "" keeps the config's dtype."""
    config = CONFIGS[size].get_config()
    config.compute.dtype = dtype or config.compute.dtype
    config.mesh.replica = config.mesh.data = 1
    return config


def abstract_weights(size: str) -> dict[str, Any]:
    """Return float32 shapes of the trained weights: image tower and head."""
    clip, classes = clip_config(size), SIZES[size][-1]
    head = {"kernel": (clip.projection_dim, classes), "bias": (classes,)}
    head = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in head.items()}
    return {"image_tower": abstract_params(clip)["image_tower"], "head": head}


@functools.cache
def weights(size: str) -> dict[str, Any]:
    """Return random weights of these shapes on the host."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: np.float32(0.02) * rng.standard_normal(x.shape, x.dtype), abstract_weights(size)
    )


def make_loss(config, size: str) -> Loss:
    """Return the loss of a run of `config`."""
    clip = clip_config(size)
    return cross_entropy(
        classifier(clip, Compute.of(config.compute)),
        Preprocessor(CLIP_MEAN, CLIP_STD, clip.vision.image_size),
        label_smoothing=config.label_smoothing,
    )


def make_programs(config, size: str, params: dict[str, Any]) -> StepFunctions:
    """Return the step functions of a run of `config`, as training compiles them."""
    clip = clip_config(size)
    task = Task(
        params=params,
        loss_fn=make_loss(config, size),
        steps_per_epoch=1000,
        num_steps=10_000,
        num_heads=clip.vision.num_attention_heads,
        augment=lambda key, batch: batch,
    )
    return StepFunctions(config, task)


def image_flops(size: str) -> float:
    """Return the operations of the forward and backward pass per image.

    A product of [m, k] and [k, n] counts as 2mkn. Only products are counted: per block and token
    24 D^2 for the kernels (MLP of 4 D) and 4 T D for the attention; then patches, projection and
    head. The backward pass has twice as many, except for the gradient of the pixels, which is not
    needed. Operations that remat recomputes are not counted.
    """
    width, blocks, _, patch, image, features, classes = SIZES[size]
    tokens = (image // patch) ** 2 + 1
    tower = blocks * tokens * (24 * width**2 + 4 * tokens * width)
    patches = 2 * (tokens - 1) * 3 * patch**2 * width
    return 3.0 * (tower + 2 * features * (width + classes)) + 2.0 * patches
