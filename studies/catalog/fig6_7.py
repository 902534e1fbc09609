"""Figures 6 and 7: one merge, and a series of them, drawn from real weights."""

from __future__ import annotations

import math

from studies import figures
from studies.catalog.fig2 import NOISE
from studies.catalog.model_pool import MERGING, PAIR
from studies.expressions import Mean, Merged, Replica
from studies.measurements import Angles, Measurement, Projected
from studies.runs import Run
from studies.study import Setup, Study, StudyReport, Table, Values


def _pair(setup: Setup) -> dict[str, Measurement]:
    run = Run.of(setup.seeds[0], PAIR)
    return {"angles": Angles((Replica(run, 0), Replica(run, 1)))}


def triangle(angle: float, norms: tuple[float, float]) -> figures.Triangle:
    """Places of w1, w2, their mean and w_H on the plane through w0, w0 at the origin.

    The mean lies on the first axis; w_H = t mean with t of equation 2, from the angle alone.

    Args:
      angle: between the task vectors, in degrees.
      norms: of the task vectors.
    """
    cosine = math.cos(math.radians(angle))
    t = 2 * cosine / (1 + cosine) if cosine > 0 else 0.0
    a, b = norms
    mean = math.sqrt(a * a + b * b + 2 * a * b * cosine) / 2
    # Of the first task vector: along the mean, and across it.
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


def _say_pair(setup: Setup, values: Values) -> StudyReport:
    known = {
        name: row
        for name, row in values["angles"].items()
        if row["angles"] and not name.endswith(NOISE)
    }
    by_angle = sorted(known, key=lambda name: known[name]["angles"][0])
    chosen = {
        name: triangle(known[name]["angles"][0], known[name]["norms"])
        for name in (by_angle[0], by_angle[-1])
    }
    rows = [[f"`{name}`", f"{one.angle:.1f}", f"{one.ratio:.3f}"] for name, one in chosen.items()]
    return StudyReport(
        [Table(["tensor", "angle (degrees)", "ratio t"], rows)],
        figures={"fig6": lambda path: figures.triangles(chosen, path)},
        notes=["The tensors with the smallest and the largest angle of all."],
    )


# More of them cannot be told apart: late merges hardly move.
_PERIODS = 4
_PARTS = 16


def _times(setup: Setup, run: Run, period: int) -> list[float]:
    """When replicas of a period are known, in epochs: from just after its beginning to its end.

    At its end the replicas are merged already.
    """
    per_epoch = setup.steps_per_epoch
    steps = {*range(0, (period + 1) * per_epoch, run.apart(per_epoch)), (period + 1) * per_epoch}
    return sorted(step / per_epoch for step in steps if step > period * per_epoch)


def _series(setup: Setup) -> dict[int, Measurement]:
    epochs = min(_PERIODS, setup.epochs)
    run = Run.of(setup.seeds[0], MERGING | {"epochs": epochs}, every_epoch=True, per_epoch=_PARTS)
    wanted: dict[int, Measurement] = {}
    for period in range(epochs):
        *inner, end = _times(setup, run, period)
        first, second = (tuple(Replica(run, r, time) for time in inner) for r in (0, 1))
        apart = first[-1], second[-1]
        merged = Replica(run, 0, end)
        of = (*first, *second, Mean(apart), merged)
        wanted[period] = Projected(of, Merged(run), apart)
    return wanted


def _say_series(setup: Setup, values: Values) -> StudyReport:
    periods, start = [], (0.0, 0.0)
    for points in values.values():
        *inner, mean, merged = map(tuple, points)
        half = len(inner) // 2
        periods.append(figures.Period(start, inner[:half], inner[half:], mean, merged))
        start = (merged[0], 0.0)
    rows = [
        [
            str(number),
            f"{one.mean[0]:.3f}",
            f"{abs(one.first[-1][1] - one.second[-1][1]):.3f}",
            f"{one.merged[0]:.3f}",
        ]
        for number, one in enumerate(periods, 1)
    ]
    columns = ["epoch", "mean, along", "replicas apart, across", "merged, along"]
    return StudyReport(
        [Table(columns, rows)],
        figures={"fig7": lambda path: figures.series(periods, path)},
        notes=[
            "Every period is drawn in a plane of its own, through the anchor, the last merged "
            "model and the direction in which the two replicas of that period part; lengths in it "
            "are true.",
            "The replicas' last points, and the mean of the two, are those of the last state "
            f"before the merge that is kept: about 1/{_PARTS} of an epoch earlier.",
        ],
    )


FIGURE_6 = Study(
    "fig6",
    "Figure 6: the merge of two models",
    "The plane of the anchor and two fine-tuned models, lengths and angles as they are: a small "
    "angle takes the merged weights to the mean, a large one toward the anchor.",
    _pair,
    _say_pair,
    num_seeds=2,
)
FIGURE_7 = Study(
    "fig7",
    "Figure 7: periodic merging",
    "Two replicas that part and are merged at every epoch's end, and go on from there.",
    _series,
    _say_series,
    num_seeds=2,
)
