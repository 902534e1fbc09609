"""Figure 2: angle and norm of fine-tuned models, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from modelstock_jax.reporting.figures import angle_by_layer, kind
from studies.catalog.model_pool import disjoint_pairs, pool
from studies.measurements import Angles, Measurement
from studies.study import Claim, Setup, Study, StudyReport, Table, Values

# Key biases receive no gradient (softmax is shift-invariant); their angles are noise.
NO_GRADIENT = ("k_proj.bias", "key.bias")
# Kind of tensor -> its name in tables.
KIND_LABELS = {
    "kernels": "kernels",
    "biases": "biases",
    "norms": "normalization layers",
    "head": "head",
}


def _measurements(setup: Setup) -> dict[str, Measurement]:
    return {"angles": Angles(pool(setup.seeds))}


def angles_by_kind(angles: Mapping[str, Any]) -> dict[str, list[list[float]]]:
    """Return `kernels`, `biases`, `norms` and `head`, if they exist -> angles of each tensor.

    Args:
      angles: value of an `Angles` measurement.
    """
    kinds: dict[str, list[list[float]]] = {}
    for name in KIND_LABELS:
        rows = [
            row["angles"] for tensor, row in _with_gradient(angles).items() if kind(tensor) == name
        ]
        if rows:
            kinds[name] = rows
    return kinds


def angle_claims(
    angles: Mapping[str, Any], count: int, where: str, prefix: str = ""
) -> list[Claim]:
    """Return the paper's claims on angles and norms; models without biases omit theirs.

    Args:
      angles: value of an `Angles` measurement.
      count: number of models: one pair per seed, in order.
      where: section or figure of the paper.
      prefix: of each claim, to name the setting.
    """
    kinds = angles_by_kind(angles)
    # The mean over tensors, of the pair of each seed.
    pairs = {
        name: disjoint_pairs(np.mean(rows, axis=0).tolist(), count) for name, rows in kinds.items()
    }
    claims = [
        Claim(
            f"{prefix}angles of kernels are the same for any two models "
            "(within 5 %, mean over tensors)",
            where,
            [_relative_std(row) for row in kinds["kernels"]],
            unit="fraction",
            within=0.05,
        ),
        Claim(
            f"{prefix}norms of task vectors are the same for any model "
            "(within 5 %, mean over tensors)",
            where,
            [_relative_std(row["norms"]) for row in _with_gradient(angles).values()],
            unit="fraction",
            within=0.05,
        ),
    ]
    if "biases" in pairs:
        differences = [a - b for a, b in zip(pairs["kernels"], pairs["biases"], strict=True)]
        text = f"{prefix}biases have smaller angles than kernels"
        claims.append(Claim(text, where, differences, "degrees"))
    return claims


def _relative_std(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1) / np.mean(values))


def _with_gradient(angles: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row for name, row in angles.items() if not name.endswith(NO_GRADIENT)}


def _summarize(setup: Setup, values: Values) -> StudyReport:
    angles = values["angles"]
    layers = [
        {
            "name": name,
            "angles": row["angles"],
            "rms": [norm / np.sqrt(row["size"]) for norm in row["norms"]],
        }
        for name, row in angles.items()
    ]
    rows = [
        [
            KIND_LABELS[name],
            f"{np.mean(degrees):.1f}",
            f"{np.mean(np.std(degrees, axis=1, ddof=1)):.2f}",
            f"{np.mean(np.cos(np.radians(degrees))):.3f}",
        ]
        for name, degrees in angles_by_kind(angles).items()
    ]
    columns = ["tensors", "mean angle (degrees)", "standard deviation over pairs", "mean cosine"]
    return StudyReport(
        [Table(columns, rows)],
        angle_claims(angles, 2 * len(setup.seeds), "Figure 2"),
        {"fig2": lambda path: angle_by_layer(layers, path)},
        [
            "Key biases receive no gradient (softmax is shift-invariant), so their angles are "
            "noise. The figure includes them; the table and the claims do not."
        ],
    )


FIGURE_2 = Study(
    "fig2",
    "Figure 2: angle and norm by layer",
    "Angles between the task vectors of any two fine-tuned models, and their norms, for each "
    "tensor. Black lines are the standard deviation over pairs and models.",
    _measurements,
    _summarize,
    num_seeds=16,
)
