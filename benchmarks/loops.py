"""The same training steps with more and more overhead, for `overhead.py`."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).parents[1]))
from configs import glyphs, vitb32  # noqa: E402
from modelstock_jax.models.clip import (
    CLIPConfig,
    abstract_params,  # noqa: E402
)
from modelstock_jax.models.config import TextConfig, VisionConfig  # noqa: E402
from modelstock_jax.models.preprocessor import Preprocessor  # noqa: E402
from modelstock_jax.reporting.timeline import Timeline  # noqa: E402
from modelstock_jax.training import train_step as step_module  # noqa: E402
from modelstock_jax.training.classifier import make_classifier  # noqa: E402
from modelstock_jax.training.finetune import make_task  # noqa: E402
from modelstock_jax.training.metrics import TrainLogger  # noqa: E402
from modelstock_jax.training.sharding import put_batch  # noqa: E402
from modelstock_jax.training.step_fns import StepFunctions  # noqa: E402
from modelstock_jax.training.trainer import RunCheckpoints  # noqa: E402

# Width, blocks, heads, patch, image, classes, training images; steps per round.
SIZES = {
    "glyphs": (96, 4, 3, 6, 24, 62, 4096, 8),
    "middle": (384, 12, 6, 32, 224, 1000, 1_281_167, 6),
    "vitb32": (768, 12, 12, 32, 224, 1000, 1_281_167, 2),
}


def make_programs(case: str, batch_size: int | None = None):
    """Return the config of a case and its step functions, with random weights."""
    width, blocks, heads, patch, image, classes, num_train, _ = SIZES[case]
    config = glyphs.get_config() if case == "glyphs" else vitb32.get_config()
    config.compute.dtype, config.epochs = "float32", 1000
    config.batch_size = batch_size or {"glyphs": config.batch_size, "middle": 8, "vitb32": 4}[case]
    sizes = dict(hidden_size=width, intermediate_size=4 * width, num_attention_heads=heads)
    clip = CLIPConfig(
        VisionConfig(**sizes, num_hidden_layers=blocks, image_size=image, patch_size=patch),
        TextConfig(**sizes, num_hidden_layers=1, vocab_size=9, max_position_embeddings=4),
        projection_dim=min(512, width),
    )
    rng = np.random.default_rng(0)
    head = {"kernel": np.zeros((clip.projection_dim, classes)), "bias": np.zeros(classes)}
    params = jax.tree.map(
        lambda x: (0.02 * rng.standard_normal(x.shape)).astype(np.float32),
        {"image_tower": abstract_params(clip)["image_tower"], "head": head},
    )
    classifier = make_classifier(config, clip, params, Preprocessor((0.5,) * 3, (0.25,) * 3, image))
    task = make_task(config, classifier, num_train, lambda key, images: images)
    return config, StepFunctions(config, task)


def without_checks(config, programs: StepFunctions) -> StepFunctions:
    """Return step functions that compute the gradient norm but no non-finite checks."""
    original = step_module.finite_checks
    step_module.finite_checks = lambda loss, grads, params: {"grad_norm": optax.tree.norm(grads)}
    try:
        bare = StepFunctions(config, programs.task)
        state, batch = programs.init_state(0), put_batch(programs.mesh, random_batch(config, 0))
        bare.train_step(state, batch, bare.step_constants(bare.anchor))
    finally:
        step_module.finite_checks = original
    return bare


def random_batch(config, seed: int):
    """Return images and labels of a step on the host."""
    rng = np.random.default_rng(seed)
    lead = (config.num_replicas, config.batch_size)
    side = config.image_size
    return {
        "image": rng.integers(0, 256, (*lead, side, side, 3), np.uint8),
        "label": rng.integers(0, 62, lead).astype(np.int32),
    }


class Loops:
    """The same steps in five variants; each returns the wall and CPU seconds of one round."""

    def __init__(self, case: str, workdir: Path) -> None:
        self.config, self.programs = make_programs(case, batch_size=2)
        self.config.image_size, self.steps = SIZES[case][4], SIZES[case][7]
        self.bare_programs = without_checks(self.config, self.programs)
        self.batches = [random_batch(self.config, seed) for seed in range(4)]
        self.anchor = self.programs.anchor
        self.constants = self.programs.step_constants(self.anchor)
        self.state = self.programs.init_state(0)
        self.timeline = Timeline(workdir / "timeline.jsonl")
        self.checkpoints = RunCheckpoints(workdir, self.config, self.programs, 0, self.timeline)
        self.logger = TrainLogger(
            self.config, self.programs.task, workdir, "overhead", 0, self.timeline
        )
        self.done, self.save_seconds = 0, []

    def bare(self) -> np.ndarray:
        """Run only steps; read the loss every `log_every_steps` steps, one step late."""
        return self._round(self.bare_programs.train_step, self._read_loss())

    def checks(self) -> np.ndarray:
        """Add the non-finite checks inside the step."""
        return self._round(self.programs.train_step, self._read_loss())

    def logging(self) -> np.ndarray:
        """Add monitor, metrics, progress and timeline, as in a run without saving."""
        return self._round(self.programs.train_step, self.logger.log_step, self.timeline)

    def saving(self) -> np.ndarray:
        """Add one save of the state at the first step of the round."""
        return self._with_save(merged=False)

    def epoch(self) -> np.ndarray:
        """Add the saves at the end of an epoch: a merged model, then the state."""
        return self._with_save(merged=True)

    def _with_save(self, merged: bool) -> np.ndarray:
        saved = threading.Event()

        def log(step, values):
            self.logger.log_step(step, values)
            if step == self.done + 1:
                self.logger.flush_pending()
                self.save_start = time.perf_counter()
                if merged:
                    self.checkpoints.save_merged(step, self.anchor)
                self._save(step, saved)

        cpu = time.process_time()
        seconds = self._round(self.programs.train_step, log, self.timeline)
        assert saved.wait(600)
        self.checkpoints.wait()
        if not merged:
            self.save_seconds.append(self.save_end - self.save_start)
        wall = max(seconds[0], self.save_end - self.round_start)
        return np.array([wall, time.process_time() - cpu])

    def _save(self, step: int, saved: threading.Event) -> None:
        original = self.timeline.end

        def end(*args):
            self.save_end = time.perf_counter()
            saved.set()
            original(*args)

        self.timeline.end = end
        self.checkpoints.save(step, self.state)
        self.timeline.end = original

    def _read_loss(self):
        pending = []

        def log(step, values):
            if pending:
                np.asarray(pending.pop())
            if step % self.config.log_every_steps == 0:
                pending.append(values["loss"])

        return log

    def _round(self, run_step, log, timeline=None) -> np.ndarray:
        phase = timeline.phase if timeline else lambda name: contextlib.nullcontext()
        self.round_start, cpu = time.perf_counter(), time.process_time()
        for k in range(self.steps):
            with phase("data"):
                batch = put_batch(self.programs.mesh, self.batches[k % 4])
            with phase("train"):
                self.state, values = run_step(self.state, batch, self.constants)
                log(self.done + k + 1, values)
        jax.block_until_ready(self.state)
        self.done += self.steps
        return np.array([time.perf_counter() - self.round_start, time.process_time() - cpu])
