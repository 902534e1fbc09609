"""Merges after training: Table 7, and merge units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modelstock_jax.merging import UNITS
from studies.catalog.model_pool import groups, mean, pool
from studies.catalog.paper_numbers import TABLE_7
from studies.curves import (
    average,
    both,
    curve,
    curve_scores,
    id_and_shifts,
    known,
    own_above,
    shown,
    theirs,
)
from studies.expressions import Merge
from studies.measurements import Measurement, Outcomes, Predicted, Score, Shell
from studies.study import Claim, Setup, Study, StudyReport, Table, Values


def _teams(setup: Setup, size: int):
    return groups(pool(setup.seeds), size)


def _sizes(setup: Setup):
    return [n for n in TABLE_7 if len(_teams(setup, n)) > 1]


def _others(setup: Setup, team):
    """Models of no replica of the team: their mean is a center that it has no part in."""
    return tuple(one for one in pool(setup.seeds) if one not in team)


def _table_7(setup: Setup) -> dict[Any, Measurement]:
    wanted: dict[Any, Measurement] = {}
    for n in _sizes(setup):
        for i, team in enumerate(_teams(setup, n)):
            models = (mean(team), Merge(team))
            wanted["mean", n, i], wanted["stock", n, i] = map(Score, models)
            wanted["at", n, i] = Shell(models, _others(setup, team))
            wanted["predicted", n, i] = Predicted(team)
    return wanted


def _say_table_7(setup: Setup, values: Values) -> StudyReport:
    rows, claims = [], []
    for n in _sizes(setup):
        teams = range(len(_teams(setup, n)))
        means, stocks = ([values[what, n, i] for i in teams] for what in ("mean", "stock"))
        at = [values["at", n, i]["distance"] for i in teams]
        predicted = [values["predicted", n, i] for i in teams]
        rows.append(
            [
                f"N = {n}",
                *both(means),
                shown([one for one, _ in at], 3),
                *both(stocks),
                shown([one for _, one in at], 3),
                shown([one["merged"] for one in predicted], 3),
            ]
        )
        claims += _claims_table_7(n, means, stocks, at, predicted)
    theirs_rows = [
        [f"N = {n}", *(theirs(x) for row in pair for x in row)] for n, pair in TABLE_7.items()
    ]
    columns = ["", "mean: ID", "avg shifts", "to the center"]
    columns += ["Model Stock: ID", "avg shifts", "to the center"]
    return StudyReport(
        [Table([*columns, "predicted"], rows), Table(["paper", *columns[1:]], theirs_rows)],
        claims,
        notes=[
            "The paper's row N = 4 has the distance of five models (5.63): 13.133 / √4 is 6.57, "
            "and one angle explains its last column only with N = 5 there.",
        ],
    )


def _claims_table_7(n: int, means, stocks, at, predicted) -> list[Claim]:
    """Claims of the teams of n: their scores, distances to the center, and those predicted."""
    return [
        Claim(
            f"N = {n}: Model Stock beats the mean of the same models on the shifts",
            "Table 7",
            [average(a) - average(b) for a, b in zip(stocks, means, strict=True)],
        ),
        Claim(
            f"N = {n}: Model Stock is at most 0.5 points behind the mean, in distribution",
            "Table 7",
            [a["id"] - b["id"] for a, b in zip(stocks, means, strict=True)],
            margin=0.5,
        ),
        Claim(
            f"N = {n}: Model Stock is closer to the center than the mean",
            "Table 7",
            [far - near for far, near in at],
            "of distance",
        ),
        Claim(
            f"N = {n}: angles alone predict Model Stock's distance to the center (within 3 %)",
            "Section 3",
            [abs(one["merged"] / near - 1) for one, (_, near) in zip(predicted, at, strict=True)],
            unit="",
            within=0.03,
        ),
    ]


# Units of few enough numbers for an angle above 90 degrees.
_UNITS_NOT_CLIPPED = ("tensor", "filter")


def _units(setup: Setup) -> dict[Any, Measurement]:
    wanted: dict[Any, Measurement] = {}
    for i, team in enumerate(_teams(setup, 2)):
        wanted |= {(unit, i): Score(Merge(team, unit=unit)) for unit in UNITS}
        wanted["one t", i] = Score(Merge(team, "constant_ratio"))
        wanted["weighted", i] = Score(Merge(team, "weighted_model_stock"))
        for unit in _UNITS_NOT_CLIPPED:
            wanted["not clipped", unit, i] = Score(Merge(team, "unclamped", unit))
            wanted["outcomes", unit, i] = Outcomes(team, unit=unit)
        wanted |= curve_scores({"mean": mean(team)}, i)
    return wanted


def _say_units(setup: Setup, values: Values) -> StudyReport:
    teams = range(len(_teams(setup, 2)))
    names = {
        **{unit: f"unit `{unit}`" for unit in UNITS},
        "one t": "one t for all, at the same distance from the anchor",
        "weighted": "weighted (ours), unit `tensor`",
        "mean": "mean (t = 1)",
    }
    curves = [curve(values, "mean", i) for i in teams]
    rows, above = [], {}
    for key, label in names.items():
        scores = [values[key, i] for i in teams]
        above[key] = known(
            own_above(id_and_shifts(score), [line])
            for score, line in zip(scores, curves, strict=True)
        )
        pairs = list(zip(scores, (values["tensor", i] for i in teams), strict=True))
        rows.append(
            [
                label,
                *both(scores),
                *(["–", "–"] if key == "tensor" else _less(pairs)),
                "–" if key == "mean" else f"{shown(above[key])} ({len(above[key])})",
            ]
        )
    columns = ["merge of two after training", "ID", "avg shifts", "ID − `tensor`"]
    columns += ["avg shifts − `tensor`", "above the mean's curve (teams)"]
    claims = [
        Claim(
            "ratios of each layer beat one ratio for all, at the same distance, on the shifts",
            "ours",
            [average(values["tensor", i]) - average(values["one t", i]) for i in teams],
        ),
        Claim("ratios of each layer beat one ratio for all, at equal ID", "ours", above["tensor"]),
    ]
    return StudyReport(
        [Table(columns, rows), _positive_part(setup, values)],
        claims,
        notes=[
            "One ratio for all is a point of the mean's WiSE-FT curve. Above it: a merge as it is, "
            "against the curve at the same accuracy in distribution, where it has one.",
        ],
    )


def _positive_part(setup: Setup, values: Values) -> Table:
    """What taking the anchor where cos <= 0 is worth; the paper leaves it open."""
    teams, rows = range(len(_teams(setup, 2))), []
    for unit in _UNITS_NOT_CLIPPED:
        counts = [values["outcomes", unit, i] for i in teams]
        met = sum(one.get("clamped", 0) for one in counts)
        pairs = [(values[unit, i], values["not clipped", unit, i]) for i in teams]
        share = f"{100 * met / sum(sum(one.values()) for one in counts):.2f} %"
        rows.append([f"unit `{unit}`", share, *_less(pairs)])
    columns = ["t = 0 where cos ≤ 0, against t < 0", "of all units", "ID", "avg shifts"]
    return Table(columns, rows)


def _less(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> list[str]:
    return [
        shown([a["id"] - b["id"] for a, b in pairs]),
        shown([average(a) - average(b) for a, b in pairs]),
    ]


TABLE_7_STUDY = Study(
    "table7",
    "Table 7: merging after training",
    "N models fine-tuned apart, merged once at the end: their mean and Model Stock.",
    _table_7,
    _say_table_7,
    num_seeds=16,
)
UNITS_STUDY = Study(
    "units",
    "Merge units",
    "The same two models merged with one angle a tensor, layer, output channel, head, block, or "
    "for all; with one ratio for all; and weighted by their noise. Where an angle is 90° or more, "
    "the anchor is kept: what that is worth against equation 3's t < 0.",
    _units,
    _say_units,
    num_seeds=16,
)
