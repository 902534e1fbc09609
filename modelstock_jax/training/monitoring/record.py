"""What a run tells while it goes: metrics, events, performance and progress."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from ml_collections import ConfigDict

from modelstock_jax.fileio import JsonLines
from modelstock_jax.merging import Stats, check_finite, report
from modelstock_jax.reporting.metrics import MetricsWriter
from modelstock_jax.reporting.progress import Progress
from modelstock_jax.reporting.timeline import Timeline
from modelstock_jax.training.hosts import distributed
from modelstock_jax.training.monitoring.watch import FLAGS, Watch
from modelstock_jax.training.programs import Task
from modelstock_jax.training.step import Metrics


class Record:
    """The record of one run; every process makes one, and the first of them writes it.

    A step's values are read when the next step is on its way: reading them at once would let the
    device wait for the host. `settle` reads them at once; it comes before a save or a merge, so
    that nothing which is not finite is saved or merged.

    Args:
      config: the run's options.
      task: what is trained.
      workdir: the run's directory.
      name: of the run, as progress shows it.
      first: the step that training goes on from.
      timeline: where time goes.
    """

    def __init__(
        self,
        config: ConfigDict,
        task: Task,
        workdir: Path,
        name: str,
        first: int,
        timeline: Timeline,
    ) -> None:
        self._config, self._task, self._workdir, self._name = config, task, workdir, name
        self._first, self._timeline = first, timeline
        self._images = config.num_replicas * config.batch_size
        self._late: tuple[int, Metrics] | None = None
        self._counted = 0.0  # Steps that count: finite, and not of an earlier life.
        self._merges = 0

    def __enter__(self) -> Record:
        main, first = distributed.is_main(), self._first
        with contextlib.ExitStack() as stack:
            self._metrics = stack.enter_context(
                MetricsWriter(self._workdir, first or None, enabled=main)
            )
            events = None
            if main:
                kept = (lambda entry: entry.get("step", first + 1) <= first) if first else None
                events = stack.enter_context(JsonLines(self._workdir / "events.jsonl", kept))
            self._progress = stack.enter_context(
                Progress(
                    self._name,
                    self._task.num_steps,
                    done=first,
                    images_per_step=self._images,
                    enabled=main,
                )
            )
            before = [entry["event"] for entry in events.kept] if events is not None else []
            self._watch = Watch(
                self._config.watch,
                _names(self._task.params),
                events,
                self.log,
                distributed.agree(before.count("not_finite")),
            )
            for line in self._metrics.kept:
                self._watch.compare(line["step"], line, again=True)
            self._close = stack.pop_all()
        if first:
            self.log(f"{self._name}: goes on from step {first}")
        self._mark = self._begin = (first, self._timeline.wall(), self._timeline.totals())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close.__exit__(kind, error, trace)

    def step(self, step: int, values: Metrics) -> None:
        """Takes a step's values, on the device yet, and reads those of the step before.

        Raises:
          UserError: if that one was not finite and the run is not to go on; or the disk is full.
        """
        self.settle()
        self._late = (step, values)

    def settle(self) -> None:
        """Reads the values that were taken last; see `step`."""
        if self._late is None:
            return
        (step, values), self._late = self._late, None
        due = step % self._config.log_every == 0 or step == self._task.num_steps
        read = distributed.whole(values if due else {name: values[name] for name in FLAGS})
        ok = read["ok"]
        if not ok.all():
            self._watch.look(step, read | {"loss": distributed.whole(values["loss"])})
        if step > self._metrics.furthest:
            self._counted += ok.mean()
        if not due:
            self._progress.update(step)
            return
        scalars = {
            f"train/{name}/replica_{r}": float(x)
            for name, v in read.items()
            if name not in FLAGS
            for r, x in enumerate(v)
        }
        self._metrics.write(step, scalars)
        self._metrics.write_performance(step, self._performance(step))
        self._watch.compare(step, scalars)
        self._progress.update(step, {name: read[name].mean() for name in ("loss", "accuracy")})

    def merge(self, step: int, stats: Stats) -> None:
        """Writes a merge's cosines and ratios.

        Raises:
          UserError: if a replica's weights are not finite.
        """
        stats = distributed.whole(stats)
        check_finite(stats)
        values = {"merge/epoch": step / self._task.steps_per_epoch}
        for row in report(stats):
            values[f"merge/cosine/{row['name']}"] = row["cosine"]
            values[f"merge/ratio/{row['name']}"] = row["ratio"]
        self._metrics.write(step, values)
        self._merges += 1

    def flush(self) -> None:
        """Hands every line to the operating system."""
        self._metrics.flush()

    def log(self, line: str) -> None:
        """Prints a line."""
        self._progress.log(line)

    def finish(self, step: int) -> None:
        """Says what the merges took and what went wrong, in a line each."""
        steps, (seconds, _) = step - self._first, self._since(self._begin)
        if self._merges:
            merge = seconds["merge"] / self._merges
            epoch = (seconds["train"] + seconds["data"]) / steps * self._task.steps_per_epoch
            share = float(f"{100 * merge / epoch:.2g}")  # As 130, where .2g alone says 1.3e+02.
            self.log(
                f"{self._name}: a merge takes {merge:.3g} s, {share:g} % of an "
                f"epoch of {self._task.steps_per_epoch} steps"
            )
        if self._watch.survived or self._watch.spikes:
            self.log(
                f"{self._name}: {self._watch.survived} times a replica's step was not finite, "
                f"{self._watch.spikes} times its loss or gradient norm left its band: "
                f"{self._workdir / 'events.jsonl'}"
            )

    def _performance(self, step: int) -> dict[str, float]:
        """Of the steps since the last call, seconds a step; goodput of this process's whole run."""
        before, self._mark = self._mark, (step, self._timeline.wall(), self._timeline.totals())
        seconds, wall = self._since(before)
        steps = step - before[0]
        total, all_wall = self._since(self._begin)
        return {
            "time/step": wall / steps,
            "time/data_wait": seconds["data"] / steps,
            "time/save": seconds["save"] / steps,
            "time/merge": seconds["merge"] / steps,
            "time/compile": seconds["compile"] / steps,
            "images_per_second": self._images * steps / wall,
            "goodput": total["train"] / all_wall * self._counted / (step - self._first),
        }

    def _since(self, mark: tuple[int, float, Any]) -> tuple[dict[str, float], float]:
        _, wall, seconds = mark
        now = self._timeline.totals()
        return {n: now[n] - seconds[n] for n in (*now, "merge", "save", "data", "compile")}, (
            self._timeline.wall() - wall
        )


def _names(tree: Any) -> list[str]:
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path in paths]
