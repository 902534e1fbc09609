"""The models of a soup: a random search of hyper-parameters, trained side by side."""

from __future__ import annotations

import numpy as np

from modelstock_jax.studies.models import Replica
from modelstock_jax.studies.runs import Run
from modelstock_jax.studies.study import Setup

SIZE = 12


def soup(setup: Setup, seed: int, objective: str) -> tuple[Replica, ...]:
    """Model Soups' random search, as one program: its ranges, about the config's learning rate."""
    rng = np.random.default_rng(seed)

    def draw(low: float, high: float) -> tuple[float, ...]:
        return tuple(float(f"{x:.6g}") for x in rng.uniform(low, high, SIZE))

    options = {
        "merge.every": "never",
        "num_replicas": SIZE,
        "objective.name": objective,
        "per_replica.learning_rate": tuple(
            float(f"{setup.learning_rate * 10**x:.6g}") for x in draw(-1, 0.5)
        ),
        "per_replica.weight_decay": tuple(float(f"{10**x:.6g}") for x in draw(-4.1, -0.28)),
        "per_replica.label_smoothing": draw(0, 0.225),
        "per_replica.mixup": draw(0, 0.875),
    }
    run = Run.of(seed, options)
    return tuple(Replica(run, r) for r in range(SIZE))
