"""What a study asks of models: accuracies, distances, angles. Each is a value of JSON."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar

import jax
import numpy as np

from modelstock_jax import merging
from modelstock_jax.merging.gram import PyTree, named_leaves
from studies.expressions import Anchor, Expression, Model, Scales, merge_of, named, stacked

# Outcomes in lines of the ledger that earlier versions wrote -> names now.
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
    """One line of the ledger: a frozen dataclass of models and numbers."""

    key_name: ClassVar[str]

    def key(self, bench: Scales) -> list[Any]:
        """A JSON value that says what is measured, and on what."""
        return [*named(self, bench), *self.sets(bench)]

    def sets(self, bench: Scales) -> list[Any]:
        """Names and sizes of the sets that it is measured on."""
        return []

    @abc.abstractmethod
    def measure(self, bench: Scales) -> Any:
        """Return the value, as JSON."""

    def read(self, value: Any) -> Any:
        """Return a value of the ledger in today's names."""
        return value


@dataclass(frozen=True)
class Score(Measurement):
    """Top-1 accuracy in percent: {"id": a number, "shifts": {name: a number}}.

    Attributes:
      model: what is measured.
      shifts: whether on the shifts as well.
    """

    key_name: ClassVar[str] = "Score"

    model: Model
    shifts: bool = True

    def sets(self, bench: Scales) -> list[Any]:
        """See `Measurement`."""
        return bench.sets(self.shifts)

    def measure(self, bench: Scales) -> Any:
        """See `Measurement`."""
        return bench.accuracy(self.model.build(bench), shifts=self.shifts)


@dataclass(frozen=True)
class HeldOut(Measurement):
    """Top-1 accuracy on the validation set, in percent: what models may be chosen by."""

    key_name: ClassVar[str] = "HeldOut"

    model: Expression

    def sets(self, bench: Scales) -> list[Any]:
        """See `Measurement`."""
        return bench.validation_set()

    def measure(self, bench: Scales) -> Any:
        """See `Measurement`."""
        return bench.validate(self.model.build(bench))


@dataclass(frozen=True)
class Distance(Measurement):
    """|w - c|, over all weights that are merged."""

    key_name: ClassVar[str] = "Distance"

    model: Model
    center: Model = Anchor()

    def measure(self, bench: Scales) -> Any:
        """See `Measurement`."""
        return float(merging.distance(self.center.build(bench), self.model.build(bench)))


@dataclass(frozen=True)
class Predicted(Measurement):
    """Expected distances from the center, from the angles alone: replica, mean and merged."""

    key_name: ClassVar[str] = "Predicted"

    of: tuple[Model, ...]
    unit: str = "tensor"

    def measure(self, bench: Scales) -> Any:
        """See `Measurement`."""
        _, stats = merge_of(bench, self.of, unit=self.unit)
        return {k: _number(v) for k, v in merging.total_distance(stats)._asdict().items()}


@dataclass(frozen=True)
class Outcomes(Measurement):
    """How many merge units met which of the merge's rules: {a `UnitOutcome`'s name: a number}."""

    key_name: ClassVar[str] = "Policies"

    of: tuple[Model, ...]
    method: str = "model_stock"
    unit: str = "tensor"

    def measure(self, bench: Scales) -> Any:
        """See `Measurement`."""
        return merging.outcome_counts(merge_of(bench, self.of, self.method, self.unit)[1])

    def read(self, value: Any) -> Any:
        """See `Measurement`."""
        return {_RENAMED_OUTCOMES.get(name, name): count for name, count in value.items()}


@dataclass(frozen=True)
class Angles(Measurement):
    """By tensor: the angles of all pairs of task vectors in degrees, their norms, the size.

    {"name": {"angles": [...], "norms": [N], "size": n}}; pairs i < j in the order of rows.
    """

    key_name: ClassVar[str] = "Angles"

    of: tuple[Model, ...]

    def measure(self, bench: Scales) -> Any:
        """See `Measurement`."""
        return _angles(bench.anchor(), stacked(bench, self.of))


