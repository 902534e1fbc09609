"""Figure 1: accuracy in distribution, on the shifts, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from studies import figures
from studies.catalog.model_pool import groups, mean, pool
from studies.catalog.soup_search import SIZE, soup
from studies.curves import ALPHAS, Curve, average, both, curve, curve_above, curve_scores, known
from studies.expressions import Greedy, Mean, Merge, Model
from studies.measurements import Measurement
from studies.study import Claim, Setup, Study, StudyReport, Table, Values

# A soup costs as much as all else together: those that Table 2 has as well.
_SOUP_SEEDS = 3
_NAMES = {
    "replica": "one fine-tuned model",
    "mean": "mean of two",
    "model_stock": "Model Stock of two",
    "uniform_soup": f"uniform soup of {SIZE}",
    "greedy_soup": f"greedy soup of {SIZE}",
}
_WHOSE = {
    "replica": "a fine-tuned model",
    "mean": "the mean of the same two",
    "uniform_soup": "the uniform soup",
    "greedy_soup": "the greedy soup",
}
_COSTS = {"replica": 1, "mean": 2, "model_stock": 2, "uniform_soup": SIZE, "greedy_soup": SIZE}


def _models(setup: Setup, seed: int) -> dict[str, Model]:
    (pair,) = groups(pool([seed]), 2)
    models = {"replica": pair[0], "mean": mean(pair), "model_stock": Merge(pair)}
    if seed in setup.seeds[:_SOUP_SEEDS]:
        members = soup(setup, seed, "cross_entropy")
        models |= {"uniform_soup": Mean(members), "greedy_soup": Greedy(members)}
    return models


def _wanted(setup: Setup) -> dict[Any, Measurement]:
    wanted: dict[Any, Measurement] = {}
    for seed in setup.seeds:
        wanted |= curve_scores(_models(setup, seed), seed)
    return wanted


def _say(setup: Setup, values: Values) -> StudyReport:
    seeds = {name: [s for s in setup.seeds if (name, s) in values] for name in _NAMES}
    lines = {name: [curve(values, name, seed) for seed in seeds[name]] for name in _NAMES}
    curves = {label: lines[name] for name, label in _NAMES.items()}
    own = {name: [values[name, seed] for seed in seeds[name]] for name in _NAMES}
    spent = {
        label: (_COSTS[name], [s["id"] for s in own[name]], [average(s) for s in own[name]])
        for name, label in _NAMES.items()
    }
    rows = [["zero-shot", "0", *both([values["zero_shot", setup.seeds[0]]])]]
    for name, label in _NAMES.items():
        for alpha in (*ALPHAS, 1):
            scores = [values[(name, s) if alpha == 1 else (name, s, alpha)] for s in seeds[name]]
            rows.append([f"{label}, α = {alpha:g}", str(_COSTS[name]), *both(scores)])
    return StudyReport(
        [Table(["w0 + α (model − w0)", "cost", "ID", "avg shifts"], rows)],
        [
            _claim(own, "model_stock", "replica", "beats a fine-tuned model"),
            _claim(own, "model_stock", "replica", "beats a fine-tuned model", shifts=True),
            _claim(own, "model_stock", "greedy_soup", "beats the greedy soup", shifts=True),
            *(one for rival in _WHOSE if len((one := _above(lines, rival)).differences) > 1),
        ],
        {
            "fig1": lambda path: figures.wise_ft_curves(
                curves, path, strong=[_NAMES["model_stock"]]
            ),
            "fig1_cost": lambda path: figures.costs(spent, path),
        },
        [
            f"A soup is of {SIZE} models of Model Soups' random search, as in Table 2, on the "
            f"first {_SOUP_SEEDS} seeds; cost is training, in fine-tunings of one model.",
            "Curve against curve: the mean difference on the shifts over the upper half of the "
            "accuracies in distribution that both have.",
        ],
    )


def _above(lines: Mapping[str, Sequence[Curve]], rival: str) -> Claim:
    """At equal ID; the paper says it of both soups."""
    pairs = zip(lines["model_stock"], lines[rival], strict=False)
    return Claim(
        f"Model Stock's WiSE-FT curve lies above that of {_WHOSE[rival]}",
        "Section 4.2" if "soup" in rival else "ours",
        known(curve_above([mine], [other]) for mine, other in pairs),
    )


def _claim(
    own: Mapping[str, Sequence[Mapping[str, Any]]],
    name: str,
    rival: str,
    text: str,
    *,
    shifts: bool = False,
) -> Claim:
    pairs = zip(own[name], own[rival], strict=False)  # A soup has fewer seeds, the first ones.
    place = "on the shifts" if shifts else "in distribution"
    return Claim(
        f"Model Stock {text}, {place}",
        "Figure 1",
        [average(a) - average(b) if shifts else a["id"] - b["id"] for a, b in pairs],
    )


FIGURE_1 = Study(
    "fig1",
    "Figure 1: in distribution against the shifts",
    "Fine-tuned models, their mean and Model Stock after training, and uniform and greedy soups, "
    "each with its WiSE-FT curve; and what each costs.",
    _wanted,
    _say,
)
