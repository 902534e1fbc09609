"""Trained replicas by content: trained once, kept as safetensors, read ever after."""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from modelstock_jax.data.benchmark import Benchmark
from modelstock_jax.errors import UserError
from modelstock_jax.reporting.timeline import Timeline
from modelstock_jax.studies.measuring.anchors import Anchor
from modelstock_jax.studies.measuring.runs import Run, training_digest
from modelstock_jax.studies.measuring.tree_file import read_tree, write_tree
from modelstock_jax.studies.measuring.turns import claim
from modelstock_jax.tensor_files.writer import new_directory
from modelstock_jax.training.checkpoints import Checkpoints
from modelstock_jax.training.classifier import Classifier
from modelstock_jax.training.finetune import (
    finetuning_programs,
    finetuning_task,
    finetuning_trainer,
)
from modelstock_jax.training.metrics import counted
from modelstock_jax.training.stages import hold, probe
from modelstock_jax.training.step_fns import Programs, Task
from modelstock_jax.training.trainer import Trainer, saved

PyTree = Any

# Files whose weights are held in memory.
_HELD = 48


class Trained:
    """What runs end in; each is trained when it is first asked for.

    A run is kept in workdir/trained/NAME: `replicas.safetensors` ([N, ...] a tensor),
    `epoch_K.safetensors` where every epoch is kept (K may be 0.5 and the like; at a merge they are
    the merged weights), `merged.safetensors` where replicas merge.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        anchor: Anchor,
        data: Benchmark,
        fingerprint: str,
        record: Callable[[list[Any], Any, float], None],
    ) -> None:
        """Trains nothing yet.

        Args:
          config: what every run starts from.
          workdir: where runs are kept.
          anchor: what every replica starts from.
          data: its training set.
          fingerprint: of the pretrained weights.
          record: (key, value, seconds), told of each run that is trained to its end.
        """
        self._record = record
        self._config, self._workdir = config, workdir
        self._anchor, self._data, self._fingerprint = anchor, data, fingerprint
        self._read = functools.lru_cache(_HELD)(read_tree)
        # Runs that differ in their seed alone share compiled programs.
        self._last: tuple[str, Classifier, Programs] | None = None

    def name(self, run: Run) -> str:
        """The digest of all that the run's weights depend on."""
        digest = training_digest(run.config(self._config), self._fingerprint)
        epochs = f"-epochs{run.per_epoch if run.per_epoch > 1 else ''}"
        return f"{digest}-{run.seed}" + epochs * run.every_epoch

    def weights(self, run: Run, part: str) -> PyTree:
        """`replicas`, `epoch_K` or `merged` of a run.

        Raises:
          UserError: if the run has no such part.
        """
        directory = self.train(run)
        path = directory / f"{part}.safetensors"
        if not path.is_file():
            raise UserError(f"{directory}: this run keeps no {part!r}")
        return self._read(path)

    def train(self, run: Run, title: str = "") -> Path:
        """Trains a run unless it is here; its directory.

        Args:
          run: what is trained.
          title: what progress calls it; its replicas and seed where nothing is given.
        """
        directory = self._workdir / "trained" / self.name(run)
        if not directory.is_dir():
            self._train(run, directory, title or self.title(run))
        return directory

    def title(self, run: Run) -> str:
        """What a reader calls the run: its replicas and seed."""
        count = run.config(self._config).num_replicas
        return f"{count} replicas, seed {run.seed}" if count > 1 else f"one model, seed {run.seed}"

    def start(self, run: Run) -> PyTree:
        """What the run's replicas start from; LP-FT's probe is trained unless it is here."""
        return self._compiled(run.config(self._config))[0].params

    @property
    def steps_per_epoch(self) -> int:
        """Of the base config."""
        return self._task(self._config).steps_per_epoch

    def steps(self, run: Run) -> int:
        """Optimizer steps of all replicas of a run together."""
        config = run.config(self._config)
        return self._task(config).num_steps * config.num_replicas

    def _task(self, config: ConfigDict) -> Task:
        data = self._data
        return finetuning_task(config, self._anchor.outline, len(data.train), data.augment)

    def is_here(self, run: Run) -> bool:
        """Whether the run has been trained."""
        return (self._workdir / "trained" / self.name(run)).is_dir()

    def _train(self, run: Run, directory: Path, title: str) -> None:
        config = run.config(self._config)
        begin = time.monotonic()
        anchor, programs = self._compiled(config)
        steps = programs.task.steps_per_epoch
        if run.every_epoch:
            config.checkpoint.keep, config.checkpoint.every = 0, run.apart(steps)
        place, timeline = (self._workdir, directory.name), Timeline(None)
        trainer = finetuning_trainer(config, anchor, self._data, programs, *place, timeline, title)
        with counted(timeline):  # A merge's time is without the compiler's.
            result = trainer.run()
        replicas = hold(config, anchor, self._data, jax.device_get(result.state.params))
        parts = {"replicas": _classified(anchor, replicas, config.num_replicas)}
        if result.merged is not None:
            parts["merged"] = anchor.classify(jax.device_get(result.merged))
        if run.every_epoch:
            parts |= _epochs(trainer, programs, steps)
        seconds = time.monotonic() - begin
        with new_directory(directory) as beside:
            for name, tree in parts.items():
                write_tree(beside / f"{name}.safetensors", tree)
        self._record(
            ["Trained", directory.name],
            {
                "seed": run.seed,
                "options": dict(run.options),
                "replicas": config.num_replicas,
                "steps": programs.task.num_steps,
            },
            seconds,
        )
        shutil.rmtree(trainer.workdir)  # What is left of it are the optimizer's moments.

    def _compiled(self, config: ConfigDict) -> tuple[Classifier, Programs]:
        """What a run starts from, and its programs; those of the last run serve other seeds."""
        key = training_digest(config, self._fingerprint)
        if self._last is None or self._last[0] != key:
            # A probe is shared by all seeds, as Model Soups share theirs: it has the base's seed.
            one = config.copy_and_resolve_references()
            one.seed = self._config.seed
            with claim(self._workdir / "locks", f"probe-{key}", wait=True):
                anchor = probe(one, self._anchor.load(), self._data, self._workdir / "probes" / key)
            self._last = key, anchor, finetuning_programs(config, anchor, self._data)
        return self._last[1:]


def _classified(anchor: Classifier, replicas: PyTree, count: int) -> PyTree:
    """Replicas as classifiers, [N, ...] a leaf: FLYP's heads are made by its text towers."""
    each = [anchor.classify(jax.tree.map(lambda x, r=r: x[r], replicas)) for r in range(count)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *each)


def part(epoch: float) -> str:
    """The file of the replicas at this time of their run.

    >>> part(2 / 1), part(12 / 32)
    ('epoch_2', 'epoch_0.375')
    """
    return f"epoch_{epoch:g}"


def _epochs(trainer: Trainer, programs: Programs, steps: int) -> dict[str, PyTree]:
    like = saved(programs.abstract_state)
    with Checkpoints(trainer.workdir / "state", keep=0) as states:
        return {part(step / steps): states.restore(step, like)["params"] for step in states.steps}
