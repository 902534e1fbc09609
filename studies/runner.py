"""One call of the studies: what is missing, the time for it, and then the studies themselves."""

from __future__ import annotations

import functools
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
from studies.context import StudyContext
from studies.image_context import ImageContext
from studies.ledger import Ledger, work_queue
from studies.measurements import Measurement
from studies.pages import write
from studies.runs import Run, runs_of
from studies.sentences.context import SentenceContext
from studies.study import Setup, Study, StudyReport


@dataclass(frozen=True)
class Schedule:
    """Runs to train and measurements to make.

    Attributes:
      runs: name of a run's directory -> a run that is not trained. Runs that differ only in their
        seed are adjacent, because they share compiled functions.
      measurements: ledger key -> a measurement that the ledger lacks, without duplicates.
    """

    runs: Mapping[str, Run]
    measurements: Mapping[str, Measurement]

    @classmethod
    def of(cls, context: StudyContext, measurements: Iterable[Measurement]) -> Schedule:
        """Select the measurements that the ledger lacks, and the untrained runs they need."""
        by_key = {context.key(measurement): measurement for measurement in measurements}
        missing = {key: value for key, value in by_key.items() if key not in context.ledger}
        runs = {context.name(run): run for run in runs_of(tuple(missing.values()))}
        untrained = {
            name: runs[name] for name in sorted(runs) if not context.runs.is_trained(runs[name])
        }
        return cls(untrained, missing)

    def queue(
        self, context: StudyContext, locks: Path, on_wait: Callable[[int], None]
    ) -> Iterator[tuple[str, Run | Measurement]]:
        """Yield (name, task): each run is followed by the measurements that only it delayed.

        Measurements are therefore made as early as possible, and an interrupted study keeps as many
        as it can.

        Args:
          context: as passed to `of`.
          locks: as for `ledger.work_queue`.
          on_wait: as for `ledger.work_queue`.
        """
        dependencies = {
            key: sorted({context.name(run) for run in runs_of(measurement)} & self.runs.keys())
            for key, measurement in self.measurements.items()
        }
        names = [key for key, needed in dependencies.items() if not needed]
        for name in self.runs:  # Sorted, as each `needed` is.
            names += [name, *(key for key, needed in dependencies.items() if needed[-1:] == [name])]
        tasks = {name: (name, self.runs.get(name) or self.measurements[name]) for name in names}

        def is_done(name: str) -> bool:
            if name in self.runs:
                return context.runs.is_trained(self.runs[name])
            return context.ledger.look_for(name)

        yield from work_queue(locks, tasks, is_done, on_wait, dependencies)


_COLORS = {"reproduced": "green", "not reproduced": "red", "inconclusive": "yellow"}


