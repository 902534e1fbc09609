"""Carries a plan out: reads, computes and writes at once, and goes on where it was killed."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modelstock_jax.checkpoint_merge.plan import Plan

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Report:
    """What a merge measured and wrote; plain Python values throughout.

    Attributes:
        rows: One a tensor that was merged, by name: ``name, unit, shape, num_units, cosine`` (None
            where undefined), ``angle`` (degrees or None), ``ratio, norms`` (one a fine-tune),
            ``predicted_distance`` (``{"replica", "mean", "merged"}``, None where unknown),
            ``policy, policies`` (name -> number of units): the rows of `merging.stats.report` and
            more. Under filter and head, means over units and root-sum-squares of norms.
        policies: Name of a policy -> units that met it, in the whole model.
        distance: Predicted distances from the centre of the whole model, root-sum-squares.
        digests: File name -> sha256 of each output file of tensors.
        resumed: Output files that an earlier, killed merge had written.
        bytes_read: Bytes that were read.
        bytes_written: Bytes of tensors that were written.
        seconds: Wall time.
    """

    rows: list[Row]
    policies: dict[str, int]
    distance: dict[str, float]
    digests: dict[str, str]
    resumed: tuple[str, ...]
    bytes_read: int
    bytes_written: int
    seconds: float


def run(
    plan: Plan,
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    finish: Callable[[Path, Report], None] | None = None,
) -> Report:
    """Writes the merged checkpoint to `out`: whole, or not at all.

    Tensors go to a directory beside `out`, whose name follows from the plan: the same command,
    killed and given again, keeps the files that are complete. Config and tokenizer files of
    ``plan.companion`` are copied beside them.

    Args:
        plan: From `make_plan`.
        out: The directory to make.
        overwrite: Replace an existing one.
        progress: Called with bytes done and bytes in all, read and written together.
        finish: Called with the finished directory, before it takes its name, and the report: the
            place to write report, card and pictures.

    Raises:
        UserError: `out` is, holds or lies in an input, or exists; no room on the disk;
            NaN or infinity in a model (nothing is left behind).
    """
    raise NotImplementedError


def measure(plan: Plan, *, progress: Callable[[int, int], None] | None = None) -> Report:
    """The first pass alone: the rows of a report, nothing written.

    Args:
        plan: From `make_plan`.
        progress: As `run`'s.
    """
    raise NotImplementedError
