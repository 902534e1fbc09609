"""Figure 5: angle and norm during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from modelstock_jax.reporting.figures import kind
from studies import figures
from studies.catalog.fig2 import NO_GRADIENT
from studies.catalog.model_pool import PAIR
from studies.expressions import Replica
from studies.measurements import Angles, Measurement
from studies.runs import Run
from studies.study import Claim, Setup, Study, StudyReport, Table, Values


def _measurements(setup: Setup) -> dict[int, Measurement]:
    runs = [Run.of(seed, PAIR, every_epoch=True) for seed in setup.seeds]
    return {
        epoch: Angles(tuple(Replica(run, r, epoch) for run in runs for r in (0, 1)))
        for epoch in range(1, setup.epochs + 1)
    }


def _summarize(setup: Setup, values: Values) -> StudyReport:
    history = _history(values)
    rows = [
        [
            str(entry["epoch"]),
            *(
                _cell(entry[name][key], digits)
                for name in ("kernels", "biases")
                for key, digits in (("angle", 2), ("norm", 3))
            ),
        ]
        for entry in history
    ]
    columns = ["epoch", "angle of kernels (degrees)", "norm of kernels"]
    columns += ["angle of biases (degrees)", "norm of biases"]
    return StudyReport(
        [Table(columns, rows)],
        _claims(history),
        {"fig5": lambda path: figures.dynamics(history, path)},
        ["Mean ± standard deviation, over pairs (angles) and models (norms)."],
    )


def _history(values: Values) -> list[dict[str, Any]]:
    """Return the angles of all pairs and norms of all models, by epoch, for kernels and biases."""
    history = []
    for epoch, tensors in values.items():
        entry: dict[str, Any] = {"epoch": epoch}
        for kind_name in ("kernels", "biases"):
            rows = [
                row
                for name, row in tensors.items()
                if kind(name) == kind_name and not name.endswith(NO_GRADIENT)
            ]
            angles = np.array([row["angles"] for row in rows])
            norms = np.array([row["norms"] for row in rows])
            entry[kind_name] = {
                "angle": angles.mean(0).tolist(),
                "norm": np.sqrt((norms**2).sum(0)).tolist(),
            }
        history.append(entry)
    return history


def _claims(history: Sequence[Mapping[str, Any]]) -> list[Claim]:
    def relative_std(kind_name: str, key: str) -> list[float]:
        return [
            float(np.std(entry[kind_name][key], ddof=1) / np.mean(entry[kind_name][key]))
            for entry in history
        ]

    return [
        Claim(
            "any two models have the same angle (within 5 %, mean over epochs)",
            "Figure 5",
            relative_std("kernels", "angle"),
            unit="fraction",
            within=0.05,
        ),
        Claim(
            "all models have the same distance to the anchor (within 5 %, mean over epochs)",
            "Figure 5",
            relative_std("kernels", "norm"),
            unit="fraction",
            within=0.05,
        ),
    ]


def _cell(values: list[float], digits: int) -> str:
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


FIGURE_5 = Study(
    "fig5",
    "Figure 5: the thin shell during training",
    "Angles between any two models, and their distance to the anchor, at the end of every epoch "
    "of runs without merging.",
    _measurements,
    _summarize,
    num_seeds=2,
)
