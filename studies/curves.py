"""WiSE-FT curves, comparisons at equal in-distribution accuracy, and cells of tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from modelstock_jax.reporting.tables import SHIFT_NAMES, MeanAndError, mean_and_error
from studies.expressions import Anchor, Between, Model
from studies.measurements import Score


def shift_name(name: str) -> str:
    """Return the name of a shift in tables.

    >>> shift_name("r"), shift_name("digits")
    ('IN-R', 'digits')
    """
    return SHIFT_NAMES.get(name, name)


def average_shifts(score: Mapping[str, Any], names: Sequence[str] | None = None) -> float:
    """Return 'avg. shifts' of a `Score`: the mean over all shifts, or over the named ones.

    >>> average_shifts({"id": 80.0, "shifts": {"v2": 70.0, "r": 60.0}})
    65.0
    """
    shifts = score["shifts"]
    accuracies = [shifts[name] for name in names or shifts]
    return sum(accuracies) / len(accuracies)


def id_and_shifts(
    score: Mapping[str, Any], names: Sequence[str] | None = None
) -> tuple[float, float]:
    """Return in-distribution accuracy and 'avg. shifts' of a `Score`; see `average_shifts`."""
    return score["id"], average_shifts(score, names)


def mean_cell(values: Sequence[float], digits: int = 2) -> str:
    """Format mean ± standard error for a table.

    >>> mean_cell([1.0, 3.0]), mean_cell([2.5]), mean_cell([])
    ('2.00 ± 1.00', '2.50', '–')
    """
    return estimate_cell(mean_and_error(values) if values else None, digits)


def estimate_cell(estimate: MeanAndError | None, digits: int = 2) -> str:
    """Format an estimate for a table, with its error if it has one."""
    if estimate is None:
        return "–"
    text = f"{estimate.mean:.{digits}f}"
    return text if estimate.error is None else f"{text} ± {estimate.error:.{digits}f}"


def accuracy_cells(scores: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return two cells of `Score`s: in-distribution accuracy and 'avg. shifts'.

    >>> accuracy_cells([{"id": 80.0, "shifts": {"v2": 70.0, "r": 60.0}}])
    ['80.00', '65.00']
    """
    return [
        mean_cell([score["id"] for score in scores]),
        mean_cell([average_shifts(score) for score in scores]),
    ]


def paper_cell(value: float | None, digits: int = 2) -> str:
    """Format a value of the paper for a table."""
    return "–" if value is None else f"{value:.{digits}f}"


Sample = TypeVar("Sample")
# Measured points between the anchor (0) and the model (1).
ALPHAS = (0.25, 0.5, 0.75)
_NUM_SAMPLES = 401
_NUM_LEVELS = 41


@dataclass(frozen=True)
class Curve:
    """The accuracies along w0 + alpha (w - w0), from which WiSE-FT chooses.

    Between the measured alphas, accuracies follow a cubic spline in alpha. A straight line would
    cut off the bends and so favor the model that is compared with the curve.

    Attributes:
      points: (alpha, in-distribution accuracy, average over the shifts) by increasing alpha; the
        first is the anchor's, the last the model's.

    Example:
      >>> points = [(a, 80 + 8 * a - 6 * a * a, 50 - 4 * a) for a in (0, 0.25, 0.5, 0.75, 1)]
      >>> curve = Curve(points)
      >>> curve.endpoint, round(curve.shifts_at(82.0), 2), curve.shifts_at(90.0)
      ((82, 46), 48.67, None)
    """

    points: Sequence[tuple[float, float, float]]

    @property
    def endpoint(self) -> tuple[float, float]:
        """(in distribution, shifts) of the model itself, alpha = 1, without tuning."""
        return tuple(self.points[-1][1:])

    @cached_property
    def samples(self) -> tuple[np.ndarray, np.ndarray]:
        """(in distribution, shifts) at 401 alphas of the curve."""
        from scipy.interpolate import (
            CubicSpline,
        )  # Takes half a second; not every command needs it.

        alphas, *accuracies = np.array(self.points, dtype=float).T
        dense_alphas = np.linspace(alphas[0], alphas[-1], _NUM_SAMPLES)
        return tuple(CubicSpline(alphas, values)(dense_alphas) for values in accuracies)

    def shifts_at(self, accuracy: float) -> float | None:
        """Return the best shifts accuracy at this in-distribution accuracy.

        None if the curve does not reach that accuracy. A curve that rises and falls again reaches
        an accuracy twice, the second time with less of the anchor's robustness. The first value is
        used, because alpha is free to choose.
        """
        x, y = self.samples
        low, high = x[:-1] - accuracy, x[1:] - accuracy
        (crossings,) = np.nonzero(low * high <= 0)
        if not crossings.size:
            return None
        rise = high[crossings] - low[crossings]
        fraction = np.where(rise == 0, 0.0, -low[crossings] / np.where(rise == 0, 1.0, rise))
        return float((y[crossings] + fraction * (y[crossings + 1] - y[crossings])).max())


def best_shifts_at(curves: Sequence[Curve], accuracy: float) -> float | None:
    """Return the best shifts accuracy of several curves at one in-distribution accuracy.

    The curves of a method with a strength are those of all its strengths.
    """
    values = [value for curve in curves if (value := curve.shifts_at(accuracy)) is not None]
    return max(values, default=None)