class Runner:
    """Runs studies on one benchmark, from one or several anchors."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        ledger: Ledger,
        out: Path,
        num_seeds: int | None = None,
        anchors: Sequence[str] = (),
        config_arguments: Sequence[str] = (),
        path_arguments: Sequence[str] = (),
    ) -> None:
        """Check the arguments; anchors and data are opened by `plan` or `run`.

        Args:
          config: base config of every run; `seed` is the first seed.
          workdir: where trained runs are stored.
          ledger: finished measurements.
          out: directory of tables and figures.
          num_seeds: of every study; None uses each study's own number.
          anchors: more pretrained models; every study is repeated from each one.
          config_arguments: the command line's config options, for the last line of a page.
          path_arguments: the command line's `--ledger` and `--out`, for the same line.

        Raises:
          UserError: for an option that every study sets itself, fewer than two seeds, or if `out`
            is not writable.
        """
        if num_seeds is not None and num_seeds < 2:
            raise UserError(f"--num_seeds={num_seeds}: a study compares at least 2 seeds")
        _check_arguments(config_arguments)
        _check_writable(out)
        self._config, self._anchors = config, anchors
        self._sentence_contexts: dict[str, SentenceContext] = {}
        self._ledger, self._out, self._num_seeds = ledger, out, num_seeds
        self._workdir = workdir
        self._config_arguments, self._path_arguments = config_arguments, path_arguments
        self._console = Console()

    def plan(self, studies: Sequence[Study]) -> int:
        """Print what the ledger lacks, with an estimate of the time for it.

        Returns:
          The number of missing measurements.

        Raises:
          UserError: for a wrong config, or an anchor that cannot be opened or is named twice.
        """
        seconds: float | None = 0.0
        num_measurements, num_missing, num_runs = 0, 0, 0
        for context, in_context in self._studies_by_context(studies):
            measurements = [
                measurement
                for study in in_context
                for measurement in study.measurements(self._setup(study, context)).values()
            ]
            schedule = Schedule.of(context, measurements)
            estimate = context.seconds(schedule.measurements.values(), schedule.runs.values())
            seconds = None if seconds is None or estimate is None else seconds + estimate
            num_measurements += len(measurements)
            num_missing += len(schedule.measurements)
            num_runs += len(schedule.runs)
        time = "time unknown" if seconds is None else f"about {duration(seconds)}"
        self._print(
            f"{num_missing} of {num_measurements} measurements missing: {num_runs} runs to train, "
            f"{time}"
        )
        return num_missing

    def run(self, study: Study) -> dict[str, StudyReport]:
        """Measure what is missing, write the study's files and print its verdicts.

        Returns:
          The report from each anchor.
        """
        reports, keys, seeds = {}, [], set()
        contexts = self._contexts_of(study)
        for name, context in contexts.items():
            setup = self._setup(study, context)
            measurements = study.measurements(setup)
            reports[name] = study.summarize(setup, self._values(study, context, measurements))
            keys += [context.key(measurement) for measurement in measurements.values()]
            seeds |= {run.seed for run in runs_of(tuple(measurements.values()))}
        details = {
            "seeds": sorted(seeds),
            "commits": self._ledger.commits(keys),
            **next(iter(contexts.values())).details(),
            "command": self._command(study),
        }
        page = write(study, reports, self._out, details)
        self._console.print(f"[bold]{study.title}[/bold]: {page}", highlight=False)
        for name, report in reports.items():
            if len(reports) > 1:
                self._print(f"from {name}:")
            for claim in report.claims:
                color = _COLORS[claim.verdict]
                verdict = f"[{color}]{claim.verdict:14}[/{color}]"
                self._console.print(
                    f"  {verdict} {escape(claim.text)}", highlight=False, soft_wrap=True
                )
        return reports

    def _command(self, study: Study) -> str:
        _, *anchors = self._contexts_of(study)
        arguments = self._config_arguments
        flags = [*(_seed_arguments(arguments) if study.domain else arguments)]
        flags += [f"--num_seeds={self._num_seeds or study.num_seeds}"]
        flags += [f"--anchors={','.join(anchors)}"] * bool(anchors)
        return " ".join(["python -m studies", study.name, *flags, *self._path_arguments])

    def _values(
        self, study: Study, context: StudyContext, measurements: Mapping[Hashable, Measurement]
    ) -> dict[Hashable, Any]:
        """Train and measure what is missing, and print each step."""
        schedule = Schedule.of(context, measurements.values())
        numbers = {name: number for number, name in enumerate(schedule.runs, 1)}
        titles = {
            context.key(measurement): (
                f"{number}/{len(measurements)}  {measurement.key(context)[0]} {name}"
            )
            for number, (name, measurement) in enumerate(measurements.items(), 1)
        }

        def on_wait(count: int) -> None:
            self._print(f"{study.name}: waits for {count} tasks of other processes")

        for name, task in schedule.queue(context, self._workdir / "locks", on_wait):
            if isinstance(task, Run):
                title = f"{study.name}: {context.runs.title(task)}"
                title += f" ({numbers[name]} of {len(numbers)})"
                options = ", ".join(f"{key}={value}" for key, value in task.options)
                self._print(f"{title}: {options}" if options else title)
                context.runs.train(task, title)
            else:
                context.value(task)
                self._print(f"{study.name}  {titles[name]}")
        return {name: context.value(measurement) for name, measurement in measurements.items()}

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    @functools.cached_property
    def _contexts(self) -> dict[str, StudyContext]:
        """The contexts of the image studies by the name of their anchor."""
        config = self._config
        first = ImageContext(config, self._workdir, self._ledger)
        contexts: dict[str, StudyContext] = {config.pretrained: first}
        for name in self._anchors:
            anchor_config = config.copy_and_resolve_references()
            anchor_config.pretrained = name
            try:
                context = ImageContext(anchor_config, self._workdir, self._ledger, first.data)
            except UserError as error:
                raise UserError(f"--anchors={name}: {error}") from error
            for other_name, other in contexts.items():
                if context.checksum == other.checksum:
                    raise UserError(f"--anchors={name}: its weights equal those of {other_name}")
            contexts[name] = context
        return contexts

    def _contexts_of(self, study: Study) -> Mapping[str, StudyContext]:
        """Return the contexts of a study by the name of their anchor."""
        if study.domain is None:
            return self._contexts
        if study.domain not in self._sentence_contexts:
            seeds = _seed_arguments(self._config_arguments)
            if self._anchors or len(seeds) < len(self._config_arguments):
                self._print(
                    f"{study.name}: has settings and an anchor that do not change; of --config.* "
                    "and --anchors, only --config.seed applies"
                )
            self._sentence_contexts[study.domain] = SentenceContext(
                study.domain, self._workdir, self._ledger, self._config.seed
            )
        context = self._sentence_contexts[study.domain]
        return {context.details()["pretrained"]: context}

    def _studies_by_context(
        self, studies: Sequence[Study]
    ) -> Iterator[tuple[StudyContext, list[Study]]]:
        for domain in dict.fromkeys(study.domain for study in studies):
            chosen = [study for study in studies if study.domain == domain]
            for context in self._contexts_of(chosen[0]).values():
                yield context, chosen

    def _setup(self, study: Study, context: StudyContext) -> Setup:
        first, *_ = self._contexts_of(study).values()
        setup = context.setup(self._num_seeds or study.num_seeds)
        return setup._replace(
            seeds=tuple(seed + study.seed_offset for seed in setup.seeds),
            additional_anchor=context is not first,
        )


def _seed_arguments(arguments: Sequence[str]) -> list[str]:
    """Return the arguments that set the first seed, the only option of the sentence studies."""
    return [argument for argument in arguments if argument.startswith("--config.seed=")]


def _check_arguments(arguments: Sequence[str]) -> None:
    """Raise an error for options that the studies would ignore."""
    for argument in arguments:
        name = argument.removeprefix("--config.").partition("=")[0]
        if name == "num_seeds":
            raise UserError(f"{argument}: set the number of seeds of a study with --num_seeds")
        if name in ("num_replicas", "merge.every"):
            raise UserError(f"{argument}: every study sets {name} itself; remove this option")


def _check_writable(out: Path) -> None:
    """Raise an error before anything is trained if the directory is not writable."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UserError(f"--out={out}: cannot write there: {error.strerror}") from error
