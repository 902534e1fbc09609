"""One call of the studies: what is missing, how long it takes, and then the studies themselves."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console
from rich.markup import escape

from modelstock_jax.errors import UserError
from modelstock_jax.reporting.progress import duration
from studies.bench import StudyContext
from studies.ledger import Ledger, work_queue
from studies.measurements import Measurement
from studies.pages import write
from studies.runs import Run, runs_of
from studies.study import Setup, Study, StudyReport

# What studies still have to do: runs, and what each lets be measured, right after it.


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
    def of(cls, bench: StudyContext, wanted: Iterable[Measurement]) -> Schedule:
        """What of `wanted` the ledger has not, and the runs that it needs and that are not here."""
        missing = {bench.key(one): one for one in wanted}
        missing = {key: one for key, one in missing.items() if key not in bench.ledger}
        runs = {bench.name(run): run for run in runs_of(tuple(missing.values()))}
        untrained = {n: runs[n] for n in sorted(runs) if not bench.trained.is_here(runs[n])}
        return cls(untrained, missing)

    def turns(
        self, bench: StudyContext, locks: Path, waits: Callable[[int], None]
    ) -> Iterator[tuple[str, Run | Measurement]]:
        """(name, piece): a run is followed by the measurements that waited for it alone.

        What is measured stays, whatever becomes of the runs: a study that is cut short keeps as
        much as it can.

        Args:
          bench: what `of` was given.
          locks: as for `ledger.work_queue`.
          waits: as for `ledger.work_queue`.
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

        yield from work_queue(locks, pieces, done, waits, needs)


_COLORS = {"holds": "green", "does not hold": "red", "not decided": "yellow"}


