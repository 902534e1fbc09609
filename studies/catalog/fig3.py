"""Figure 3: test error on the plane of the anchor, a fine-tuned model and the center."""

from __future__ import annotations

import math
from typing import Any

from studies import figures
from studies.catalog.model_pool import pool
from studies.curves import shown
from studies.expressions import Between, InPlane, Mean
from studies.measurements import Distance, Measurement, Score
from studies.study import Claim, Setup, Study, StudyReport, Table, Values

# In units of w1 - w0, and of the center's height over that line. The center lies over about three
# quarters of it: a point that is as far along for every height lies this much less.
_ALONG = tuple(0.25 * i for i in range(-1, 7))
_ACROSS = tuple(0.5 * i for i in range(-2, 5))
_SLANT = 0.75
_GRID = tuple((x - _SLANT * y, y) for x in _ALONG for y in _ACROSS)
_ALPHAS = (0.25, 0.5, 0.75, 1.0)


def _models(setup: Setup):
    models = pool(setup.seeds)
    return models[0], Mean(models)


def _wanted(setup: Setup) -> dict[Any, Measurement]:
    one, center = _models(setup)
    wanted: dict[Any, Measurement] = {}
    for x, y in _GRID:
        wanted[x, y] = Score(InPlane(one, center, x, y), shifts=False)
    wanted["one"], wanted["center"] = Distance(one), Distance(center)
    wanted["apart"] = Distance(one, center)
    for r, model in enumerate(pool(setup.seeds)):
        wanted |= {("line", r, a): Score(Between(model, a), shifts=False) for a in _ALPHAS}
    wanted["at the center"] = Score(center, shifts=False)
    return wanted


def _say(setup: Setup, values: Values) -> StudyReport:
    one, center, apart = (values[name] for name in ("one", "center", "apart"))
    # The anchor is the origin, the fine-tuned model lies on the first axis.
    cosine = (one**2 + center**2 - apart**2) / (2 * one * center)
    corner = (center * cosine, center * math.sqrt(max(0.0, 1 - cosine**2)))
    points = [(x * one + y * corner[0], y * corner[1], 100 - values[x, y]["id"]) for x, y in _GRID]
    replicas = range(len(pool(setup.seeds)))
    lines = {a: [100 - values["line", r, a]["id"] for r in replicas] for a in _ALPHAS}
    best = 100 - values["at the center"]["id"]
    claims = [
        Claim(
            "the error is lower at the center than at a fine-tuned model",
            "Figure 3",
            [error - best for error in lines[1.0]],
        ),
        Claim(
            "between the anchor and a fine-tuned model lies a point that is better than the model",
            "Section 2.2",
            [end - near for end, near in zip(lines[1.0], lines[0.75], strict=True)],
        ),
    ]
    rows = [[f"w0 + {a:g} (w1 − w0)", shown(errors)] for a, errors in lines.items()]
    marks = {"w0": (0.0, 0.0), "w1": (one, 0.0), "center": corner}
    return StudyReport(
        [Table(["", "test error (%)"], [*rows, ["center", f"{best:.2f}"]])],
        claims,
        {"fig3": lambda path: figures.landscape(points, marks, path)},
        [
            "The point between is taken at α = 0.75, fixed before any error was seen.",
            "The center is one model, and of all others: its own chance is in no error bar.",
        ],
    )


FIGURE_3 = Study(
    "fig3",
    "Figure 3: test error around the center",
    "In-distribution test error on the plane of the anchor w0, one fine-tuned model w1 and the "
    "mean of all (the center); distances are true.",
    _wanted,
    _say,
    num_seeds=8,
)
