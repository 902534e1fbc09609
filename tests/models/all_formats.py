"""A tiny CLIP that every format can represent: heads of width 64, MLP ratio 4, quick_gelu."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from modelstock_jax.models.checkpoint import Checkpoint
from modelstock_jax.models.clip import CLIPConfig
from modelstock_jax.models.config import TextConfig, VisionConfig
from tests.models import small

VISION = VisionConfig(
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=12,
    patch_size=4,
)
TEXT = TextConfig(
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=1,
    num_attention_heads=1,
    vocab_size=60,
    max_position_embeddings=16,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=59,
)
CONFIG = CLIPConfig(VISION, TEXT, projection_dim=32)
CHECKPOINT = small.checkpoint(CONFIG)


def with_tokenizer(directory: Path, checkpoint: Checkpoint = CHECKPOINT) -> Checkpoint:
    """The checkpoint with a placeholder file as tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text("{}")
    return dataclasses.replace(checkpoint, directory=directory)


def with_head(checkpoint: Checkpoint = CHECKPOINT, seed: int = 1) -> Checkpoint:
    """A different image tower and a head with three classes, two of which have the same name."""
    rng = np.random.default_rng(seed)
    head = {
        "kernel": rng.standard_normal((32, 3)).astype(np.float32),
        "bias": rng.standard_normal(3).astype(np.float32),
    }
    replica = {"image_tower": small.perturbed(CONFIG, seed)["image_tower"], "head": head}
    return checkpoint.with_replica(replica, ("crane", "gull é", "crane"))
