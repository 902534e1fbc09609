"""Replicas of unequal hyper-parameters: what equation 3 and its weighted extension make of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from studies.catalog.model_pool import MERGING, groups, mean
from studies.catalog.soup_search import SIZE, soup
from studies.curves import both, curve, curve_scores, id_and_shifts, known, own_above, shown
from studies.expressions import Merge, Merged, Replica
from studies.measurements import Measurement, Outcomes, Score
from studies.runs import Run
from studies.study import Claim, Setup, Study, StudyReport, Table, Values

_SIZES = (2, 4, SIZE)
_METHODS = {
    "uniform_mean": "mean",
    "model_stock": "equation 3",
    "weighted_model_stock": "weighted (extension)",
}
_PLACES = ("in distribution", "on the shifts")
# Of the learning rates of two replicas to the config's.
_RATES = {"one": (1.0, 1.0), "two": (0.5, 2.0)}


def _teams(setup: Setup, size: int) -> list[tuple[Replica, ...]]:
    return [
        team for seed in setup.seeds for team in groups(soup(setup, seed, "cross_entropy"), size)
    ]


def _periodic(setup: Setup, seed: int, rates: str) -> Merged:
    own = tuple(factor * setup.learning_rate for factor in _RATES[rates])
    more = {"per_replica.learning_rate": own} if rates != "one" else {}
    return Merged(Run.of(seed, MERGING | more))


def _wanted(setup: Setup) -> dict[Any, Measurement]:
    wanted: dict[Any, Measurement] = {}
    for size in _SIZES:
        for i, team in enumerate(_teams(setup, size)):
            wanted |= curve_scores({("uniform_mean", size): mean(team)}, i)
            for method in ("model_stock", "weighted_model_stock"):
                wanted[(method, size), i] = Score(Merge(team, method))
            wanted["outcomes", size, i] = Outcomes(team, "weighted_model_stock")
    for seed in setup.seeds:
        for rates in _RATES:
            wanted[rates, seed] = Score(_periodic(setup, seed, rates))
    return wanted


def _say(setup: Setup, values: Values) -> StudyReport:
    rows, claims = [], []
    for size in _SIZES:
        more_rows, more_claims = _after_training(setup, values, size)
        rows += more_rows
        claims += more_claims
    columns = ["after training", "ID", "avg shifts", "ID − equation 3", "avg shifts − equation 3"]
    return StudyReport(
        [
            Table([*columns, "above the mean's curve (teams)"], rows),
            _policies(setup, values),
            _rates(setup, values),
        ],
        claims + _rate_claims(setup, values),
        notes=[
            f"Replicas are those of Table 2's soups: {SIZE} a seed, of random learning rate, "
            "weight decay, epochs, label smoothing and mixup; teams share no replica.",
            "Above the mean's curve: a model as it is, against the mean's WiSE-FT curve at the "
            "same accuracy in distribution, where it has one.",
            "The weighted rule takes all replicas for one signal with noise of unequal size. One "
            "that has moved less than the signal of the others has negative noise by that account, "
            "and its unit falls back on equation 3.",
        ],
    )


def _after_training(setup: Setup, values: Values, size: int) -> tuple[list[list[str]], list[Claim]]:
    teams = range(len(_teams(setup, size)))
    curves = [curve(values, ("uniform_mean", size), i) for i in teams]
    scores = {method: [values[(method, size), i] for i in teams] for method in _METHODS}
    found = {method: [id_and_shifts(one) for one in scores[method]] for method in _METHODS}
    above = {
        method: known(own_above(one, [line]) for one, line in zip(ours, curves, strict=True))
        for method, ours in found.items()
        if method != "uniform_mean"
    }
    rows = [
        [
            f"N = {size}, {label}",
            *both(scores[method]),
            *(
                "–" if method == "model_stock" else shown(column)
                for column in _differences(found[method], found["model_stock"])
            ),
            f"{shown(above[method])} ({len(above[method])})" if method in above else "–",
        ]
        for method, label in _METHODS.items()
    ]
    claims = [
        Claim(f"N = {size}: {_METHODS[one]} beats {_rival(other)}, {place}", "ours", column)
        for one, other in (
            ("model_stock", "uniform_mean"),
            ("weighted_model_stock", "model_stock"),
        )
        for place, column in zip(_PLACES, _differences(found[one], found[other]), strict=True)
    ]
    if len(above["model_stock"]) > 1:
        text = f"N = {size}: equation 3 beats the mean's WiSE-FT curve, at equal ID"
        claims.append(Claim(text, "ours", above["model_stock"]))
    return rows, claims


def _rival(method: str) -> str:
    return "the mean of the same models" if method == "uniform_mean" else _METHODS[method]


def _differences(
    ours: Sequence[tuple[float, float]], others: Sequence[tuple[float, float]]
) -> list[list[float]]:
    return np.transpose(np.subtract(ours, others)).tolist()


def _policies(setup: Setup, values: Values) -> Table:
    columns = {
        "interpolated": "weighted",
        "fallback_to_eq3": "fell back on equation 3",
        "clamped": "anchor kept",
    }
    rows = []
    for size in _SIZES:
        counts = [values["outcomes", size, i] for i in range(len(_teams(setup, size)))]
        rows.append([f"N = {size}", *(_share(counts, policy) for policy in columns)])
    return Table(["weighted: share of tensors", *columns.values()], rows)


def _share(counts: Sequence[Mapping[str, int]], policy: str) -> str:
    met = sum(one.get(policy, 0) for one in counts)
    return f"{100 * met / sum(sum(one.values()) for one in counts):.0f} %"


def _rates(setup: Setup, values: Values) -> Table:
    rows = []
    for rates, factors in _RATES.items():
        label = " and ".join(f"{factor:g}" for factor in factors)
        scores = [values[rates, seed] for seed in setup.seeds]
        rows.append([f"learning rates {label} times the config's", *both(scores)])
    return Table(["two replicas, merged every epoch", "ID", "avg shifts"], rows)


def _rate_claims(setup: Setup, values: Values) -> list[Claim]:
    pairs = [[id_and_shifts(values[rates, seed]) for seed in setup.seeds] for rates in _RATES]
    text = "merging rates of ½ and 2 every epoch is as good as of one (within 1 point)"
    return [
        Claim(f"{text}, {place}", "ours", column, within=1)
        for place, column in zip(_PLACES, _differences(*pairs), strict=True)
    ]


UNEQUAL = Study(
    "unequal",
    "Replicas of unequal hyper-parameters",
    "Model Stock supposes replicas that differ by chance alone. Here they differ by learning rate, "
    "weight decay, epochs, label smoothing and mixup: merged after training by equation 3, by the "
    "weighted extension, which gives each its own noise, and by the mean; and every epoch, of two "
    "learning rates. The claims are ours, not the paper's.",
    _wanted,
    _say,
    num_seeds=3,
)
