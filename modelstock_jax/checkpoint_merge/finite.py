"""NaN and infinity in a model: refused with its name, the tensor's and the place."""

from __future__ import annotations

import math

import numpy as np

from modelstock_jax.checkpoint_merge.casts import first_non_finite
from modelstock_jax.checkpoint_merge.decide import Planned
from modelstock_jax.merging.policy import NonFiniteError


def refuse_non_finite(
    label: str, model: int, tensor: Planned, values: np.ndarray, start: int
) -> None:
    """Raises where stored numbers are not finite, with the model, the tensor and the element."""
    if (found := first_non_finite(values)) is None:
        return
    shape = tensor.shape if math.prod(tensor.shape) > start + found else (start + found + 1,)
    place = [int(n) for n in np.unravel_index(start + found, shape)]
    raise NonFiniteError(
        f"{label}: tensor {tensor.name!r} holds NaN or infinity, first at {place}; mend the model, "
        f"or leave the tensor out with --exclude {tensor.name!r} --excluded base",
        "pretrained" if model == 0 else model - 1, tensor.name,
    )
