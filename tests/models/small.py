"""A CLIP as wide as the synthetic benchmark's, with non-default biases and norms."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np

from modelstock_jax.models.checkpoint import Checkpoint
from modelstock_jax.models.clip import CLIPConfig
from modelstock_jax.models.config import TextConfig, VisionConfig
from modelstock_jax.models.model import abstract_params
from modelstock_jax.models.preprocessor import Preprocessor

EOS = 7


def config(layers: int = 2, **text) -> CLIPConfig:
    """Image 24, patch 6, width 96; text tower with half as many layers; embedding 64."""
    act = text.pop("hidden_act", "quick_gelu")
    size = dict(hidden_size=96, intermediate_size=384, num_attention_heads=3, hidden_act=act)
    words = dict(
        num_hidden_layers=layers // 2,
        vocab_size=60,
        max_position_embeddings=16,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=EOS,
    )
    return CLIPConfig(
        VisionConfig(**size, num_hidden_layers=layers, image_size=24, patch_size=6),
        TextConfig(**size, **{**words, **text}),
        projection_dim=64,
    )


def perturbed(config: CLIPConfig, seed: int = 0) -> dict:
    """Random parameters, including biases and norms: zeros and ones would hide errors."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        std = 0.1 if len(leaf.shape) < 2 else leaf.shape[0] ** -0.5
        start = {"scale": 1.0, "logit_scale": 2.6592}.get(path[-1].key, 0.0)
        return np.asarray(start + std * rng.standard_normal(leaf.shape), np.float32)

    return jax.tree.map_with_path(draw, abstract_params(config))


def checkpoint(config: CLIPConfig, directory: Path | None = None, seed: int = 0) -> Checkpoint:
    """A checkpoint with perturbed parameters and CLIP's pixel statistics."""
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    preprocessor = Preprocessor(mean, std, config.vision.image_size)
    return Checkpoint(config, perturbed(config, seed), preprocessor, directory)


def images(count: int = 3, seed: int = 1) -> np.ndarray:
    """Normalized images [count, 24, 24, 3]."""
    return np.random.default_rng(seed).standard_normal((count, 24, 24, 3)).astype(np.float32)


def ids(count: int = 5, length: int = 16, seed: int = 2) -> np.ndarray:
    """Token ids: end-of-text at various positions, padding after it, higher ids before it."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(EOS + 1, 60, (count, length)).astype(np.int32)
    ids[:, 0] = 0
    for i, end in enumerate(rng.integers(2, length, count)):
        ids[i, end:] = EOS
    return ids


def replaced(config: CLIPConfig, tower: str, **values) -> CLIPConfig:
    """The config with some values of one tower changed."""
    return dataclasses.replace(
        config, **{tower: dataclasses.replace(getattr(config, tower), **values)}
    )
