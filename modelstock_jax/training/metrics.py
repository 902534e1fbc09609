"""What a run tells while it goes: metrics, events, performance and progress."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from jax import monitoring
from ml_collections import ConfigDict

from modelstock_jax.errors import UserError
from modelstock_jax.fileio import JsonLines
from modelstock_jax.merging import Stats, check_finite, report
from modelstock_jax.merging.gram import named_leaves
from modelstock_jax.reporting.metrics import MetricsWriter
from modelstock_jax.reporting.progress import Progress
from modelstock_jax.reporting.timeline import Timeline
from modelstock_jax.training import multihost
from modelstock_jax.training.step_fns import Task
from modelstock_jax.training.train_step import Metrics

FLAGS = ("ok", "first_bad", "first_bad_weight")
BANDS = ("loss", "grad_norm")
ACTIONS = {
    "skip_step": "its step is skipped",
    "restore_last_merge": "it starts anew from the last merged model",
}
SPIKE_WARMUP = 20  # values, before a band says anything


class TrainLogger:
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
        start_step: int,
        timeline: Timeline,
    ) -> None:
        self._config, self._task, self._workdir, self._name = config, task, workdir, name
        self._first, self._timeline = start_step, timeline
        self._images = config.num_replicas * config.batch_size
        self._late: tuple[int, Metrics] | None = None
        self._counted = 0.0  # Steps that count: finite, and not of an earlier life.
        self._merges = 0

    def __enter__(self) -> TrainLogger:
        main, first = multihost.is_main(), self._first
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
            self._monitor = NonFiniteMonitor(
                self._config.monitor,
                list(named_leaves(self._task.params)),
                events,
                self.log,
                multihost.broadcast_from_main(before.count("not_finite")),
            )
            for line in self._metrics.kept:
                self._monitor.check_spikes(line["step"], line, replayed=True)
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

    def log_step(self, step: int, values: Metrics) -> None:
        """Takes a step's values, on the device yet, and reads those of the step before.

        Raises:
          UserError: if that one was not finite and the run is not to go on; or the disk is full.
        """
        self.flush_pending()
        self._late = (step, values)

    def flush_pending(self) -> None:
        """Reads the values that were taken last; see `step`."""
        if self._late is None:
            return
        (step, values), self._late = self._late, None
        due = step % self._config.log_every_steps == 0 or step == self._task.num_steps
        read = multihost.to_host(values if due else {name: values[name] for name in FLAGS})
        ok = read["ok"]
        if not ok.all():
            self._monitor.check(step, read | {"loss": multihost.to_host(values["loss"])})
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
        self._monitor.check_spikes(step, scalars)
        self._progress.update(step, {name: read[name].mean() for name in ("loss", "accuracy")})

    def log_merge(self, step: int, stats: Stats) -> None:
        """Writes a merge's cosines and ratios.

        Raises:
          UserError: if a replica's weights are not finite.
        """
        stats = multihost.to_host(stats)
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
        if self._monitor.num_non_finite or self._monitor.num_spikes:
            self.log(
                f"{self._name}: {self._monitor.num_non_finite} times a replica's step was not finite, "
                f"{self._monitor.num_spikes} times its loss or gradient norm left its band: "
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


# An eye on the replicas: steps that are not finite, and losses out of their band.


class NonFiniteMonitor:
    """Reports what goes wrong in a replica, and ends a run that cannot go on.

    A step that is not finite is an event: a line in `events.jsonl` and on the screen; the step has
    dealt with it by then (`train_step`). A loss or gradient norm above its band is a line in the
    file, and nothing is done. Neither holds a clock: equal runs give equal bytes.

    Args:
      config: the `watch` group of `configs/default.py`.
      names: of the leaves of a replica's weights, in the tree's order.
      lines: `events.jsonl`, or None where another process writes it.
      log: prints a line.
      survived: events of this run before it was resumed.

    Attributes:
      survived: replicas' steps that were not finite, so far.
      spikes: values above their band, so far.
    """

    def __init__(
        self,
        config: ConfigDict,
        names: Sequence[str],
        lines: JsonLines | None,
        log: Callable[[str], None],
        num_non_finite: int = 0,
    ) -> None:
        self._config, self._names, self._lines, self._log = config, names, lines, log
        self._bands: dict[tuple[str, int], SpikeDetector] = {}
        self.num_non_finite, self.num_spikes = num_non_finite, 0

    def check(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        """Reports the replicas whose step was not finite.

        Args:
          step: the step.
          values: `FLAGS` and `loss`, [R] each.

        Raises:
          UserError: with the policy 'stop', and where there were more than `max_events`.
        """
        policy, most = self._config.on_non_finite, self._config.max_non_finite_steps
        for replica in np.flatnonzero(~values["ok"]).tolist():
            loss = float(values["loss"][replica])
            gradient, weights = (
                self._names[leaf] if (leaf := int(values[flag][replica])) >= 0 else None
                for flag in FLAGS[1:]
            )
            tensor, what = gradient or weights, f"replica {replica}, step {step}: "
            if gradient:
                what += f"gradient of {tensor} is not finite"
            elif not math.isfinite(loss):
                what += f"the loss is {loss}, though every gradient is finite"
            else:
                what += f"weights of {tensor} are not finite after it, though their gradient is"
            self._write("not_finite", step, replica, tensor=tensor, loss=loss, action=policy)
            if policy == "stop":
                raise UserError(
                    f"{what}. Nothing of it was merged or saved, and the last checkpoint is "
                    "untouched: lower optimizer.learning_rate in another --workdir, or go on from "
                    "that checkpoint with --config.monitor.on_non_finite=skip_step --allow_config_change"
                )
            self.num_non_finite += 1
            self._log(f"{what}: {ACTIONS[policy]} ({self.num_non_finite} of at most {most})")
            if self.num_non_finite > most:
                raise UserError(
                    f"{what}, and so were {most} before it: more than monitor.max_non_finite_steps={most}. The "
                    "last checkpoint is untouched: lower optimizer.learning_rate in another "
                    "--workdir, or go on with a higher --config.monitor.max_non_finite_steps"
                )

    def check_spikes(
        self, step: int, scalars: Mapping[str, Any], *, replayed: bool = False
    ) -> None:
        """Holds a line of metrics against the bands of its losses and gradient norms.

        Args:
          step: the step.
          scalars: "train/NAME/replica_R" -> number; None or not finite is passed over.
          again: whether the line is of an earlier life, whose events are in the file.
        """
        if not self._config.spike_deviations:
            return
        for name in BANDS:
            for replica in itertools.count():
                series = f"train/{name}/replica_{replica}"
                if series not in scalars:
                    break
                value = scalars[series]
                if value is None or not math.isfinite(value):
                    continue
                band = self._bands.setdefault(
                    (name, replica),
                    SpikeDetector(self._config.spike_deviations, self._config.spike_window),
                )
                mean, deviation = band.mean, band.deviation
                if band.update(value):
                    self.num_spikes += 1
                    if not replayed:
                        details = {name: value, "mean": mean, "deviation": deviation}
                        self._write(f"{name}_spike", step, replica, **details)

    def _write(self, event: str, step: int, replica: int, **details: Any) -> None:
        if self._lines is not None:
            self._lines.append({"event": event, "step": step, "replica": replica, **details})
            self._lines.flush()


class SpikeDetector:
    """The running mean and deviation of a series, and whether a value lies above them.

    With a_n = 1 / min(n, window), x the n-th value held at the edge where it lies above,

        mean <- mean + a_n (x - mean),    variance <- (1 - a_n) (variance + a_n (x - mean)^2),
        edge = mean + deviations * max(sqrt(variance), |mean| / 1000)

    A mean of all values at first, then an exponential one. A value above the edge widens the band
    as one at the edge does: one spike does not hide the next, and a new level is learnt.

    Args:
      deviations: how far up the edge lies.
      window: values that the band remembers, about.

    >>> band = SpikeDetector(deviations=6.0, window=100)
    >>> [band.update(x) for x in [1.0, 1.1, 0.9] * 10 + [1.2, 5.0]][-2:]
    [False, True]
    """

    def __init__(self, deviations: float, window: int) -> None:
        self.mean = self.variance = 0.0
        self._count, self._deviations, self._window = 0, deviations, window

    @property
    def deviation(self) -> float:
        """What the edge is measured in; rounding alone is not a spike."""
        return max(math.sqrt(self.variance), abs(self.mean) / 1000)

    def update(self, value: float) -> bool:
        """Takes the next value; whether it lies above the band that those before it made."""
        edge = self.mean + self._deviations * self.deviation
        above = self._count >= SPIKE_WARMUP and value > edge
        self._count += 1
        rate = 1 / min(self._count, self._window)
        change = (edge if above else value) - self.mean
        self.mean += rate * change
        self.variance = (1 - rate) * (self.variance + rate * change**2)
        return above


# How long jax traces and compiles, counted apart from the phase in which it happens.

COMPILES = "/jax/core/compile/"  # Tracing, lowering, and XLA or the cache of its programs.


@contextlib.contextmanager
def counted(timeline: Timeline) -> Iterator[None]:
    """Moves what the open phase of `timeline` spends compiling to its phase "compile"."""

    def listen(event: str, duration_secs: float, **_) -> None:
        if event.startswith(COMPILES):
            timeline.move("compile", duration_secs)

    monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        monitoring.unregister_event_duration_listener(listen)
