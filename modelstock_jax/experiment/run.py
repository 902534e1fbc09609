"""One run: train the replicas of every seed, compare the models they give, write the results."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from modelstock_jax.data.benchmark import Benchmark
from modelstock_jax.experiment import export, results
from modelstock_jax.experiment.agreement import check_same
from modelstock_jax.experiment.candidates import Candidate, after_training
from modelstock_jax.experiment.evaluate import Measure
from modelstock_jax.experiment.learning_rate import choose_learning_rate
from modelstock_jax.experiment.opening import check_data, classify, open_data
from modelstock_jax.experiment.options import check_options
from modelstock_jax.experiment.pretrained import open_anchor, pretrain
from modelstock_jax.experiment.workdir import claim, release
from modelstock_jax.merging import distance, report
from modelstock_jax.reporting.files import write_json
from modelstock_jax.reporting.progress import Progress
from modelstock_jax.reporting.timeline import Timeline
from modelstock_jax.training.classifier import Classifier
from modelstock_jax.training.finetune import finetuning_programs, finetuning_trainer
from modelstock_jax.training.hosts import distributed
from modelstock_jax.training.loop import Result, Trainer
from modelstock_jax.training.methods.phases import hold, probe
from modelstock_jax.training.monitoring.compilation import counted
from modelstock_jax.training.programs import mesh_of, use_compilation_cache

Document = dict[str, Any]


def run(
    config: ConfigDict,
    workdir: str | Path,
    argv: Sequence[str] = (),
    allow_config_change: bool = False,
) -> None:
    """Does what the config says, and goes on where an earlier call stopped.

    Args:
      config: see `configs/default.py`.
      workdir: everything is written there; made if missing.
      argv: how Python was started, for the model card.
      allow_config_change: go on in a workdir whose config differs where only rounding depends on
        it.

    Raises:
      UserError: on any mistake of a user; nothing written before is lost.
    """
    workdir = Path(workdir)
    check_options(config)  # Before the workdir is theirs: a mended name is no other config.
    mesh_of(config)  # Nor does it take a zero-shot head to know that devices are missing.
    use_compilation_cache(config.compute.compilation_cache)
    check_same(config, workdir=str(workdir))
    if distributed.is_main():
        claim(workdir, config, allow_change=allow_config_change)
    distributed.barrier("the workdir is ours")
    lines = workdir / "timeline.jsonl"
    try:
        with Timeline(lines, distributed.is_main()) as timeline, counted(timeline):
            if config.task == "pretrain":
                pretrain(config, workdir, timeline)
            elif config.task == "learning_rate":
                choose_learning_rate(config, workdir, timeline)
            else:
                command = shlex.join(["python", *argv]) if argv else ""
                finetune(config, workdir, command, timeline)
            if distributed.is_main():
                timeline.show()
    finally:
        release(workdir)


def finetune(config: ConfigDict, workdir: Path, command: str, timeline: Timeline) -> None:
    """Trains and compares every seed; writes the results and the merged model."""
    check_data(config)
    pretrained = open_anchor(config)
    export.check(config, pretrained)
    data = open_data(config)
    anchor = classify(config, pretrained, data, workdir / "heads")
    study = Study(config, workdir, probe(config, anchor, data, workdir), data, timeline)
    documents = [study.before_training(anchor)]
    for seed in range(config.seed, config.seed + config.num_seeds):
        documents.append(study.one_seed(seed))
    merged = None
    if study.merges:
        merged = distributed.whole(study.train(config.seed, "merged").merged)
    if not distributed.is_main():
        return
    with timeline.phase("export"):
        if merged is not None:
            rows = [documents[0]["rows"][0], documents[1]["rows"][-1]]
            export.export(
                workdir / "model",
                config,
                pretrained,
                merged | study.anchor.classify(merged),
                data.class_names,
                rows,
                results.last_ratios(workdir, f"seed_{config.seed}/merged"),
                command,
            )
        results.write(workdir, config, documents)


class Study:
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
        done = distributed.agree(distributed.is_main() and path.exists())
        document = {} if done else make()
        if not distributed.is_main():
            return {}
        if not done:
            write_json(path, document)
        return json.loads(path.read_text())

    def _compare(self, seed: int) -> Document:
        config, anchor = self.config, self.anchor
        document, rows = {}, []
        if config.compare or not self.merges:
            replicas = distributed.whole(self.train(seed, "unmerged").state.params)
            replicas = hold(config, anchor, self.data, replicas)
            start = self._programs.task.params
            stats, models, count = after_training(config, start, replicas, anchor.num_heads)
            sizes = [leaf.size for leaf in jax.tree.leaves(start)]
            document["geometry"] = [
                row | {"size": size} for row, size in zip(report(stats), sizes, strict=True)
            ]
            rows += self._rows(models, count, seed)
        if self.merges:
            merged = distributed.whole(self.train(seed, "merged").merged)
            details = {"num_replicas": config.num_replicas}
            model = Candidate(_method(config), merged, config.num_replicas, None, details)
            rows += self._rows([model], 1, seed)
        return document | {"rows": rows}

    def _rows(self, models, count: int, seed: int | None) -> list[dict[str, Any]]:
        rows, each = [], self._measure.num_images
        shown = distributed.is_main()
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
