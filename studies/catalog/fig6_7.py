"""Figures 6 and 7: one merge, and a series of merges, drawn from measured weights."""

from __future__ import annotations

import math

from studies import figures
from studies.catalog.fig2 import NO_GRADIENT
from studies.catalog.model_pool import MERGING, PAIR
from studies.expressions import Mean, Merged, Replica
from studies.measurements import Angles, Measurement, Projected
from studies.runs import Run
from studies.study import Setup, Study, StudyReport, Table, Values


def _pair(setup: Setup) -> dict[str, Measurement]:
    run = Run.of(setup.seeds[0], PAIR)
    return {"angles": Angles((Replica(run, 0), Replica(run, 1)))}


def triangle(angle: float, norms: tuple[float, float]) -> figures.Triangle:
    """Return w1, w2, their mean and w_H on the plane through w0, with w0 as the origin.

    The mean is on the first axis. w_H = t mean, with t of equation 2, from the angle alone.

    Args:
      angle: between the task vectors, in degrees.
      norms: of the task vectors.
    """
    cosine = math.cos(math.radians(angle))
    t = 2 * cosine / (1 + cosine) if cosine > 0 else 0.0
    a, b = norms
    mean = math.sqrt(a * a + b * b + 2 * a * b * cosine) / 2
    # Components of the first task vector along the mean and across it.
    along = (a * a + a * b * cosine) / (2 * mean)
    across = math.sqrt(max(0.0, a * a - along * along))
    return figures.Triangle(
        first=(along, across),
        second=(2 * mean - along, -across),
        mean=mean,
        merged=t * mean,
        angle=angle,
        ratio=t,
    )


def _summarize_pair(setup: Setup, values: Values) -> StudyReport:
    rows = {
        name: row
        for name, row in values["angles"].items()
        if row["angles"] and not name.endswith(NO_GRADIENT)
    }
    by_angle = sorted(rows, key=lambda name: rows[name]["angles"][0])
    chosen = {
        name: triangle(rows[name]["angles"][0], rows[name]["norms"])
        for name in (by_angle[0], by_angle[-1])
    }
    shapes = [triangle(row["angles"][0], row["norms"]) for row in rows.values()]
    points = [(shape.angle, shape.ratio) for shape in shapes]
    cells = [
        [f"`{name}`", f"{shape.angle:.1f}", f"{shape.ratio:.3f}"] for name, shape in chosen.items()
    ]
    return StudyReport(
        [Table(["tensor", "angle (degrees)", "ratio t"], cells)],
        figures={
            "fig6": lambda path: figures.triangles(chosen, path),
            "fig6_ratio": lambda path: figures.ratios(points, path),
        },
        notes=[
            "The tensors with the smallest and the largest angle.",
            "The position of the center μ follows from the angle: the triangle w0, μ, w12 has a "
            "right angle at μ (property (ii) of the thin shell).",
        ],
    )


# Later periods are not distinguishable in the figure: late merges hardly change the model.
_NUM_PERIODS = 4
_SAVES_PER_EPOCH = 16


def _times(setup: Setup, run: Run, period: int) -> list[float]:
    """Return the saved states of a period in epochs, from after its start to its end.

    At the end of a period, the replicas are already merged.
    """
    per_epoch = setup.steps_per_epoch
    end = (period + 1) * per_epoch
    steps = {*range(0, end, run.save_interval(per_epoch)), end}
    return sorted(step / per_epoch for step in steps if step > period * per_epoch)


def _series(setup: Setup) -> dict[int, Measurement]:
    epochs = min(_NUM_PERIODS, setup.epochs)
    run = Run.of(
        setup.seeds[0],
        MERGING | {"epochs": epochs},
        every_epoch=True,
        saves_per_epoch=_SAVES_PER_EPOCH,
    )
    measurements: dict[int, Measurement] = {}
    for period in range(epochs):
        *inner, end = _times(setup, run, period)
        first, second = (tuple(Replica(run, r, time) for time in inner) for r in (0, 1))
        apart = first[-1], second[-1]
        models = (*first, *second, Mean(apart), Replica(run, 0, end))
        measurements[period] = Projected(models, Merged(run), apart)
    return measurements


def _summarize_series(setup: Setup, values: Values) -> StudyReport:
    periods, start = [], (0.0, 0.0)
    for points in values.values():
        *inner, mean, merged = map(tuple, points)
        half = len(inner) // 2
        periods.append(figures.Period(start, inner[:half], inner[half:], mean, merged))
        start = (merged[0], 0.0)
    rows = [
        [
            str(number),
            f"{period.mean[0]:.3f}",
            f"{abs(period.first[-1][1] - period.second[-1][1]):.3f}",
            f"{period.merged[0]:.3f}",
        ]
        for number, period in enumerate(periods, 1)
    ]
    columns = ["epoch", "mean, along", "distance between replicas, across", "merged, along"]
    return StudyReport(
        [Table(columns, rows)],
        figures={"fig7": lambda path: figures.series(periods, path)},
        notes=[
            "Each period is drawn in a separate plane, through the anchor, the last merged model "
            "and the direction in which the two replicas of that period diverge. Lengths in a "
            "plane are true to scale.",
            "The last points of the replicas, and their mean, are those of the last saved state "
            f"before the merge: about 1/{_SAVES_PER_EPOCH} of an epoch earlier.",
        ],
    )


FIGURE_6 = Study(
    "fig6",
    "Figure 6: the merge of two models",
    "The plane of the anchor and two fine-tuned models, with true lengths and angles. With a small "
    "angle, the merged weights are near the mean; with a large one, near the anchor.",
    _pair,
    _summarize_pair,
    num_seeds=2,
)
FIGURE_7 = Study(
    "fig7",
    "Figure 7: periodic merging",
    "Two replicas diverge, are merged at the end of every epoch, and resume from the merged model.",
    _series,
    _summarize_series,
    num_seeds=2,
)