class Runner:
    """Studies on one set of data, from one anchor or from several."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        ledger: Ledger,
        out: Path,
        num_seeds: int | None = None,
        anchors: Sequence[str] = (),
        config_arguments: Sequence[str] = (),
    ) -> None:
        """Opens the anchors and the data.

        Args:
          config: what every run starts from; `seed` is the first seed.
          workdir: trained runs are kept there.
          ledger: finished measurements.
          out: tables and figures are written there.
          num_seeds: of every study; None takes each one's own number.
          anchors: further pretrained models, from each of which every study is done again.
          config_arguments: what the command line says of the config, for a page's last line.

        Raises:
          UserError: for a wrong config, an option that every study sets itself, fewer than two
            seeds, an anchor that cannot be opened or comes twice, or where nothing can be written.
        """
        if num_seeds is not None and num_seeds < 2:
            raise UserError(f"--num_seeds={num_seeds}: a study compares at least 2 seeds")
        _check_arguments(config_arguments)
        _check_writable(out)
        self._benches = {config.pretrained: StudyContext(config, workdir, ledger)}
        self._bench = self._benches[config.pretrained]
        for name in anchors:
            one = config.copy_and_resolve_references()
            one.pretrained = name
            try:
                bench = StudyContext(one, workdir, ledger, self._bench.data)
            except UserError as error:
                raise UserError(f"--anchors={name}: {error}") from error
            for known, other in self._benches.items():
                if bench.fingerprint == other.fingerprint:
                    raise UserError(f"--anchors={name}: its weights are those of {known}")
            self._benches[name] = bench
        self._ledger, self._out, self._num_seeds = ledger, out, num_seeds
        self._locks = workdir / "locks"
        self._config_arguments = config_arguments
        self._console = Console()

    def plan(self, studies: Sequence[Study]) -> int:
        """Prints what is not in the ledger, and an estimate of the time for it.

        Returns:
          The number of missing measurements.
        """
        seconds: float | None = 0.0
        count, missing, runs = 0, 0, 0
        for bench in self._benches.values():
            wanted = [
                one
                for study in studies
                for one in study.measurements(self._setup(study, bench)).values()
            ]
            schedule = Schedule.of(bench, wanted)
            more = bench.seconds(schedule.measurements.values(), schedule.runs.values())
            seconds = None if seconds is None or more is None else seconds + more
            count += len(wanted)
            missing += len(schedule.measurements)
            runs += len(schedule.runs)
        guess = "not timed yet" if seconds is None else f"about {duration(seconds)}"
        self._say(f"{missing} of {count} missing: {runs} runs to train, {guess}")
        return missing

    def run(self, study: Study) -> dict[str, StudyReport]:
        """Measures what is missing, writes the study's files and prints its verdicts.

        Returns:
          The report from each anchor.
        """
        reports, keys, seeds = {}, [], set()
        for name, bench in self._benches.items():
            setup = self._setup(study, bench)
            wanted = study.measurements(setup)
            reports[name] = study.summarize(setup, self._values(study, bench, wanted))
            keys += [bench.key(one) for one in wanted.values()]
            seeds |= {run.seed for run in runs_of(tuple(wanted.values()))}
        details = {
            "seeds": sorted(seeds),
            "commits": self._ledger.commits(keys),
            "pretrained": self._bench.config.pretrained,
            "data": self._bench.config.data.name,
            "max_shift_images": self._bench.config.evaluation.max_shift_images,
            "command": self._command(study),
        }
        page = write(study, reports, self._out, details)
        self._console.print(f"[bold]{study.title}[/bold]: {page}", highlight=False)
        for name, report in reports.items():
            if len(reports) > 1:
                self._say(f"from {name}:")
            for claim in report.claims:
                color = _COLORS[claim.verdict]
                verdict = f"[{color}]{claim.verdict:13}[/{color}]"
                self._console.print(
                    f"  {verdict} {escape(claim.text)}", highlight=False, soft_wrap=True
                )
        return reports

    def _command(self, study: Study) -> str:
        _, *further = self._benches
        flags = [*self._config_arguments, f"--num_seeds={self._num_seeds or study.num_seeds}"]
        flags += [f"--anchors={','.join(further)}"] * bool(further)
        return " ".join(["python -m studies", study.name, *flags])

    def _values(
        self, study: Study, bench: StudyContext, wanted: Mapping[Hashable, Measurement]
    ) -> dict[Hashable, Any]:
        """Trains and measures what is missing, and says what it does."""
        schedule = Schedule.of(bench, wanted.values())
        numbers = {name: number for number, name in enumerate(schedule.runs, 1)}
        titles = {
            bench.key(one): f"{number}/{len(wanted)}  {one.key(bench)[0]} {name}"
            for number, (name, one) in enumerate(wanted.items(), 1)
        }

        def waits(count: int) -> None:
            self._say(f"{study.name}: waits for {count} that other processes are at")

        for name, piece in schedule.turns(bench, self._locks, waits):
            if isinstance(piece, Run):
                title = f"{study.name}: {bench.trained.title(piece)}"
                title += f" ({numbers[name]} of {len(numbers)})"
                options = ", ".join(f"{key}={value}" for key, value in piece.options)
                self._say(f"{title}: {options}" if options else title)
                bench.trained.train(piece, title)
            else:
                bench.value(piece)
                self._say(f"{study.name}  {titles[name]}")
        return {name: bench.value(one) for name, one in wanted.items()}

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _setup(self, study: Study, bench: StudyContext) -> Setup:
        config = bench.config
        count = self._num_seeds or study.num_seeds
        return Setup(
            tuple(range(config.seed, config.seed + count)),
            config.epochs,
            bench.trained.steps_per_epoch,
            config.optimizer.learning_rate,
            shifts=bool(bench.data.shifts),
            further=bench is not self._bench,
            stored=config.data.name != "glyphs",
        )


def _check_arguments(arguments: Sequence[str]) -> None:
    """Refuses what the studies would pass over without a word."""
    for argument in arguments:
        name = argument.removeprefix("--config.").partition("=")[0]
        if name == "num_seeds":
            raise UserError(f"{argument}: the number of seeds of a study is --num_seeds")
        if name in ("num_replicas", "merge.every"):
            raise UserError(f"{argument}: every study sets its own {name}")


def _check_writable(out: Path) -> None:
    """Finds out before anything is trained."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UserError(f"--out={out}: cannot write there: {error.strerror}") from error
