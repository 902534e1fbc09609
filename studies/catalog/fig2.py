"""Figure 2: angle and norm of fine-tuned models, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from modelstock_jax.reporting.figures import angle_by_layer, kind
from studies.catalog.model_pool import own_pairs, pool
from studies.measurements import Angles, Measurement
from studies.study import Claim, Setup, Study, StudyReport, Table, Values

# A key's bias gets no gradient (softmax does not see it): its angle is of noise alone.
NOISE = "k_proj.bias"


def _wanted(setup: Setup) -> dict[str, Measurement]:
    return {"angles": Angles(pool(setup.seeds))}


def angles_by_kind(found: Mapping[str, Any]) -> dict[str, list[list[float]]]:
    """`kernels`, `biases`, `norms` and `head`, where there are such -> angles of each tensor.

    Args:
      found: what `Angles` measured.
    """
    kinds: dict[str, list[list[float]]] = {}
    for what in ("kernels", "biases", "norms", "head"):
        angles = [row["angles"] for name, row in _sure(found).items() if kind(name) == what]
        if angles:
            kinds[what] = angles
    return kinds


def angle_claims(found: Mapping[str, Any], count: int, where: str, prefix: str = "") -> list[Claim]:
    """What the paper says of angles and norms; nothing of biases where there are none.

    Args:
      found: what `Angles` measured.
      count: of models: pairs of a seed each, one after the other.
      where: the paper says it.
      prefix: of each claim, for what it is said.
    """
    of_kind = angles_by_kind(found)
    # One number a tensor, or a seed's own pair.
    own = {
        what: own_pairs(np.mean(angles, axis=0).tolist(), count) for what, angles in of_kind.items()
    }
    claims = [
        Claim(
            f"{prefix}angles of kernels are the same for any two models "
            "(within 5 %, mean over tensors)",
            where,
            [_deviation(angles) for angles in of_kind["kernels"]],
            unit="",
            within=0.05,
        ),
        Claim(
            f"{prefix}norms are the same for any model (within 5 %, mean over tensors)",
            where,
            [_deviation(row["norms"]) for row in _sure(found).values()],
            unit="",
            within=0.05,
        ),
    ]
    if "biases" in own:
        smaller = [a - b for a, b in zip(own["kernels"], own["biases"], strict=True)]
        text = f"{prefix}biases have smaller angles than kernels"
        claims.append(Claim(text, where, smaller, "degrees"))
    return claims


def _deviation(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1) / np.mean(values))


def _sure(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row for name, row in found.items() if not name.endswith(NOISE)}


def _say(setup: Setup, values: Values) -> StudyReport:
    found = values["angles"]
    layers = [
        {
            "name": name,
            "angles": row["angles"],
            "rms": [norm / np.sqrt(row["size"]) for norm in row["norms"]],
        }
        for name, row in found.items()
    ]
    rows = [
        [
            what,
            f"{np.mean(angles):.1f}",
            f"{np.mean(np.std(angles, axis=1, ddof=1)):.2f}",
            f"{np.mean(np.cos(np.radians(angles))):.3f}",
        ]
        for what, angles in angles_by_kind(found).items()
    ]
    claims = angle_claims(found, 2 * len(setup.seeds), "Figure 2")
    return StudyReport(
        [Table(["", "mean angle (degrees)", "its deviation over pairs", "mean cosine"], rows)],
        claims,
        {"fig2": lambda path: angle_by_layer(layers, path)},
        [
            "A key's bias gets no gradient, so its angle is noise: it is drawn, and left out of "
            "the table and the claims."
        ],
    )


FIGURE_2 = Study(
    "fig2",
    "Figure 2: angle and norm by layer",
    "Angles between the task vectors of any two fine-tuned models, and their norms, tensor by "
    "tensor; black lines are the standard deviation over pairs and models.",
    _wanted,
    _say,
    num_seeds=16,
)
