"""The environment of a study: trains, builds and measures models, and stores every result."""

from __future__ import annotations

import functools
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from modelstock_jax import __version__
from modelstock_jax.data import benchmark
from modelstock_jax.data.benchmark import Benchmark
from modelstock_jax.errors import UserError
from modelstock_jax.evaluation import classifier_evaluator
from modelstock_jax.experiment.setup import check_and_set_up
from modelstock_jax.merging.trees import PyTree
from modelstock_jax.training.sharding import make_mesh
from studies.expressions import Expression
from studies.ledger import Ledger
from studies.measurements import HeldOut, Measurement
from studies.run_store import RunStore, anchor_opener, epoch_file
from studies.runs import Run, checksum, identity


class StudyContext:
    """Trains, builds and measures models; finished measurements are read from the ledger.

    Attributes:
      config: base config of every run.
      ledger: finished measurements.
      runs: finished runs.
      num_heads: attention heads of the image tower.
      data: training and evaluation data.
      checksum: of the pretrained weights, and of a head or images other than the default; part of
        every key.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: str | Path,
        ledger: Ledger,
        data: Benchmark | None = None,
    ) -> None:
        """Open the anchor and the data; train and measure nothing.

        Args:
          config: base config of every run of a study.
          workdir: trained runs are stored in workdir/trained.
          ledger: finished measurements; may be stored elsewhere.
          data: of `config.data`, if another context has opened it.

        Raises:
          UserError: for a wrong config, as in `launch.py`.
        """
        check_and_set_up(config)
        if jax.process_count() > 1:
            raise UserError("studies run in one process; launch.py trains on many hosts")
        self.config, self.ledger = config, ledger
        commit()  # Cache it now: another commit may be checked out while this process runs.
        workdir = Path(workdir)
        open_anchor = anchor_opener(config)
        self.data = data = data or benchmark.load(config.data)
        self._anchor = open_anchor(data, workdir)
        outline = self._anchor.outline
        self.checksum = identity(config, outline.checksum, data)
        self.num_heads = outline.num_heads
        self.runs = RunStore(config, workdir, self._anchor, data, self.checksum, self._record)
        max_images = config.evaluation.max_shift_images
        self._validation, self._test = data.validation, data.test
        self._shifts = {
            name: images.first(max_images or len(images)) for name, images in data.shifts.items()
        }
        mesh = make_mesh(1, 0, num_replicas=1, batch_size=jax.device_count())
        self._evaluate = classifier_evaluator(config, outline, mesh)

    def value(self, measurement: Measurement) -> Any:
        """Return the value of a measurement; measure it if the ledger does not contain it."""
        key = self.key(measurement)
        if key not in self.ledger:
            begin = time.monotonic()
            value = measurement.measure(self)
            self._record(measurement.key(self), value, time.monotonic() - begin)
        return measurement.read(self.ledger[key])

    def _record(self, key: list[Any], value: Any, seconds: float) -> None:
        self.ledger.add(
            self._key_checksum(key), value=value, what=key[0], seconds=seconds, commit=commit()
        )

    def _key_checksum(self, key: list[Any]) -> str:
        # Sets of different data may have equal names and sizes, so the key includes the data's
        # name. The lines of the glyphs are older and do not include it.
        name = self.config.data.name
        return checksum([self.checksum, key, *([name] if name != "glyphs" else [])])

    def key(self, measurement: Measurement) -> str:
        """Return the ledger key: equal for equal models, trained and measured alike."""
        return self._key_checksum(measurement.key(self))

    def seconds(self, missing: Iterable[Measurement], untrained: Iterable[Run]) -> float | None:
        """Estimate the time to train and measure from earlier times; None without earlier runs."""
        seconds_per_step = self.ledger.median_seconds(
            "Trained", lambda value: value["steps"] * value["replicas"]
        )
        total = 0.0
        for run in untrained:
            if seconds_per_step is None:
                return None
            total += seconds_per_step * self.runs.steps(run)
        for measurement in missing:
            total += self.ledger.median_seconds(measurement.key(self)[0]) or 0.0
        return total

    def sets(self, shifts: bool) -> list[Any]:
        """Return names and sizes of the test sets, which are part of an accuracy's key.

        Raises:
          UserError: if shifts are requested and the data has none.
        """
        if shifts and not self._shifts:
            raise UserError(
                f"data.name={self.config.data.name!r}: this study measures distribution shifts, "
                "and the data has none; name shifts with --config.data.shifts, or choose other data"
            )
        image_sets = [self._test, *self._shifts.values()] if shifts else [self._test]
        return [[images.name, len(images)] for images in image_sets]

    def accuracy(self, params: PyTree, *, shifts: bool) -> dict[str, Any]:
        """Return top-1 accuracies in percent: {"id": ..., "shifts": {name: ...}}."""
        shift_sets = self._shifts if shifts else {}
        accuracies = self._evaluate(params, [self._test, *shift_sets.values()])
        return {
            "id": accuracies[self._test.name],
            "shifts": {name: accuracies[images.name] for name, images in shift_sets.items()},
        }

    def validation_set(self) -> list[Any]:
        """Return name and size of the validation set, which are part of a measurement's key."""
        return [self._validation.name, len(self._validation)]

    def validate(self, params: PyTree) -> float:
        """See `ModelSource`."""
        return self._evaluate(params, [self._validation])[self._validation.name]

    def held_out(self, model: Expression) -> float:
        """See `ModelSource`; stored in the ledger."""
        return self.value(HeldOut(model))

    def name(self, run: Run) -> str:
        """See `ModelSource`."""
        return self.runs.name(run)

    def anchor(self) -> PyTree:
        """See `ModelSource`."""
        return self._anchor.load().params

    def start(self, run: Run) -> PyTree:
        """See `ModelSource`."""
        return self.runs.start(run)

    def replica(self, run: Run, index: int, epoch: float | None) -> PyTree:
        """See `ModelSource`."""
        name = "replicas" if epoch is None else epoch_file(epoch)
        return jax.tree.map(lambda x: x[index], self.runs.weights(run, name))

    def merged(self, run: Run) -> PyTree:
        """See `ModelSource`."""
        return self.runs.weights(run, "merged")


@functools.cache
def commit() -> str:
    """Return the commit of the code, or the package's version without a repository."""
    try:
        return subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return __version__
