"""One run: train the replicas of every seed, compare the models they give, write the results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from modelstock_jax.evaluation import make_evaluator
from modelstock_jax.experiment import results
from modelstock_jax.experiment.candidates import Candidate, after_training, distance
from modelstock_jax.experiment.export import export
from modelstock_jax.experiment.pretrained import open_pretrained, pretrain
from modelstock_jax.experiment.workdir import claim
from modelstock_jax.merging import report
from modelstock_jax.reporting.files import write_json
from modelstock_jax.reporting.progress import Progress
from modelstock_jax.reporting.rows import make_row
from modelstock_jax.training.finetune import (
    Benchmark,
    Classifier,
    anchor_classifier,
    finetuning_task,
    load_benchmark,
)
from modelstock_jax.training.loop import Trainer

PyTree = Any


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
        return
    checkpoint = open_pretrained(config.pretrained)
    data = load_benchmark(config.data.name)
    anchor = anchor_classifier(config, checkpoint, data)
    study = Study(config, workdir, anchor, data)
    seeds = range(config.seed, config.seed + config.num_seeds)
    documents = [study.zero_shot(), *(study.seed(seed) for seed in seeds)]
    results.write(workdir, config, documents)
    export(workdir, config, checkpoint, study, documents, command)


class Study:
    """Trains and measures one seed after the other; a finished seed is read, not run again."""

    def __init__(
        self, config: ConfigDict, workdir: Path, anchor: Classifier, data: Benchmark
    ) -> None:
        self.config, self.workdir, self.anchor, self.data = config, workdir, anchor, data
        self.merged: dict[int, PyTree] = {}
        self._evaluate = None

    def zero_shot(self) -> dict[str, Any]:
        """The anchor's row."""
        return self._document(
            "zero_shot", lambda: {"rows": self._rows([Candidate("zero_shot", self.anchor.params, 0)], None)}
        )

    def seed(self, seed: int) -> dict[str, Any]:
        """Rows, geometry and merges of one seed."""
        return self._document(f"seed_{seed}", lambda: self._run_seed(seed))

    def _document(self, name: str, make) -> dict[str, Any]:
        path = self.workdir / "runs" / name / "results.json"
        if not path.exists():
            write_json(path, make())
        return json.loads(path.read_text())

    def trainer(self, seed: int, name: str) -> Trainer:
        """The trainer of one arm: `merged` as the config says, `unmerged` with no merges."""
        config = self.config.copy_and_resolve_references()
        config.seed = seed
        if name == "unmerged":
            config.merge.every = "never"
        task = finetuning_task(config, self.anchor, self.data)
        return Trainer(config, task, self.workdir, f"seed_{seed}/{name}")

    def _run_seed(self, seed: int) -> dict[str, Any]:
        config, document = self.config, {}
        arms = ["unmerged"] * bool(config.compare) + ["merged"]
        candidates: list[Candidate] = []
        for arm in arms:
            trainer = self.trainer(seed, arm)
            result = trainer.run()
            if arm == "unmerged" or not trainer.merge_steps:
                replicas = jax.device_get(result.state.params)
                stats, models = after_training(
                    config, self.anchor.params, replicas, self.anchor.num_heads
                )
                candidates.extend(models)
                document["geometry"] = report(stats)
            else:
                method = _merged_method(config)
                details = {"num_replicas": config.num_replicas}
                candidates.append(
                    Candidate(method, result.merged, config.num_replicas, None, details)
                )
        document["rows"] = self._rows(candidates, seed)
        return document

    def _rows(self, candidates: list[Candidate], seed: int | None) -> list[dict[str, Any]]:
        if self._evaluate is None:
            trainer = self.trainer(self.config.seed, "merged")
            self._evaluate = make_evaluator(
                self.anchor.apply,
                self.anchor.normalize,
                trainer.mesh,
                self.config.evaluation.batch_size,
            )
        data = self.data
        sets = [data.validation, data.test, *data.shifts.values()]
        images = sum(len(image_set) for image_set in sets)
        rows = []
        title = "evaluate" if seed is None else f"seed_{seed}/evaluate"
        with Progress(title, len(candidates), images_per_step=images) as progress:
            for done, model in enumerate(candidates, 1):
                accuracy = self._evaluate(model.params, sets)
                rows.append(
                    make_row(
                        model.method,
                        id=accuracy[data.test.name],
                        shifts={name: accuracy[s.name] for name, s in data.shifts.items()},
                        seed=seed,
                        cost=model.cost,
                        distance_to_anchor=float(distance(model.params, self.anchor.params)),
                        predicted_distance=model.predicted_distance,
                        validation=accuracy[data.validation.name],
                        **model.details,
                    )
                )
                progress.update(done)
        return rows


def _merged_method(config: ConfigDict) -> str:
    if config.merge.carry_noise != "off":
        return "carried"
    if config.merge.every == "end":
        return "model_stock" if config.merge.method == "stock" else "mean"
    return "periodic" if config.merge.method == "stock" else "periodic_mean"
