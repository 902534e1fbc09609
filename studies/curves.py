"""WiSE-FT curves, models compared at equal accuracy in distribution, and cells of tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from modelstock_jax.reporting.tables import MeanAndError, mean_and_error
from studies.expressions import Anchor, Between, Model
from studies.measurements import Score

# Numbers of Scores, and the cells of tables that show them.


def average(score: Mapping[str, Any], names: Sequence[str] | None = None) -> float:
    """'Avg shifts' of a Score: the plain mean, of all or of some.

    >>> average({"id": 80.0, "shifts": {"v2": 70.0, "r": 60.0}})
    65.0
    """
    shifts = score["shifts"]
    chosen = [shifts[name] for name in names or shifts]
    return sum(chosen) / len(chosen)


def id_and_shifts(score: Mapping[str, Any]) -> tuple[float, float]:
    """The two numbers of a Score: accuracy in distribution, and 'avg shifts'."""
    return score["id"], average(score)


def shown(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± standard error, as a table's cell.

    >>> shown([1.0, 3.0]), shown([2.5]), shown([])
    ('2.00 ± 1.00', '2.50', '–')
    """
    return with_error(mean_and_error(values) if values else None, digits)


def with_error(found: MeanAndError | None, digits: int = 2) -> str:
    """A mean and its error, where it has one."""
    if found is None:
        return "–"
    text = f"{found.mean:.{digits}f}"
    return text if found.error is None else f"{text} ± {found.error:.{digits}f}"


def both(scores: Sequence[Mapping[str, Any]]) -> list[str]:
    """Two cells of Scores: accuracy in distribution, and 'avg shifts'.

    >>> both([{"id": 80.0, "shifts": {"v2": 70.0, "r": 60.0}}])
    ['80.00', '65.00']
    """
    return [shown([score["id"] for score in scores]), shown([average(score) for score in scores])]


def theirs(value: float | None, digits: int = 2) -> str:
    """A number of the paper, as a table's cell."""
    return "–" if value is None else f"{value:.{digits}f}"


Sample = TypeVar("Sample")
# Between the anchor (0) and the model (1).
ALPHAS = (0.25, 0.5, 0.75)
_DENSE = 401
_LEVELS = 41


@dataclass(frozen=True)
class Curve:
    """Accuracy along w0 + alpha (w - w0): what WiSE-FT may choose from.

    Between its alphas accuracies follow a cubic spline in alpha: a straight line would cut the
    bends and so favor whatever is compared at a measured alpha.

    Attributes:
      points: (alpha, accuracy in distribution, average over the shifts), alpha rising; the first is
        the anchor's, the last the model's own.

    Example:
      >>> curve = Curve([(a, 80 + 8 * a - 6 * a * a, 50 - 4 * a) for a in (0, 0.25, 0.5, 0.75, 1)])
      >>> curve.own, round(curve.at(82.0), 2), curve.at(90.0)
      ((82, 46), 48.67, None)
    """

    points: Sequence[tuple[float, float, float]]

    @property
    def own(self) -> tuple[float, float]:
        """(in distribution, shifts) of the model itself, with nothing tuned."""
        return tuple(self.points[-1][1:])

    @cached_property
    def dense(self) -> tuple[np.ndarray, np.ndarray]:
        """Many (in distribution, shifts) along the curve."""
        from scipy.interpolate import CubicSpline  # Half a second: only where curves are read.

        alphas, *accuracies = np.array(self.points, dtype=float).T
        between = np.linspace(alphas[0], alphas[-1], _DENSE)
        return tuple(CubicSpline(alphas, one)(between) for one in accuracies)

    def at(self, accuracy: float) -> float | None:
        """The best shifts at this accuracy in distribution; None where the curve has none such.

        A curve that rises and falls again meets an accuracy twice, the second time with less of
        the anchor's robustness: whoever may choose alpha takes the first.
        """
        x, y = self.dense
        low, high = x[:-1] - accuracy, x[1:] - accuracy
        (met,) = np.nonzero(low * high <= 0)
        if not met.size:
            return None
        rise = high[met] - low[met]
        share = np.where(rise == 0, 0.0, -low[met] / np.where(rise == 0, 1.0, rise))
        return float((y[met] + share * (y[met + 1] - y[met])).max())


