"""Which ratios help, and where: parts of a model, and rules other than equation 3 per tensor."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from studies.catalog.model_pool import groups, mean, pool
from studies.curves import (
    COMPARISONS,
    Curve,
    Gap,
    Point,
    accuracy_cells,
    curve,
    curve_scores,
    estimate_cell,
    gap_at_equal_id,
    gap_cell,
    id_and_shifts,
    jackknife,
    mean_cell,
    shift_name,
)
from studies.expressions import Merge
from studies.measurements import Angles, Measurement, Score
from studies.ratio_rules import (
    RULES,
    RatioMerge,
    depths,
    parts,
    pooled,
    stored_gram_matrices,
)
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
    "steeper": "Ratios of the blocks, twice as far from that of the tower",
    "reflected": "Ratios of the blocks, reflected about that of the tower",
    "interior": "One ratio for all blocks, one for the head; the mean elsewhere",
    "coherent": "Best ratios for signals that add up",
}


# Chosen before the final measurement. The criterion: each difference of `_criterion_table` at equal
# ID is above two standard errors, on both benchmarks and from both anchors of the images.
_CANDIDATES = ("interior", "kind")
# Measured with them: what a ratio that grows or falls with depth does on each benchmark.
_CONTROLS = ("block", "steeper", "reflected")


def _measurements(rules: Sequence[str], setup: Setup) -> dict[Any, Measurement]:
    measurements: dict[Any, Measurement] = {}
    for i, pair in enumerate(groups(pool(setup.seeds), 2)):
        measurements |= curve_scores({"mean": mean(pair)}, i, _ALPHAS)
        measurements["tensor", i] = Score(Merge(pair))
        for rule in rules:
            measurements[rule, i] = Score(RatioMerge(pair, rule))
    return measurements


def _all_measurements(setup: Setup) -> dict[Any, Measurement]:
    """Return those of every rule, of lowered parts, and of angles."""
    rules = (*RULES, "one", *(f"lower {part}" for part in _PARTS))
    pairs = groups(pool(setup.seeds), 2)
    angles = {("angles", i): Angles(pair) for i, pair in enumerate(pairs)}
    return _measurements(rules, setup) | angles


def _difference(
    gap: Gap, points: Sequence[Point], others: Sequence[Point], curves: Sequence[Curve]
) -> str:
    """Return a cell with the difference of the gaps of two rules to the same curves."""

    def difference(samples: Sequence[tuple[Point, Point, Curve]]) -> float | None:
        points, others, rivals = zip(*samples, strict=True)
        ours, theirs = (gap(list(zip(side, rivals, strict=True))) for side in (points, others))
        return None if ours is None or theirs is None else ours - theirs

    return estimate_cell(jackknife(difference, list(zip(points, others, curves, strict=True))))


def _curves(setup: Setup, values: Values) -> list[Curve]:
    count = len(groups(pool(setup.seeds), 2))
    return [curve(values, "mean", i, _ALPHAS) for i in range(count)]


def _rules_table(labels: Mapping[str, str], curves: Sequence[Curve], values: Values) -> Table:
    rows = []
    for rule, label in labels.items():
        scores = [values[rule, i] for i in range(len(curves))]
        points = list(map(id_and_shifts, scores))
        gaps = [gap_cell(gap, points, curves) for gap in COMPARISONS.values()]
        rows.append([label, *accuracy_cells(scores), *gaps])
    columns = ["ratios of 2 replicas", "ID", "avg. shifts"]
    return Table([*columns, *(f"− the mean's curve, {name}" for name in COMPARISONS)], rows)


def _shifts_table(labels: Mapping[str, str], count: int, values: Values) -> Table:
    """Return the difference to the mean's curve at equal ID, shift by shift."""
    names = list(values["mean", 0]["shifts"])
    rows = []
    for rule, label in labels.items():
        cells = []
        for name in names:
            curves = [curve(values, "mean", i, _ALPHAS, [name]) for i in range(count)]
            points = [id_and_shifts(values[rule, i], [name]) for i in range(count)]
            cells.append(gap_cell(gap_at_equal_id, points, curves))
        rows.append([label, *cells])
    return Table(["− the mean's curve at equal ID", *map(shift_name, names)], rows)


def _ratio_cells(ratios: Sequence[float]) -> list[str]:
    """Return two cells: mean and standard deviation over the pairs."""
    spread = f"{np.std(ratios, ddof=1):.3f}" if len(ratios) > 1 else "–"
    return [f"{np.mean(ratios):.3f}", spread]


