"""Replicas with unequal hyperparameters, merged by equation 3 and by its weighted extension."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from studies.catalog.model_pool import MERGING, groups, mean
from studies.catalog.soup_search import SIZE, soup
from studies.curves import (
    accuracy_cells,
    curve,
    curve_scores,
    defined,
    id_and_shifts,
    mean_cell,
    model_gap,
)
from studies.expressions import Merge, Merged, Replica
from studies.measurements import Measurement, Outcomes, Score
from studies.runs import Run
from studies.study import Claim, Setup, Study, StudyReport, Table, Values

_SIZES = (2, 4, SIZE)
_METHODS = {
    "uniform_mean": "Uniform mean",
    "model_stock": "Model Stock",
    "weighted_model_stock": "Model Stock, weighted (extension)",
}
# Names in claims.
_SUBJECTS = {
    "uniform_mean": "the uniform mean of the same models",
    "model_stock": "Model Stock",
    "weighted_model_stock": "weighted Model Stock (extension)",
}
_PLACES = ("in distribution", "out of distribution")
# Learning rates of two replicas, divided by the config's.
_RATES = {"equal": (1.0, 1.0), "unequal": (0.5, 2.0)}


def _teams(setup: Setup, size: int) -> list[tuple[Replica, ...]]:
    return [
        team for seed in setup.seeds for team in groups(soup(setup, seed, "cross_entropy"), size)
    ]


def _periodic(setup: Setup, seed: int, rates: str) -> Merged:
    learning_rates = tuple(factor * setup.learning_rate for factor in _RATES[rates])
    options = {"per_replica.learning_rate": learning_rates} if rates == "unequal" else {}
    return Merged(Run.of(seed, MERGING | options))


def _measurements(setup: Setup) -> dict[Any, Measurement]:
    measurements: dict[Any, Measurement] = {}
    for size in _SIZES:
        for i, team in enumerate(_teams(setup, size)):
            measurements |= curve_scores({("uniform_mean", size): mean(team)}, i)
            for method in ("model_stock", "weighted_model_stock"):
                measurements[(method, size), i] = Score(Merge(team, method))
            measurements["outcomes", size, i] = Outcomes(team, "weighted_model_stock")
    for seed in setup.seeds:
        for rates in _RATES:
            measurements[rates, seed] = Score(_periodic(setup, seed, rates))
    return measurements


def _summarize(setup: Setup, values: Values) -> StudyReport:
    rows, claims = [], []
    for size in _SIZES:
        size_rows, size_claims = _after_training(setup, values, size)
        rows += size_rows
        claims += size_claims
    columns = ["merging after training", "ID", "avg. shifts", "ID − Model Stock"]
    columns += ["avg. shifts − Model Stock", "above the uniform mean's WiSE-FT curve (teams)"]
    return StudyReport(
        [Table(columns, rows), _outcome_table(setup, values), _rate_table(setup, values)],
        claims + _rate_claims(setup, values),
        notes=[
            f"Replicas are the models of Table 2's soups: {SIZE} per seed, with random learning "
            "rate, weight decay, epochs, label smoothing and mixup. Teams share no replica.",
            "Above the curve: avg. shifts of the merge without tuning, minus that of the curve at "
            "the same ID, if the curve reaches it.",
            "The weighted rule assumes that all replicas have the same signal, with noise of "
            "unequal size. For a replica whose update is shorter than the others' signal, the "
            "estimated noise is negative, and the merge unit falls back to equation 3.",
        ],
    )


def _after_training(setup: Setup, values: Values, size: int) -> tuple[list[list[str]], list[Claim]]:
    teams = range(len(_teams(setup, size)))
    curves = [curve(values, ("uniform_mean", size), i) for i in teams]
    scores = {method: [values[(method, size), i] for i in teams] for method in _METHODS}
    points = {method: [id_and_shifts(score) for score in scores[method]] for method in _METHODS}
    gaps = {
        method: defined(
            model_gap(point, [mean_curve]) for point, mean_curve in zip(merged, curves, strict=True)
        )
        for method, merged in points.items()
        if method != "uniform_mean"
    }
    rows = [
        [
            f"N = {size}, {label}",
            *accuracy_cells(scores[method]),
            *(
                "–" if method == "model_stock" else mean_cell(column)
                for column in _differences(points[method], points["model_stock"])
            ),
            f"{mean_cell(gaps[method])} ({len(gaps[method])})" if method in gaps else "–",
        ]
        for method, label in _METHODS.items()
    ]
    claims = [
        Claim(f"N = {size}: {_SUBJECTS[a]} beats {_SUBJECTS[b]}, {place}", "this project", column)
        for a, b in (
            ("model_stock", "uniform_mean"),
            ("weighted_model_stock", "model_stock"),
        )
        for place, column in zip(_PLACES, _differences(points[a], points[b]), strict=True)
    ]
    if len(gaps["model_stock"]) > 1:
        text = f"N = {size}: Model Stock beats the uniform mean's WiSE-FT curve, at equal ID"
        claims.append(Claim(text, "this project", gaps["model_stock"]))
    return rows, claims


def _differences(
    points: Sequence[tuple[float, float]], others: Sequence[tuple[float, float]]
) -> list[list[float]]:
    return np.transpose(np.subtract(points, others)).tolist()


def _outcome_table(setup: Setup, values: Values) -> Table:
    columns = {
        "interpolated": "weighted",
        "fallback_to_eq3": "fallback to equation 3",
        "clamped": "clamped to 0",
    }
    rows = []
    for size in _SIZES:
        counts = [values["outcomes", size, i] for i in range(len(_teams(setup, size)))]
        rows.append([f"N = {size}", *(_percentage(counts, outcome) for outcome in columns)])
    return Table(["Model Stock, weighted: outcomes of tensors", *columns.values()], rows)


def _percentage(counts: Sequence[Mapping[str, int]], outcome: str) -> str:
    number = sum(count.get(outcome, 0) for count in counts)
    return f"{100 * number / sum(sum(count.values()) for count in counts):.0f} %"


def _rate_table(setup: Setup, values: Values) -> Table:
    rows = []
    for rates, factors in _RATES.items():
        label = " and ".join(f"{factor:g}" for factor in factors)
        scores = [values[rates, seed] for seed in setup.seeds]
        rows.append([f"learning rates {label} times the config's", *accuracy_cells(scores)])
    return Table(["two replicas, merged every epoch", "ID", "avg. shifts"], rows)


def _rate_claims(setup: Setup, values: Values) -> list[Claim]:
    pairs = [[id_and_shifts(values[rates, seed]) for seed in setup.seeds] for rates in _RATES]
    text = (
        "merging every epoch with learning rates of ½ and 2 times the config's is as good as with "
        "equal ones (within 1 point)"
    )
    return [
        Claim(f"{text}, {place}", "this project", column, within=1)
        for place, column in zip(_PLACES, _differences(*pairs), strict=True)
    ]


UNEQUAL = Study(
    "unequal",
    "Replicas with unequal hyperparameters",
    "Model Stock assumes replicas that differ only by chance. These replicas differ in learning "
    "rate, weight decay, epochs, label smoothing and mixup. They are merged after training by "
    "Model Stock (equation 3), by the weighted extension, which estimates the noise of each "
    "replica, and by the uniform mean. Replicas with two learning rates are also merged every "
    "epoch. The claims are not in the paper.",
    _measurements,
    _summarize,
    num_seeds=3,
)