@dataclass(frozen=True)
class AnglesFrom(Measurement):
    """As `Angles`, of models that started elsewhere than at the anchor."""

    key_name: ClassVar[str] = "AnglesFrom"

    of: tuple[Model, ...]
    start: Model

    def measure(self, bench: Scales) -> Any:
        """See `Measurement`."""
        return _angles(self.start.build(bench), stacked(bench, self.of))


@dataclass(frozen=True)
class Shell(Measurement):
    """Inner products that the paper's properties (i) to (iii) speak of, about a held-out center.

    With c the mean of `others`: |w_i - c| of each model, and the cosines between (w0 - c) and
    (w_i - c), and between (w_i - c) and (w_j - c), with the share that the center's own noise adds
    to each product taken off: the center of M models lies |e|^2 / M from the true one, and
    |e|^2 is estimated from the spread of `others` about it. `merging.thin_shell` takes the center
    from the measured models themselves, the others of each.
    """

    key_name: ClassVar[str] = "Shell"

    of: tuple[Model, ...]
    others: tuple[Model, ...]

    def measure(self, bench: Scales) -> Any:
        """See `Measurement`."""
        center = _flat_mean(bench, self.others)
        w0 = _flat(bench.anchor())
        spread = sum(_dot(d, d) for d in (_flat(one.build(bench)) - center for one in self.others))
        count = len(self.others)
        # E |c - mu|^2, from the sample variance about the sample mean.
        noise = spread / (count - 1) / count
        models = [_flat(one.build(bench)) - center for one in self.of]
        away = w0 - center
        squares = [_dot(d, d) - noise for d in models]
        anchor = _dot(away, away) - noise
        return {
            "distance": [float(np.sqrt(s)) for s in squares],
            "to_anchor": [
                float((_dot(away, d) - noise) / np.sqrt(anchor * s))
                for d, s in zip(models, squares, strict=True)
            ],
            "between": [
                float((_dot(models[i], models[j]) - noise) / np.sqrt(squares[i] * squares[j]))
                for i, j in zip(*np.triu_indices(len(models), 1), strict=True)
            ],
        }


@dataclass(frozen=True)
class Projected(Measurement):
    """Models on a plane: [along, across] each, in units of the weights.

    Along is the direction from the anchor to `end`; across that of first - second of `apart`, less
    what of it is along. The anchor lies at the origin.
    """

    key_name: ClassVar[str] = "Projected"

    of: tuple[Model, ...]
    end: Model
    apart: tuple[Model, Model]

    def measure(self, bench: Scales) -> Any:
        """See `Measurement`."""
        w0 = _flat(bench.anchor())
        along = _flat(self.end.build(bench)) - w0
        along /= np.sqrt(_dot(along, along))
        first, second = (_flat(one.build(bench)) for one in self.apart)
        across = first - second
        across -= _dot(across, along) * along
        across /= np.sqrt(_dot(across, across))
        moved = (_flat(one.build(bench)) - w0 for one in self.of)
        return [[_dot(d, along), _dot(d, across)] for d in moved]


def _flat(tree) -> np.ndarray:
    leaves = jax.tree.leaves(jax.device_get(tree))
    return np.concatenate([np.ravel(leaf) for leaf in leaves]).astype(np.float64)


def _flat_mean(bench: Scales, models: Sequence[Model]) -> np.ndarray:
    return reduce(np.add, (_flat(one.build(bench)) for one in models)) / len(models)


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b)


def _number(value: float | None) -> float | None:
    return None if value is None else float(value)


def _angles(w0: PyTree, models: PyTree) -> dict[str, Any]:
    cosines = jax.device_get(merging.cosines(w0, models))
    norms = jax.device_get(merging.norms(w0, models))
    pairs = np.triu_indices(len(jax.tree.leaves(models)[0]), 1)
    found = {}
    for (name, cosine), norm, leaf in zip(
        named_leaves(cosines).items(),
        jax.tree.leaves(norms),
        jax.tree.leaves(w0),
        strict=True,
    ):
        known = [c for c in cosine[pairs].tolist() if c != merging.COSINE_UNDEFINED]
        found[name] = {
            "angles": merging.angle(np.array(known)).round(4).tolist(),
            "norms": [float(f"{x:.6g}") for x in norm],
            "size": leaf.size,
        }
    return found
