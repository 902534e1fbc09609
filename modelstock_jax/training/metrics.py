"""Logging of a run: metrics, events, performance, progress, and detection of bad steps."""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
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
from modelstock_jax.merging.trees import named_leaves
from modelstock_jax.reporting.metrics import MetricsWriter
from modelstock_jax.reporting.progress import Progress
from modelstock_jax.reporting.timeline import Timeline
from modelstock_jax.training import multihost
from modelstock_jax.training.step_fns import Task
from modelstock_jax.training.train_step import Metrics

FLAGS = ("ok", "first_bad", "first_bad_weight")
SPIKE_METRICS = ("loss", "grad_norm")
ACTIONS = {
    "skip_step": "its update is skipped",
    "restore_last_merge": "it restarts from the last merged model",
}
SPIKE_WARMUP = 20  # values before a detector reports spikes
COMPILE_EVENTS = "/jax/core/compile/"  # tracing, lowering, and XLA or its compilation cache


class TrainLogger:
    """The log of one run. Every process creates one; only process 0 writes files.

    The metrics of a step are read when the next step has been dispatched: reading them at once
    would make the device wait for the host. `flush_pending` reads them at once. It is called before
    a save or a merge, so that no value that is not finite is saved or merged.

    Args:
      config: options of the run
      task: the training task
      workdir: directory of the run
      name: name of the run in progress output
      start_step: step that training resumes from; 0 for a new run
      timeline: records the time
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
        self._start_step, self._timeline = start_step, timeline
        self._images_per_step = config.num_replicas * config.batch_size
        self._pending: tuple[int, Metrics] | None = None
        self._productive_steps = 0.0  # finite, and not repeated after a restart
        self._num_merges = 0

    def __enter__(self) -> TrainLogger:
        main, start = multihost.is_main(), self._start_step
        with contextlib.ExitStack() as stack:
            self._metrics = stack.enter_context(
                MetricsWriter(self._workdir, start or None, enabled=main)
            )
            events = None
            if main:
                keep = (lambda entry: entry.get("step", start + 1) <= start) if start else None
                events = stack.enter_context(JsonLines(self._workdir / "events.jsonl", keep))
            self._progress = stack.enter_context(
                Progress(
                    self._name,
                    self._task.num_steps,
                    done=start,
                    images_per_step=self._images_per_step,
                    enabled=main,
                )
            )
            stack.enter_context(show_compilation(self._progress))
            earlier = [entry["event"] for entry in events.preserved] if events is not None else []
            self._monitor = NonFiniteMonitor(
                self._config.monitor,
                list(named_leaves(self._task.params)),
                events,
                self.log,
                multihost.broadcast_from_main(earlier.count("not_finite")),
            )
            for line in self._metrics.preserved:
                self._monitor.check_spikes(line["step"], line, replayed=True)
            self._exit = stack.pop_all()
        if start:
            self.log(f"{self._name}: resumed from step {start}")
        self._mark = self._begin = (start, self._timeline.wall(), self._timeline.totals())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._exit.__exit__(kind, error, trace)

    def log_step(self, step: int, metrics: Metrics) -> None:
        """Store the metrics of a step, still on the device, and log those of the previous step.

        Raises:
          UserError: if the previous step was not finite and the run must stop, or the disk is full
        """
        self.flush_pending()
        self._pending = (step, metrics)

    def flush_pending(self) -> None:
        """Read and log the metrics that `log_step` stored last."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        due = step % self._config.log_every_steps == 0 or step == self._task.num_steps
        values = multihost.to_host(metrics if due else {name: metrics[name] for name in FLAGS})
        ok = values["ok"]
        if not ok.all():
            self._monitor.check(step, values | {"loss": multihost.to_host(metrics["loss"])})
        if step > self._metrics.furthest:
            self._productive_steps += ok.mean()
        if not due:
            self._progress.update(step)
            return
        scalars = {
            f"train/{name}/replica_{r}": float(x)
            for name, per_replica in values.items()
            if name not in FLAGS
            for r, x in enumerate(per_replica)
        }
        self._metrics.write(step, scalars)
        self._metrics.write_performance(step, self._performance(step))
        self._monitor.check_spikes(step, scalars)
        self._progress.update(step, {name: values[name].mean() for name in ("loss", "accuracy")})

    def log_merge(self, step: int, stats: Stats) -> None:
        """Log the cosines and ratios of a merge.

        Raises:
          UserError: if the parameters of a replica are not finite
        """
        stats = multihost.to_host(stats)
        check_finite(stats)
        values = {"merge/epoch": step / self._task.steps_per_epoch}
        for row in report(stats):
            values[f"merge/cosine/{row['name']}"] = row["cosine"]
            values[f"merge/ratio/{row['name']}"] = row["ratio"]
        self._metrics.write(step, values)
        self._num_merges += 1

    def flush(self) -> None:
        """Flush the metrics files."""
        self._metrics.flush()

    def log(self, line: str) -> None:
        """Print a line."""
        self._progress.log(line)

    def finish(self, step: int) -> None:
        """Print one line each about the time of the merges and about bad steps."""
        steps, (seconds, _) = step - self._start_step, self._since(self._begin)
        if self._num_merges:
            merge = seconds["merge"] / self._num_merges
            epoch = (seconds["train"] + seconds["data"]) / steps * self._task.steps_per_epoch
            percent = float(f"{100 * merge / epoch:.2g}")  # prints 130; .2g alone prints 1.3e+02
            self.log(
                f"{self._name}: {merge:.3g} s per merge, {percent:g} % of an epoch of "
                f"{self._task.steps_per_epoch} steps"
            )
        if self._monitor.num_non_finite or self._monitor.num_spikes:
            self.log(
                f"{self._name}: {self._monitor.num_non_finite} non-finite replica steps, "
                f"{self._monitor.num_spikes} spikes of the loss or gradient norm; see "
                f"{self._workdir / 'events.jsonl'}"
            )

    def _performance(self, step: int) -> dict[str, float]:
        """Return seconds per step since the last call, and goodput since the process started."""
        last, self._mark = self._mark, (step, self._timeline.wall(), self._timeline.totals())
        seconds, wall = self._since(last)
        steps = step - last[0]
        total_seconds, total_wall = self._since(self._begin)
        productive = self._productive_steps / (step - self._start_step)
        return {
            "time/step": wall / steps,
            "time/data_wait": seconds["data"] / steps,
            "time/save": seconds["save"] / steps,
            "time/merge": seconds["merge"] / steps,
            "time/compile": seconds["compile"] / steps,
            "images_per_second": self._images_per_step * steps / wall,
            "goodput": total_seconds["train"] / total_wall * productive,
        }

    def _since(self, mark: tuple[int, float, Any]) -> tuple[dict[str, float], float]:
        """Return (seconds per phase, wall time) since a mark."""
        _, wall, seconds = mark
        now = self._timeline.totals()
        return {n: now[n] - seconds[n] for n in (*now, "merge", "save", "data", "compile")}, (
            self._timeline.wall() - wall
        )


