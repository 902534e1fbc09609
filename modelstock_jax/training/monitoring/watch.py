"""An eye on the replicas: steps that are not finite, and losses out of their band."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from modelstock_jax.errors import UserError
from modelstock_jax.fileio import JsonLines

FLAGS = ("ok", "first_bad", "first_bad_weight")
BANDS = ("loss", "grad_norm")
ACTIONS = {
    "skip_step": "its step is skipped",
    "restore_last_merge": "it starts anew from the last merged model",
}
LEARNT_AFTER = 20  # values, before a band says anything


class Band:
    """The running mean and deviation of a series, and whether a value lies above them.

    With a_n = 1 / min(n, window), x the n-th value held at the edge where it lies above,

        mean <- mean + a_n (x - mean),    variance <- (1 - a_n) (variance + a_n (x - mean)^2),
        edge = mean + deviations * max(sqrt(variance), |mean| / 1000)

    A mean of all values at first, then an exponential one. A value above the edge widens the band
    as one at the edge does: one spike does not hide the next, and a new level is learnt.

    Args:
      deviations: how far up the edge lies.
      window: values that the band remembers, about.

    >>> band = Band(deviations=6.0, window=100)
    >>> [band.leaves(x) for x in [1.0, 1.1, 0.9] * 10 + [1.2, 5.0]][-2:]
    [False, True]
    """

    def __init__(self, deviations: float, window: int) -> None:
        self.mean = self.variance = 0.0
        self._count, self._deviations, self._window = 0, deviations, window

    @property
    def deviation(self) -> float:
        """What the edge is measured in; rounding alone is not a spike."""
        return max(math.sqrt(self.variance), abs(self.mean) / 1000)

    def leaves(self, value: float) -> bool:
        """Takes the next value; whether it lies above the band that those before it made."""
        edge = self.mean + self._deviations * self.deviation
        above = self._count >= LEARNT_AFTER and value > edge
        self._count += 1
        rate = 1 / min(self._count, self._window)
        change = (edge if above else value) - self.mean
        self.mean += rate * change
        self.variance = (1 - rate) * (self.variance + rate * change**2)
        return above


class Watch:
    """Reports what goes wrong in a replica, and ends a run that cannot go on.

    A step that is not finite is an event: a line in `events.jsonl` and on the screen; the step has
    dealt with it by then (`health`). A loss or gradient norm above its band is a line in the file,
    and nothing is done. Neither holds a clock: equal runs give equal bytes.

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
        survived: int = 0,
    ) -> None:
        self._config, self._names, self._lines, self._log = config, names, lines, log
        self._bands: dict[tuple[str, int], Band] = {}
        self.survived, self.spikes = survived, 0

    def look(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        """Reports the replicas whose step was not finite.

        Args:
          step: the step.
          values: `FLAGS` and `loss`, [R] each.

        Raises:
          UserError: with the policy 'stop', and where there were more than `max_events`.
        """
        policy, most = self._config.policy, self._config.max_events
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
                    "that checkpoint with --config.watch.policy=skip_step --allow_config_change"
                )
            self.survived += 1
            self._log(f"{what}: {ACTIONS[policy]} ({self.survived} of at most {most})")
            if self.survived > most:
                raise UserError(
                    f"{what}, and so were {most} before it: more than watch.max_events={most}. The "
                    "last checkpoint is untouched: lower optimizer.learning_rate in another "
                    "--workdir, or go on with a higher --config.watch.max_events"
                )

    def compare(self, step: int, scalars: Mapping[str, Any], *, again: bool = False) -> None:
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
                    Band(self._config.spike_deviations, self._config.spike_window),
                )
                mean, deviation = band.mean, band.deviation
                if band.leaves(value):
                    self.spikes += 1
                    if not again:
                        details = {name: value, "mean": mean, "deviation": deviation}
                        self._write(f"{name}_spike", step, replica, **details)

    def _write(self, event: str, step: int, replica: int, **details: Any) -> None:
        if self._lines is not None:
            self._lines.append({"event": event, "step": step, "replica": replica, **details})
            self._lines.flush()
