"""NaN and infinity in a model: refused with its name, the tensor's and the place."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

from modelstock_jax.checkpoint_merge.casts import first_non_finite
from modelstock_jax.merging.rules import NonFiniteError


class Tensor(Protocol):
    """What a message says of a tensor."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""


def escaped(name: str) -> str:
    """A name as a shell pattern that fits it alone.

    Example:
        >>> escaped("head[0].weight"), escaped("q.weight")
        ('head[[]0].weight', 'q.weight')
    """
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def refuse_non_finite(
    label: str, model: int, tensor: Tensor, values: np.ndarray, start: int
) -> None:
    """Raises where stored numbers are not finite, with the model, the tensor and the element."""
    if (found := first_non_finite(values)) is None:
        return
    shape = tensor.shape if math.prod(tensor.shape) > start + found else (start + found + 1,)
    place = [int(n) for n in np.unravel_index(start + found, shape)]
    # What is left out is taken from models that are finite.
    instead = "mean" if model == 0 else "base"
    raise NonFiniteError(
        f"{label}: tensor {tensor.name!r} holds NaN or infinity, first at {place}; mend the model, "
        f"or leave the tensor out with --exclude {escaped(tensor.name)!r} --excluded {instead}",
        "pretrained" if model == 0 else model - 1, tensor.name,
    )
