"""Methods for one checkpoint, MonoSoup and LiNeS, against its WiSE-FT curve."""

from __future__ import annotations

from typing import Any

from studies.catalog.model_pool import groups, pool
from studies.curves import (
    COMPARISONS,
    accuracy_cells,
    curve,
    curve_scores,
    gap_cell,
    id_and_shifts,
)
from studies.expressions import LiNeS, Merge, Model, MonoSoup, Replica
from studies.measurements import Measurement, Score
from studies.study import Setup, Study, StudyReport, Table, Values

# Of WiSE-FT; dense where the methods are.
_ALPHAS = (0.25, 0.5, 0.6, 0.7, 0.8, 0.9)
_LINES_ALPHAS = (0.25, 0.5, 0.75)
_START = {"single": "one fine-tuned model", "stock": "Model Stock of 2"}


def _starts(pair: tuple[Replica, ...]) -> dict[str, Model]:
    return {"single": pair[0], "stock": Merge(pair)}


def _scaled(model: Model) -> dict[str, Model]:
    """Return label -> the model with a scaled update."""
    return {
        "MonoSoup": MonoSoup(model),
        **{f"LiNeS, alpha = {alpha:g}": LiNeS(model, alpha) for alpha in _LINES_ALPHAS},
    }


def _measurements(setup: Setup) -> dict[Any, Measurement]:
    measurements: dict[Any, Measurement] = {}
    for i, pair in enumerate(groups(pool(setup.seeds), 2)):
        starts = _starts(pair)
        measurements |= curve_scores(starts, i, _ALPHAS)
        for start, model in starts.items():
            for label, scaled in _scaled(model).items():
                measurements[start, label, i] = Score(scaled)
    return measurements


def _summarize(setup: Setup, values: Values) -> StudyReport:
    pairs = groups(pool(setup.seeds), 2)
    tables = []
    for start, subject in _START.items():
        curves = [curve(values, start, i, _ALPHAS) for i in range(len(pairs))]
        scores = [values[start, i] for i in range(len(pairs))]
        rows = [[subject, *accuracy_cells(scores), *["–"] * len(COMPARISONS)]]
        for label in _scaled(_starts(pairs[0])[start]):
            scores = [values[start, label, i] for i in range(len(pairs))]
            points = [id_and_shifts(score) for score in scores]
            gaps = [gap_cell(gap, points, curves) for gap in COMPARISONS.values()]
            rows.append([label, *accuracy_cells(scores), *gaps])
        columns = [subject, "ID", "avg. shifts"]
        columns += [f"− its WiSE-FT curve, {name}" for name in COMPARISONS]
        tables.append(Table(columns, rows))
    return StudyReport(tables, notes=[_NOTE])


_NOTE = (
    "The curve is that of the model in the first row, a spline through 8 points. Differences are "
    "those of accuracies averaged over the models, with a jackknife error; they are without a "
    "value where the curve does not reach that accuracy. LiNeS scales the update from alpha in the "
    "first layer to 1 in the last."
)

SINGLE_MODEL = Study(
    "single_model",
    "One checkpoint: MonoSoup and LiNeS",
    "The update of one model, scaled by singular direction (MonoSoup) or by layer (LiNeS), "
    "compared with the WiSE-FT curve of the same model, which scales it as a whole: for a single "
    "fine-tuned model and for Model Stock of 2.",
    _measurements,
    _summarize,
    num_seeds=8,
)
