"""The same training steps in several ways, for `overhead.py`: bare, watched, recorded, saved."""

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
from modelstock_jax.models.clip import abstract_params  # noqa: E402
from modelstock_jax.models.config import (  # noqa: E402
    CLIPConfig,
    Preprocessor,
    TextConfig,
    VisionConfig,
)
from modelstock_jax.reporting.timeline import Timeline  # noqa: E402
from modelstock_jax.training import train_step as step_module  # noqa: E402
from modelstock_jax.training.classifier import make_classifier  # noqa: E402
from modelstock_jax.training.finetune import make_task  # noqa: E402
from modelstock_jax.training.metrics import TrainLogger  # noqa: E402
from modelstock_jax.training.sharding import put_batch  # noqa: E402
from modelstock_jax.training.step_fns import StepFunctions  # noqa: E402
from modelstock_jax.training.trainer import RunCheckpoints  # noqa: E402

# Width, blocks, heads, patch, image, classes, training images; steps of a round.
SIZES = {
    "glyphs": (96, 4, 3, 6, 24, 62, 4096, 8),
    "middle": (384, 12, 6, 32, 224, 1000, 1_281_167, 6),
    "vitb32": (768, 12, 12, 32, 224, 1000, 1_281_167, 2),
}


def make_programs(case: str, batch_size: int | None = None):
    """The config of a case and its programs, at random weights."""
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


def without_flags(config, programs: StepFunctions) -> StepFunctions:
    """Programs whose step computes the gradient's norm, and looks at nothing else."""
    real = step_module.finite_checks
    step_module.finite_checks = lambda loss, grads, params: {"grad_norm": optax.tree.norm(grads)}
    try:
        bare = StepFunctions(config, programs.task)
        state, batch = programs.init_state(0), put_batch(programs.mesh, random_batch(config, 0))
        bare.train_step(state, batch, bare.step_constants(bare.anchor))  # Traced while it is so.
    finally:
        step_module.finite_checks = real
    return bare


def random_batch(config, seed: int):
    """Images and labels of a step, on the host."""
    rng = np.random.default_rng(seed)
    lead = (config.num_replicas, config.batch_size)
    side = config.image_size
    return {
        "image": rng.integers(0, 256, (*lead, side, side, 3), np.uint8),
        "label": rng.integers(0, 62, lead).astype(np.int32),
    }


class Loops:
    """The same steps in four ways; each call returns one round's seconds, wall and CPU."""

    def __init__(self, case: str, workdir: Path) -> None:
        self.config, self.programs = make_programs(case, batch_size=2)
        self.config.image_size, self.steps = SIZES[case][4], SIZES[case][7]
        self.bare_programs = without_flags(self.config, self.programs)
        self.batches = [random_batch(self.config, seed) for seed in range(4)]
        self.anchor = self.programs.anchor
        self.reference = self.programs.step_constants(self.anchor)
        self.state = self.programs.init_state(0)
        self.timeline = Timeline(workdir / "timeline.jsonl")
        self.stores = RunCheckpoints(workdir, self.config, self.programs, 0, self.timeline)
        self.record = TrainLogger(
            self.config, self.programs.task, workdir, "overhead", 0, self.timeline
        )
        self.done, self.lasted = 0, []

    def bare(self) -> np.ndarray:
        """Steps alone; the loss is read every `log_every` steps, a step late."""
        return self._round(self.bare_programs.train_step, self._loss_alone())

    def flags(self) -> np.ndarray:
        """The step computes whether every gradient is finite."""
        return self._round(self.programs.train_step, self._loss_alone())

    def records(self) -> np.ndarray:
        """As a run does it, but for saving: watch, metrics, progress, timeline."""
        return self._round(self.programs.train_step, self.record.log_step, self.timeline)

    def saving(self) -> np.ndarray:
        """As a run does it, with one save of the state, at the first step of the round."""
        return self._with_save(merged=False)

    def epoch(self) -> np.ndarray:
        """As at an epoch's end: a merged model is saved, and the state after it."""
        return self._with_save(merged=True)

    def _with_save(self, merged: bool) -> np.ndarray:
        ended = threading.Event()

        def take(step, values):
            self.record.log_step(step, values)
            if step == self.done + 1:
                self.record.flush_pending()
                self.began = time.perf_counter()
                if merged:
                    self.stores.save_merged(step, self.anchor)
                self._save(step, ended)

        cpu = time.process_time()
        seconds = self._round(self.programs.train_step, take, self.timeline)
        assert ended.wait(600)
        self.stores.wait()
        if not merged:
            self.lasted.append(self.ended - self.began)
        wall = max(seconds[0], self.ended - self.round_began)
        return np.array([wall, time.process_time() - cpu])

    def _save(self, step: int, ended: threading.Event) -> None:
        tell = self.timeline.end

        def end(*args):
            self.ended = time.perf_counter()
            ended.set()
            tell(*args)

        self.timeline.end = end
        self.stores.save(step, self.state)
        self.timeline.end = tell

    def _loss_alone(self):
        late = []

        def take(step, values):
            if late:
                np.asarray(late.pop())
            if step % self.config.log_every_steps == 0:
                late.append(values["loss"])

        return take

    def _round(self, run_step, take, timeline=None) -> np.ndarray:
        phase = timeline.phase if timeline else lambda name: contextlib.nullcontext()
        self.round_began, cpu = time.perf_counter(), time.process_time()
        for k in range(self.steps):
            with phase("data"):
                batch = put_batch(self.programs.mesh, self.batches[k % 4])
            with phase("train"):
                self.state, values = run_step(self.state, batch, self.reference)
                take(self.done + k + 1, values)
        jax.block_until_ready(self.state)
        self.done += self.steps
        return np.array([time.perf_counter() - self.round_began, time.process_time() - cpu])
