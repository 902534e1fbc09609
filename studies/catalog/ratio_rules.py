"""Which ratios help, and where: parts of a model, and rules other than equation 3 per tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from studies.catalog.model_pool import groups, mean, pool
from studies.curves import (
    accuracy_cells,
    average_shifts,
    curve,
    curve_scores,
    defined,
    estimate_cell,
    id_and_shifts,
    jackknife,
    mean_cell,
    mean_curve,
    model_gap,
)
from studies.expressions import Merge
from studies.measurements import Measurement, Score
from studies.ratio_rules import RULES, RatioMerge
from studies.study import Setup, Study, StudyReport, Table, Values

# Dense near the merges, where accuracies bend.
_ALPHAS = (0.25, 0.5, 0.6, 0.7, 0.8, 0.9)
_HALVES = ("first half", "second half")
_PARTS = (
    *(
        f"{kind}, {half}"
        for kind in ("query and key", "value and output", "MLP", "norms", "biases")
        for half in _HALVES
    ),
    "embeddings and projection",
    "head",
)
_LABELS = {
    "tensor": "Equation 3, unit `tensor`",
    "one": "One ratio for all tensors: that of the tower",
    "tower": "One ratio for the tower, one for the head",
    "kind": "One ratio for each kind of tensor",
    "block": "One ratio for each block",
    "reflected": "Ratios of the blocks, reflected about that of the tower",
    "coherent": "Best ratios for signals that add up",
}


def _measurements(setup: Setup) -> dict[Any, Measurement]:
    measurements: dict[Any, Measurement] = {}
    for i, pair in enumerate(groups(pool(setup.seeds), 2)):
        measurements |= curve_scores({"mean": mean(pair)}, i, _ALPHAS)
        measurements["tensor", i] = Score(Merge(pair))
        for rule in (*RULES, "one", *(f"lower {part}" for part in _PARTS)):
            measurements[rule, i] = Score(RatioMerge(pair, rule))
    return measurements


def _summarize(setup: Setup, values: Values) -> StudyReport:
    count = len(groups(pool(setup.seeds), 2))
    curves = [curve(values, "mean", i, _ALPHAS) for i in range(count)]

    def gap(samples: Sequence[tuple[Any, Any]]) -> float | None:
        points, rivals = zip(*samples, strict=True)
        accuracy, shifts = np.mean(points, axis=0).tolist()
        return model_gap((accuracy, shifts), [mean_curve(rivals)])

    rows, effects = [], []
    for rule, label in _LABELS.items():
        scores = [values[rule, i] for i in range(count)]
        points = list(map(id_and_shifts, scores))
        pairs = list(zip(points, curves, strict=True))
        gaps = defined(model_gap(point, [rival]) for point, rival in pairs)
        of_means = jackknife(gap, pairs) if count > 1 else None
        cells = [*accuracy_cells(scores), estimate_cell(of_means)]
        rows.append([label, *cells, f"{mean_cell(gaps)} ({len(gaps)})"])
    for part in _PARTS:
        changes = [
            (
                values[f"lower {part}", i]["id"] - values["tower", i]["id"],
                average_shifts(values[f"lower {part}", i]) - average_shifts(values["tower", i]),
            )
            for i in range(count)
        ]
        effects.append([part, *(mean_cell(list(column)) for column in zip(*changes, strict=True))])
    columns = ["ratios of 2 replicas", "ID", "avg. shifts", "above the mean's curve, of means"]
    return StudyReport(
        [
            Table([*columns, "above the mean's curve (pairs)"], rows),
            Table(["part with a ratio lowered by 0.3", "change of ID", "of avg. shifts"], effects),
        ],
        notes=[
            "Above the mean's curve: avg. shifts minus that of the WiSE-FT curve of the uniform "
            "mean at the same ID, of accuracies averaged over the pairs (with a jackknife error) "
            "and pair by pair.",
        ],
    )


_ABOUT = (
    "The uniform mean of 2 replicas, pulled toward the anchor by other ratios than those of "
    "equation 3 per tensor, and the effect of the ratio of each part of the model."
)
RATIO_RULES = Study("ratio_rules", "Ratio rules", _ABOUT, _measurements, _summarize, num_seeds=8)
SENTENCE_RATIO_RULES = Study(
    "sentence_ratio_rules",
    "Ratio rules on a real sentence encoder",
    _ABOUT,
    _measurements,
    _summarize,
    num_seeds=4,
    domain="movie",
)
