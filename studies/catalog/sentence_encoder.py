"""A real pretrained sentence encoder on real domains of text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from modelstock_jax.merging import UNITS
from studies import figures
from studies.catalog.fig2 import KIND_LABELS, angle_claims, angles_by_kind
from studies.catalog.model_pool import MERGING, PAIR, groups, mean
from studies.curves import (
    average_shifts,
    curve,
    curve_scores,
    defined,
    id_and_shifts,
    mean_cell,
    model_gap,
)
from studies.expressions import Merge, Merged, Model, Replica
from studies.measurements import Angles, Measurement, Predicted, Score, Shell
from studies.runs import Run
from studies.study import Claim, Setup, Study, StudyReport, Table, Values

Scores = Sequence[Mapping[str, Any]]
# Dense near the merges: a ratio of all weights is 0.65, and accuracies bend there.
_ALPHAS = (0.25, 0.5, 0.65, 0.8)
# Points of the curve that are rows of the tables.
_WISE_FT = (0.25, 0.5, 0.8)
_HIGH_LEARNING_RATE = 3e-4
# Seeds of the other learning rate and of the runs with merging.
_NUM_OTHER_SEEDS = 4
_SIZES = (1, 2, 3, 4)
_FEW_UNITS = ("tensor", "global")
_LABELS = {
    "zero_shot": "Zero-shot",
    "single": "Single fine-tuned model",
    "mean": "Uniform mean of 2",
    **{unit: f"Model Stock of 2, unit `{unit}`" for unit in UNITS},
    "constant_ratio": "Mean of 2 with one ratio, same L2 distance to the anchor as `tensor`",
    "mean of 4": "Uniform mean of 4",
    "tensor of 4": "Model Stock of 4, unit `tensor`",
    "global of 4": "Model Stock of 4, unit `global`",
    "periodic": "Model Stock of 2, periodic",
}


def _pool(seeds: Sequence[int], options: dict[str, Any]) -> tuple[Replica, ...]:
    return tuple(Replica(Run.of(seed, PAIR | options), r) for seed in seeds for r in (0, 1))


def _sizes(setup: Setup) -> list[int]:
    """Return the N whose teams leave half of the models for the center."""
    return [n for n in _SIZES if n <= len(setup.seeds)]


def _scores(
    setting: str, models: Sequence[Model], units: Sequence[str], alphas: Sequence[float]
) -> dict[Any, Measurement]:
    """Return (setting, row, number) -> the score: single models, and merges of disjoint pairs.

    (setting, "mean", number, alpha) is a point of the WiSE-FT curve of a pair's mean.
    """
    found: dict[Any, Measurement] = {("single", i): Score(m) for i, m in enumerate(models)}
    for i, pair in enumerate(groups(models, 2)):
        found |= curve_scores({"mean": mean(pair)}, i, alphas)
        found |= {(unit, i): Score(Merge(pair, unit=unit)) for unit in units}
        found["constant_ratio", i] = Score(Merge(pair, "constant_ratio"))
    return {(setting, *key): measurement for key, measurement in found.items()}


def _measurements(setup: Setup) -> dict[Any, Measurement]:
    models = _pool(setup.seeds, {})
    measurements = _scores("base", models, UNITS, _ALPHAS)
    for i, four in enumerate(groups(models, 4)):
        measurements["base", "mean of 4", i] = Score(mean(four))
        for unit in _FEW_UNITS:
            measurements["base", f"{unit} of 4", i] = Score(Merge(four, unit=unit))
    other_seeds = setup.seeds[:_NUM_OTHER_SEEDS]
    for i, seed in enumerate(other_seeds):
        measurements["base", "periodic", i] = Score(Merged(Run.of(seed, MERGING)))
    others = _pool(other_seeds, {"optimizer.learning_rate": _HIGH_LEARNING_RATE})
    measurements |= _scores("high", others, _FEW_UNITS, _WISE_FT)
    measurements["angles"] = Angles(models)
    half = len(models) // 2
    for n in _sizes(setup):
        teams = groups(models[:half], n)
        measurements["shell", "mean", n] = Shell(tuple(map(mean, teams)), models[half:])
        if n > 1:
            stocks = tuple(map(Merge, teams))
            measurements["shell", "stock", n] = Shell(stocks, models[half:])
            measurements["predicted", n] = Predicted(teams[0])
    return measurements


def _measurements_few(setup: Setup) -> dict[Any, Measurement]:
    return _scores("base", _pool(setup.seeds, {}), _FEW_UNITS, _WISE_FT)


class _Setting:
    """The scores of one setting: one in-distribution domain and learning rate."""

    def __init__(self, values: Values, name: str) -> None:
        found = {key[1:]: value for key, value in values.items() if key[0] == name}
        count = sum(1 for key in found if key[0] == "mean" and len(key) == 2)
        self.rows: dict[str, Scores] = {
            row: [value for key, value in found.items() if key[0] == row and len(key) == 2]
            for row in _LABELS
        }
        for alpha in _WISE_FT[::-1]:
            self.rows[f"WiSE-FT of the mean, α = {alpha:g}"] = [
                found["mean", i, alpha] for i in range(count)
            ]
        self.rows = {row: scores for row, scores in self.rows.items() if scores}
        alphas = sorted({key[2] for key in found if len(key) == 3})
        self.curves = [curve(found, "mean", i, alphas) for i in range(count)]

    @property
    def singles(self) -> Scores:
        """The mean of the two single models of each pair."""
        return [_mean_score(pair) for pair in groups(self.rows["single"], 2)]

    def gaps(self, row: str) -> list[float]:
        """Return avg. shifts above the WiSE-FT curve of the mean of 2, at equal ID."""
        points = map(id_and_shifts, self.rows[row])
        return defined(
            model_gap(point, [rival]) for point, rival in zip(points, self.curves, strict=False)
        )

    def table(self, title: str) -> Table:
        """Return accuracies, balanced accuracies and AUC of every row."""
        first = self.rows["mean"][0]
        columns = [title, "ID", *first["shifts"], "avg. shifts", "balanced", "AUC"]
        columns.append("above the curve of the mean (pairs)")
        return Table(columns, [self._cells(row, first) for row in self.rows])

    def _cells(self, row: str, first: Mapping[str, Any]) -> list[str]:
        scores = self.rows[row][:1] if row == "zero_shot" else self.rows[row]
        cells = [mean_cell([score["id"] for score in scores])]
        cells += [
            mean_cell([score["shifts"][name] for score in scores]) for name in first["shifts"]
        ]
        cells.append(mean_cell([average_shifts(score) for score in scores]))
        for measure in ("balanced", "auc"):
            cells.append(mean_cell([_average(score, measure) for score in scores]))
        gaps = self.gaps(row) if row in (*UNITS, "constant_ratio") else []
        return [_LABELS.get(row, row), *cells, f"{mean_cell(gaps)} ({len(gaps)})" if gaps else "–"]


def _mean_score(scores: Scores) -> dict[str, Any]:
    names = scores[0]["shifts"]
    return {
        "id": float(np.mean([score["id"] for score in scores])),
        "shifts": {name: float(np.mean([s["shifts"][name] for s in scores])) for name in names},
    }


def _average(score: Mapping[str, Any], measure: str) -> float:
    return float(np.mean([score[measure][name] for name in score["shifts"]]))


# (better, worse): rows of one setting that are compared.
_DIFFERENCES = (
    ("tensor", "mean"),
    ("tensor", "constant_ratio"),
    ("tensor", "global"),
    ("block", "tensor"),
    ("tensor of 4", "mean of 4"),
    ("tensor of 4", "global of 4"),
)


def _difference_table(settings: Mapping[str, _Setting]) -> Table:
    """Compare two rows, with the errors over pairs of models and over test texts."""
    rows = []
    for name, setting in settings.items():
        for better, worse in _DIFFERENCES:
            if better in setting.rows:
                a, b = setting.rows[better], setting.rows[worse]
                rows.append(
                    [
                        f"{name}: {_LABELS[better]} − {_LABELS[worse]}",
                        mean_cell([x["id"] - y["id"] for x, y in zip(a, b, strict=True)]),
                        f"{_error_over_texts(a, b, shifts=False):.2f}",
                        mean_cell(_differences(a, b)),
                        f"{_error_over_texts(a, b, shifts=True):.2f}",
                    ]
                )
    columns = ["difference of the same models", "ID", "ID: error over texts"]
    return Table([*columns, "avg. shifts", "avg. shifts: error over texts"], rows)


def _differences(a: Scores, b: Scores) -> list[float]:
    return [average_shifts(x) - average_shifts(y) for x, y in zip(a, b, strict=True)]


def _error_over_texts(a: Scores, b: Scores, *, shifts: bool) -> float:
    """Return the standard error of a mean difference of accuracies from the choice of the texts.

    Each text has the difference of its classifications, averaged over the pairs of models. The
    result is what a paired bootstrap over the texts of each set converges to, in points.
    """
    names = [name for name in a[0]["correct"] if (name in a[0]["shifts"]) == shifts]
    variances = []
    for name in names:
        by_text = np.mean(
            [
                _bits(x["correct"][name]) - _bits(y["correct"][name])
                for x, y in zip(a, b, strict=True)
            ],
            axis=0,
        )
        variances.append(by_text.var(ddof=1) / len(by_text))
    return 100 * float(np.sqrt(np.sum(variances))) / len(names)


def _bits(text: str) -> np.ndarray:
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8)).astype(float)


def _claims(setting: _Setting) -> list[Claim]:
    """Return the claims on the accuracies of a setting."""
    rows, singles = setting.rows, setting.singles
    claims = [
        Claim(
            "Model Stock beats the uniform mean of the same 2 models, out of distribution",
            "Table 7",
            _differences(rows["tensor"], rows["mean"]),
        ),
        Claim(
            "Model Stock is at most 0.5 points behind the uniform mean of 2, in distribution",
            "Table 7",
            [a["id"] - b["id"] for a, b in zip(rows["tensor"], rows["mean"], strict=True)],
            margin=0.5,
        ),
        Claim(
            "Model Stock beats a single fine-tuned model, out of distribution",
            "Figure 1",
            _differences(rows["tensor"], singles),
        ),
        Claim(
            "the uniform mean of 2 beats a single fine-tuned model, in distribution",
            "Table 1",
            [a["id"] - b["id"] for a, b in zip(rows["mean"], singles, strict=True)],
        ),
        Claim(
            "the uniform mean of 2 beats a single fine-tuned model, out of distribution",
            "Table 1",
            _differences(rows["mean"], singles),
        ),
        Claim(
            "layer-wise ratios beat one ratio, at the same distance to the anchor, out of "
            "distribution",
            "this project",
            _differences(rows["tensor"], rows["constant_ratio"]),
        ),
    ]
    gaps = setting.gaps("tensor")
    if len(gaps) > 1:
        text = "Model Stock is above the WiSE-FT curve of the uniform mean, at equal ID"
        claims.append(Claim(text, "this project", gaps))
    return claims


def _geometry(setup: Setup, values: Values) -> tuple[list[Table], list[Claim]]:
    """Return tables and claims on angles and on distances to a center of other models."""
    angles = values["angles"]
    rows = [
        [
            KIND_LABELS[name],
            f"{np.mean(degrees):.1f}",
            f"{np.mean(np.std(degrees, axis=1, ddof=1)):.2f}",
        ]
        for name, degrees in angles_by_kind(angles).items()
    ]
    tables = [Table(["tensors", "mean angle (degrees)", "standard deviation over pairs"], rows)]
    means = {n: values["shell", "mean", n]["distance"] for n in _sizes(setup)}
    radius = float(np.mean(means[1]))
    rows, errors = [], []
    for n in means:
        cells = [mean_cell(means[n], 3), f"{radius / np.sqrt(n):.3f}"]
        if n > 1:
            stocks, predicted = (
                values["shell", "stock", n]["distance"],
                values["predicted", n]["merged"],
            )
            errors.append(float(np.mean(stocks)) / predicted - 1)
            cells += [mean_cell(stocks, 3), f"{predicted:.3f}"]
        rows.append([f"N = {n}", *cells, *["–"] * (4 - len(cells))])
    columns = ["L2 distance to the center", "uniform mean", "predicted by 1/√N"]
    tables.append(Table([*columns, "Model Stock", "predicted from the angles"], rows))
    deviations = [float(np.mean(means[n])) * np.sqrt(n) / radius - 1 for n in means if n > 1]
    claims = angle_claims(angles, 2 * len(setup.seeds), "Figure 2")
    claims += [
        Claim(text, where, differences, unit="fraction", within=0.03)
        for text, where, differences in (
            (
                "the distance of a mean of N models to the center decreases as 1/√N (within 3 %)",
                "Section 2.3",
                deviations,
            ),
            (
                "angles alone predict Model Stock's distance to the center (within 3 %)",
                "Section 3",
                errors,
            ),
        )
    ]
    return tables, claims


_NOTES = (
    "Balanced: mean over the shifts of the balanced accuracy, which gives both classes the same "
    "weight. AUC: mean over the shifts of the area under the ROC curve, which does not depend on "
    "the threshold between the classes.",
    "Above the curve of the mean: avg. shifts of the merge, minus that of the WiSE-FT curve of the "
    "uniform mean of the same models at the same ID. The curve is a spline through 6 points, or 5.",
    "Error over texts: the standard error from the choice of the test texts, for the same models. "
    "The error after ± is over disjoint pairs of models.",
)


def _summarize(setup: Setup, values: Values) -> StudyReport:
    base, high = _Setting(values, "base"), _Setting(values, "high")
    tables, claims = _geometry(setup, values)
    names = [f"learning rate {rate:g}" for rate in (setup.learning_rate, _HIGH_LEARNING_RATE)]
    settings = dict(zip(names, (base, high), strict=True))
    accuracy_claims = _claims(base)
    accuracy_claims += [
        dataclasses.replace(claim, text=f"{names[1]}: {claim.text}") for claim in _claims(high)
    ]
    periodic = base.rows["periodic"]
    after = base.rows["tensor"][: len(periodic)]
    accuracy_claims.append(
        Claim(
            "periodic merging beats merging after training, out of distribution",
            "Section 3",
            _differences(periodic, after),
        )
    )
    drawn = {"single_model": "single", "constant_ratio": "constant_ratio"}
    points = {row: base.rows[name] for row, name in drawn.items()}
    units = {unit: base.rows[unit] for unit in UNITS}
    return StudyReport(
        [
            *(setting.table(name) for name, setting in settings.items()),
            _difference_table(settings),
            *tables,
        ],
        [*accuracy_claims, *claims],
        {"sentence_encoder": partial(figures.merges_and_curve, base.curves, points, units)},
        _NOTES,
    )


def _summarize_few(setup: Setup, values: Values) -> StudyReport:
    setting = _Setting(values, "base")
    name = f"learning rate {setup.learning_rate:g}"
    return StudyReport(
        [setting.table(name), _difference_table({name: setting})], _claims(setting), notes=_NOTES
    )


SENTENCE_ENCODER = Study(
    "sentence_encoder",
    "A real sentence encoder",
    "all-MiniLM-L6-v2, a contrastive sentence encoder that this project did not train, with a "
    "zero-shot head from prompts. It is fine-tuned to tell positive from negative snippets of "
    "movie reviews; Amazon reviews, news editorials and tweets are the shifts.",
    _measurements,
    _summarize,
    num_seeds=8,
    domain="movie",
)
SENTENCE_ENCODER_TWEETS = Study(
    "sentence_encoder_tweets",
    "A real sentence encoder, fine-tuned on tweets",
    "As the study `sentence_encoder`, with tweets in distribution; reviews and news editorials are "
    "the shifts.",
    _measurements_few,
    _summarize_few,
    num_seeds=4,
    domain="tweets",
)
