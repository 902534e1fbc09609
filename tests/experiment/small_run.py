"""Complete runs in a separate process: a tiny random CLIP on the synthetic benchmark."""

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
from modelstock_jax.models.clip import CLIPConfig
from modelstock_jax.models.config import TextConfig, VisionConfig
from modelstock_jax.models.model import init
from modelstock_jax.models.preprocessor import Preprocessor
from tests.compiler_flags import FLAGS

ROOT = Path(__file__).parents[2]
STEPS_PER_EPOCH = 8
SHORT = ("--config.compare=False", "--config.export.which=merged", "--config.epochs=1")
"""More arguments of the shortest run that trains, merges and exports."""


def save_anchor(directory: Path) -> Path:
    """Save a random CLIP of one block with the tokenizer of the synthetic benchmark."""
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
        # Rendering and evaluating all shifts takes most of a run's time; test_finding.py has them.
        "--config.data.shifts=('v2','sketch')",
        *more,
    ]


def cpu_environment(xla_flags: str = "") -> dict[str, str]:
    """Return the environment of a process without the variables of XLA and JAX of these tests.

    It has their compilation cache and their flags that make the compiler quick.
    """
    cache = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name in cache or not name.startswith(("XLA_", "JAX_"))
    }
    return inherited | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{FLAGS} {xla_flags}".strip()}


def start(
    *args: str,
    program: tuple[str, ...] = ("launch.py",),
    environment: Mapping[str, str] = MappingProxyType({}),
) -> subprocess.Popen:
    """Start `python launch.py ...` on a CPU; `environment` is added to `cpu_environment`."""
    return subprocess.Popen(
        [sys.executable, *program, *args],
        cwd=ROOT,
        env=cpu_environment() | environment,
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
    """Run to the end; return the exit code and the output. A run that hangs is killed."""
    process = start(*args, program=program, environment=environment)
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, output
