"""Measures of a merge unit, as a row for tables and JSON."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np

from modelstock_jax.merging.geometry import angle
from modelstock_jax.merging.policy import Policy


def unit_row(
    name: str,
    key: str,
    cosine: np.ndarray,
    ratio: np.ndarray,
    norm: np.ndarray,
    policy: np.ndarray,
) -> dict[str, Any]:
    """One tensor's row: plain Python values, None where undefined.

    Where the tensor lies in many units: means of cosine, angle (degrees) and ratio, and
    root-sum-squares of norms.

    Args:
      name: of the tensor.
      key: of the unit that it lies in.
      cosine: [...] of the units' shape, `geometry.COSINE_UNDEFINED` where there is none.
      ratio: [...].
      norm: [N, ...], |d_i|.
      policy: [...], codes of `Policy`.

    Example:
      >>> row = unit_row("w", "w", np.array(0.5), np.array(2 / 3), np.ones(2), np.array(0))
      >>> round(row["angle"], 4), row["norms"], row["policy"]
      (60.0, [1.0, 1.0], 'interpolated')
    """
    defined = cosine[cosine <= 1.0]
    policies = collections.Counter(Policy(int(code)).name.lower() for code in policy.flat)
    return {
        "name": name,
        "unit": key,
        "num_units": int(policy.size),
        "cosine": float(defined.mean()) if defined.size else None,
        "angle": float(angle(defined).mean()) if defined.size else None,
        "ratio": float(ratio.mean()),
        "norms": [float(np.sqrt(np.sum(n**2))) for n in norm],
        "policy": policies.most_common(1)[0][0] if len(policies) == 1 else "mixed",
        "policies": dict(policies),
    }
