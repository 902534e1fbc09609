"""merge_report.json: everything that a merge measured and was made of. It holds no clock."""

from __future__ import annotations

import dataclasses
import platform
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from modelstock_jax import __version__
from modelstock_jax.checkpoint_merge.depth import ROLES, role
from modelstock_jax.checkpoint_merge.options import Options
from modelstock_jax.checkpoint_merge.plan import Plan
from modelstock_jax.checkpoint_merge.run import Report

FORMAT = 1
PACKAGES = ("numpy", "ml_dtypes")
# These leave the result as it is.
_NOT_WHAT = ("digest", "threads", "window_bytes")


def document(
    plan: Plan, report: Report, digests: Sequence[Mapping[str, str]], command: str
) -> dict[str, Any]:
    """The report as JSON holds it; the same merge gives the same document.

    Args:
      plan: of the merge.
      report: of the merge.
      digests: file name -> digest (`crc32:...`) of each input, the base first; empty where not
        computed.
      command: what was typed.

    Returns:
      Plain values: `units` has a row a tensor, `not_merged` the others and why.
    """
    inputs = [
        {"model": source.label, "bytes": source.num_bytes, "files": dict(files),
         "notes": list(source.notes)}
        for source, files in zip((plan.base, *plan.finetuned), digests, strict=True)
    ]  # fmt: skip
    return {
        "format": FORMAT,
        "base": inputs[0] if plan.anchored else None,
        "models": inputs[1:],
        "options": asked(plan.options),
        "units": report.rows,
        "policies": report.policies,
        "ratios": ratios(report.rows),
        "predicted_distance": report.distance,
        "anchor_rounding": plan.rounding,
        "not_merged": [
            {"name": name, "takes": tensor.action, "reason": tensor.reason}
            for name, tensor in plan.tensors.items() if tensor.action != "merge"
        ],
        "notes": list(plan.notes),
        "outputs": report.digests,
        "command": command,
        "versions": versions(),
    }  # fmt: skip


def asked(options: Options) -> dict[str, Any]:
    """The options that make the result, those left at their default but for method and unit."""
    default = Options()
    values = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(options) if field.name not in _NOT_WHAT
    }  # fmt: skip
    keep = ("method", "unit")
    return {k: v for k, v in values.items() if k in keep or v != getattr(default, k)}


def ratios(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Count, least, median and largest ratio of the tensors that have one, by role.

    Example:
      >>> rows = [{"name": f"layers.{i}.mlp.w", "cosine": 0.5, "ratio": i / 4} for i in range(4)]
      >>> ratios(rows)["all"]
      {'tensors': 4, 'min': 0.0, 'median': 0.375, 'max': 0.75}
    """
    found: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row["cosine"] is not None and row["ratio"] is not None:
            found["all"].append(row["ratio"])
            found[role(row["name"])].append(row["ratio"])
    return {
        name: {
            "tensors": len(found[name]),
            "min": min(found[name]),
            "median": statistics.median(found[name]),
            "max": max(found[name]),
        }
        for name in ("all", *ROLES) if name in found
    }  # fmt: skip


def versions() -> dict[str, str]:
    """What the numbers depend on."""
    found = {package: version(package) for package in PACKAGES}
    return {"modelstock_jax": __version__, "python": platform.python_version(), **found}
