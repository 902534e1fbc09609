"""One run: train the replicas of every seed, compare the models they give, write the results."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from modelstock_jax.data import benchmark
from modelstock_jax.data.benchmark import Benchmark
from modelstock_jax.errors import UserError
from modelstock_jax.experiment import export, results
from modelstock_jax.experiment.candidates import Candidate, after_training
from modelstock_jax.experiment.evaluate import Measure
from modelstock_jax.experiment.learning_rate import choose_learning_rate
from modelstock_jax.experiment.pretrained import open_anchor, pretrain
from modelstock_jax.experiment.workdir import claim
from modelstock_jax.merging import report
from modelstock_jax.reporting.files import write_json
from modelstock_jax.reporting.progress import Progress
from modelstock_jax.training.finetune import (
    Classifier,
    anchor_classifier,
    finetuning_batches,
    finetuning_task,
)
from modelstock_jax.training.loop import Result, Trainer
from modelstock_jax.training.programs import Programs

Document = dict[str, Any]


def run(config: ConfigDict, workdir: str | Path, command: str = "") -> None:
    """Does what the config says, and goes on where an earlier call stopped.

    Args:
      config: see `configs/default.py`.
      workdir: everything is written there; made if missing.
      command: how the run was started, for the model card.

    Raises:
      UserError: on any mistake of a user; nothing written before is lost.
    """
    workdir = Path(workdir)
    claim(workdir, config)
    if config.task == "pretrain":
        pretrain(config, workdir)
    elif config.task == "learning_rate":
        choose_learning_rate(config, workdir)
    elif config.task == "finetune":
        finetune(config, workdir, command)
    else:
        raise UserError(f"task={config.task!r}: choose 'finetune', 'learning_rate' or 'pretrain'")


def finetune(config: ConfigDict, workdir: Path, command: str) -> None:
    """Trains and compares every seed; writes the results and the merged model."""
    pretrained = open_anchor(config)
    export.check(config, pretrained)
    data = benchmark.load(config.data)
    anchor = anchor_classifier(config, pretrained, data, workdir / "heads")
    study = Study(config, workdir, anchor, data)
    documents = [study.zero_shot()]
    for seed in range(config.seed, config.seed + config.num_seeds):
        documents.append(study.one_seed(seed))
    if study.merges:
        rows = [documents[0]["rows"][0], documents[1]["rows"][-1]]
        export.export(
            workdir / "model",
            config,
            pretrained,
            study.train(config.seed, "merged").merged,
            data.class_names,
            rows,
            results.last_ratios(workdir, f"seed_{config.seed}/merged"),
            command,
        )
    results.write(workdir, config, documents)


class Study:
    """Trains and measures one seed after the other; what is finished is read, not run again."""

    def __init__(
        self, config: ConfigDict, workdir: Path, anchor: Classifier, data: Benchmark
    ) -> None:
        """Reads and trains nothing yet."""
        self.config, self.workdir, self.anchor, self.data = config, workdir, anchor, data
        # Every mistake in the config shows here, before anything is trained.
        task = finetuning_task(config, anchor, len(data.train), data.augment)
        self._programs = Programs(config, task)
        self.merges = self._trainer(config.seed, "merged").merge_steps > 0
        self._measure = Measure(config, anchor, data, self._programs.mesh)

    def zero_shot(self) -> Document:
        """The anchor's row."""
        candidate = Candidate("zero_shot", self.anchor.params, 0)
        return self._once("zero_shot", lambda: {"rows": self._rows([candidate], 1, None)})

    def one_seed(self, seed: int) -> Document:
        """Rows of every model that one seed gives, and the geometry of its unmerged replicas."""
        return self._once(f"seed_{seed}", lambda: self._compare(seed))

    def train(self, seed: int, arm: str) -> Result:
        """Trains an arm to its end: `merged` as the config says, or `unmerged`, with no merges."""
        return self._trainer(seed, arm).run()

    def _trainer(self, seed: int, arm: str) -> Trainer:
        config = self.config.copy_and_resolve_references()
        config.seed = seed
        if arm == "unmerged":
            config.merge.every = "never"
        batches = partial(finetuning_batches, config, self.data, self.anchor.normalize.image_size)
        return Trainer(config, self._programs, batches, self.workdir, f"seed_{seed}/{arm}")

    def _once(self, name: str, make: Callable[[], Document]) -> Document:
        path = self.workdir / "runs" / name / "results.json"
        if not path.exists():
            write_json(path, make())
        return json.loads(path.read_text())

    def _compare(self, seed: int) -> Document:
        config, anchor = self.config, self.anchor
        document, rows = {}, []
        if config.compare or not self.merges:
            replicas = jax.device_get(self.train(seed, "unmerged").state.params)
            stats, models, count = after_training(config, anchor.params, replicas, anchor.num_heads)
            sizes = [leaf.size for leaf in jax.tree.leaves(anchor.params)]
            document["geometry"] = [
                row | {"size": size} for row, size in zip(report(stats), sizes, strict=True)
            ]
            rows += self._rows(models, count, seed)
        if self.merges:
            merged = self.train(seed, "merged").merged
            details = {"num_replicas": config.num_replicas}
            model = Candidate(_method(config), merged, config.num_replicas, None, details)
            rows += self._rows([model], 1, seed)
        return document | {"rows": rows}

    def _rows(self, models, count: int, seed: int | None) -> list[dict[str, Any]]:
        rows = []
        with Progress("evaluate", count, images_per_step=self._measure.num_images) as progress:
            for done, model in enumerate(models, 1):
                rows.append(
                    self._measure.row(
                        model.method,
                        model.params,
                        seed=seed,
                        cost=model.cost,
                        predicted_distance=model.predicted_distance,
                        **model.details,
                    )
                )
                progress.update(done)
        return rows


def _method(config: ConfigDict) -> str:
    if config.merge.carry_noise != "off":
        return "carried"
    at_end = config.merge.every == "end"
    if config.merge.method == "mean":
        return "mean" if at_end else "periodic_mean"
    return "model_stock" if at_end else "periodic"
