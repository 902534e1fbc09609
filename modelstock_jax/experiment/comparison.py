"""The models that a run compares: trained and measured seed by seed, each finished part a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from modelstock_jax.data.benchmark import Benchmark
from modelstock_jax.experiment.candidates import Candidate, after_training
from modelstock_jax.experiment.evaluate import Measure
from modelstock_jax.fileio import write_json
from modelstock_jax.merging import distance, report
from modelstock_jax.reporting.progress import Progress
from modelstock_jax.reporting.timeline import Timeline
from modelstock_jax.training import multihost
from modelstock_jax.training.classifier import Classifier
from modelstock_jax.training.finetune import finetuning_programs, finetuning_trainer
from modelstock_jax.training.stages import hold
from modelstock_jax.training.trainer import Result, Trainer

Document = dict[str, Any]


class Comparison:
    """Trains and measures one seed after the other; what is finished is read, not run again."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        anchor: Classifier,
        data: Benchmark,
        timeline: Timeline,
    ) -> None:
        """Reads and trains nothing yet."""
        self.config, self.workdir, self.anchor, self.data = config, workdir, anchor, data
        self._timeline = timeline
        # Every mistake in the config shows here, before anything is trained.
        self._programs = finetuning_programs(config, anchor, data)
        self.merges = self._trainer(config.seed, "merged").merge_steps > 0
        self._measure = Measure(config, anchor, data, self._programs.mesh)

    def before_training(self, opened: Classifier) -> Document:
        """The row of the model as it was opened, and the probed anchor's where it is another."""
        drawn = self.config.objective.head == "random"
        first = [Candidate("random_head" if drawn else "zero_shot", opened.params, 0)]
        if self.anchor is not opened:
            cost = self.config.objective.probe_epochs / self.config.epochs
            first.append(Candidate("probed", self.anchor.params, cost))
        return self._once("zero_shot", lambda: {"rows": self._rows(first, len(first), None)})

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
        name, programs = f"seed_{seed}/{arm}", self._programs
        return finetuning_trainer(
            config, self.anchor, self.data, programs, self.workdir, name, self._timeline
        )

    def _once(self, name: str, make: Callable[[], Document]) -> Document:
        """Process 0 says whether it is done, writes it, and alone reads it: {} on the others."""
        path = self.workdir / "runs" / name / "results.json"
        done = multihost.agree(multihost.is_main() and path.exists())
        document = {} if done else make()
        if not multihost.is_main():
            return {}
        if not done:
            write_json(path, document)
        return json.loads(path.read_text())

    def _compare(self, seed: int) -> Document:
        config, anchor = self.config, self.anchor
        document: Document = {}
        rows: list[dict[str, Any]] = []
        if config.compare or not self.merges:
            replicas = multihost.whole(self.train(seed, "unmerged").state.params)
            replicas = hold(config, anchor, self.data, replicas)
            start = self._programs.task.params
            stats, models, count = after_training(config, start, replicas, anchor.num_heads)
            sizes = [leaf.size for leaf in jax.tree.leaves(start)]
            document["geometry"] = [
                row | {"size": size} for row, size in zip(report(stats), sizes, strict=True)
            ]
            rows += self._rows(models, count, seed)
        if self.merges:
            merged = multihost.whole(self.train(seed, "merged").merged)
            details = {"num_replicas": config.num_replicas}
            model = Candidate(_method(config), merged, config.num_replicas, None, details)
            rows += self._rows([model], 1, seed)
        return document | {"rows": rows}

    def _rows(
        self, models: Iterable[Candidate], count: int, seed: int | None
    ) -> list[dict[str, Any]]:
        rows, each = [], self._measure.num_images
        shown = multihost.is_main()
        with (
            self._timeline.phase("evaluate"),
            Progress("evaluate", count * each, unit="images", enabled=shown) as progress,
        ):
            for number, model in enumerate(models):
                details = dict(model.details)
                if "head" not in model.params:  # What is measured is not what was merged.
                    start = self._programs.task.params
                    details["distance_to_anchor"] = float(distance(start, model.params))
                rows.append(
                    self._measure.row(
                        model.method,
                        self.anchor.classify(model.params),
                        seed=seed,
                        cost=model.cost,
                        predicted_distance=model.predicted_distance,
                        measured=lambda done, before=number * each: progress.update(before + done),
                        **details,
                    )
                )
        return rows


def _method(config: ConfigDict) -> str:
    if config.merge.carry_noise != "off":
        return "carried"
    at_end = config.merge.every == "end"
    if config.merge.method == "mean":
        return "mean" if at_end else "periodic_mean"
    return "model_stock" if at_end else "periodic"
