"""A whole run in a process of its own: a tiny random CLIP on the true glyph world."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import jax
import numpy as np

from modelstock_jax.experiment.setup import BUNDLED
from modelstock_jax.models import checkpoint_io
from modelstock_jax.models.checkpoint import Checkpoint
from modelstock_jax.models.clip import init
from modelstock_jax.models.config import CLIPConfig, Preprocessor, TextConfig, VisionConfig

ROOT = Path(__file__).parents[2]
STEPS_PER_EPOCH = 8


def save_anchor(directory: Path) -> Path:
    """A random CLIP of one block with the glyph world's tokenizer."""
    size = dict(hidden_size=12, intermediate_size=24, num_attention_heads=2, num_hidden_layers=1)
    config = CLIPConfig(
        VisionConfig(**size, image_size=24, patch_size=12),
        TextConfig(
            **size,
            vocab_size=272,
            max_position_embeddings=26,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        ),
        projection_dim=8,
    )
    params = jax.tree.map(np.asarray, init(config, jax.random.key(0)))
    tokenizer = BUNDLED["glyph-clip"]
    pixels = Preprocessor((0.5,) * 3, (0.25,) * 3, 24)
    return checkpoint_io.save(directory, Checkpoint(config, params, pixels, tokenizer))


def arguments(anchor: Path, workdir: Path, *more: str) -> list[str]:
    return [
        "--config=configs/glyphs.py",
        f"--workdir={workdir}",
        f"--config.pretrained={anchor}",
        "--config.batch_size=512",
        "--config.epochs=2",
        "--config.checkpoint.save_every_steps=3",
        "--config.evaluation.wise_ft_alphas=(0.5,)",
        # Drawing and measuring the others is most of a run's time; the demo's test has them all.
        "--config.data.shifts=('v2','sketch')",
        *more,
    ]


def start(
    *args: str,
    program: tuple[str, ...] = ("launch.py",),
    environment: Mapping[str, str] = MappingProxyType({}),
) -> subprocess.Popen:
    """`python launch.py ...` on a CPU, as a user starts it; `environment` is added to ours."""
    kept = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    env = {
        name: value
        for name, value in os.environ.items()
        if name in kept or not name.startswith(("XLA_", "JAX_"))
    }
    return subprocess.Popen(
        [sys.executable, *program, *args],
        cwd=ROOT,
        env=env | {"JAX_PLATFORMS": "cpu"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(
    *args: str,
    program: tuple[str, ...] = ("launch.py",),
    seconds: float = 540,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> tuple[int, str]:
    """Runs to the end; exit code and all that was printed. One that hangs is killed."""
    process = start(*args, program=program, environment=environment)
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, output
