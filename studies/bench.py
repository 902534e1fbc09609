"""Where a study's models are trained, built and measured; all of it is kept by content."""

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
from modelstock_jax.merging.gram import PyTree
from modelstock_jax.training.sharding import make_mesh
from studies.expressions import Expression
from studies.ledger import Ledger
from studies.measurements import HeldOut, Measurement
from studies.run_store import RunStore, opener, part
from studies.runs import Run, checksum, identity


class StudyContext:
    """Trains, builds and measures; what the ledger has is read from it.

    Attributes:
      config: what every run starts from.
      ledger: finished measurements.
      trained: finished runs.
      num_heads: attention heads of the image tower.
      data: what is trained and measured on.
      fingerprint: of the pretrained weights, and of a head or images that are not the plain ones;
        a part of every key.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: str | Path,
        ledger: Ledger,
        data: Benchmark | None = None,
    ) -> None:
        """Opens the anchor and the data; trains and measures nothing.

        Args:
          config: what every run of a study starts from.
          workdir: trained runs are kept in workdir/trained.
          ledger: finished measurements; may lie elsewhere.
          data: of `config.data`, where another bench has opened it.

        Raises:
          UserError: as `launch.py` does for a wrong config.
        """
        check_and_set_up(config)
        if jax.process_count() > 1:
            raise UserError("studies run in one process; launch.py trains on many hosts")
        self.config, self.ledger = config, ledger
        commit()  # Of the code that runs: another may be checked out beneath it.
        workdir = Path(workdir)
        opened = opener(config)
        self.data = data = data or benchmark.load(config.data)
        self._anchor = opened(data, workdir)
        outline = self._anchor.outline
        self.fingerprint = identity(config, outline.fingerprint, data)
        self.num_heads = outline.num_heads
        self.trained = RunStore(config, workdir, self._anchor, data, self.fingerprint, self._record)
        most = config.evaluation.max_shift_images
        self._validation, self._test = data.validation, data.test
        self._shifts = {name: one.first(most or len(one)) for name, one in data.shifts.items()}
        mesh = make_mesh(1, 0, num_replicas=1, batch_size=jax.device_count())
        self._evaluate = classifier_evaluator(config, outline, mesh)

    def value(self, measurement: Measurement) -> Any:
        """What the measurement gives; measured now where the ledger has it not."""
        key = self.key(measurement)
        if key not in self.ledger:
            begin = time.monotonic()
            value = measurement.measure(self)
            self._record(measurement.key(self), value, time.monotonic() - begin)
        return measurement.read(self.ledger[key])

    def _record(self, key: list[Any], value: Any, seconds: float) -> None:
        self.ledger.add(
            self._digest(key), value=value, what=key[0], seconds=seconds, commit=commit()
        )

    def _digest(self, key: list[Any]) -> str:
        # Sets of other data may have the same names and sizes; the glyphs' lines came first and do
        # not name theirs.
        name = self.config.data.name
        return checksum([self.fingerprint, key, *([name] if name != "glyphs" else [])])

    def key(self, measurement: Measurement) -> str:
        """The ledger's key: equal for equal models of equal training, measured alike."""
        return self._digest(measurement.key(self))

    def seconds(self, missing: Iterable[Measurement], untrained: Iterable[Run]) -> float | None:
        """How long it takes to train and measure these, by what was timed before; None if never."""
        training = self.ledger.rate("Trained", lambda value: value["steps"] * value["replicas"])
        total = 0.0
        for run in untrained:
            if training is None:
                return None
            total += training * self.trained.steps(run)
        for one in missing:
            total += self.ledger.rate(one.key(self)[0]) or 0.0
        return total

    def sets(self, shifts: bool) -> list[Any]:
        """What accuracies are measured on, as a part of their key: names and sizes.

        Raises:
          UserError: if shifts are asked for and the data has none.
        """
        if shifts and not self._shifts:
            raise UserError(
                f"data.name={self.config.data.name!r}: this study measures shifts, and there are "
                "none in the data; name some with --config.data.shifts, or choose other data"
            )
        chosen = [self._test, *self._shifts.values()] if shifts else [self._test]
        return [[one.name, len(one)] for one in chosen]

    def accuracy(self, params: PyTree, *, shifts: bool) -> dict[str, Any]:
        """Top-1 in percent: {"id": ..., "shifts": {name: ...}}."""
        chosen = self._shifts if shifts else {}
        found = self._evaluate(params, [self._test, *chosen.values()])
        return {
            "id": found[self._test.name],
            "shifts": {name: found[one.name] for name, one in chosen.items()},
        }

    def validation_set(self) -> list[Any]:
        """What models are chosen on, as a part of its measurements' key."""
        return [self._validation.name, len(self._validation)]

    def validate(self, params: PyTree) -> float:
        """See `Weights`."""
        return self._evaluate(params, [self._validation])[self._validation.name]

    def held_out(self, model: Expression) -> float:
        """See `Weights`; kept in the ledger."""
        return self.value(HeldOut(model))

    def name(self, run: Run) -> str:
        """See `Weights`."""
        return self.trained.name(run)

    def anchor(self) -> PyTree:
        """See `Weights`."""
        return self._anchor.load().params

    def start(self, run: Run) -> PyTree:
        """See `Weights`."""
        return self.trained.start(run)

    def replica(self, run: Run, index: int, epoch: float | None) -> PyTree:
        """See `Weights`."""
        name = "replicas" if epoch is None else part(epoch)
        return jax.tree.map(lambda x: x[index], self.trained.weights(run, name))

    def merged(self, run: Run) -> PyTree:
        """See `Weights`."""
        return self.trained.weights(run, "merged")


@functools.cache
def commit() -> str:
    """The code's commit, or the package's version where there is no repository."""
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