def model_gap(point: tuple[float, float], rivals: Sequence[Curve]) -> float | None:
    """Return shifts accuracy of a model minus a rival's curves, at the model's ID accuracy.

    None if no curve of the rival reaches that accuracy.

    Args:
      point: (in distribution, shifts) of the model without tuning.
      rivals: curves of one method.

    Example:
      >>> line = Curve([(a, 80 + 10 * a, 50 - 4 * a) for a in (0, 0.25, 0.5, 0.75, 1)])
      >>> round(model_gap((85.0, 49.0), [line]), 3), model_gap((95.0, 49.0), [line])
      (1.0, None)
    """
    accuracy, shifts = point
    rival = best_shifts_at(rivals, accuracy)
    return None if rival is None else shifts - rival


def curve_gap(curves: Sequence[Curve], rivals: Sequence[Curve]) -> float | None:
    """Return the mean difference of shifts accuracy between curves at equal ID accuracy.

    The mean is over the upper half of the in-distribution accuracies that both reach. Near the
    anchor, where all curves begin, they do not differ. None if they share no accuracy.

    Example:
      >>> line = [(a, 80 + 10 * a, 50 - 4 * a) for a in (0, 0.25, 0.5, 0.75, 1)]
      >>> higher = [(a, x, y + a) for a, x, y in line]
      >>> round(curve_gap([Curve(higher)], [Curve(line)]), 3)
      0.75
    """
    low = max(min(curve.samples[0].min() for curve in side) for side in (curves, rivals))
    high = min(max(curve.samples[0].max() for curve in side) for side in (curves, rivals))
    if low >= high:
        return None
    gaps = []
    for accuracy in np.linspace((low + high) / 2, high, _NUM_LEVELS):
        shifts, rival = best_shifts_at(curves, accuracy), best_shifts_at(rivals, accuracy)
        if shifts is not None and rival is not None:
            gaps.append(shifts - rival)
    return float(np.mean(gaps)) if gaps else None


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Return the mean accuracies of several curves, alpha by alpha.

    Comparing each seed separately has two problems. If curves bend, noise in a seed's
    in-distribution accuracy does not average out over comparisons. A seed at which a rival does
    not reach that accuracy is left out. Means over seeds reduce both.
    """
    points = zip(*(curve.points for curve in curves), strict=True)
    return Curve([tuple(np.mean(seeds, axis=0).tolist()) for seeds in points])


def jackknife(
    statistic: Callable[[Sequence[Sample]], float | None], samples: Sequence[Sample]
) -> MeanAndError | None:
    """Return a statistic of all samples with its leave-one-out standard error (Tukey).

        error^2 = (n - 1) / n sum_j (s_j - mean(s))^2,  s_j without sample j

    None if the statistic is None for all samples, or for all but one.

    Example:
      >>> estimate = jackknife(lambda values: float(np.mean(values)), [1.0, 2.0, 6.0])
      >>> round(estimate.mean, 3), round(estimate.error, 3)  # As for a plain mean.
      (3.0, 1.528)
    """
    count = len(samples)
    left_out = defined(statistic([*samples[:i], *samples[i + 1 :]]) for i in range(count))
    value = statistic(samples)
    if value is None or len(left_out) < count or count < 2:
        return None
    return MeanAndError(value, float(np.sqrt((count - 1) * np.var(left_out))))


def defined(gaps: Iterable[float | None]) -> list[float]:
    """Return the gaps that are not None: both sides reach that accuracy."""
    return [gap for gap in gaps if gap is not None]


# (in distribution, shifts) of a model.
Point = tuple[float, float]
Gap = Callable[[Sequence[tuple[Point, Curve]]], float | None]


def gap_at_equal_id(samples: Sequence[tuple[Point, Curve]]) -> float | None:
    """Return avg. shifts of mean accuracies, minus that of the mean curve at the same ID.

    Args:
      samples: (in distribution, shifts) of a model, and the curve that it is compared with.
    """
    points, rivals = zip(*samples, strict=True)
    accuracy, shifts = np.mean(points, axis=0).tolist()
    return model_gap((accuracy, shifts), [mean_curve(rivals)])


def gap_at_equal_shifts(samples: Sequence[tuple[Point, Curve]]) -> float | None:
    """Return ID of mean accuracies, minus that of the mean curve at the same avg. shifts."""
    return gap_at_equal_id(
        [
            ((shifts, accuracy), Curve([(alpha, y, x) for alpha, x, y in rival.points]))
            for (accuracy, shifts), rival in samples
        ]
    )


COMPARISONS: Mapping[str, Gap] = {
    "avg. shifts at equal ID": gap_at_equal_id,
    "ID at equal avg. shifts": gap_at_equal_shifts,
}


def gap_cell(gap: Gap, points: Sequence[Point], curves: Sequence[Curve]) -> str:
    """Return a cell with the gap of models to their curves, with its jackknife error."""
    return estimate_cell(jackknife(gap, list(zip(points, curves, strict=True))))


def curve_scores(
    models: Mapping[Any, Model], seed: Any, alphas: Sequence[float] = ALPHAS
) -> dict[tuple[Any, ...], Score]:
    """Return the measurements of curves: (name, seed) -> the model, (name, seed, alpha)."""
    measurements = {("zero_shot", seed): Score(Anchor())}
    for name, model in models.items():
        measurements[name, seed] = Score(model)
        measurements |= {(name, seed, alpha): Score(Between(model, alpha)) for alpha in alphas}
    return measurements


def curve(
    values: Mapping[Any, Any],
    name: Any,
    seed: Any,
    alphas: Sequence[float] = ALPHAS,
    shifts: Sequence[str] | None = None,
) -> Curve:
    """Return the curve of a model from the values of `curve_scores`, over all or named shifts."""
    keys = {0.0: ("zero_shot", seed)}
    keys |= {alpha: (name, seed, alpha) for alpha in alphas} | {1.0: (name, seed)}
    return Curve([(alpha, *id_and_shifts(values[key], shifts)) for alpha, key in keys.items()])
