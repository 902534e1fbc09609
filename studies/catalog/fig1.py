"""Figure 1: in-distribution accuracy, avg. shifts, and training cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from studies import figures
from studies.catalog.model_pool import groups, mean, pool
from studies.catalog.soup_search import SIZE, soup
from studies.curves import (
    ALPHAS,
    Curve,
    accuracy_cells,
    average_shifts,
    curve,
    curve_gap,
    curve_scores,
    defined,
)
from studies.expressions import Greedy, Mean, Merge, Model
from studies.measurements import Measurement
from studies.study import Claim, Setup, Study, StudyReport, Table, Values

# A soup costs as much training as everything else together, so only Table 2's soups are used.
_SOUP_SEEDS = 3
# Row of the registry -> label of a model, in tables and figures.
_NAMES = {
    "single_model": "Single fine-tuned model",
    "uniform_mean": "Uniform mean of 2 replicas",
    "model_stock": "Model Stock of 2 replicas",
    "uniform_soup": f"Uniform Model Soup of {SIZE} models",
    "greedy_soup": f"Greedy Model Soup of {SIZE} models",
}
_RIVALS = {
    "single_model": "a single fine-tuned model",
    "uniform_mean": "the uniform mean of the same 2 replicas",
    "uniform_soup": "the Uniform Model Soup",
    "greedy_soup": "the Greedy Model Soup",
}
_NUM_TRAININGS = {
    "single_model": 1,
    "uniform_mean": 2,
    "model_stock": 2,
    "uniform_soup": SIZE,
    "greedy_soup": SIZE,
}


def _models(setup: Setup, seed: int) -> dict[str, Model]:
    (pair,) = groups(pool([seed]), 2)
    models = {"single_model": pair[0], "uniform_mean": mean(pair), "model_stock": Merge(pair)}
    if seed in setup.seeds[:_SOUP_SEEDS]:
        members = soup(setup, seed, "cross_entropy")
        models |= {"uniform_soup": Mean(members), "greedy_soup": Greedy(members)}
    return models


def _measurements(setup: Setup) -> dict[Any, Measurement]:
    measurements: dict[Any, Measurement] = {}
    for seed in setup.seeds:
        measurements |= curve_scores(_models(setup, seed), seed)
    return measurements


def _summarize(setup: Setup, values: Values) -> StudyReport:
    seeds = {name: [s for s in setup.seeds if (name, s) in values] for name in _NAMES}
    curves = {name: [curve(values, name, seed) for seed in seeds[name]] for name in _NAMES}
    labeled_curves = {name: (label, curves[name]) for name, label in _NAMES.items()}
    scores = {name: [values[name, seed] for seed in seeds[name]] for name in _NAMES}
    costs = {
        name: (
            label,
            _NUM_TRAININGS[name],
            [score["id"] for score in scores[name]],
            [average_shifts(score) for score in scores[name]],
        )
        for name, label in _NAMES.items()
    }
    gap_claims = [_gap_claim(curves, rival) for rival in _RIVALS]
    return StudyReport(
        [_table(setup, values, seeds)],
        [
            _claim(scores, "single_model"),
            _claim(scores, "single_model", shifts=True),
            _claim(scores, "greedy_soup", shifts=True),
            *(claim for claim in gap_claims if len(claim.differences) > 1),
        ],
        {
            "fig1": lambda path: figures.wise_ft_curves(
                labeled_curves,
                path,
                strong=["model_stock"],
                title="WiSE-FT curves of Model Stock and of other models",
            ),
            "fig1_cost": lambda path: figures.costs(costs, path),
        },
        [
            f"A soup has {SIZE} models of Model Soups' random search, as in Table 2, on the first "
            f"{_SOUP_SEEDS} seeds. Fine-tuning runs count the trainings of a single model.",
            "Claims on WiSE-FT curves: the mean difference of avg. shifts over the upper half of "
            "the in-distribution accuracies that both curves reach.",
        ],
    )


def _table(setup: Setup, values: Values, seeds: Mapping[str, Sequence[int]]) -> Table:
    rows = [["Zero-shot", "0", *accuracy_cells([values["zero_shot", setup.seeds[0]]])]]
    for name, label in _NAMES.items():
        for alpha in (*ALPHAS, 1):
            scores = [values[(name, s) if alpha == 1 else (name, s, alpha)] for s in seeds[name]]
            rows.append(
                [f"{label}, α = {alpha:g}", str(_NUM_TRAININGS[name]), *accuracy_cells(scores)]
            )
    return Table(["w0 + α (w − w0)", "fine-tuning runs", "ID", "avg. shifts"], rows)


def _gap_claim(curves: Mapping[str, Sequence[Curve]], rival: str) -> Claim:
    """Return the claim of a higher curve at equal ID, which the paper makes for both soups."""
    pairs = zip(curves["model_stock"], curves[rival], strict=False)
    return Claim(
        f"the WiSE-FT curve of Model Stock is above that of {_RIVALS[rival]}",
        "Section 4.2" if "soup" in rival else "this project",
        defined(curve_gap([stock], [other]) for stock, other in pairs),
    )


def _claim(
    scores: Mapping[str, Sequence[Mapping[str, Any]]], rival: str, *, shifts: bool = False
) -> Claim:
    # A soup has fewer seeds, the first ones.
    pairs = zip(scores["model_stock"], scores[rival], strict=False)
    return Claim(
        f"Model Stock beats {_RIVALS[rival]}, {'out of' if shifts else 'in'} distribution",
        "Figure 1",
        [average_shifts(a) - average_shifts(b) if shifts else a["id"] - b["id"] for a, b in pairs],
    )


FIGURE_1 = Study(
    "fig1",
    "Figure 1: in-distribution and out-of-distribution accuracy",
    "Single fine-tuned models, their uniform mean, Model Stock after training, and Uniform and "
    "Greedy Model Soups, each with its WiSE-FT curve and its number of fine-tuning runs.",
    _measurements,
    _summarize,
)
