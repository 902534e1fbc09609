"""Angles, norms and ratios by layer: what the figures draw, from the merge's own report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Report = Sequence[Mapping[str, Any]]


def kind(name: str) -> str:
    """Which of `kernels`, `biases`, `norms`, `head` a tensor is, by its name.

    Example:
      >>> kind("image_tower.blocks.block_00.layer_norm1.scale")
      'norms'
      >>> kind("head.bias"), kind("image_tower.patch_embedding.kernel")
      ('head', 'kernels')
    """
    parts = name.split(".")
    if parts[0] == "head":
        return "head"
    if len(parts) > 1 and "norm" in parts[-2]:
        return "norms"
    return "biases" if parts[-1] == "bias" else "kernels"


def ratio_summary(report: Report) -> dict[str, dict[str, float]]:
    """The median ratio t by kind of tensor, with the quartiles.

    Units without an angle (frozen, or of one number) are left out.

    Args:
      report: rows of `merging.report`: at least `name`, `ratio`, `cosine`.

    Returns:
      kind -> {median, low, high, count}; a kind with no unit is absent.

    Example:
      >>> rows = [{"name": "a.kernel", "cosine": 0.5, "ratio": r} for r in (0.6, 0.7, 0.8)]
      >>> ratio_summary(rows)["kernels"]["median"]
      0.7
    """
    ratios: dict[str, list[float]] = {}
    for row in report:
        if row.get("cosine") is not None and row.get("ratio") is not None:
            ratios.setdefault(kind(row["name"]), []).extend(_numbers(row["ratio"]))
    result = {}
    for name, values in ratios.items():
        low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
        result[name] = {"median": median, "low": low, "high": high, "count": len(values)}
    return result


def layer_rows(reports: Iterable[Report]) -> list[dict[str, Any]]:
    """Collects the angles and norms of several runs (seeds, or pairs of replicas) by tensor.

    Args:
      reports: one `merging.report` a pair or seed: rows of `name`, `angle` (degrees, or None),
        `norms` ([N], Euclidean, of each replica's task vector), `size` (n, its numbers).

    Returns:
      Rows {name, angles: degrees, one a report, rms: norm / sqrt(n), one a replica}.

    Example:
      >>> report = [{"name": "w", "angle": 45.0, "norms": [2.0, 4.0], "size": 4}]
      >>> layer_rows([report, report])
      [{'name': 'w', 'angles': [45.0, 45.0], 'rms': [1.0, 2.0, 1.0, 2.0]}]
    """
    collected: dict[str, dict[str, Any]] = {}
    for report in reports:
        for row in report:
            name = row["name"]
            entry = collected.setdefault(name, {"name": name, "angles": [], "rms": []})
            entry["angles"] += _numbers(row.get("angle"))
            root = math.sqrt(max(1, row["size"]))
            entry["rms"] += [norm / root for norm in _numbers(row.get("norms"))]
    return list(collected.values())


def _numbers(value: Any) -> list[float]:
    if value is None:
        return []
    return [float(number) for number in np.ravel(np.asarray(value, dtype=np.float64))]
