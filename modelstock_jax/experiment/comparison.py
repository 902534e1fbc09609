"""Train and evaluate the models that a run compares, seed by seed.

The results of the anchor and of each seed are cached in `runs/NAME/results.json`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from modelstock_jax.data.benchmark import Benchmark
from modelstock_jax.evaluation import ModelEvaluator
from modelstock_jax.experiment.export import exported_row
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
from modelstock_jax.merging.trees import PyTree
from modelstock_jax.registry import METHODS
from modelstock_jax.reporting.progress import Progress
from modelstock_jax.reporting.tables import current_rows
from modelstock_jax.reporting.timeline import Timeline
from modelstock_jax.training import multihost
from modelstock_jax.training.batch_norm import StatisticsEstimator, check_statistics
from modelstock_jax.training.classifier import Classifier
from modelstock_jax.training.finetune import make_trainer, method_name
from modelstock_jax.training.metrics import show_compilation
from modelstock_jax.training.stages import apply_tpgm
from modelstock_jax.training.state import drop_statistics
from modelstock_jax.training.step_fns import StepFunctions
from modelstock_jax.training.trainer import Trainer


@dataclass(frozen=True)
class MergedModel:
    """One model to evaluate.

    Attributes:
      method: key of `registry.ROWS`
      params: its weights
      fine_tuning_runs: training cost in fine-tunings of one model
      predicted_distance: distance to the center as predicted from the angles; None if undefined
      details: other entries of its row: alpha, of, unit, replica, num_replicas
    """

    method: str
    params: PyTree
    fine_tuning_runs: float
    predicted_distance: float | None = None
    details: dict[str, Any] = field(default_factory=dict)


def merged_models(
    config: ConfigDict, anchor: PyTree, replicas: PyTree, num_heads: int
) -> tuple[Stats, Iterator[MergedModel], int]:
    """Merge replicas that were trained without merging, by every method.

    Args:
      config: options of the run, with the merge unit and WiSE-FT alphas
      anchor: pretrained weights
      replicas: fine-tuned weights, leaves [N, ...]
      num_heads: number of attention heads, for the merge unit `head`

    Returns:
      Statistics of `model_stock` with `merge.unit`, an iterator of the models, and their number. A
      single replica has no angle: the statistics are those of `uniform_mean`, and the models are
      the replica and its WiSE-FT curve.
    """
    count, alphas = config.num_replicas, config.evaluation.wise_ft_alphas
    options = {"unit": config.merge.unit, "num_heads": num_heads}
    if count == 1:
        _, stats = uniform_mean(anchor, replicas, **options)
        return stats, _single_models(config, anchor, replicas, None), 1 + len(alphas)
    merged, stats = model_stock(anchor, replicas, **options)
    predicted = total_distance(stats)
    details = {"num_replicas": count}

    def models() -> Iterator[MergedModel]:
        yield from _single_models(config, anchor, replicas, predicted.replica)
        mean, _ = uniform_mean(anchor, replicas)
        yield MergedModel("uniform_mean", mean, count, predicted.mean, details)
        for alpha in alphas:
            point = details | {"alpha": alpha, "of": "uniform_mean"}
            yield MergedModel("wise_ft", wise_ft(anchor, replicas, alpha)[0], count, None, point)
        constant, _ = constant_ratio(anchor, replicas, **options)
        yield MergedModel("constant_ratio", constant, count, None, details)
        yield MergedModel("model_stock", merged, count, predicted.merged, details)
        weighted, _ = weighted_model_stock(anchor, replicas, **options)
        yield MergedModel("weighted_model_stock", weighted, count, None, details)
        for unit in config.evaluation.units:
            by_unit, unit_stats = model_stock(anchor, replicas, unit=unit, num_heads=num_heads)
            distance_to_center = total_distance(unit_stats).merged
            yield MergedModel(
                "model_stock", by_unit, count, distance_to_center, details | {"unit": unit}
            )

    return stats, models(), count + 2 * len(alphas) + 4 + len(config.evaluation.units)


def _single_models(
    config: ConfigDict, anchor: PyTree, replicas: PyTree, predicted_distance: float | None
) -> Iterator[MergedModel]:
    """Yield each replica, and the WiSE-FT curve of the first."""
    for r in range(config.num_replicas):
        replica = jax.tree.map(lambda x, r=r: x[r], replicas)
        yield MergedModel(method_name(config), replica, 1, predicted_distance, {"replica": r})
    first = jax.tree.map(lambda x: x[:1], replicas)
    for alpha in config.evaluation.wise_ft_alphas:
        point = {"alpha": alpha, "of": "single_model"}
        yield MergedModel("wise_ft", wise_ft(anchor, first, alpha)[0], 1, None, point)


Document = dict[str, Any]


class Comparison:
    """Trains and evaluates each seed; finished results are read from files."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        anchor: Classifier,
        data: Benchmark,
        timeline: Timeline,
    ) -> None:
        """Validate the config; nothing is trained or read."""
        self.config, self.workdir, self.anchor, self.data = config, workdir, anchor, data
        self._timeline = timeline
        self._programs: StepFunctions | None = None
        # This raises every config error before training.
        merged = self.trainer(config.seed, "merged")
        self._programs, self.merges = merged.step_functions, merged.merge_steps > 0
        self._start = merged.task.params
        check_statistics(config, self._start)
        self._estimate = StatisticsEstimator(config, anchor, data, merged.step_functions.mesh)
        self._merged: PyTree = None
        mesh, self._validates = merged.step_functions.mesh, config.export.which == "best"
        self._evaluator = ModelEvaluator(config, anchor, data, mesh, validate=self._validates)

    def evaluate_anchor(self, opened: Classifier) -> Document:
        """Return the row of the anchor as opened and, after a linear probe, of the probed anchor.

        Args:
          opened: the anchor before the linear probe
        """
        path = self._path("zero_shot")
        if not self._finished(path):
            models = [MergedModel(opened.row, opened.params, 0)]
            if self.anchor is not opened:
                cost = self.config.objective.probe_epochs / self.config.epochs
                models.append(MergedModel("probed", self.anchor.params, cost))
            _write(path, {"rows": self._rows(models, len(models), None)})
        return _read(path)

    def run_seed(self, seed: int) -> Document:
        """Return the rows of one seed, and the angles and norms of its replicas without merging.

        Args:
          seed: seed of the run
        """
        path, config = self._path(f"seed_{seed}"), self.config
        if not self._finished(path):
            document: Document = {"rows": []}
            if config.compare or not self.merges:
                document = self._after_training(seed)
            if self.merges:
                merged = self.merged_model(seed)
                details = {"num_replicas": config.num_replicas}
                model = MergedModel(_row_name(config), merged, config.num_replicas, None, details)
                document["rows"] += self._rows([model], 1, seed)
            _write(path, document)
        return _read(path)

    def exported_model(self, rows: Sequence[dict[str, Any]]) -> tuple[int, PyTree] | None:
        """Return the model that `export.which` selects, and the index of its row.

        A model that was merged after training is merged again, from the stored replicas.

        Args:
          rows: rows of the first seed; none on processes other than 0

        Returns:
          (index, NumPy arrays), or None if the run has no merged model to export
        """
        seed, index = self.config.seed, -1
        if multihost.is_main():
            found = exported_row(self.config.export.which, rows, self.merges)
            index = -1 if found is None else found
        index = multihost.broadcast_from_main(index)
        if index < 0:
            return None
        if multihost.broadcast_from_main(self.merges and index == len(rows) - 1):
            return index, self.merged_model(seed)
        _, models, _ = self._models_after_training(seed)
        model = next(itertools.islice(models, index, None))
        return index, jax.device_get(self._estimated(model).params)

    def merged_model(self, seed: int) -> PyTree:
        """Return the last merged model of a seed, NumPy arrays; train it if needed.

        Its batch norms have the statistics that `merge.batch_norm_statistics` selects.
        """
        if seed == self.config.seed and self._merged is not None:
            return self._merged
        merged = multihost.to_host(self.trainer(seed, "merged").run().merged)
        merged = self._with_statistics(merged)
        if seed == self.config.seed:  # It is exported after all seeds are evaluated.
            self._merged = merged
        return merged

    def _with_statistics(self, params: PyTree) -> PyTree:
        if self.config.merge.batch_norm_statistics == "keep":
            return params
        with self._timeline.phase("batch norms"):
            return self._estimate(params)

    def trainer(self, seed: int, run: str) -> Trainer:
        """Return the trainer of one run.

        Args:
          seed: seed of the run
          run: `merged` for the config's merges, `unmerged` for none
        """
        config = self.config.copy_and_resolve_references()
        config.seed = seed
        if run == "unmerged":
            config.merge.every = "never"
        return make_trainer(
            config,
            self.anchor,
            self.data,
            self.workdir,
            f"seed_{seed}/{run}",
            step_functions=self._programs,
            timeline=self._timeline,
        )

    def _models_after_training(self, seed: int) -> tuple[Stats, Iterator[MergedModel], int]:
        """Return `merged_models` of the replicas trained without merging; train them if needed."""
        replicas = multihost.to_host(self.trainer(seed, "unmerged").run().state.params)
        replicas = apply_tpgm(self.config, self.anchor, self.data, replicas)
        num_heads = self.anchor.num_heads
        return merged_models(self.config, self._start, replicas, num_heads)

    def _after_training(self, seed: int) -> Document:
        """Return rows, angles and norms of replicas that were trained without merging."""
        stats, models, count = self._models_after_training(seed)
        models = (self._estimated(model) for model in models)
        sizes = [leaf.size for leaf in jax.tree.leaves(self._start)]
        geometry = [row | {"size": size} for row, size in zip(report(stats), sizes, strict=True)]
        return {"geometry": geometry, "rows": self._rows(models, count, seed)}

    def _estimated(self, model: MergedModel) -> MergedModel:
        """Return a model that was merged after training, with the statistics of batch norms."""
        if "replica" in model.details:  # A fine-tuned model has those that it was trained with.
            return model
        return replace(model, params=self._with_statistics(model.params))

    def _finished(self, path: Path) -> bool:
        """Whether process 0 has the results of a model or seed; every process gets this answer."""
        finished = multihost.is_main() and path.exists()
        if finished and self._validates:  # The option may have changed since the results.
            finished = all("validation" in row for row in _read(path)["rows"])
        return multihost.broadcast_from_main(finished)

    def _path(self, name: str) -> Path:
        return self.workdir / "runs" / name / "results.json"

    def _rows(
        self, models: Iterable[MergedModel], count: int, seed: int | None
    ) -> list[dict[str, Any]]:
        rows, images = [], self._evaluator.num_images
        enabled = multihost.is_main()
        with (
            self._timeline.phase("evaluate"),
            Progress("evaluate", count * images, unit="images", enabled=enabled) as progress,
            show_compilation(progress),
        ):
            for index, model in enumerate(models):
                details = dict(model.details)
                if "head" not in model.params:  # The head is added only for the evaluation.
                    start, weights = map(drop_statistics, (self._start, model.params))
                    details["distance_to_anchor"] = float(distance(start, weights))
                rows.append(
                    self._evaluator.row(
                        model.method,
                        self.anchor.classify(model.params),
                        seed=seed,
                        cost=model.fine_tuning_runs,
                        predicted_distance=model.predicted_distance,
                        on_progress=lambda done, before=index * images: progress.update(
                            before + done
                        ),
                        **details,
                    )
                )
        return rows


def _write(path: Path, document: Document) -> None:
    if multihost.is_main():
        write_json(path, document)


def _read(path: Path) -> Document:
    """Return the cached results with the method names of this version, {} on other processes."""
    if not multihost.is_main():
        return {}
    document = json.loads(path.read_text())
    return document | {"rows": current_rows(document["rows"])}


def _row_name(config: ConfigDict) -> str:
    if config.merge.carry_noise != "off":
        return "model_stock_carried"
    method = METHODS[config.merge.method]
    return method.name if config.merge.every == "end" else method.periodic_row
