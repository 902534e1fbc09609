"""A small checkpoint of every kind of model: odd sizes, and no parameter at its default."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from modelstock_jax.models import checkpoint_io
from modelstock_jax.models.checkpoint import Checkpoint
from modelstock_jax.models.clip import CLIPConfig
from modelstock_jax.models.config import DualEncoderConfig, ModelConfig, TextConfig, VisionConfig
from modelstock_jax.models.convnext import ConvNeXtConfig, ConvNeXtV2Config
from modelstock_jax.models.model import abstract_params
from modelstock_jax.models.param_mapping import flatten
from modelstock_jax.models.preprocessor import Preprocessor
from modelstock_jax.models.resnet import ResNetConfig
from modelstock_jax.models.siglip import SiglipConfig
from modelstock_jax.models.vit import (
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    ViTConfig,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, and the images that it is applied to.

    Attributes:
      config: its sizes
      sides: (H, W) of the images
      classes: size of the classifier among its tensors; 0 has none
      teacher: whether there is a second classifier, of the distillation token
    """

    config: ModelConfig
    sides: tuple[tuple[int, int], ...]
    classes: int = 0
    teacher: bool = False

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Names of the classes."""
        return tuple(f"class {i}" for i in range(self.classes)) if self.classes else None


# Widths, depths and patches that no release has.
_SIZES = dict(hidden_size=36, num_hidden_layers=2, num_attention_heads=3)
_WIDE = dict(**_SIZES, intermediate_size=52)
_VIT = dict(**_WIDE, pooler_output_size=36)
_TANH = "gelu_pytorch_tanh"


def _text(**values: Any) -> TextConfig:
    sizes: dict[str, Any] = dict(
        hidden_size=20, num_hidden_layers=1, num_attention_heads=2, intermediate_size=44
    )
    words: dict[str, Any] = dict(vocab_size=50, max_position_embeddings=9)
    return TextConfig(**{**sizes, **words, "eos_token_id": 7, **values})


CASES = {
    "clip, tanh gelu": Case(
        CLIPConfig(
            VisionConfig(**_WIDE, image_size=28, patch_size=7, hidden_act=_TANH),
            _text(hidden_act=_TANH, eos_token_id=2),
            projection_dim=14,
        ),
        ((21, 35),),
    ),
    "siglip": Case(
        SiglipConfig(
            VisionConfig(
                **_WIDE, image_size=28, patch_size=7, hidden_act=_TANH, layer_norm_eps=1e-6
            ),
            _text(hidden_act=_TANH, layer_norm_eps=1e-6),
            projection_size=36,
        ),
        ((28, 28), (35, 21)),
    ),
    # As 384 pixels with patches of 14: the last pixels are in no patch.
    "siglip, pixels left over": Case(
        SiglipConfig(
            VisionConfig(**_WIDE, image_size=34, patch_size=8, hidden_act="gelu"),
            _text(hidden_act="gelu", hidden_size=36, num_hidden_layers=2),
            projection_size=36,
        ),
        ((34, 34),),
    ),
    "vit": Case(
        ViTConfig(**_WIDE, image_size=28, patch_size=7, pooler_output_size=10), ((28, 28), (42, 21))
    ),
    "vit, classifier, no qkv bias": Case(
        ViTConfig(**_VIT, image_size=23, patch_size=5, qkv_bias=False, layer_norm_eps=1e-4),
        ((23, 23),),
        classes=5,
    ),
    "deit": Case(DeiTConfig(**_VIT, image_size=28, patch_size=7), ((14, 28),)),
    "deit, one classifier": Case(
        DeiTConfig(**_VIT, image_size=28, patch_size=7, hidden_act=_TANH), ((28, 28),), classes=5
    ),
    "deit, two classifiers": Case(
        DeiTConfig(**_VIT, image_size=21, patch_size=7, qkv_bias=False),
        ((35, 28),),
        classes=5,
        teacher=True,
    ),
    "dinov2": Case(Dinov2Config(**_SIZES, image_size=28, patch_size=7), ((28, 28), (35, 49))),
    "dinov2, SwiGLU, classifier": Case(
        # The width of the MLP, 60, is rounded up to 64.
        Dinov2Config(
            **{**_SIZES, "hidden_size": 30},
            image_size=35,
            patch_size=7,
            mlp_ratio=3,
            use_swiglu_ffn=True,
            use_mask_token=False,
        ),
        ((21, 21),),
        classes=5,
    ),
    "dinov2_with_registers": Case(
        Dinov2WithRegistersConfig(
            **_SIZES, image_size=28, patch_size=7, num_register_tokens=3, use_swiglu_ffn=True
        ),
        ((42, 35),),
    ),
    "dinov2_with_registers, classifier": Case(
        Dinov2WithRegistersConfig(**_SIZES, image_size=42, patch_size=7, qkv_bias=False),
        ((42, 42), (21, 28)),
        classes=5,
    ),
    "convnext": Case(
        ConvNeXtConfig(
            hidden_sizes=(12, 20), depths=(1, 2), image_size=30, layer_scale_init_value=0.0
        ),
        ((30, 30),),
    ),
    "convnext, layer scale, classifier": Case(
        ConvNeXtConfig(hidden_sizes=(12, 20, 28), depths=(1, 1, 1), patch_size=3, image_size=32),
        ((37, 45),),
        classes=5,
    ),
    "convnextv2": Case(
        ConvNeXtV2Config(hidden_sizes=(12, 20), depths=(2, 1), image_size=30, hidden_act="relu"),
        ((37, 26),),
    ),
    "convnextv2, classifier": Case(
        ConvNeXtV2Config(hidden_sizes=(12, 20), depths=(1, 1), patch_size=3, image_size=32),
        ((32, 32),),
        classes=5,
    ),
    "resnet, bottleneck": Case(
        ResNetConfig(hidden_sizes=(12, 20), depths=(1, 2), embedding_size=6, image_size=44),
        ((44, 44),),
    ),
    "resnet, basic, classifier": Case(
        ResNetConfig(
            hidden_sizes=(6, 10),
            depths=(2, 1),
            embedding_size=6,
            layer_type="basic",
            image_size=32,
        ),
        ((37, 50),),
        classes=5,
    ),
    "resnet, stride first, classifier": Case(
        ResNetConfig(
            hidden_sizes=(12, 20),
            depths=(1, 1),
            embedding_size=12,
            downsample_in_first_stage=True,
            downsample_in_bottleneck=True,
            hidden_act="gelu",
            image_size=53,
        ),
        ((53, 53),),
        classes=5,
    ),
}


def perturbed(case: Case, seed: int = 0) -> tuple[dict, dict | None]:
    """Random parameters and head; statistics and integers too: defaults would hide errors."""
    rng, head = np.random.default_rng(seed), None

    def draw(path, leaf):
        name, size = path[-1].key, leaf.shape
        if np.issubdtype(leaf.dtype, np.integer):
            return rng.integers(1, 1000, size)
        if name == "var":
            return rng.uniform(0.5, 1.5, size).astype(np.float32)
        std = 0.1 if len(size) < 2 else size[0] ** -0.5
        return np.asarray(("scale" in name) + std * rng.standard_normal(size), np.float32)

    params = jax.tree.map_with_path(draw, abstract_params(case.config))
    if case.classes:
        heads = [
            {
                "kernel": rng.standard_normal((case.config.feature_size, case.classes), np.float32),
                "bias": rng.standard_normal(case.classes, np.float32),
            }
            for _ in range(1 + case.teacher)
        ]
        head = {**heads[0], **({"distillation": heads[1]} if case.teacher else {})}
        params = {k: v for k, v in params.items() if k not in case.config.base_only}
    return params, head


def checkpoint(case: Case, seed: int = 0) -> Checkpoint:
    """A checkpoint in memory."""
    params, head = perturbed(case, seed)
    preprocessor = Preprocessor((0.5, 0.4, 0.3), (0.25, 0.2, 0.3), case.config.image_size)
    return Checkpoint(case.config, params, preprocessor, head=head, labels=case.labels)


def directory(case: Case, path: Path, seed: int = 0) -> Path:
    """The directory of a checkpoint."""
    return checkpoint_io.save(path, checkpoint(case, seed))


def images(case: Case, sides: tuple[int, int], count: int = 2) -> np.ndarray:
    """Normalized images [count, H, W, C]."""
    shape = (count, *sides, case.config.num_channels)
    return np.random.default_rng(3).standard_normal(shape).astype(np.float32)


def ids(case: Case, count: int = 3) -> np.ndarray | None:
    """Token ids [count, L]; None for a model without texts."""
    if not isinstance(case.config, DualEncoderConfig):
        return None
    text = case.config.text
    shape = (count, text.max_position_embeddings)
    return np.random.default_rng(4).integers(0, text.vocab_size, shape).astype(np.int32)


def leaves(tree: Any) -> dict[str, np.ndarray]:
    """Leaves by dotted name."""
    return {".".join(path): np.asarray(leaf) for path, leaf in flatten(tree)}