def best_at(curves: Sequence[Curve], accuracy: float) -> float | None:
    """The best of several curves at one accuracy: a rival with a strength, at its best one."""
    found = [value for one in curves if (value := one.at(accuracy)) is not None]
    return max(found, default=None)


def own_above(one: tuple[float, float], rivals: Sequence[Curve]) -> float | None:
    """How far a model, as it is, lies above a rival's curves at its own accuracy, on the shifts.

    None where no curve of the rival has that accuracy.

    Example:
      >>> line = Curve([(a, 80 + 10 * a, 50 - 4 * a) for a in (0, 0.25, 0.5, 0.75, 1)])
      >>> round(own_above((85.0, 49.0), [line]), 3), own_above((95.0, 49.0), [line])
      (1.0, None)
    """
    accuracy, shifts = one
    rival = best_at(rivals, accuracy)
    return None if rival is None else shifts - rival


def curve_above(one: Sequence[Curve], rivals: Sequence[Curve]) -> float | None:
    """How far curves lie above a rival's, on the shifts: the mean over accuracies of both.

    It is taken over the upper half of the accuracies in distribution that both have: near the
    anchor, where all curves begin, there is nothing to tell apart. None where there are no such.

    Example:
      >>> line = [(a, 80 + 10 * a, 50 - 4 * a) for a in (0, 0.25, 0.5, 0.75, 1)]
      >>> higher = [(a, x, y + a) for a, x, y in line]
      >>> round(curve_above([Curve(higher)], [Curve(line)]), 3)
      0.75
    """
    low = max(min(c.dense[0].min() for c in curves) for curves in (one, rivals))
    high = min(max(c.dense[0].max() for c in curves) for curves in (one, rivals))
    if low >= high:
        return None
    gaps = []
    for accuracy in np.linspace((low + high) / 2, high, _LEVELS):
        mine, theirs = best_at(one, accuracy), best_at(rivals, accuracy)
        if mine is not None and theirs is not None:
            gaps.append(mine - theirs)
    return float(np.mean(gaps)) if gaps else None


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Mean accuracies, alpha by alpha.

    Where curves bend, noise in one seed's accuracy in distribution does not average out over
    comparisons, and a seed at which a rival does not reach that accuracy drops out of them. Of the
    means there is less of both.
    """
    points = zip(*(one.points for one in curves), strict=True)
    return Curve([tuple(np.mean(seeds, axis=0).tolist()) for seeds in points])


def jackknife(
    statistic: Callable[[Sequence[Sample]], float | None], samples: Sequence[Sample]
) -> MeanAndError | None:
    """A statistic of all samples, and its standard error from leaving out each in turn (Tukey).

        error^2 = (n - 1) / n sum_j (s_j - mean(s))^2,  s_j without sample j

    None where the statistic is, of all or without one.

    Example:
      >>> found = jackknife(lambda values: float(np.mean(values)), [1.0, 2.0, 6.0])
      >>> round(found.mean, 3), round(found.error, 3)  # As of a plain mean.
      (3.0, 1.528)
    """
    count = len(samples)
    without = known(statistic([*samples[:i], *samples[i + 1 :]]) for i in range(count))
    found = statistic(samples)
    if found is None or len(without) < count or count < 2:
        return None
    return MeanAndError(found, float(np.sqrt((count - 1) * np.var(without))))


def known(gaps: Iterable[float | None]) -> list[float]:
    """Those that could be read: where both have a point of that accuracy."""
    return [gap for gap in gaps if gap is not None]


def curve_scores(
    models: Mapping[Any, Model], seed: Any, alphas: Sequence[float] = ALPHAS
) -> dict[tuple[Any, ...], Score]:
    """What the curves of models need: (name, seed) -> the model's score, (name, seed, alpha)."""
    wanted = {("zero_shot", seed): Score(Anchor())}
    for name, model in models.items():
        wanted[name, seed] = Score(model)
        wanted |= {(name, seed, alpha): Score(Between(model, alpha)) for alpha in alphas}
    return wanted


def curve(
    values: Mapping[Any, Any], name: Any, seed: Any, alphas: Sequence[float] = ALPHAS
) -> Curve:
    """The curve of a model from what `curve_scores` asked for."""
    keys = {0.0: ("zero_shot", seed)}
    keys |= {alpha: (name, seed, alpha) for alpha in alphas} | {1.0: (name, seed)}
    return Curve([(a, *id_and_shifts(values[key])) for a, key in keys.items()])
