"""Measurements of models: accuracies, distances, angles. Each value is JSON."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar

import jax
import numpy as np

from modelstock_jax import merging
from modelstock_jax.merging.trees import PyTree, named_leaves
from studies.expressions import (
    Anchor,
    Expression,
    MeasurementContext,
    Model,
    merge_of,
    named,
    stacked,
)

# Outcomes in ledger lines that earlier versions wrote -> names now.
_RENAMED_OUTCOMES = {
    "given": "fixed_ratio",
    "clipped": "clamped",
    "undefined": "unchanged",
    "one_replica_left": "one_model_changed",
    "replicas_left_out": "unchanged_models_left_out",
    "too_small": "scalar",
    "weighted_fallback": "fallback_to_eq3",
    "kept": "copied",
}


class Measurement(abc.ABC):
    """One line of the ledger: a frozen dataclass of models and parameters.

    Attributes:
      key_name: name in the ledger's keys. It never changes, even if the class is renamed, because
        finished measurements are found by it.
    """

    key_name: ClassVar[str]

    def key(self, context: MeasurementContext) -> list[Any]:
        """Return a JSON value that identifies what is measured, and on which sets."""
        return [*named(self, context), *self.sets(context)]

    def sets(self, context: MeasurementContext) -> list[Any]:
        """Return names and sizes of the image sets that are used."""
        return []

    @abc.abstractmethod
    def measure(self, context: MeasurementContext) -> Any:
        """Return the value, as JSON."""

    def read(self, value: Any) -> Any:
        """Return a ledger value with current names."""
        return value


@dataclass(frozen=True)
class Score(Measurement):
    """Top-1 accuracy in percent: {"id": accuracy, "shifts": {name: accuracy}}.

    Attributes:
      model: the model.
      shifts: whether to measure on the shifts too.
    """

    key_name: ClassVar[str] = "Score"

    model: Model
    shifts: bool = True

    def sets(self, context: MeasurementContext) -> list[Any]:
        """See `Measurement`."""
        return context.sets(self.shifts)

    def measure(self, context: MeasurementContext) -> Any:
        """See `Measurement`."""
        return context.accuracy(self.model.build(context), shifts=self.shifts)


@dataclass(frozen=True)
class HeldOut(Measurement):
    """Top-1 accuracy on the validation set in percent, for model selection."""

    key_name: ClassVar[str] = "HeldOut"

    model: Expression

    def sets(self, context: MeasurementContext) -> list[Any]:
        """See `Measurement`."""
        return context.validation_set()

    def measure(self, context: MeasurementContext) -> Any:
        """See `Measurement`."""
        return context.validate(self.model.build(context))


@dataclass(frozen=True)
class Distance(Measurement):
    """|w - c| over all merged weights."""

    key_name: ClassVar[str] = "Distance"

    model: Model
    center: Model = Anchor()

    def measure(self, context: MeasurementContext) -> Any:
        """See `Measurement`."""
        return float(merging.distance(self.center.build(context), self.model.build(context)))


@dataclass(frozen=True)
class Predicted(Measurement):
    """Distances to center of replica, mean and merged model, predicted from the angles alone."""

    key_name: ClassVar[str] = "Predicted"

    models: tuple[Model, ...]
    unit: str = "tensor"

    def measure(self, context: MeasurementContext) -> Any:
        """See `Measurement`."""
        _, stats = merge_of(context, self.models, unit=self.unit)
        return {k: _float(v) for k, v in merging.total_distance(stats)._asdict().items()}


@dataclass(frozen=True)
class Outcomes(Measurement):
    """Number of merge units with each outcome: {name of a `UnitOutcome`: count}."""

    key_name: ClassVar[str] = "Policies"

    models: tuple[Model, ...]
    method: str = "model_stock"
    unit: str = "tensor"

    def measure(self, context: MeasurementContext) -> Any:
        """See `Measurement`."""
        return merging.outcome_counts(merge_of(context, self.models, self.method, self.unit)[1])

    def read(self, value: Any) -> Any:
        """See `Measurement`."""
        return {_RENAMED_OUTCOMES.get(name, name): count for name, count in value.items()}


@dataclass(frozen=True)
class Angles(Measurement):
    """Angles between all pairs of task vectors in degrees, norms, and size, for each tensor.

    {"name": {"angles": [...], "norms": [N], "size": n}}; pairs i < j in row-major order.
    """

    key_name: ClassVar[str] = "Angles"

    models: tuple[Model, ...]

    def measure(self, context: MeasurementContext) -> Any:
        """See `Measurement`."""
        return _angles(context.anchor(), stacked(context, self.models))


@dataclass(frozen=True)
class AnglesFrom(Measurement):
    """Like `Angles`, for models with an initial model other than the anchor."""

    key_name: ClassVar[str] = "AnglesFrom"

    models: tuple[Model, ...]
    start: Model

    def measure(self, context: MeasurementContext) -> Any:
        """See `Measurement`."""
        return _angles(self.start.build(context), stacked(context, self.models))


@dataclass(frozen=True)
class Shell(Measurement):
    """Inner products of the paper's properties (i) to (iii), with a held-out center.

    c is the mean of `others`. Measured are |w_i - c| of each model, and the cosines between
    (w0 - c) and (w_i - c), and between (w_i - c) and (w_j - c). Each product is corrected for the
    center's own noise: the squared distance of a center of M models from the true one is |e|^2 / M,
    and |e|^2 is estimated from the spread of `others` around it. `merging.thin_shell` instead
    computes the center of each model from the other measured models.
    """

    key_name: ClassVar[str] = "Shell"

    models: tuple[Model, ...]
    others: tuple[Model, ...]

    def measure(self, context: MeasurementContext) -> Any:
        """See `Measurement`."""
        center = _flat_mean(context, self.others)
        w0 = _flat(context.anchor())
        spread = sum(
            _dot(d, d) for d in (_flat(other.build(context)) - center for other in self.others)
        )
        count = len(self.others)
        # E |c - mu|^2, from the sample variance about the sample mean.
        noise = spread / (count - 1) / count
        offsets = [_flat(model.build(context)) - center for model in self.models]
        anchor_offset = w0 - center
        squares = [_dot(d, d) - noise for d in offsets]
        anchor_square = _dot(anchor_offset, anchor_offset) - noise
        return {
            "distance": [float(np.sqrt(s)) for s in squares],
            "to_anchor": [
                float((_dot(anchor_offset, d) - noise) / np.sqrt(anchor_square * s))
                for d, s in zip(offsets, squares, strict=True)
            ],
            "between": [
                float((_dot(offsets[i], offsets[j]) - noise) / np.sqrt(squares[i] * squares[j]))
                for i, j in zip(*np.triu_indices(len(offsets), 1), strict=True)
            ],
        }


@dataclass(frozen=True)
class Projected(Measurement):
    """Coordinates [along, across] of each model on a plane, in units of the weights.

    The anchor is the origin. Along is the direction from the anchor to `end`. Across is the part
    of (first - second) of `apart` that is orthogonal to it.
    """

    key_name: ClassVar[str] = "Projected"

    models: tuple[Model, ...]
    end: Model
    apart: tuple[Model, Model]

    def measure(self, context: MeasurementContext) -> Any:
        """See `Measurement`."""
        w0 = _flat(context.anchor())
        along = _flat(self.end.build(context)) - w0
        along /= np.sqrt(_dot(along, along))
        first, second = (_flat(model.build(context)) for model in self.apart)
        across = first - second
        across -= _dot(across, along) * along
        across /= np.sqrt(_dot(across, across))
        task_vectors = (_flat(model.build(context)) - w0 for model in self.models)
        return [[_dot(d, along), _dot(d, across)] for d in task_vectors]


def _flat(tree) -> np.ndarray:
    leaves = jax.tree.leaves(jax.device_get(tree))
    return np.concatenate([np.ravel(leaf) for leaf in leaves]).astype(np.float64)


def _flat_mean(context: MeasurementContext, models: Sequence[Model]) -> np.ndarray:
    return reduce(np.add, (_flat(model.build(context)) for model in models)) / len(models)


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b)


def _float(value: float | None) -> float | None:
    return None if value is None else float(value)


def _angles(w0: PyTree, models: PyTree) -> dict[str, Any]:
    cosines = jax.device_get(merging.cosines(w0, models))
    norms = jax.device_get(merging.norms(w0, models))
    pairs = np.triu_indices(len(jax.tree.leaves(models)[0]), 1)
    tensors = {}
    for (name, cosine), norm, leaf in zip(
        named_leaves(cosines).items(),
        jax.tree.leaves(norms),
        jax.tree.leaves(w0),
        strict=True,
    ):
        defined = [c for c in cosine[pairs].tolist() if c != merging.COSINE_UNDEFINED]
        tensors[name] = {
            "angles": merging.angle(np.array(defined)).round(4).tolist(),
            "norms": [float(f"{x:.6g}") for x in norm],
            "size": leaf.size,
        }
    return tensors
