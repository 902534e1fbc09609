"""Models of all methods of Tables 2, 3 and 4."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from studies.catalog.model_pool import MERGING, STRONG, STRONG_LENGTH
from studies.catalog.soup_search import PROBE_RATIO, probe_options, soup
from studies.expressions import Anchor, Best, Greedy, Mean, Merged, Model, Replica
from studies.runs import Run
from studies.study import Setup

# Options of the methods that train a single model; each is trained at several learning rates.
_METHODS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "vanilla": [{}],
    "lp": [{"objective.name": "linear_probe"}],
    "lp_ft": [{"objective.name": "lp_ft"}],
    "car_ft": [{"objective.name": "car_ft"}],
    # In a short training, the learning rate of the projection radii limits FTP.
    "ftp": [
        {"optimizer.projection.name": "ftp", "optimizer.projection.learning_rate": rate}
        for rate in (0.01, 0.1)
    ],
    "flyp": [{"objective.name": "flyp"}],
    # The norm that TPGM's authors use on ImageNet.
    "tpgm": [{"optimizer.projection.name": "tpgm", "optimizer.projection.norm": "l2"}],
}
# Learning rates divided by the config's; the model that is best on validation data is used.
_RATES = (1 / 3, 1.0, 3.0)
# Methods whose best learning rate was the minimum or maximum of these.
_OTHER_RATES = {"lp": tuple(PROBE_RATIO * f for f in _RATES), "ftp": (1 / 9, 1 / 3, 1.0)}
NAMES = {
    "zero_shot": "Zero-shot",
    "vanilla": "Vanilla FT",
    "vanilla*": "Vanilla FT*",
    "lp": "LP",
    "lp_ft": "LP-FT",
    "car_ft": "CAR-FT",
    "ftp": "FTP",
    "flyp": "FLYP",
    "tpgm": "TPGM",
    "uniform_soup": "Uniform Model Soup",
    "greedy_soup": "Greedy Model Soup",
    "uniform_soup*": "Uniform Model Soup (from LP init)",
    "greedy_soup*": "Greedy Model Soup (from LP init)",
    "model_stock": "Model Stock",
    "model_stock*": "Model Stock*",
}


def _strong(setup: Setup, method: str) -> dict[str, Any]:
    """Return the options of the second setup for methods with *, else {}."""
    if not method.endswith("*"):
        return {}
    return STRONG | {"epochs": round(STRONG_LENGTH * setup.epochs)}


def rates_of(method: str) -> tuple[float, ...]:
    """Return the learning rates of a single-model method, divided by the config's."""
    return _OTHER_RATES.get(method, _RATES)


def single(setup: Setup, method: str, seed: int) -> tuple[Replica, ...]:
    """Return a model for each of the method's options and learning rates."""
    rates = tuple(setup.learning_rate * factor for factor in rates_of(method))
    base = {
        "merge.every": "never",
        "num_replicas": len(rates),
        "per_replica.learning_rate": rates,
        **_strong(setup, method),
    }
    runs = [
        Run.of(seed, {**base, **options, **probe_options(setup, options)})
        for options in _METHODS[method.rstrip("*")]
    ]
    return tuple(Replica(run, r) for run in runs for r in range(len(rates)))


def is_single(method: str) -> bool:
    """Return whether the method's model is the best of several on validation data."""
    return method.rstrip("*") in _METHODS


def model_by(setup: Setup, method: str, seed: int) -> Model:
    """Return the model of a row of the tables; `method` is a key of `NAMES`."""
    if method == "zero_shot":
        return Anchor()
    if method.startswith("model_stock"):
        return Merged(Run.of(seed, MERGING | _strong(setup, method)))
    if "soup" in method:
        members = soup(setup, seed, "lp_ft" if method.endswith("*") else "cross_entropy")
        return Mean(members) if method.startswith("uniform") else Greedy(members)
    return Best(single(setup, method, seed))