def _parts_table(curves: Sequence[Curve], values: Values) -> Table:
    """Return the ratio of equation 3 of each part, and what a lower one changes."""
    count, rows = len(curves), []
    grams = [stored_gram_matrices(values["angles", i]) for i in range(count)]
    by_part = parts(grams[0])
    pooled_ratios = [pooled(of_pair, by_part.__getitem__) for of_pair in grams]
    for part in _PARTS:
        names = [name for name in by_part if by_part[name] == part]
        if not names:  # A model without an MLP.
            continue
        found = [of_pair[names[0]] for of_pair in pooled_ratios]
        lowered, tower = (
            [id_and_shifts(values[rule, i]) for i in range(count)]
            for rule in (f"lower {part}", "tower")
        )
        changes = np.subtract(lowered, tower).T.tolist()
        gaps = [_difference(gap, lowered, tower, curves) for gap in COMPARISONS.values()]
        rows.append([part, *_ratio_cells(found), *map(mean_cell, changes), *gaps])
    columns = ["part", "ratio (equation 3)", "standard deviation over pairs"]
    columns += ["ratio lowered by 0.3: change of ID", "of avg. shifts"]
    columns += [f"of the difference to the curve, {name}" for name in COMPARISONS]
    return Table(columns, rows)


def _depth_table(count: int, values: Values) -> Table:
    """Return the ratio of equation 3 of each block."""
    grams = [stored_gram_matrices(values["angles", i]) for i in range(count)]
    blocks = [RULES["block"](of_pair) for of_pair in grams]
    places = {depth: name for name, depth in depths(grams[0]).items() if depth is not None}
    rows = []
    for depth, name in sorted(places.items()):
        rows.append([str(depth), *_ratio_cells([of_pair[name] for of_pair in blocks])])
    return Table(["block", "ratio (equation 3)", "standard deviation over pairs"], rows)


def _criterion_table(curves: Sequence[Curve], values: Values) -> Table:
    count, rows = len(curves), []
    for comparison, gap in COMPARISONS.items():
        for rule in _CANDIDATES:
            points = [id_and_shifts(values[rule, i]) for i in range(count)]
            cells = [gap_cell(gap, points, curves)]
            for rival in ("tensor", "one"):
                others = [id_and_shifts(values[rival, i]) for i in range(count)]
                cells.append(_difference(gap, points, others, curves))
            rows.append([f"{_LABELS[rule]}: {comparison}", *cells])
    return Table(["candidate", "− the mean's curve", "− equation 3", "− one ratio"], rows)


_NOTE = (
    "The mean's curve: the WiSE-FT curve of the uniform mean, a spline through 8 points. "
    "Differences are those of accuracies averaged over the pairs, with a jackknife error. They are "
    "without a value where the curve does not reach that accuracy. Where the curve is flat, a "
    "small error of ID is a large one of avg. shifts at equal ID, but not of ID at equal avg. "
    "shifts."
)


def _summarize(setup: Setup, values: Values) -> StudyReport:
    curves = _curves(setup, values)
    tables = [
        _rules_table(_LABELS, curves, values),
        _shifts_table(_LABELS, len(curves), values),
        _parts_table(curves, values),
        _depth_table(len(curves), values),
    ]
    return StudyReport(tables, notes=[_NOTE])


def _summarize_candidates(setup: Setup, values: Values) -> StudyReport:
    curves = _curves(setup, values)
    labels = {rule: _LABELS[rule] for rule in ("tensor", "one", *_CANDIDATES, *_CONTROLS)}
    tables = [
        _criterion_table(curves, values),
        _rules_table(labels, curves, values),
        _shifts_table(labels, len(curves), values),
    ]
    return StudyReport(tables, notes=[_NOTE])


RATIO_RULES = Study(
    "ratio_rules",
    "Ratio rules",
    "The uniform mean of 2 replicas, pulled toward the anchor by other ratios than those of "
    "equation 3 per tensor, and the effect of the ratio of each part of the model.",
    _all_measurements,
    _summarize,
    num_seeds=4,
)
SENTENCE_RATIO_RULES = dataclasses.replace(
    RATIO_RULES,
    name="sentence_ratio_rules",
    title="Ratio rules on a real sentence encoder",
    num_seeds=2,
    domain="movie",
)
RATIO_CANDIDATES = Study(
    "ratio_candidates",
    "Chosen ratio rules",
    "The two rules chosen from the study of ratio rules, on replicas of other seeds. The "
    "criterion: each difference at equal ID is above two standard errors, on both benchmarks and "
    "from both anchors of the synthetic one. The last three rules of the tables are controls.",
    functools.partial(_measurements, ("one", *_CANDIDATES, *_CONTROLS)),
    _summarize_candidates,
    num_seeds=8,
    seed_offset=200,
)
SENTENCE_RATIO_CANDIDATES = dataclasses.replace(
    RATIO_CANDIDATES,
    name="sentence_ratio_candidates",
    title="Chosen ratio rules on a real sentence encoder",
    domain="movie",
    seed_offset=100,
)
