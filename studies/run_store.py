"""Trained replicas and pretrained anchors by content: made once, kept as safetensors."""

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
from modelstock_jax.data.glyphs.captions import broad_set
from modelstock_jax.errors import UserError
from modelstock_jax.experiment.setup import open_anchor
from modelstock_jax.fileio import new_directory
from modelstock_jax.merging.gram import PyTree
from modelstock_jax.models import tower
from modelstock_jax.models.checkpoint import Checkpoint
from modelstock_jax.models.config import Preprocessor
from modelstock_jax.models.param_mapping import flatten, unflatten
from modelstock_jax.models.transformer import Compute
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
from modelstock_jax.training.metrics import counted
from modelstock_jax.training.stages import apply_tpgm, linear_probe
from modelstock_jax.training.step_fns import StepFunctions, Task
from modelstock_jax.training.trainer import Trainer, saved
from studies.ledger import lock_run
from studies.runs import Run, checksum, training_checksum

# A tree of weights as one safetensors file.


def write_tree(path: Path, tree: PyTree) -> None:
    """Writes nested dicts of arrays, a leaf by its keys joined with dots.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "w.safetensors"
      >>> write_tree(path, {"head": {"bias": np.arange(2.0)}})
      >>> read_tree(path)
      {'head': {'bias': array([0., 1.])}}
    """
    write_tensors(path, {".".join(keys): np.asarray(leaf) for keys, leaf in flatten(tree)})


def read_tree(path: Path) -> PyTree:
    """What `write_tree` wrote; NumPy arrays."""
    files = TensorFiles(path)
    tree = unflatten({tuple(name.split(".")): files[name] for name in files})
    return jax.tree.map(np.asarray, tree)


# What a study starts from: a CLIP, or a tower that is pretrained with labels when it is needed.


PREFIX = "tower:"
# How a tower is pretrained; chosen before any was fine-tuned.
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
    """A pretrained model that is loaded, or made, when its weights are first asked for.

    Attributes:
      outline: the model; its weights may be shapes alone.
      load: -> the model with its weights.
    """

    outline: Classifier
    load: Callable[[], Classifier]


def opener(config: ConfigDict) -> Callable[[Benchmark, Path], Anchor]:
    """(data, workdir) -> the anchor that `config.pretrained` names: a CLIP, or `tower:NAME`.

    Raises:
      UserError: if there is no such model, or a tower is to see other images than the glyphs.
    """
    name = config.pretrained
    if not name.startswith(PREFIX):
        checkpoint = open_anchor(config)
        return partial(_clip, config, checkpoint)
    if config.data.name != "glyphs":
        raise UserError(
            f"pretrained={name}: towers are pretrained on the glyphs' broad world; "
            f"data.name={config.data.name!r} needs a CLIP"
        )
    tower.tower(name.removeprefix(PREFIX))
    return partial(_tower, config)


def _clip(config: ConfigDict, checkpoint: Checkpoint, data: Benchmark, workdir: Path) -> Anchor:
    opened = anchor_classifier(config, checkpoint, data, workdir / "heads")
    return Anchor(opened, lambda: opened)


def _tower(config: ConfigDict, data: Benchmark, workdir: Path) -> Anchor:
    """As a run, a tower is known by all that its weights depend on, not by their bits."""
    name = config.pretrained.removeprefix(PREFIX)
    init = partial(tower.init, name, len(data.class_names), jax.random.key(0))
    recipe, shapes = _recipe(config), jax.eval_shape(init)
    sizes = [list(leaf.shape) for leaf in jax.tree.leaves(shapes)]
    outline = Classifier(
        params=shapes,
        apply=tower.classifier(name, Compute.of(config.compute)),
        normalize=Preprocessor((0.5,) * 3, (0.25,) * 3, tower.IMAGE_SIZE),
        num_heads=tower.TOWERS[name].num_heads,
        fingerprint=training_checksum(recipe, checksum([name, NUM_IMAGES, sizes])),
    )

    @functools.cache
    def load() -> Classifier:
        place = f"{name}-{outline.fingerprint}"
        path = workdir / "towers" / place / "model.safetensors"
        with lock_run(workdir / "locks", f"tower-{place}", wait=True):
            if not path.is_file():
                start = dataclasses.replace(outline, params=init(), fingerprint="")
                _pretrain(recipe, start, data, workdir, path)
        return dataclasses.replace(outline, params=read_tree(path))

    return Anchor(outline, load)


def _recipe(config: ConfigDict) -> ConfigDict:
    one = single_replica_config(config)
    one.update_from_flattened_dict(RECIPE)
    one.seed = 0
    return one


def _pretrain(
    recipe: ConfigDict, start: Classifier, data: Benchmark, workdir: Path, path: Path
) -> None:
    broad = dataclasses.replace(data, train=broad_set(NUM_IMAGES))
    title = f"{recipe.pretrained}: pretraining"
    trainer = make_trainer(recipe, start, broad, workdir, path.parent.name, title=title)
    params = jax.tree.map(lambda x: x[0], jax.device_get(trainer.run().state.params))
    with new_directory(path.parent) as beside:
        write_tree(beside / path.name, params)
    shutil.rmtree(trainer.workdir)  # What is left of it are the optimizer's moments.


# Files whose weights are held in memory.
_HELD = 48


class RunStore:
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
        self._last: tuple[str, Classifier, StepFunctions] | None = None

    def name(self, run: Run) -> str:
        """The digest of all that the run's weights depend on."""
        digest = training_checksum(run.config(self._config), self._fingerprint)
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

    def _task(self, config: ConfigDict, anchor: Classifier | None = None) -> Task:
        data, anchor = self._data, anchor or self._anchor.outline
        return make_task(config, anchor, len(data.train), data.augment)

    def is_here(self, run: Run) -> bool:
        """Whether the run has been trained."""
        return (self._workdir / "trained" / self.name(run)).is_dir()

    def _train(self, run: Run, directory: Path, title: str) -> None:
        config = run.config(self._config)
        begin = time.monotonic()
        anchor, programs = self._compiled(config)
        steps = programs.task.steps_per_epoch
        if run.every_epoch:
            config.checkpoint.keep, config.checkpoint.save_every_steps = 0, run.apart(steps)
        timeline = Timeline(None)
        trainer = make_trainer(
            config,
            anchor,
            self._data,
            self._workdir,
            directory.name,
            step_functions=programs,
            timeline=timeline,
            title=title,
        )
        with counted(timeline):  # A merge's time is without the compiler's.
            result = trainer.run()
        replicas = apply_tpgm(config, anchor, self._data, jax.device_get(result.state.params))
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

    def _compiled(self, config: ConfigDict) -> tuple[Classifier, StepFunctions]:
        """What a run starts from, and its programs; those of the last run serve other seeds."""
        key = training_checksum(config, self._fingerprint)
        if self._last is None or self._last[0] != key:
            # A probe is shared by all seeds, as Model Soups share theirs: it has the base's seed.
            one = config.copy_and_resolve_references()
            one.seed = self._config.seed
            with lock_run(self._workdir / "locks", f"probe-{key}", wait=True):
                anchor = linear_probe(
                    one, self._anchor.load(), self._data, self._workdir / "probes" / key
                )
            programs = StepFunctions(config, self._task(config, anchor))
            self._last = key, anchor, programs
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


def _epochs(trainer: Trainer, programs: StepFunctions, steps: int) -> dict[str, PyTree]:
    like = saved(programs.abstract_state)
    with Checkpoints(trainer.workdir / "state", keep=0) as states:
        return {part(step / steps): states.restore(step, like)["params"] for step in states.steps}
