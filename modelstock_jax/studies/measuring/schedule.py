"""What studies still have to do: runs, and what each lets be measured, right after it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from modelstock_jax.studies.measuring.bench import Bench
from modelstock_jax.studies.measuring.measurements import Measurement
from modelstock_jax.studies.measuring.runs import Run, runs_of
from modelstock_jax.studies.measuring.turns import turns


@dataclass(frozen=True)
class Schedule:
    """Runs to train and measurements to make.

    Attributes:
      runs: the name of a run's directory -> a run that is not there. Those that differ in their
        seed alone follow each other: they share compiled programs.
      measurements: the ledger's key -> a measurement that it has not, each once.
    """

    runs: Mapping[str, Run]
    measurements: Mapping[str, Measurement]

    @classmethod
    def of(cls, bench: Bench, wanted: Iterable[Measurement]) -> Schedule:
        """What of `wanted` the ledger has not, and the runs that it needs and that are not here."""
        missing = {bench.key(one): one for one in wanted}
        missing = {key: one for key, one in missing.items() if key not in bench.ledger}
        runs = {bench.name(run): run for run in runs_of(tuple(missing.values()))}
        untrained = {n: runs[n] for n in sorted(runs) if not bench.trained.is_here(runs[n])}
        return cls(untrained, missing)

    def turns(
        self, bench: Bench, locks: Path, waits: Callable[[int], None]
    ) -> Iterator[tuple[str, Run | Measurement]]:
        """(name, piece): a run is followed by the measurements that waited for it alone.

        What is measured stays, whatever becomes of the runs: a study that is cut short keeps as
        much as it can.

        Args:
          bench: what `of` was given.
          locks: as for `turns.turns`.
          waits: as for `turns.turns`.
        """
        needs = {
            key: sorted({bench.name(run) for run in runs_of(one)} & self.runs.keys())
            for key, one in self.measurements.items()
        }
        names = [key for key, needed in needs.items() if not needed]
        for name in self.runs:  # They are sorted, as each `needed` is.
            names += [name, *(key for key, needed in needs.items() if needed[-1:] == [name])]
        pieces = {name: (name, self.runs.get(name) or self.measurements[name]) for name in names}

        def done(name: str) -> bool:
            if name in self.runs:
                return bench.trained.is_here(self.runs[name])
            return bench.ledger.look_for(name)

        yield from turns(locks, pieces, done, waits, needs)
