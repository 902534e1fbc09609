"""Weights of the checkpoints of one run in their average: EMA, and a learning-rate decay (WSM)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from modelstock_jax.errors import UserError, suggest

# A decay of the learning rate from 1 at x = 0 to 0 at x = 1 -> its integral from 0 to x.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: x - x**2 / 2,
    "cosine": lambda x: x / 2 + math.sin(math.pi * x) / (2 * math.pi),
    "1-sqrt": lambda x: x - x**1.5 * 2 / 3,
}


def ema_weights(decay: float, number: int) -> np.ndarray:
    """Return the weights of checkpoints in their exponential moving average, [number].

        c_1 = decay^(K - 1),    c_k = (1 - decay) decay^(K - k) for k > 1

    It is the last value of `ema`, which starts at the first checkpoint.

    Args:
      decay: in [0, 1)
      number: K

    Raises:
      UserError: the decay is outside [0, 1)

    Example:
      >>> ema_weights(0.5, 3).tolist()
      [0.25, 0.25, 0.5]
    """
    if not 0 <= decay < 1:
        raise UserError(f"decay must be in [0, 1), not {decay:g}")
    powers = decay ** np.arange(number - 1, -1, -1, dtype=np.float64)
    return np.where(np.arange(number) > 0, (1 - decay) * powers, powers)


def decay_weights(schedule: str, steps: Sequence[float], length: float | None = None) -> np.ndarray:
    """Return the weights whose average imitates a learning-rate decay at the end of the run (WSM).

    The average is w_1 + sum_k f_k (w_k - w_{k-1}): each update between two checkpoints is
    multiplied by the mean f_k of the decay over its steps (arXiv 2507.17634, section 3). So the
    weights are

        c_1 = 1 - f_2,    c_k = f_k - f_{k+1},    c_K = f_K

    If the updates of the run are fixed, and proportional to the learning rate, the average is
    exactly the result of the run with the decay.

    Args:
      schedule: `linear`, `cosine` or `1-sqrt`: from 1 to 0 over the decay
      steps: steps of the checkpoints, increasing, [K]
      length: number of steps of the decay, up to the last checkpoint; None from the first one on

    Returns:
      [K], not negative, with sum 1; 0 for checkpoints before the last one at full rate

    Raises:
      UserError: the schedule is unknown, the steps do not increase, or the length is not positive

    Example:
      >>> decay_weights("linear", [0, 1, 2, 3, 4]).tolist()
      [0.125, 0.25, 0.25, 0.25, 0.125]
      >>> decay_weights("linear", [0, 1, 2, 3, 4], length=2).tolist()
      [0.0, 0.0, 0.25, 0.5, 0.25]
    """
    if schedule not in SCHEDULES:
        raise UserError(
            f"schedule {schedule!r} is not valid; choose one of {', '.join(SCHEDULES)}"
            f"{suggest(schedule, SCHEDULES)}"
        )
    if any(b <= a for a, b in itertools.pairwise(steps)):
        raise UserError(f"the steps of the checkpoints must increase, not {list(steps)}")
    length = steps[-1] - steps[0] if length is None else length
    if len(steps) > 1 and not length > 0:
        raise UserError(f"the length of the decay must be above 0, not {length:g}")
    integral, start = SCHEDULES[schedule], steps[-1] - length

    def of_decay(step: float) -> float:
        """Return the integral of the learning rate up to a step, which is 1 before the decay."""
        elapsed = step - start
        return elapsed if elapsed < 0 else length * integral(elapsed / length)

    rates = [
        (of_decay(b) - of_decay(a)) / (b - a) for a, b in itertools.pairwise(steps)
    ]  # f_2 .. f_K
    weights = -np.diff([1.0, *rates, 0.0])
    return np.where(weights > 1e-15, weights, 0.0)
