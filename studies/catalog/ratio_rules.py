"""Which ratios help, and where: parts of a model, and rules other than equation 3 per tensor."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from studies.catalog.model_pool import groups, mean, pool
from studies.curves import (
    Curve,
    accuracy_cells,
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
    "halfway": "Equation 3 per tensor, pulled halfway toward that of the tower",
    "reflected": "Ratios of the blocks, reflected about that of the tower",
    "coherent": "Best ratios for signals that add up",
}


# Fixed before the final measurement, on seeds that chose nothing.
_CANDIDATES = ("block", "reflected")


def _measurements(rules: Sequence[str], setup: Setup) -> dict[Any, Measurement]:
    measurements: dict[Any, Measurement] = {}
    for i, pair in enumerate(groups(pool(setup.seeds), 2)):
        measurements |= curve_scores({"mean": mean(pair)}, i, _ALPHAS)
        measurements["tensor", i] = Score(Merge(pair))
        for rule in rules:
            measurements[rule, i] = Score(RatioMerge(pair, rule))
    return measurements


def _gap(samples: Sequence[tuple[tuple[float, float], Curve]]) -> float | None:
    """Return the height of mean accuracies above the mean curve, at the same ID."""
    points, rivals = zip(*samples, strict=True)
    accuracy, shifts = np.mean(points, axis=0).tolist()
    return model_gap((accuracy, shifts), [mean_curve(rivals)])


def _gap_difference(samples: Sequence[tuple[Any, Any, Curve]]) -> float | None:
    """Return the difference of the heights of two rules above the same curve."""
    points, others, rivals = zip(*samples, strict=True)
    gap, other = (_gap(list(zip(side, rivals, strict=True))) for side in (points, others))
    return None if gap is None or other is None else gap - other


def _curves(setup: Setup, values: Values) -> list[Curve]:
    count = len(groups(pool(setup.seeds), 2))
    return [curve(values, "mean", i, _ALPHAS) for i in range(count)]


def _rules_table(labels: Mapping[str, str], curves: Sequence[Curve], values: Values) -> Table:
    rows = []
    for rule, label in labels.items():
        scores = [values[rule, i] for i in range(len(curves))]
        pairs = list(zip(map(id_and_shifts, scores), curves, strict=True))
        gaps = defined(model_gap(point, [rival]) for point, rival in pairs)
        cells = [*accuracy_cells(scores), estimate_cell(jackknife(_gap, pairs))]
        rows.append([label, *cells, f"{mean_cell(gaps)} ({len(gaps)})"])
    columns = ["ratios of 2 replicas", "ID", "avg. shifts", "above the mean's curve, of means"]
    return Table([*columns, "above the mean's curve (pairs)"], rows)


def _parts_table(count: int, values: Values) -> Table:
    rows = []
    for part in _PARTS:
        changes = [
            np.subtract(
                id_and_shifts(values[f"lower {part}", i]), id_and_shifts(values["tower", i])
            )
            for i in range(count)
        ]
        rows.append([part, *(mean_cell(list(column)) for column in zip(*changes, strict=True))])
    return Table(["part with a ratio lowered by 0.3", "change of ID", "of avg. shifts"], rows)


def _criterion_table(curves: Sequence[Curve], values: Values) -> Table:
    rows = []
    for rule in _CANDIDATES:
        points = [id_and_shifts(values[rule, i]) for i in range(len(curves))]
        cells = [estimate_cell(jackknife(_gap, list(zip(points, curves, strict=True))))]
        for rival in ("tensor", "one"):
            others = [id_and_shifts(values[rival, i]) for i in range(len(curves))]
            samples = list(zip(points, others, curves, strict=True))
            cells.append(estimate_cell(jackknife(_gap_difference, samples)))
        rows.append([_LABELS[rule], *cells])
    columns = ["candidate, at equal ID", "− the mean's curve", "− equation 3", "− one ratio"]
    return Table(columns, rows)


_NOTE = (
    "Above the mean's curve: avg. shifts minus that of the WiSE-FT curve of the uniform mean at "
    "the same ID, of accuracies averaged over the pairs (with a jackknife error) and pair by pair."
)


def _summarize(setup: Setup, values: Values) -> StudyReport:
    curves = _curves(setup, values)
    tables = [_rules_table(_LABELS, curves, values), _parts_table(len(curves), values)]
    return StudyReport(tables, notes=[_NOTE])


def _summarize_candidates(setup: Setup, values: Values) -> StudyReport:
    curves = _curves(setup, values)
    labels = {rule: _LABELS[rule] for rule in ("tensor", "one", *_CANDIDATES)}
    tables = [_rules_table(labels, curves, values), _criterion_table(curves, values)]
    return StudyReport(tables, notes=[_NOTE])


def _development(name: str, title: str, num_seeds: int, domain: str | None = None) -> Study:
    rules = (*RULES, "one", *(f"lower {part}" for part in _PARTS))
    return Study(
        name,
        title,
        "The uniform mean of 2 replicas, pulled toward the anchor by other ratios than those of "
        "equation 3 per tensor, and the effect of the ratio of each part of the model.",
        functools.partial(_measurements, rules),
        _summarize,
        num_seeds,
        domain,
    )


def _final(name: str, title: str, num_seeds: int, domain: str | None = None) -> Study:
    return Study(
        name,
        title,
        "The two rules chosen from the study of ratio rules, on replicas of other seeds. A rule "
        "stands if each difference is above two standard errors, on both benchmarks and from both "
        "anchors of the synthetic one.",
        functools.partial(_measurements, ("one", *_CANDIDATES)),
        _summarize_candidates,
        num_seeds,
        domain,
    )


_REAL = "on a real sentence encoder"
RATIO_RULES = _development("ratio_rules", "Ratio rules", 4)
SENTENCE_RATIO_RULES = _development(
    "sentence_ratio_rules", f"Ratio rules {_REAL}", 2, domain="movie"
)
RATIO_CANDIDATES = _final("ratio_candidates", "Chosen ratio rules", 8)
SENTENCE_RATIO_CANDIDATES = _final(
    "sentence_ratio_candidates", f"Chosen ratio rules {_REAL}", 8, domain="movie"
)
