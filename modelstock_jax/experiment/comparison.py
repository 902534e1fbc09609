"""The models that a run compares: trained and measured seed by seed, each finished part a file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from modelstock_jax.data.benchmark import Benchmark
from modelstock_jax.evaluation import ModelEvaluator
from modelstock_jax.fileio import write_json
from modelstock_jax.merging import (
    Stats,
    constant_ratio,
    distance,
    model_stock,
    report,
    total_distance,
    uniform_mean,
    weighted_model_stock,
    wise_ft,
)
from modelstock_jax.merging.gram import PyTree
from modelstock_jax.registry import METHODS
from modelstock_jax.reporting.progress import Progress
from modelstock_jax.reporting.timeline import Timeline
from modelstock_jax.training import multihost
from modelstock_jax.training.classifier import Classifier
from modelstock_jax.training.finetune import make_trainer, method_name
from modelstock_jax.training.stages import apply_tpgm
from modelstock_jax.training.step_fns import StepFunctions
from modelstock_jax.training.trainer import Trainer


@dataclass(frozen=True)
class MergedModel:
    """One model to evaluate.

    Attributes:
      method: a key of `registry.ROWS`.
      params: its weights.
      cost: training spent, in fine-tunings of one model.
      predicted_distance: to the center, from the angles alone; None where nothing predicts it.
      details: what else tells its row from others (alpha, of, unit, replica, num_replicas).
    """

    method: str
    params: PyTree
    fine_tuning_runs: float
    predicted_distance: float | None = None
    details: dict[str, Any] = field(default_factory=dict)


def merged_models(
    config: ConfigDict, anchor: PyTree, replicas: PyTree, num_heads: int
) -> tuple[Stats, Iterator[MergedModel], int]:
    """Every model that can be made of replicas trained without a merge between them.

    Args:
      config: the run's options; its merge unit and WiSE-FT alphas are used.
      anchor: the pretrained weights.
      replicas: trained apart, [N, ...] a leaf.
      num_heads: for the merge unit `head`.

    Returns:
      The geometry of the replicas under `merge.unit`, the candidates one by one, and how many.
    """
    count = config.num_replicas
    options = {"unit": config.merge.unit, "num_heads": num_heads}
    stock, stats = model_stock(anchor, replicas, **options)
    expected = total_distance(stats)
    team = {"num_replicas": count}

    def candidates() -> Iterator[MergedModel]:
        for r in range(count):
            one = jax.tree.map(lambda x, r=r: x[r], replicas)
            yield MergedModel(method_name(config), one, 1, expected.replica, {"replica": r})
        first = jax.tree.map(lambda x: x[:1], replicas)
        for alpha in config.evaluation.wise_ft_alphas:
            curve = {"alpha": alpha}
            yield MergedModel(
                "wise_ft", wise_ft(anchor, first, alpha)[0], 1, None, curve | {"of": "single_model"}
            )
        mean, _ = uniform_mean(anchor, replicas)
        yield MergedModel("uniform_mean", mean, count, expected.mean, team)
        for alpha in config.evaluation.wise_ft_alphas:
            details = team | {"alpha": alpha, "of": "uniform_mean"}
            yield MergedModel("wise_ft", wise_ft(anchor, replicas, alpha)[0], count, None, details)
        shrunk, _ = constant_ratio(anchor, replicas, **options)
        yield MergedModel("constant_ratio", shrunk, count, None, team)
        yield MergedModel("model_stock", stock, count, expected.merged, team)
        weighted, _ = weighted_model_stock(anchor, replicas, **options)
        yield MergedModel("weighted_model_stock", weighted, count, None, team)
        for unit in config.evaluation.units:
            merged, by_unit = model_stock(anchor, replicas, unit=unit, num_heads=num_heads)
            predicted = total_distance(by_unit).merged
            yield MergedModel("model_stock", merged, count, predicted, team | {"unit": unit})

    curves = 2 * len(config.evaluation.wise_ft_alphas)
    return stats, candidates(), count + curves + 4 + len(config.evaluation.units)


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
        self._programs: StepFunctions | None = None
        # Every mistake in the config shows here, before anything is trained.
        merged = self.trainer(config.seed, "merged")
        self._programs, self.merges = merged.step_functions, merged.merge_steps > 0
        self._start = merged.task.params
        self._measure = ModelEvaluator(config, anchor, data, merged.step_functions.mesh)

    def evaluate_anchor(self, opened: Classifier) -> Document:
        """The row of the model as it was opened, and the probed anchor's where it is another."""
        path = self._path("zero_shot")
        if not _finished(path):
            drawn = self.config.objective.head == "random"
            first = [MergedModel("random_head" if drawn else "zero_shot", opened.params, 0)]
            if self.anchor is not opened:
                cost = self.config.objective.probe_epochs / self.config.epochs
                first.append(MergedModel("probed", self.anchor.params, cost))
            _write(path, {"rows": self._rows(first, len(first), None)})
        return _read(path)

    def run_seed(self, seed: int) -> Document:
        """Rows of every model that one seed gives, and the geometry of its unmerged replicas."""
        path, config = self._path(f"seed_{seed}"), self.config
        if not _finished(path):
            document: Document = {"rows": []}
            if config.compare or not self.merges:
                replicas = multihost.to_host(self.trainer(seed, "unmerged").run().state.params)
                document = self._after_training(seed, replicas)
            if self.merges:
                merged = multihost.to_host(self.trainer(seed, "merged").run().merged)
                details = {"num_replicas": config.num_replicas}
                model = MergedModel(_method(config), merged, config.num_replicas, None, details)
                document["rows"] += self._rows([model], 1, seed)
            _write(path, document)
        return _read(path)

    def trainer(self, seed: int, arm: str) -> Trainer:
        """The run of an arm: `merged` as the config says, or `unmerged`, with no merges."""
        config = self.config.copy_and_resolve_references()
        config.seed = seed
        if arm == "unmerged":
            config.merge.every = "never"
        return make_trainer(
            config,
            self.anchor,
            self.data,
            self.workdir,
            f"seed_{seed}/{arm}",
            step_functions=self._programs,
            timeline=self._timeline,
        )

    def _after_training(self, seed: int, replicas: Any) -> Document:
        """Rows of the models that unmerged replicas give, and the replicas' geometry."""
        replicas = apply_tpgm(self.config, self.anchor, self.data, replicas)
        num_heads = self.anchor.num_heads
        stats, models, count = merged_models(self.config, self._start, replicas, num_heads)
        sizes = [leaf.size for leaf in jax.tree.leaves(self._start)]
        geometry = [row | {"size": size} for row, size in zip(report(stats), sizes, strict=True)]
        return {"geometry": geometry, "rows": self._rows(models, count, seed)}

    def _path(self, name: str) -> Path:
        return self.workdir / "runs" / name / "results.json"

    def _rows(
        self, models: Iterable[MergedModel], count: int, seed: int | None
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
                    details["distance_to_anchor"] = float(distance(self._start, model.params))
                rows.append(
                    self._measure.row(
                        model.method,
                        self.anchor.classify(model.params),
                        seed=seed,
                        cost=model.fine_tuning_runs,
                        predicted_distance=model.predicted_distance,
                        measured=lambda done, before=number * each: progress.update(before + done),
                        **details,
                    )
                )
        return rows


def _finished(path: Path) -> bool:
    """Whether process 0 has the document: all processes take the same branch."""
    return multihost.broadcast_from_main(multihost.is_main() and path.exists())


def _write(path: Path, document: Document) -> None:
    if multihost.is_main():
        write_json(path, document)


def _read(path: Path) -> Document:
    """The document on process 0, {} on the others."""
    return json.loads(path.read_text()) if multihost.is_main() else {}


def _method(config: ConfigDict) -> str:
    if config.merge.carry_noise != "off":
        return "model_stock_carried"
    method = METHODS[config.merge.method]
    return method.name if config.merge.every == "end" else method.periodic_row
