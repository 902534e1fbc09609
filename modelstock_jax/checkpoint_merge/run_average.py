"""The average of checkpoints of one run, as a linear merge without a base."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from modelstock_jax.checkpoint_merge.recipe import Recipe
from modelstock_jax.errors import UserError, listed
from modelstock_jax.merging.run_weights import decay_weights, ema_weights


def average_recipe(
    labels: Sequence[str],
    *,
    weights: Sequence[float] | None = None,
    ema: float | None = None,
    schedule: str | None = None,
) -> Recipe:
    """Return the linear merge of checkpoints, equally weighted by default.

    If all names are equal but for a number at their end, these are the steps, and the checkpoints
    are put in their order.

    Args:
      labels: the checkpoints
      weights: one per checkpoint, in the order given
      ema: decay of an exponential moving average
      schedule: `linear`, `cosine` or `1-sqrt`, with `:STEPS` for a decay over the last steps only

    Raises:
      UserError: the weights are given in two ways, or do not fit the checkpoints

    Example:
      >>> recipe = average_recipe(["run/step-20", "run/step-3"], ema=0.5)
      >>> recipe.models, recipe.options["weights"]
      (('run/step-3', 'run/step-20'), (0.5, 0.5))
    """
    ways = {"--weights": weights, "--ema": ema, "--schedule": schedule}
    if len(given := [name for name, value in ways.items() if value is not None]) > 1:
        raise UserError(f"give only one of {', '.join(given)}")
    if len(labels) < 2:
        raise UserError("give two or more checkpoints: CKPT1 CKPT2 ...")
    if weights is not None and len(weights) != len(labels):
        raise UserError(
            f"--weights has {len(weights)} values, but there are {len(labels)} checkpoints; give "
            "one per checkpoint"
        )
    notes, steps = [], _steps(labels)
    if weights is None and steps:
        ordered = [label for _, label in sorted(zip(steps, labels, strict=True))]
        if ordered != list(labels):
            notes.append("the checkpoints are in the order of the steps in their names")
        labels, steps = ordered, sorted(steps)
    found = _weights(len(labels), steps, ema, schedule) if weights is None else np.array(weights)
    if unused := [label for label, w in zip(labels, found, strict=True) if w == 0]:
        notes.append(f"{listed(unused, 4)}: weight 0, not read")
    used = [(label, float(w)) for label, w in zip(labels, found, strict=True) if w != 0]
    if not used:
        raise UserError("--weights: not all weights may be 0")
    options = {"method": "linear", "weights": tuple(w for _, w in used)}
    return Recipe(None, tuple(label for label, _ in used), options, notes=tuple(notes))


def _steps(labels: Sequence[str]) -> list[int]:
    """Return the numbers at the end of the names; an empty list if a name has none."""
    names = [Path(label.rstrip("/")).name.removesuffix(".safetensors") for label in labels]
    matches = [re.fullmatch(r"(.*?)([0-9]+)", name) for name in names]
    found = [match for match in matches if match]
    # Names that differ in more than the number may have several: epoch-1-step-100.
    is_alike = len(found) == len(labels) and len({match[1] for match in found}) == 1
    return [int(match[2]) for match in found] if is_alike else []


def _weights(
    number: int, steps: Sequence[int], ema: float | None, schedule: str | None
) -> np.ndarray:
    """Return the weights of checkpoints in the order of their steps, [number]."""
    if ema is not None:
        return ema_weights(ema, number)
    if schedule is None:
        return np.ones(number)
    name, colon, text = schedule.partition(":")
    if colon and not re.fullmatch("[0-9]+", text):
        raise UserError(f"--schedule {schedule}: STEPS must be an integer, such as {name}:2000")
    if not steps:
        if text:
            raise UserError(
                f"--schedule {schedule}: the names of the checkpoints must end in their steps, "
                "such as checkpoint-500; rename them, or leave out the number"
            )
        steps = range(number)
    if text and int(text) > steps[-1] - steps[0]:
        raise UserError(
            f"--schedule {schedule}: the checkpoints span only {steps[-1] - steps[0]} steps"
        )
    return decay_weights(name, steps, int(text) if text else None)
