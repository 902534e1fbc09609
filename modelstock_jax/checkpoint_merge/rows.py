"""What a merge measured, as rows of plain Python values."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from modelstock_jax.checkpoint_merge.decide import Planned
from modelstock_jax.checkpoint_merge.methods import Solved
from modelstock_jax.merging.rules import unit_row

Row = dict[str, Any]
_DISTANCES = ("replica", "mean", "merged")


def tensor_rows(
    key: str, members: Iterable[Planned], solved: Solved, *, anchored: bool = True
) -> dict[str, Row]:
    """The rows of a unit's tensors, by name; tensors of one unit differ in name and shape alone.

    What a method does not define is None: the ratio and the merged weights' distance of TIES and
    slerp; the ratio of negative weights, whose sum says nothing about how far the merged weights
    are from the base; every angle, norm and distance where there is no base.

    Args:
        key: Of the unit.
        members: Its tensors.
        solved: What was found of it.
        anchored: Whether there is a base.
    """
    solution = solved.solution
    distance = {name: _root_sum_square(values) if anchored else None
                for name, values in zip(_DISTANCES, solution.distance, strict=True)}
    shared: Row = {"cosines": _pairwise(solved.gram), "predicted_distance": distance}
    if not solved.has_ratio:
        shared["ratio"] = distance["merged"] = None
    elif (solution.coefficient < 0).any():
        shared["ratio"] = None
    if not anchored:
        shared |= {"cosine": None, "angle": None, "ratio": None, "norms": [], "cosines": []}
    rows = {}
    for member in members:
        row = unit_row(member.name, key, solution.cosine, solution.ratio, solution.norm,
                       solution.policy)
        rows[member.name] = {**row, "shape": list(member.shape), **shared}
    return rows


def totals(rows: Iterable[Row]) -> tuple[dict[str, int], dict[str, float | None]]:
    """Units that met each policy, and predicted distances of the whole model, None where unknown.

    A unit counts once, however many tensors share it.
    """
    units = {row["unit"]: row for row in rows}.values()
    policies: collections.Counter[str] = collections.Counter()
    for row in units:
        policies.update(row["policies"])
    distance: dict[str, float | None] = {}
    for name in _DISTANCES:
        known = [far for row in units if (far := row["predicted_distance"][name]) is not None]
        distance[name] = math.sqrt(sum(far**2 for far in known)) if known else None
    return dict(policies), distance


def _pairwise(gram: np.ndarray) -> list[list[float | None]]:
    """Cosine of each two task vectors, the mean over units where both moved; None where none did.

    Example:
        >>> _pairwise(np.array([[1.0, 1.0], [1.0, 4.0]])[..., None])
        [[1.0, 0.5], [0.5, 1.0]]
    """
    norms = np.sqrt(np.einsum("iik->ik", gram))
    moved = norms > 0
    both = moved[:, None] & moved[None]
    safe = np.where(moved, norms, 1.0)
    cosines = np.where(both, gram / safe[:, None] / safe[None], 0.0).sum(axis=-1)
    number = both.sum(axis=-1)
    found = [[float(np.clip(c / n, -1.0, 1.0)) if n else None for c, n in zip(*row, strict=True)]
             for row in zip(cosines, number, strict=True)]
    for i, row in enumerate(found):
        row[i] = row[i] and 1.0
    return found


def _root_sum_square(distances: np.ndarray) -> float | None:
    known = distances[distances >= 0]
    return float(np.sqrt(np.sum(known**2))) if known.size else None
