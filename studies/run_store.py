"""Trained replicas and pretrained anchors, made once and stored by checksum as safetensors."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import time
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
from modelstock_jax.models.param_mapping import flatten, unflatten
from modelstock_jax.models.preprocessor import Preprocessor
from modelstock_jax.reporting.timeline import Timeline
from modelstock_jax.tensor_files.reader import TensorFiles
from modelstock_jax.tensor_files.writer import write_tensors
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
from studies.runs import Run, checksum, training_checksum


def write_tree(path: Path, tree: PyTree) -> None:
    """Write nested dicts of arrays to one safetensors file; names are keys joined with dots.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "w.safetensors"
      >>> write_tree(path, {"head": {"bias": np.arange(2.0)}})
      >>> read_tree(path)
      {'head': {'bias': array([0., 1.])}}
    """
    write_tensors(path, {".".join(keys): np.asarray(leaf) for keys, leaf in flatten(tree)})


def read_tree(path: Path) -> PyTree:
    """Read a file of `write_tree` as nested dicts of NumPy arrays."""
    files = TensorFiles(path)
    tree = unflatten({tuple(name.split(".")): files[name] for name in files})
    return jax.tree.map(np.asarray, tree)


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


class RunStore:
    """The weights of runs; a run is trained when they are first needed.

    A run is stored in workdir/trained/NAME:

    - `replicas.safetensors`: the replicas at the end, [N, ...] per tensor.
    - `epoch_K.safetensors`: with `every_epoch`, the replicas at epoch K (K may be a fraction such
      as 0.5; at a merge, they are the merged weights).
    - `merged.safetensors`: the last merged model, if the run merges.
    """

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
        self._record = record
        self._config, self._workdir = config, workdir
        self._anchor, self._data, self._anchor_checksum = anchor, data, anchor_checksum
        self._read = functools.lru_cache(_MAX_CACHED_FILES)(read_tree)
        # Runs that differ only in their seed share compiled functions.
        self._last: tuple[str, Classifier, StepFunctions] | None = None

    def name(self, run: Run) -> str:
        """Return the checksum of everything that the run's weights depend on, with its seed."""
        run_checksum = training_checksum(run.config(self._config), self._anchor_checksum)
        epochs = f"-epochs{run.saves_per_epoch if run.saves_per_epoch > 1 else ''}"
        return f"{run_checksum}-{run.seed}" + epochs * run.every_epoch

    def weights(self, run: Run, part: str) -> PyTree:
        """Return `replicas`, `epoch_K` or `merged` of a run; train it if needed.

        Raises:
          UserError: if the run has no such part.
        """
        directory = self.train(run)
        path = directory / f"{part}.safetensors"
        if not path.is_file():
            raise UserError(f"{directory}: this run has no {part!r}")
        return self._read(path)

    def train(self, run: Run, title: str = "") -> Path:
        """Train a run unless it is stored; return its directory.

        Args:
          run: the run.
          title: shown with the progress; by default the replicas and the seed.
        """
        directory = self._workdir / "trained" / self.name(run)
        if not directory.is_dir():
            self._train(run, directory, title or self.title(run))
        return directory

    def title(self, run: Run) -> str:
        """Return the run's replicas and seed as text."""
        count = run.config(self._config).num_replicas
        return f"{count} replicas, seed {run.seed}" if count > 1 else f"one model, seed {run.seed}"

    def start(self, run: Run) -> PyTree:
        """Return the initial weights of the run's replicas; for LP-FT, those with a probed head."""
        return self._compiled(run.config(self._config))[0].params

    @property
    def steps_per_epoch(self) -> int:
        """Steps per epoch of the base config."""
        return self._task(self._config).steps_per_epoch

    def steps(self, run: Run) -> int:
        """Return the optimizer steps of a run, summed over its replicas."""
        config = run.config(self._config)
        return self._task(config).num_steps * config.num_replicas

    def _task(self, config: ConfigDict, anchor: Classifier | None = None) -> Task:
        data, anchor = self._data, anchor or self._anchor.outline
        return make_task(config, anchor, len(data.train), data.augment)

    def is_trained(self, run: Run) -> bool:
        """Return whether the run is stored."""
        return (self._workdir / "trained" / self.name(run)).is_dir()

    def _train(self, run: Run, directory: Path, title: str) -> None:
        config = run.config(self._config)
        begin = time.monotonic()
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
            directory.name,
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
        seconds = time.monotonic() - begin
        with new_directory(directory) as temporary:
            for name, tree in parts.items():
                write_tree(temporary / f"{name}.safetensors", tree)
        self._record(
            ["Trained", directory.name],
            {
                "seed": run.seed,
                "options": dict(run.options),
                "replicas": config.num_replicas,
                "steps": step_functions.task.num_steps,
            },
            seconds,
        )
        shutil.rmtree(trainer.workdir)  # It still contains the optimizer state.

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


def epoch_file(epoch: float) -> str:
    """Return the file stem of the replicas at an epoch of their run.

    >>> epoch_file(2 / 1), epoch_file(12 / 32)
    ('epoch_2', 'epoch_0.375')
    """
    return f"epoch_{epoch:g}"


def _saved_epochs(
    trainer: Trainer, step_functions: StepFunctions, steps_per_epoch: int
) -> dict[str, PyTree]:
    like = checkpoint_items(step_functions.abstract_state)
    with Checkpoints(trainer.workdir / "state", keep=0) as states:
        return {
            epoch_file(step / steps_per_epoch): states.restore(step, like)["params"]
            for step in states.steps
        }
