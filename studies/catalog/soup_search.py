"""The models of a soup: a random search over hyperparameters, trained in parallel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from studies.expressions import Replica
from studies.runs import Run
from studies.study import Setup

SIZE = 12
# Learning rate of a linear probe divided by the config's.
PROBE_RATIO = 50
# Probabilities of 0, 1 and 2 RandAugment operations: the authors have 48, 18 and 5 such models.
_OPERATIONS = (2 / 3, 1 / 4, 1 / 12)


def soup(setup: Setup, seed: int, objective: str) -> tuple[Replica, ...]:
    """Return models of the random search of Model Soups (Wortsman et al. 2022), as one run.

    The distributions follow the list of the authors' 71 models:

    - learning rate: two decades around the config's (authors: 1e-6 to 1e-4).
    - weight decay: 10^-4.1 to 10^-0.28.
    - epochs: a quarter of the config's to all of them (authors: 4 to 16).
    - label smoothing and mixup: each in half of the models.
    - RandAugment, for stored images only: in a third of the models, with one operation, rarely two.

    All models use the config's crop, and on the glyphs their augmentation.
    """
    rng = np.random.default_rng(seed)

    def draw(low: float, high: float) -> tuple[float, ...]:
        return tuple(float(f"{x:.6g}") for x in rng.uniform(low, high, SIZE))

    def half(high: float) -> tuple[float, ...]:
        return tuple(
            x * bool(used)
            for x, used in zip(draw(0, high), rng.integers(2, size=SIZE), strict=True)
        )

    epochs = rng.integers(max(1, setup.epochs // 4), setup.epochs + 1, SIZE).tolist()
    options = {
        "merge.every": "never",
        "num_replicas": SIZE,
        "per_replica.learning_rate": tuple(
            float(f"{setup.learning_rate * 10**x:.6g}") for x in draw(-1.5, 0.5)
        ),
        "per_replica.weight_decay": tuple(float(f"{10**x:.6g}") for x in draw(-4.1, -0.28)),
        "epochs": max(epochs),
        "per_replica.epochs": tuple(epochs),
        "per_replica.label_smoothing": half(0.225),
        "per_replica.mixup": half(0.875),
        "objective.name": objective,
    }
    if setup.stored_images:
        options |= {
            "per_replica.randaugment_ops": tuple(rng.choice(3, SIZE, p=_OPERATIONS).tolist()),
            "per_replica.randaugment_magnitude": tuple(rng.integers(1, 21, SIZE).tolist()),
        }
    run = Run.of(seed, options | probe_options(setup, options))
    return tuple(Replica(run, r) for r in range(SIZE))


def probe_options(setup: Setup, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the option of the learning rate of LP-FT's probe; {} for other objectives.

    A head of exp(logit_scale) times unit columns hardly changes at the learning rate of a tower.
    50 times the config's, 0.1 on the glyphs, is the best on validation data (docs/results.md).
    """
    if options.get("objective.name") != "lp_ft":
        return {}
    return {"objective.probe_learning_rate": PROBE_RATIO * setup.learning_rate}
