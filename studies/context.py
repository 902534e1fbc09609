"""The environment of a study: trains, builds and measures models, and stores every result."""

from __future__ import annotations

import abc
import functools
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from modelstock_jax import __version__
from modelstock_jax.merging.trees import PyTree
from studies.expressions import Expression
from studies.ledger import Ledger
from studies.measurements import HeldOut, Measurement
from studies.run_store import RunStore, epoch_file
from studies.runs import Run, checksum
from studies.study import Setup


class StudyContext(abc.ABC):
    """Trains, builds and measures models; finished measurements are read from the ledger.

    Attributes:
      config: base config of every run.
      ledger: finished measurements.
      runs: finished runs.
      num_heads: attention heads.
      checksum: of everything but the runs and sets that accuracies depend on; part of every key.
    """

    config: ConfigDict
    ledger: Ledger
    runs: RunStore
    num_heads: Any
    checksum: str

    @abc.abstractmethod
    def setup(self, num_seeds: int) -> Setup:
        """Return what determines a study's measurements."""

    @abc.abstractmethod
    def details(self) -> dict[str, Any]:
        """Return names of the pretrained model and the data, for a page."""

    @abc.abstractmethod
    def sets(self, shifts: bool) -> list[Any]:
        """See `MeasurementContext`."""

    @abc.abstractmethod
    def accuracy(self, params: PyTree, *, shifts: bool) -> dict[str, Any]:
        """See `MeasurementContext`."""

    @abc.abstractmethod
    def validation_set(self) -> list[Any]:
        """See `MeasurementContext`."""

    @abc.abstractmethod
    def validate(self, params: PyTree) -> float:
        """See `ModelSource`."""

    @abc.abstractmethod
    def anchor(self) -> PyTree:
        """See `ModelSource`."""

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
        return checksum([self.checksum, key])

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

    def held_out(self, model: Expression) -> float:
        """See `ModelSource`; stored in the ledger."""
        return self.value(HeldOut(model))

    def name(self, run: Run) -> str:
        """See `ModelSource`."""
        return self.runs.name(run)

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
