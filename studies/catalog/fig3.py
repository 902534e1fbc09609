"""Figure 3: test error on the plane of the anchor, a fine-tuned model and the center."""

from __future__ import annotations

import math
from typing import Any

from studies import figures
from studies.catalog.model_pool import pool
from studies.curves import mean_cell
from studies.expressions import Between, InPlane, Mean
from studies.measurements import Distance, Measurement, Score
from studies.study import Claim, Setup, Study, StudyReport, Table, Values

# In units of w1 - w0, and of the center's height above that line. The center is above about three
# quarters of the line; a grid with equal columns at every height is shifted by this fraction.
_ALONG = tuple(0.25 * i for i in range(-1, 7))
_ACROSS = tuple(0.5 * i for i in range(-2, 5))
_SLANT = 0.75
_GRID = tuple((x - _SLANT * y, y) for x in _ALONG for y in _ACROSS)
_ALPHAS = (0.25, 0.5, 0.75, 1.0)


def _models(setup: Setup):
    models = pool(setup.seeds)
    return models[0], Mean(models)


def _measurements(setup: Setup) -> dict[Any, Measurement]:
    model, center = _models(setup)
    measurements: dict[Any, Measurement] = {}
    for x, y in _GRID:
        measurements[x, y] = Score(InPlane(model, center, x, y), shifts=False)
    measurements["anchor to model"] = Distance(model)
    measurements["anchor to center"] = Distance(center)
    measurements["center to model"] = Distance(model, center)
    for r, replica in enumerate(pool(setup.seeds)):
        measurements |= {
            ("line", r, alpha): Score(Between(replica, alpha), shifts=False) for alpha in _ALPHAS
        }
    measurements["at the center"] = Score(center, shifts=False)
    return measurements


def _summarize(setup: Setup, values: Values) -> StudyReport:
    to_model, to_center, between = (
        values[name] for name in ("anchor to model", "anchor to center", "center to model")
    )
    # The anchor is the origin, and the fine-tuned model is on the first axis.
    cosine = (to_model**2 + to_center**2 - between**2) / (2 * to_model * to_center)
    center = (to_center * cosine, to_center * math.sqrt(max(0.0, 1 - cosine**2)))
    points = [
        (x * to_model + y * center[0], y * center[1], 100 - values[x, y]["id"]) for x, y in _GRID
    ]
    replicas = range(len(pool(setup.seeds)))
    errors = {alpha: [100 - values["line", r, alpha]["id"] for r in replicas] for alpha in _ALPHAS}
    center_error = 100 - values["at the center"]["id"]
    claims = [
        Claim(
            "the test error is lower at the center than at a fine-tuned model",
            "Figure 3",
            [error - center_error for error in errors[1.0]],
        ),
        Claim(
            "a point between the anchor and a fine-tuned model has a lower test error than the "
            "model",
            "Section 2.2",
            [at_model - inside for at_model, inside in zip(errors[1.0], errors[0.75], strict=True)],
        ),
    ]
    rows = [[f"w0 + {alpha:g} (w1 − w0)", mean_cell(row)] for alpha, row in errors.items()]
    rows.append(["center", f"{center_error:.2f}"])
    marks = {"zero_shot": (0.0, 0.0), "single_model": (to_model, 0.0), "center": center}
    return StudyReport(
        [Table(["weights", "test error (%)"], rows)],
        claims,
        {"fig3": lambda path: figures.landscape(points, marks, path)},
        [
            "The point between the anchor and the model is α = 0.75, fixed before any error was "
            "measured.",
            f"The figure has {len(points)} measured points (dots). Between them, the logarithm of "
            "the error follows a thin-plate spline through all points.",
            "The center is one model, the mean of all fine-tuned ones. Error bars do not include "
            "its randomness.",
        ],
    )


FIGURE_3 = Study(
    "fig3",
    "Figure 3: test error around the center",
    "In-distribution test error on the plane of the anchor w0, one fine-tuned model w1 and the "
    "mean of all fine-tuned models (the center). Distances are true to scale.",
    _measurements,
    _summarize,
    num_seeds=8,
)
