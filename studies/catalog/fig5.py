"""Figure 5: the shell during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from modelstock_jax.reporting.figures import kind
from studies import figures
from studies.catalog.fig2 import NOISE
from studies.catalog.model_pool import PAIR
from studies.expressions import Replica
from studies.measurements import Angles, Measurement
from studies.runs import Run
from studies.study import Claim, Setup, Study, StudyReport, Table, Values


def _wanted(setup: Setup) -> dict[int, Measurement]:
    runs = [Run.of(seed, PAIR, every_epoch=True) for seed in setup.seeds]
    return {
        epoch: Angles(tuple(Replica(run, r, epoch) for run in runs for r in (0, 1)))
        for epoch in range(1, setup.epochs + 1)
    }


def _say(setup: Setup, values: Values) -> StudyReport:
    history = _history(values)
    rows = [
        [
            str(entry["epoch"]),
            *(
                _cell(entry[what][key], digits)
                for what in ("kernels", "biases")
                for key, digits in (("angle", 2), ("norm", 3))
            ),
        ]
        for entry in history
    ]
    columns = ["epoch", "angle of kernels", "norm", "angle of biases", "norm"]
    return StudyReport(
        [Table(columns, rows)],
        _claims(history),
        {"fig5": lambda path: figures.dynamics(history, path)},
        ["Mean ± standard deviation, over pairs (angles) and models (norms)."],
    )


def _history(values: Values) -> list[dict[str, Any]]:
    """Each epoch's angles of any two models and norms of each, of kernels and of biases."""
    history = []
    for epoch, found in values.items():
        entry: dict[str, Any] = {"epoch": epoch}
        for what in ("kernels", "biases"):
            tensors = [
                row
                for name, row in found.items()
                if kind(name) == what and not name.endswith(NOISE)
            ]
            angles = np.array([row["angles"] for row in tensors])
            norms = np.array([row["norms"] for row in tensors])
            entry[what] = {
                "angle": angles.mean(0).tolist(),
                "norm": np.sqrt((norms**2).sum(0)).tolist(),
            }
        history.append(entry)
    return history


def _claims(history: Sequence[Mapping[str, Any]]) -> list[Claim]:
    def spread(what: str, key: str) -> list[float]:
        return [
            float(np.std(entry[what][key], ddof=1) / np.mean(entry[what][key])) for entry in history
        ]

    return [
        Claim(
            "any two models have the same angle (within 5 %, mean over epochs)",
            "Figure 5",
            spread("kernels", "angle"),
            unit="",
            within=0.05,
        ),
        Claim(
            "all models are as far from the anchor (within 5 %, mean over epochs)",
            "Figure 5",
            spread("kernels", "norm"),
            unit="",
            within=0.05,
        ),
    ]


def _cell(values: list[float], digits: int) -> str:
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


FIGURE_5 = Study(
    "fig5",
    "Figure 5: the shell during training",
    "Angles between any two models, and their distance from the anchor, at the end of every epoch "
    "of runs that are never merged.",
    _wanted,
    _say,
    num_seeds=2,
)
