"""Evaluation of one checkpoint on every set."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from modelstock_jax.data.benchmark import Benchmark
from modelstock_jax.data.user_cache import cache_directory
from modelstock_jax.errors import UserError
from modelstock_jax.evaluation import classifier_evaluator
from modelstock_jax.experiment.agreement import check_same
from modelstock_jax.experiment.opening import open_all
from modelstock_jax.experiment.options import check_options
from modelstock_jax.merging import distance
from modelstock_jax.reporting.progress import Progress
from modelstock_jax.reporting.tables import make_row, screen_table
from modelstock_jax.training import multihost
from modelstock_jax.training.checkpoints import Checkpoints
from modelstock_jax.training.classifier import Classifier
from modelstock_jax.training.launcher import use_cores
from modelstock_jax.training.sharding import make_mesh, spread, whole_sharding
from modelstock_jax.training.step_fns import use_compilation_cache

PyTree = Any


class Measure:
    """Rows of results: each model's accuracy on every set of a benchmark.

    Attributes:
      num_images: that a row takes, of all sets.
    """

    def __init__(self, config: ConfigDict, anchor: Classifier, data: Benchmark, mesh: Mesh) -> None:
        """Prepares the evaluator for the classifiers of one architecture."""
        self._anchor, self._data = anchor, data
        most = config.evaluation.max_shift_images
        self._sets = [data.test, *(s.take(most or len(s)) for s in data.shifts.values())]
        if data.real is not None:
            self._sets.append(data.real)
        self.num_images = sum(len(image_set) for image_set in self._sets)
        self._evaluate = classifier_evaluator(config, anchor, mesh)

    def row(
        self,
        method: str,
        params: PyTree,
        *,
        measured: Callable[[int], None] = lambda images: None,
        **details: Any,
    ) -> dict[str, Any]:
        """A row as `reporting.rows.make_row` gives it.

        Args:
          method: the row's.
          params: whole on every process.
          measured: told how many images of this row are done.
          **details: go into the row.
        """
        data, accuracy = self._data, self._evaluate(params, self._sets, measured)
        if data.real is not None:
            details["real"] = accuracy[data.real.name]
        if "distance_to_anchor" not in details:
            details["distance_to_anchor"] = float(distance(self._anchor.params, params))
        return make_row(
            method,
            id=accuracy[data.test.name],
            shifts={name: accuracy[s.name] for name, s in data.shifts.items()},
            **details,
        )


def evaluate_checkpoint(config: ConfigDict, path: str | None) -> dict[str, Any]:
    """Evaluates any checkpoint that the code can read; prints the table and returns the row.

    Nothing is written but the zero-shot head, in the user's cache directory.

    Args:
      config: names the data, and the anchor and the objective of a run's checkpoints.
      path: a CLIP as `config.pretrained` names one (a directory or a hub id; without a head it
        gets the zero-shot one), or a step of a run's Orbax checkpoints of merged weights.

    Raises:
      UserError: if there is no such checkpoint, or it does not fit the data.
    """
    if not path:
        raise UserError("--mode=eval needs --checkpoint=DIR")
    check_options(config)
    use_cores(config)
    use_compilation_cache(config.compute.compilation_cache)
    check_same(config, checkpoint=path)
    directory, details = Path(path), {}
    _check_place(directory)
    is_step = directory.name.isdigit() and directory.is_dir()
    if not is_step:
        config = config.copy_and_resolve_references()
        config.pretrained = path
        details["distance_to_anchor"] = None  # It is the model itself that is measured.
    _, data, anchor = open_all(config, _heads())
    mesh = make_mesh(1, 0, num_replicas=1, batch_size=jax.device_count())
    params = anchor.params
    if is_step:
        start = anchor.start(config)
        everywhere = jax.tree.map(lambda _: whole_sharding(mesh), start)
        with Checkpoints(directory.parent, keep=0, read_only=True) as checkpoints:
            restored = checkpoints.restore(int(directory.name), spread(start, everywhere))
        params = anchor.classify(multihost.whole(restored))
    measure = Measure(config, anchor, data, mesh)
    with Progress(
        "evaluate", measure.num_images, unit="images", enabled=multihost.is_main()
    ) as progress:
        row = measure.row(
            directory.name, params, measured=progress.update, seed=None, cost=None, **details
        )
    if multihost.is_main():
        screen_table([row])
    return row


def _check_place(path: Path) -> None:
    """Parts of a run's workdir that are no models, and are easily taken for one."""
    if (path / "runs").is_dir() and (path / "model").is_dir():
        raise UserError(f"{path} is a run's workdir; its merged model is {path / 'model'}")
    if path.name.isdigit() and path.parent.name == "state":
        raise UserError(f"{path} is a training state; the merged models of that run are the "
                        f"numbers in {path.parent.parent / 'merged'}")


def _heads() -> Path | None:
    """Where heads are kept between evaluations; None where the user's cache cannot be written."""
    place = cache_directory() / "heads"
    try:
        place.mkdir(parents=True, exist_ok=True)
        writable = os.access(place, os.W_OK)
    except OSError:
        writable = False
    return place if multihost.agree(writable) else None  # Process 0 is the one that writes.
