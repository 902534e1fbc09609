"""Tensors, and rows of them, that no rule merges: taken from one model, or the plain mean."""

from __future__ import annotations

import math

import numpy as np

from modelstock_jax.checkpoint_merge.casts import FLOATS, narrow, recode, widen
from modelstock_jax.checkpoint_merge.chunks import PIECE
from modelstock_jax.checkpoint_merge.decide import Planned
from modelstock_jax.checkpoint_merge.finite import refuse_non_finite
from modelstock_jax.checkpoint_merge.output import Output
from modelstock_jax.checkpoint_merge.plan import Plan
from modelstock_jax.checkpoint_merge.tally import Tally
from modelstock_jax.tensor_files.reader import DTYPES


def copy_tensor(
    plan: Plan, tensor: Planned, tally: Tally, output: Output, *, start: int = 0
) -> None:
    """Writes what is left of a tensor from element `start` on, and says that it is complete.

    Raises:
        NonFiniteError: NaN or infinity in the model that it is taken from.
    """
    count = math.prod(tensor.shape)
    models = tensor.models(len(plan.finetuned))
    for begin in range(start, count, PIECE):
        stop = min(begin + PIECE, count)
        parts = [_read(plan, tensor, model, begin, stop, tally) for model in models]
        output.write(tensor.name, begin, _mean(parts, tensor.code))
    output.complete(tensor.name)


def _read(
    plan: Plan, tensor: Planned, model: int, start: int, stop: int, tally: Tally
) -> np.ndarray:
    source = (plan.base, *plan.finetuned)[model]
    name = tensor.name_in(model)
    values = source.read(name, start, stop)
    source.note(name, start, values)
    tally.add(read=values.nbytes)
    if tensor.checked and source.tensors[name].code in FLOATS:
        refuse_non_finite(source.label, model, tensor, values, start)
    return values


def _mean(parts: list[np.ndarray], code: str) -> np.ndarray:
    if len(parts) == 1:
        # A counter may be an integer in one model and a float in another.
        return recode(parts[0], code) if code in FLOATS else parts[0].astype(DTYPES[code])
    total, wide = np.zeros(len(parts[0])), np.empty(len(parts[0]))
    for part in parts:
        widen(part, wide)
        total += wide
    total /= len(parts)
    return narrow(total, code)
