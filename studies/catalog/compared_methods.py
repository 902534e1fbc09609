"""Models by every method of Tables 2, 3 and 4: Model Stock, and what it is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from studies.catalog.model_pool import MERGING, STRONG, STRONG_LENGTH
from studies.catalog.soup_search import PROBE_RATIO, probe_options, soup
from studies.expressions import Anchor, Best, Greedy, Mean, Merged, Model, Replica
from studies.runs import Run
from studies.study import Setup

# Options of every single model, of each of which all learning rates are tried.
_METHODS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "vanilla": [{}],
    "lp": [{"objective.name": "linear_probe"}],
    "lp_ft": [{"objective.name": "lp_ft"}],
    "car_ft": [{"objective.name": "car_ft"}],
    # How fast its radii may grow is what binds in a short training.
    "ftp": [
        {"optimizer.projection.name": "ftp", "optimizer.projection.learning_rate": rate}
        for rate in (0.01, 0.1)
    ],
    "flyp": [{"objective.name": "flyp"}],
    # Its authors' norm on ImageNet.
    "tpgm": [{"optimizer.projection.name": "tpgm", "optimizer.projection.norm": "l2"}],
}
# Learning rates to the config's: the model that is best on validation is taken.
_RATES = (1 / 3, 1.0, 3.0)
# Whose best lay at an end of those.
_OWN_RATES = {"lp": tuple(PROBE_RATIO * f for f in _RATES), "ftp": (1 / 9, 1 / 3, 1.0)}
NAMES = {
    "zero_shot": "zero-shot",
    "vanilla": "vanilla fine-tuning",
    "vanilla*": "vanilla fine-tuning*",
    "lp": "linear probe",
    "lp_ft": "LP-FT",
    "car_ft": "CAR-FT",
    "ftp": "FTP",
    "flyp": "FLYP",
    "tpgm": "TPGM",
    "uniform_soup": "uniform soup",
    "greedy_soup": "greedy soup",
    "uniform_soup*": "uniform soup from LP",
    "greedy_soup*": "greedy soup from LP",
    "model_stock": "Model Stock",
    "model_stock*": "Model Stock*",
}


def _strong(setup: Setup, method: str) -> dict[str, Any]:
    """The second set-up's options, of the methods that the paper marks with an asterisk."""
    if not method.endswith("*"):
        return {}
    return STRONG | {"epochs": round(STRONG_LENGTH * setup.epochs)}


def rates_of(method: str) -> tuple[float, ...]:
    """Learning rates that are tried of a single model, to the config's."""
    return _OWN_RATES.get(method, _RATES)


def single(setup: Setup, method: str, seed: int) -> tuple[Replica, ...]:
    """A model of each of the method's options at each learning rate, the rates side by side."""
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
    """Whether the method's model is the best one of several on validation."""
    return method.rstrip("*") in _METHODS


def model_by(setup: Setup, method: str, seed: int) -> Model:
    """What a row of the tables measures; `method` is a key of `NAMES`."""
    if method == "zero_shot":
        return Anchor()
    if method.startswith("model_stock"):
        return Merged(Run.of(seed, MERGING | _strong(setup, method)))
    if "soup" in method:
        members = soup(setup, seed, "lp_ft" if method.endswith("*") else "cross_entropy")
        return Mean(members) if method.startswith("uniform") else Greedy(members)
    return Best(single(setup, method, seed))
