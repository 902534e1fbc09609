"""Runs of the image studies: their anchors, and how they are trained."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from modelstock_jax.data.benchmark import Benchmark
from modelstock_jax.data.glyphs.captions import pretraining_set
from modelstock_jax.errors import UserError
from modelstock_jax.experiment.setup import open_anchor
from modelstock_jax.fileio import new_directory
from modelstock_jax.merging.trees import PyTree
from modelstock_jax.models.checkpoint import Checkpoint
from modelstock_jax.models.compute import Compute
from modelstock_jax.models.preprocessor import Preprocessor
from modelstock_jax.reporting.timeline import Timeline
from modelstock_jax.training.checkpoints import Checkpoints
from modelstock_jax.training.classifier import Classifier, anchor_classifier
from modelstock_jax.training.finetune import (
    make_task,
    make_trainer,
    single_replica_config,
)
from modelstock_jax.training.metrics import count_compilation
from modelstock_jax.training.stages import apply_tpgm, linear_probe
from modelstock_jax.training.step_fns import StepFunctions, Task
from modelstock_jax.training.trainer import Trainer, checkpoint_items
from studies import towers
from studies.ledger import lock_run
from studies.run_store import RunStore, epoch_file, read_tree, write_tree
from studies.runs import Run, checksum, training_checksum

PREFIX = "tower:"
# Pretraining of a tower; chosen before any tower was fine-tuned.
NUM_IMAGES = 20_480
RECIPE = {
    "objective.name": "cross_entropy",
    "optimizer.name": "adamw",
    "optimizer.learning_rate": 2e-3,
    "optimizer.weight_decay": 0.05,
    "optimizer.warmup_fraction": 0.05,
    "epochs": 12,
    "batch_size": 256,
}


@dataclasses.dataclass(frozen=True)
class Anchor:
    """A pretrained model that is loaded, or pretrained, when its weights are first needed.

    Attributes:
      outline: the model; its weights may be shapes only.
      load: -> the model with its weights.
    """

    outline: Classifier
    load: Callable[[], Classifier]


def anchor_opener(config: ConfigDict) -> Callable[[Benchmark, Path], Anchor]:
    """Return (data, workdir) -> the anchor of `config.pretrained`: a CLIP, or `tower:NAME`.

    Raises:
      UserError: if there is no such model, or for a tower with data other than the glyphs.
    """
    name = config.pretrained
    if not name.startswith(PREFIX):
        checkpoint = open_anchor(config)
        return partial(_clip, config, checkpoint)
    if config.data.name != "glyphs":
        raise UserError(
            f"pretrained={name}: towers are pretrained on the glyphs; "
            f"data.name={config.data.name!r} needs a CLIP"
        )
    towers.tower(name.removeprefix(PREFIX))
    return partial(_tower, config)


def _clip(config: ConfigDict, checkpoint: Checkpoint, data: Benchmark, workdir: Path) -> Anchor:
    opened = anchor_classifier(config, checkpoint, data, workdir / "heads")
    return Anchor(opened, lambda: opened)


def _tower(config: ConfigDict, data: Benchmark, workdir: Path) -> Anchor:
    """Return a tower, identified by everything that its weights depend on, not by their bits."""
    name = config.pretrained.removeprefix(PREFIX)
    init = partial(towers.init, name, len(data.class_names), jax.random.key(0))
    recipe, shapes = _recipe(config), jax.eval_shape(init)
    sizes = [list(leaf.shape) for leaf in jax.tree.leaves(shapes)]
    outline = Classifier(
        params=shapes,
        apply=towers.classifier(name, Compute.of(config.compute)),
        normalize=Preprocessor((0.5,) * 3, (0.25,) * 3, towers.IMAGE_SIZE),
        num_heads=towers.TOWERS[name].num_heads,
        checksum=training_checksum(recipe, checksum([name, NUM_IMAGES, sizes])),
        model=towers.TOWERS[name],
    )

    @functools.cache
    def load() -> Classifier:
        directory = f"{name}-{outline.checksum}"
        path = workdir / "towers" / directory / "model.safetensors"
        with lock_run(workdir / "locks", f"tower-{directory}", wait=True):
            if not path.is_file():
                start = dataclasses.replace(outline, params=init(), checksum="")
                _pretrain(recipe, start, data, workdir, path)
        return dataclasses.replace(outline, params=read_tree(path))

    return Anchor(outline, load)


def _recipe(config: ConfigDict) -> ConfigDict:
    recipe = single_replica_config(config)
    recipe.update_from_flattened_dict(RECIPE)
    recipe.seed = 0
    return recipe


def _pretrain(
    recipe: ConfigDict, start: Classifier, data: Benchmark, workdir: Path, path: Path
) -> None:
    broad = dataclasses.replace(data, train=pretraining_set(NUM_IMAGES))
    title = f"{recipe.pretrained}: pretraining"
    trainer = make_trainer(recipe, start, broad, workdir, path.parent.name, title=title)
    params = jax.tree.map(lambda x: x[0], jax.device_get(trainer.run().state.params))
    with new_directory(path.parent) as temporary:
        write_tree(temporary / path.name, params)
    shutil.rmtree(trainer.workdir)  # It still contains the optimizer state.


_MAX_CACHED_FILES = 48


class ImageRuns(RunStore):
    """Runs that are trained with the trainer of the package."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        anchor: Anchor,
        data: Benchmark,
        anchor_checksum: str,
        record: Callable[[list[Any], Any, float], None],
    ) -> None:
        """Create the store; train nothing.

        Args:
          config: base config of every run.
          workdir: where runs are stored.
          anchor: initial model of every replica.
          data: contains the training set.
          anchor_checksum: of the pretrained weights.
          record: called with (key, value, seconds) after each complete run.
        """
        super().__init__(config, workdir, record, _MAX_CACHED_FILES)
        self._anchor, self._data, self._anchor_checksum = anchor, data, anchor_checksum
        # Runs that differ only in their seed share compiled functions.
        self._last: tuple[str, Classifier, StepFunctions] | None = None

    def checksum(self, config: ConfigDict) -> str:
        """See `RunStore`."""
        return training_checksum(config, self._anchor_checksum)

    def start(self, run: Run) -> PyTree:
        """See `RunStore`; for LP-FT, the anchor with a probed head."""
        return self._compiled(run.config(self._config))[0].params

    @property
    def steps_per_epoch(self) -> int:
        """Steps per epoch of the base config."""
        return self._task(self._config).steps_per_epoch

    def num_steps(self, config: ConfigDict) -> int:
        """See `RunStore`."""
        return self._task(config).num_steps

    def _task(self, config: ConfigDict, anchor: Classifier | None = None) -> Task:
        data, anchor = self._data, anchor or self._anchor.outline
        return make_task(config, anchor, len(data.train), data.augment)

    def train_parts(self, run: Run, name: str, title: str) -> dict[str, PyTree]:
        """See `RunStore`."""
        config = run.config(self._config)
        anchor, step_functions = self._compiled(config)
        steps = step_functions.task.steps_per_epoch
        if run.every_epoch:
            config.checkpoint.keep = 0
            config.checkpoint.save_every_steps = run.save_interval(steps)
        timeline = Timeline(None)
        trainer = make_trainer(
            config,
            anchor,
            self._data,
            self._workdir,
            name,
            step_functions=step_functions,
            timeline=timeline,
            title=title,
        )
        with count_compilation(timeline):  # Excludes compilation from the time of a merge.
            result = trainer.run()
        replicas = apply_tpgm(config, anchor, self._data, jax.device_get(result.state.params))
        parts = {"replicas": _as_classifiers(anchor, replicas, config.num_replicas)}
        if result.merged is not None:
            parts["merged"] = anchor.classify(jax.device_get(result.merged))
        if run.every_epoch:
            parts |= _saved_epochs(trainer, step_functions, steps)
        return parts

    def _compiled(self, config: ConfigDict) -> tuple[Classifier, StepFunctions]:
        """Return a run's initial model and its step functions, which other seeds reuse."""
        key = training_checksum(config, self._anchor_checksum)
        if self._last is None or self._last[0] != key:
            # All seeds share a probe, as in Model Soups. It is trained with the base config's seed.
            probe_config = config.copy_and_resolve_references()
            probe_config.seed = self._config.seed
            with lock_run(self._workdir / "locks", f"probe-{key}", wait=True):
                anchor = linear_probe(
                    probe_config, self._anchor.load(), self._data, self._workdir / "probes" / key
                )
            step_functions = StepFunctions(config, self._task(config, anchor))
            self._last = key, anchor, step_functions
        return self._last[1:]


def _as_classifiers(anchor: Classifier, replicas: PyTree, count: int) -> PyTree:
    """Return replicas as classifiers, [N, ...] per leaf; FLYP's heads come from its text towers."""
    classifiers = [
        anchor.classify(jax.tree.map(lambda x, r=r: x[r], replicas)) for r in range(count)
    ]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *classifiers)


def _saved_epochs(
    trainer: Trainer, step_functions: StepFunctions, steps_per_epoch: int
) -> dict[str, PyTree]:
    like = checkpoint_items(step_functions.abstract_state)
    with Checkpoints(trainer.workdir / "state", keep=0) as states:
        return {
            epoch_file(step / steps_per_epoch): states.restore(step, like)["params"]
            for step in states.steps
        }
