"""Merging after training: Table 7, and merge units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modelstock_jax.merging import UNITS
from studies.catalog.model_pool import groups, mean, pool
from studies.catalog.paper_numbers import TABLE_7
from studies.curves import (
    accuracy_cells,
    average_shifts,
    curve,
    curve_scores,
    defined,
    id_and_shifts,
    mean_cell,
    model_gap,
    paper_cell,
)
from studies.expressions import Merge
from studies.measurements import Measurement, Outcomes, Predicted, Score, Shell
from studies.study import Claim, Setup, Study, StudyReport, Table, Values


def _teams(setup: Setup, size: int):
    return groups(pool(setup.seeds), size)


def _sizes(setup: Setup):
    return [n for n in TABLE_7 if len(_teams(setup, n)) > 1]


def _others(setup: Setup, team):
    """Return the models outside the team; their mean is a center independent of the team."""
    return tuple(model for model in pool(setup.seeds) if model not in team)


def _table_7(setup: Setup) -> dict[Any, Measurement]:
    measurements: dict[Any, Measurement] = {}
    for n in _sizes(setup):
        for i, team in enumerate(_teams(setup, n)):
            models = (mean(team), Merge(team))
            measurements["mean", n, i], measurements["stock", n, i] = map(Score, models)
            measurements["shell", n, i] = Shell(models, _others(setup, team))
            measurements["predicted", n, i] = Predicted(team)
    return measurements


def _summarize_table_7(setup: Setup, values: Values) -> StudyReport:
    rows, claims = [], []
    for n in _sizes(setup):
        teams = range(len(_teams(setup, n)))
        means, stocks = ([values[method, n, i] for i in teams] for method in ("mean", "stock"))
        distances = [values["shell", n, i]["distance"] for i in teams]
        predictions = [values["predicted", n, i]["merged"] for i in teams]
        rows.append(
            [
                f"N = {n}",
                *accuracy_cells(means),
                mean_cell([of_mean for of_mean, _ in distances], 3),
                *accuracy_cells(stocks),
                mean_cell([of_stock for _, of_stock in distances], 3),
                mean_cell(predictions, 3),
            ]
        )
        claims += _claims_table_7(n, means, stocks, distances, predictions)
    paper_rows = [
        [f"N = {n}", *(paper_cell(value) for row in pair for value in row)]
        for n, pair in TABLE_7.items()
    ]
    columns = [
        f"{method}: {column}"
        for method in ("uniform mean", "Model Stock")
        for column in ("ID", "avg. shifts", "L2 distance to center")
    ]
    paper_columns = [column.replace("ID", "ImageNet") for column in columns]
    return StudyReport(
        [
            Table(["ours", *columns, "Model Stock: predicted distance to center"], rows),
            Table(["paper", *paper_columns], paper_rows),
        ],
        claims,
        notes=[
            "In the paper, the uniform mean in row N = 4 has the distance of five models (5.63). "
            "13.133 / √4 is 6.57, and a single angle explains the last column of that row only "
            "with N = 5.",
        ],
    )


def _claims_table_7(
    n: int,
    means: Sequence[Mapping[str, Any]],
    stocks: Sequence[Mapping[str, Any]],
    distances: Sequence[tuple[float, float]],
    predictions: Sequence[float],
) -> list[Claim]:
    """Return the claims for teams of n.

    Args:
      n: number of models in a team.
      means: scores of the uniform means.
      stocks: scores of Model Stock.
      distances: to the center, of the uniform mean and of Model Stock.
      predictions: of Model Stock's distance.
    """
    return [
        Claim(
            f"N = {n}: Model Stock beats the uniform mean of the same models, out of distribution",
            "Table 7",
            [average_shifts(a) - average_shifts(b) for a, b in zip(stocks, means, strict=True)],
        ),
        Claim(
            f"N = {n}: Model Stock is at most 0.5 points behind the uniform mean, in distribution",
            "Table 7",
            [a["id"] - b["id"] for a, b in zip(stocks, means, strict=True)],
            margin=0.5,
        ),
        Claim(
            f"N = {n}: Model Stock is closer to the center than the uniform mean",
            "Table 7",
            [of_mean - of_stock for of_mean, of_stock in distances],
            "in L2 distance",
        ),
        Claim(
            f"N = {n}: angles alone predict Model Stock's distance to the center (within 3 %)",
            "Section 3",
            [
                abs(prediction / of_stock - 1)
                for prediction, (_, of_stock) in zip(predictions, distances, strict=True)
            ],
            unit="fraction",
            within=0.03,
        ),
    ]


# Merge units small enough for angles above 90 degrees.
_UNCLAMPED_UNITS = ("tensor", "filter")


def _units(setup: Setup) -> dict[Any, Measurement]:
    measurements: dict[Any, Measurement] = {}
    for i, team in enumerate(_teams(setup, 2)):
        measurements |= {(unit, i): Score(Merge(team, unit=unit)) for unit in UNITS}
        measurements["global ratio", i] = Score(Merge(team, "constant_ratio"))
        measurements["weighted", i] = Score(Merge(team, "weighted_model_stock"))
        for unit in _UNCLAMPED_UNITS:
            measurements["unclamped", unit, i] = Score(Merge(team, "unclamped", unit))
            measurements["outcomes", unit, i] = Outcomes(team, unit=unit)
        measurements |= curve_scores({"mean": mean(team)}, i)
    return measurements


def _summarize_units(setup: Setup, values: Values) -> StudyReport:
    teams = range(len(_teams(setup, 2)))
    names = {
        **{unit: f"Model Stock, unit `{unit}`" for unit in UNITS},
        "global ratio": "Mean with one global ratio, same L2 distance to anchor as `tensor`",
        "weighted": "Model Stock, weighted (extension), unit `tensor`",
        "mean": "Uniform mean (t = 1)",
    }
    curves = [curve(values, "mean", i) for i in teams]
    rows, gaps = [], {}
    for key, label in names.items():
        scores = [values[key, i] for i in teams]
        gaps[key] = defined(
            model_gap(id_and_shifts(score), [mean_curve])
            for score, mean_curve in zip(scores, curves, strict=True)
        )
        pairs = list(zip(scores, (values["tensor", i] for i in teams), strict=True))
        rows.append(
            [
                label,
                *accuracy_cells(scores),
                *(["–", "–"] if key == "tensor" else _difference_cells(pairs)),
                "–" if key == "mean" else f"{mean_cell(gaps[key])} ({len(gaps[key])})",
            ]
        )
    columns = ["merge of 2 replicas after training", "ID", "avg. shifts", "ID − `tensor`"]
    columns += ["avg. shifts − `tensor`", "above the uniform mean's WiSE-FT curve (pairs)"]
    claims = [
        Claim(
            "layer-wise ratios beat one global ratio, at the same distance to the anchor, out of "
            "distribution",
            "this project",
            [
                average_shifts(values["tensor", i]) - average_shifts(values["global ratio", i])
                for i in teams
            ],
        ),
        Claim(
            "layer-wise ratios beat one global ratio, at equal ID", "this project", gaps["tensor"]
        ),
    ]
    return StudyReport(
        [Table(columns, rows), _clamping_table(setup, values)],
        claims,
        notes=[
            "The mean with one global ratio is a point of the uniform mean's WiSE-FT curve. Above "
            "the curve: avg. shifts of the merge without tuning, minus that of the curve at the "
            "same ID. Pairs whose ID the curve does not reach are left out; the number of the "
            "others is in parentheses.",
        ],
    )


def _clamping_table(setup: Setup, values: Values) -> Table:
    """Compare t = 0 with t < 0 where cos <= 0; the paper does not specify this case."""
    teams, rows = range(len(_teams(setup, 2))), []
    for unit in _UNCLAMPED_UNITS:
        counts = [values["outcomes", unit, i] for i in teams]
        num_clamped = sum(count.get("clamped", 0) for count in counts)
        pairs = [(values[unit, i], values["unclamped", unit, i]) for i in teams]
        fraction = f"{100 * num_clamped / sum(sum(count.values()) for count in counts):.2f} %"
        rows.append([f"unit `{unit}`", fraction, *_difference_cells(pairs)])
    columns = ["t = 0 (clamped) − t < 0, where cos ≤ 0", "clamped units", "ID", "avg. shifts"]
    return Table(columns, rows)


def _difference_cells(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> list[str]:
    return [
        mean_cell([a["id"] - b["id"] for a, b in pairs]),
        mean_cell([average_shifts(a) - average_shifts(b) for a, b in pairs]),
    ]


TABLE_7_STUDY = Study(
    "table7",
    "Table 7: merging after training",
    "N independently fine-tuned models, merged once after training: their uniform mean and Model "
    "Stock.",
    _table_7,
    _summarize_table_7,
    num_seeds=16,
)
UNITS_STUDY = Study(
    "units",
    "Merge units",
    "The same two models, merged with one angle per tensor, layer, output channel, head or block, "
    "with one angle for the entire model, with one global ratio, and weighted by their noise. If "
    "an angle is 90° or more, this project uses the anchor (t = 0); the second table compares this "
    "with the t < 0 of equation 3.",
    _units,
    _summarize_units,
    num_seeds=16,
)