class NonFiniteMonitor:
    """Report non-finite steps and spikes of the replicas, and stop a run that cannot continue.

    A non-finite step is written to `events.jsonl` and printed; the train step has already applied
    `monitor.on_non_finite`. A spike of the loss or gradient norm is only written to the file. Both
    are without timestamps, so that the files of identical runs are bitwise identical.

    Args:
      config: the `monitor` group of `configs/default.py`
      names: names of a replica's leaves, in tree order
      events: `events.jsonl`, or None if another process writes it
      log: prints a line
      num_non_finite: non-finite replica steps of this run before it was resumed

    Attributes:
      num_non_finite: non-finite replica steps so far
      num_spikes: spikes so far
    """

    def __init__(
        self,
        config: ConfigDict,
        names: Sequence[str],
        events: JsonLines | None,
        log: Callable[[str], None],
        num_non_finite: int = 0,
    ) -> None:
        self._config, self._names, self._events, self._log = config, names, events, log
        self._detectors: dict[tuple[str, int], SpikeDetector] = {}
        self.num_non_finite, self.num_spikes = num_non_finite, 0

    def check(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        """Report the replicas whose step was not finite.

        Args:
          step: the step
          values: `FLAGS` and "loss", each [R]

        Raises:
          UserError: if `on_non_finite` is 'stop', or there were more than `max_non_finite_steps`
        """
        action, limit = self._config.on_non_finite, self._config.max_non_finite_steps
        for replica in np.flatnonzero(~values["ok"]).tolist():
            tensor, problem = self._describe(step, replica, values)
            loss = float(values["loss"][replica])
            self._write("not_finite", step, replica, tensor=tensor, loss=loss, action=action)
            if action == "stop":
                raise UserError(
                    f"{problem}; this step was neither merged nor saved, and the last checkpoint "
                    "is intact: lower optimizer.learning_rate in a new --workdir, or resume from "
                    "that checkpoint with --config.monitor.on_non_finite=skip_step "
                    "--allow_config_change"
                )
            self.num_non_finite += 1
            self._log(
                f"{problem}: {ACTIONS[action]} ({self.num_non_finite} of at most {limit} "
                "non-finite steps)"
            )
            if self.num_non_finite > limit:
                raise UserError(
                    f"{problem}: more than monitor.max_non_finite_steps={limit} replica steps were "
                    "not finite; the last checkpoint is intact: lower optimizer.learning_rate in a "
                    "new --workdir, or resume with a higher --config.monitor.max_non_finite_steps"
                )

    def _describe(
        self, step: int, replica: int, values: Mapping[str, np.ndarray]
    ) -> tuple[str | None, str]:
        """Return (tensor or None, what is not finite)."""
        loss = float(values["loss"][replica])
        gradient, weights = (
            self._names[leaf] if (leaf := int(values[flag][replica])) >= 0 else None
            for flag in FLAGS[1:]
        )
        where = f"replica {replica}, step {step}: "
        if gradient:
            return gradient, where + f"gradient of {gradient} is not finite"
        if not math.isfinite(loss):
            return weights, where + f"the loss is {loss}, although all gradients are finite"
        return weights, where + (
            f"weights of {weights} are not finite after the update, although their gradient is"
        )

    def check_spikes(
        self, step: int, scalars: Mapping[str, Any], *, replayed: bool = False
    ) -> None:
        """Look for spikes in the losses and gradient norms of a line of metrics.

        Args:
          step: the step
          scalars: "train/NAME/replica_R" -> value; None and non-finite values are ignored
          replayed: whether the line was logged before the run was resumed, so that its events are
            in the file already
        """
        if not self._config.spike_deviations:
            return
        for name in SPIKE_METRICS:
            for replica in itertools.count():
                series = f"train/{name}/replica_{replica}"
                if series not in scalars:
                    break
                value = scalars[series]
                if value is None or not math.isfinite(value):
                    continue
                detector = self._detectors.setdefault(
                    (name, replica),
                    SpikeDetector(self._config.spike_deviations, self._config.spike_window),
                )
                mean, deviation = detector.mean, detector.deviation
                if detector.update(value):
                    self.num_spikes += 1
                    if not replayed:
                        details = {name: value, "mean": mean, "deviation": deviation}
                        self._write(f"{name}_spike", step, replica, **details)

    def _write(self, event: str, step: int, replica: int, **details: Any) -> None:
        if self._events is not None:
            self._events.append({"event": event, "step": step, "replica": replica, **details})
            self._events.flush()


class SpikeDetector:
    """Running mean and deviation of a series, and detection of values far above them.

    With a_n = 1 / min(n, window) and x the n-th value, clipped to the limit,

        mean <- mean + a_n (x - mean),    variance <- (1 - a_n) (variance + a_n (x - mean)^2),
        limit = mean + deviations * max(sqrt(variance), |mean| / 1000)

    The mean is arithmetic for the first `window` values, then exponential. A spike is clipped to
    the limit, so that it does not hide the next spike, and the detector adapts to a new level.

    Args:
      deviations: distance of the limit from the mean, in deviations
      window: approximate number of values that the mean covers

    Example:
      >>> detector = SpikeDetector(deviations=6.0, window=100)
      >>> [detector.update(x) for x in [1.0, 1.1, 0.9] * 10 + [1.2, 5.0]][-2:]
      [False, True]
    """

    def __init__(self, deviations: float, window: int) -> None:
        self.mean = self.variance = 0.0
        self._count, self._deviations, self._window = 0, deviations, window

    @property
    def deviation(self) -> float:
        """The standard deviation, at least |mean| / 1000, so that rounding is not a spike."""
        return max(math.sqrt(self.variance), abs(self.mean) / 1000)

    def update(self, value: float) -> bool:
        """Add a value. Return whether it is a spike relative to the values before it."""
        limit = self.mean + self._deviations * self.deviation
        is_spike = self._count >= SPIKE_WARMUP and value > limit
        self._count += 1
        rate = 1 / min(self._count, self._window)
        change = (limit if is_spike else value) - self.mean
        self.mean += rate * change
        self.variance = (1 - rate) * (self.variance + rate * change**2)
        return is_spike


@contextlib.contextmanager
def count_compilation(timeline: Timeline) -> Iterator[None]:
    """Count compilation time as phase "compile" of the timeline, not as part of the open phase."""

    def listen(event: str, duration_secs: float, **_) -> None:
        if event.startswith(COMPILE_EVENTS):
            timeline.move("compile", duration_secs)

    monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        monitoring.unregister_event_duration_listener(listen)


@contextlib.contextmanager
def show_compilation(progress: Progress) -> Iterator[None]:
    """Show in `progress` that JAX compiles, and leave this time out of its rate."""
    thread = threading.get_ident()

    def begin(event: str, value: float, **_) -> None:
        if event.startswith(COMPILE_EVENTS) and threading.get_ident() == thread:
            progress.begin_pause("compiling ...")

    def end(event: str, duration_secs: float, **_) -> None:
        if event.startswith(COMPILE_EVENTS) and threading.get_ident() == thread:
            progress.end_pause()

    monitoring.register_scalar_listener(begin)  # JAX records the start of a compilation as one.
    monitoring.register_event_duration_secs_listener(end)
    try:
        yield
    finally:
        monitoring.unregister_scalar_listener(begin)
        monitoring.unregister_event_duration_listener(end)
