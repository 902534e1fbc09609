"""Rows of results: one evaluated model each; and their mean over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from modelstock_jax.reporting.style import METHODS

Row = Mapping[str, Any]

# What a row may lack; it has always an `id`.
MEASURES = ("avg_shifts", "distance_to_anchor", "predicted_distance", "cost")


class Measured(NamedTuple):
    """A mean over seeds and its standard error (None with one seed)."""

    mean: float
    error: float | None = None


@dataclass(frozen=True)
class Summary:
    """One method over all its seeds; a measure that no row has is None."""

    method: str
    label: str
    alpha: float | None
    of: str | None
    unit: str | None
    num_seeds: int
    id: Measured
    avg_shifts: Measured | None
    distance_to_anchor: Measured | None
    predicted_distance: Measured | None
    cost: Measured | None
    shifts: dict[str, Measured] = field(default_factory=dict)


def make_row(
    method: str,
    *,
    id: float,
    shifts: Mapping[str, float],
    seed: int | None = None,
    cost: float = 0,
    distance_to_anchor: float | None = None,
    predicted_distance: float | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A row of `results.json`; the average of the shifts is their plain mean.

    Args:
      method: a key of `style.METHODS`, or a name of your own.
      id: top-1 accuracy on the in-distribution test set, in percent.
      shifts: name of a shift -> top-1 accuracy in percent.
      seed: the run's seed; None for what no seed enters (the anchor).
      cost: training spent, in fine-tunings of one model.
      distance_to_anchor: Euclidean, over all weights that are merged.
      predicted_distance: to the centre (root-sum-squares over units); None where not defined.
      **more: `alpha` and `of` ("replica" or "mean") of a WiSE-FT row, `num_replicas`; `unit` where
        it is not the run's own; anything else to keep.

    Returns:
      A plain dict.

    Example:
      >>> make_row("mean", id=70.0, shifts={"V2": 60.0, "R": 40.0}, seed=0)["avg_shifts"]
      50.0
    """
    shifts = {name: float(accuracy) for name, accuracy in shifts.items()}
    return {
        "method": method,
        "id": float(id),
        "shifts": shifts,
        "avg_shifts": sum(shifts.values()) / len(shifts) if shifts else None,
        "seed": seed,
        "cost": cost,
        "distance_to_anchor": distance_to_anchor,
        "predicted_distance": predicted_distance,
        **more,
    }


def mean_and_error(values: Sequence[float]) -> Measured:
    """The mean, and the standard error of the mean: sqrt(sum (x - mean)^2 / (S - 1) / S).

    Args:
      values: one number a seed; at least one.

    Returns:
      `Measured(mean, error)`; the error of a single value is None.

    Example:
      >>> mean_and_error([1.0, 3.0])
      Measured(mean=2.0, error=1.0)
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Measured(mean)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Measured(mean, math.sqrt(variance / count))


def summarise(rows: Iterable[Row]) -> list[Summary]:
    """Groups rows by method (and alpha, unit) in order of appearance; means and errors over seeds.

    Several rows of one seed (the replicas of a run) are averaged first: the error is over seeds.

    Args:
      rows: as `make_row` gives them.

    Returns:
      One `Summary` a method.
    """
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        key = tuple(row.get(name) for name in ("method", "of", "alpha", "unit", "num_replicas"))
        groups.setdefault(key, []).append(row)
    labels = [label(group[0]) for group in groups.values()]
    summaries = []
    for name, group in zip(labels, groups.values(), strict=True):
        first = group[0]
        if labels.count(name) > 1 and first.get("num_replicas"):
            name = f"{name}, N = {first['num_replicas']}"
        shifts = dict.fromkeys(shift for row in group for shift in row["shifts"])
        summaries.append(
            Summary(
                method=first["method"],
                label=name,
                alpha=first.get("alpha"),
                of=first.get("of"),
                unit=first.get("unit"),
                num_seeds=len({row.get("seed") for row in group}),
                id=over_seeds((row, row["id"]) for row in group),
                shifts={
                    shift: over_seeds(
                        (row, row["shifts"][shift]) for row in group if shift in row["shifts"]
                    )
                    for shift in shifts
                },
                **{measure: _known(group, measure) for measure in MEASURES},
            )
        )
    return summaries


def over_seeds(measured: Iterable[tuple[Row, float]]) -> Measured:
    """The mean over seeds of the means within a seed, of rows each with its value.

    Example:
      >>> over_seeds([({"seed": 0}, 1.0), ({"seed": 0}, 3.0), ({"seed": 1}, 4.0)])
      Measured(mean=3.0, error=1.0)
    """
    seeds: dict[Any, list[float]] = {}
    for row, value in measured:
        seeds.setdefault(row.get("seed"), []).append(float(value))
    return mean_and_error([math.fsum(group) / len(group) for group in seeds.values()])


def _known(rows: Sequence[Row], measure: str) -> Measured | None:
    known = [(row, row[measure]) for row in rows if row.get(measure) is not None]
    return over_seeds(known) if known else None


def label(row: Row) -> str:
    """What a reader calls the row's method.

    Example:
      >>> label({"method": "wise_ft", "alpha": 0.5, "of": "mean"})
      'WiSE-FT of the mean, α = 0.5'
    """
    method = METHODS.get(row["method"])
    if method is None:
        return str(row["method"])
    source = "the mean" if row.get("of") == "mean" else "one replica"
    text = method.label.format(
        n=row.get("num_replicas", "the"), of=source, alpha=row.get("alpha", 0.5)
    )
    return f"{text}, unit {row['unit']}" if row.get("unit") else text
