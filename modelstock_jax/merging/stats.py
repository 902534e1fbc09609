"""What a merge measured: per unit, as pytrees; and as rows and totals for tables."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from modelstock_jax.merging.geometry import Distances
from modelstock_jax.merging.policy import NonFiniteError, Policy
from modelstock_jax.merging.summary import unit_row


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class UnitTable:
    """Names of the tensors and the units that they lie in, in the order of the tree's leaves."""

    unit: str
    names: tuple[str, ...]
    keys: tuple[str, ...]


class Stats(NamedTuple):
    """Measures of a merge, each a pytree with the structure of `pretrained`.

    A leaf has the unit's shape: `()`, `[F]` output channels under `filter`, `[H]` heads under
    `head`. Tensors that share a unit hold the same values. All are float32 (float64 for float64
    weights) but where noted.
    """

    cosine: Any  # mean pairwise cosine, or COSINE_UNDEFINED (2.0)
    ratio: Any  # t: how far from the anchor (0) to the mean (1); the sum of a_i
    norm: Any  # [N, ...], |d_i| of each replica
    predicted_distance: Distances  # to the centre; DISTANCE_UNDEFINED (-1.0) where unknown
    policy: Any  # int8 codes of `Policy`
    finite: Any  # [N, ...] bool, of the tensor itself, not of its unit
    units: UnitTable  # static: no arrays


def report(stats: Stats) -> list[dict[str, Any]]:
    """Rows for tables and JSON, one a tensor; plain Python values, None where undefined.

    Under `filter` and `head` a row holds the mean over its units of cosine, angle (degrees) and
    ratio, and root-sum-squares of norms; `policies` counts the units.

    Example:
      >>> from modelstock_jax.merging import model_stock
      >>> w0, w = np.zeros(2, np.float32), np.array([[1, 0], [1, 1]], np.float32)
      >>> row, = report(model_stock({"w": w0}, {"w": w})[1])
      >>> row["name"], row["policy"], round(row["angle"], 3), round(row["ratio"], 3)
      ('w', 'interpolated', 45.0, 0.828)
    """
    return [
        unit_row(leaf.name, leaf.key, leaf.cosine, leaf.ratio, leaf.norm, leaf.policy)
        for leaf in _leaves(stats)
    ]


def total_distance(stats: Stats) -> Distances:
    """Predicted distances from the centre of the whole model: root-sum-squares over units.

    Each unit counts once, however many tensors share it; units whose distance is unknown (one
    replica left, cosine undefined) are left out.

    Returns:
      `Distances` of plain floats, in the units of the weights.

    Example:
      >>> from modelstock_jax.merging import model_stock
      >>> w0, w = np.zeros(2, np.float32), np.array([[1, 0], [1, 1]], np.float32)
      >>> round(total_distance(model_stock({"w": w0}, {"w": w})[1]).mean, 3)
      0.469
    """
    leaves = {leaf.key: leaf for leaf in _leaves(stats)}.values()

    def total(distances):
        known = (np.asarray(d, np.float64).ravel() for d in distances)
        return float(np.sqrt(sum(np.sum(d[d > 0] ** 2) for d in known)))

    return Distances(*(total(leaf.distance[k] for leaf in leaves) for k in range(3)))


def policy_counts(stats: Stats) -> dict[str, int]:
    """How many units each policy met, by its name in lower case; only those that occur.

    Example:
      >>> from modelstock_jax.merging import model_stock
      >>> policy_counts(model_stock({"w": np.zeros(2)}, {"w": np.zeros((2, 2))})[1])
      {'undefined': 1}
    """
    counts = collections.Counter()
    for leaf in {leaf.key: leaf for leaf in _leaves(stats)}.values():
        counts.update(Policy(int(code)).name.lower() for code in leaf.policy.flat)
    return dict(counts)


def check_finite(stats: Stats, pretrained: Any = None) -> None:
    """Raise where weights were not finite; for use after a jitted merge.

    A merge called eagerly does this by itself.

    Args:
      stats: of the merge.
      pretrained: the anchor, to tell a bad anchor from bad replicas; optional.

    Raises:
      NonFiniteError: naming the replica, counted from 0, and the tensor.
    """
    for k, leaf in enumerate(_leaves(stats)):
        ok = leaf.finite.reshape(len(leaf.finite), -1).all(axis=1)
        if ok.all():
            continue
        anchor = None if pretrained is None else jax.tree.leaves(pretrained)[k]
        if not ok.any() and (anchor is None or not bool(jnp.isfinite(anchor).all())):
            replica = "pretrained"
            who = "pretrained" if anchor is not None else "pretrained, or every replica"
        else:
            replica = int(np.argmin(ok))
            who = f"replica {replica} (counted from 0)"
        raise NonFiniteError(
            f"{who}: tensor {leaf.name!r} holds NaN or infinity, or a movement too large for "
            "float32; mend it or leave it out",
            replica, leaf.name,
        )


class _Leaf(NamedTuple):
    name: str
    key: str
    cosine: np.ndarray
    ratio: np.ndarray
    norm: np.ndarray
    distance: tuple[np.ndarray, ...]
    policy: np.ndarray
    finite: np.ndarray


def _leaves(stats: Stats) -> list[_Leaf]:
    *measures, distances, policy, finite = jax.device_get(tuple(stats)[:-1])
    columns: list[Any] = [jax.tree.leaves(column) for column in measures]
    columns.append(zip(*(jax.tree.leaves(part) for part in distances), strict=True))
    columns += [jax.tree.leaves(policy), jax.tree.leaves(finite)]
    rows = zip(stats.units.names, stats.units.keys, *columns, strict=True)
    return [_Leaf(*row) for row in rows]
