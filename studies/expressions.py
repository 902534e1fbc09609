"""How a model is made from trained ones: what a study measures, by content.

An expression names its model (`key`), so that two studies that need one model share its
measurements, and makes its weights (`build`).
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp

from modelstock_jax import merging
from modelstock_jax.merging import Stats
from modelstock_jax.merging.engine import merge
from modelstock_jax.merging.gram import PyTree
from modelstock_jax.merging.rules import UnitSolution, measure, solve_with_coefficients
from modelstock_jax.registry import RENAMED_METHODS
from studies.runs import Run

# What models are built of, and what measures them: `bench.StudyContext` is both.


class Expression(Protocol):
    """A model by what it is made of: every `expressions.Model` is one."""

    def build(self, weights: Weights) -> PyTree:
        """Its weights."""


class Weights(Protocol):
    """What a bench gives to a model's `build`."""

    num_heads: int

    def name(self, run: Run) -> str:
        """The digest of a run and its seed."""

    def anchor(self) -> PyTree:
        """The pretrained weights."""

    def start(self, run: Run) -> PyTree:
        """What a run's replicas start from: the anchor, or LP-FT's probed one."""

    def replica(self, run: Run, index: int, epoch: float | None) -> PyTree:
        """A replica at the end of the run, or of an epoch (0.5: in the middle of the first)."""

    def merged(self, run: Run) -> PyTree:
        """The last merged model of a run."""

    def held_out(self, model: Expression) -> float:
        """Accuracy on the validation set, in percent."""

    def validate(self, params: PyTree) -> float:
        """The same, of weights that no expression names."""


class Scales(Weights, Protocol):
    """What a bench gives to a measurement's `measure`."""

    def sets(self, shifts: bool) -> list[Any]:
        """What accuracies are measured on, as a part of their key: names and sizes."""

    def accuracy(self, params: PyTree, *, shifts: bool) -> dict[str, Any]:
        """Top-1 in percent: {"id": ..., "shifts": {name: ...}}."""

    def validation_set(self) -> list[Any]:
        """What models are chosen on, as a part of its measurements' key."""


class Model(abc.ABC):
    """An expression: a frozen dataclass of runs, models and numbers.

    Attributes:
      key_name: What it is called in the ledger's keys. It never changes, whatever the class is
        called: finished measurements are found by it.
    """

    key_name: ClassVar[str]

    def key(self, weights: Weights) -> list[Any]:
        """A JSON value that says what the model is."""
        return named(self, weights)

    @abc.abstractmethod
    def build(self, weights: Weights) -> PyTree:
        """Its weights."""


# Keys contain the names that methods had when the first measurements were made.
_FIRST_METHOD_NAMES = {new: old for old, new in RENAMED_METHODS.items()} | {
    "unclamped": "not_clipped"
}


def named(value: Any, weights: Weights) -> Any:
    """The JSON value of an expression or a measurement: its key name and what it is made of."""
    if isinstance(value, Run):
        return weights.name(value)
    if isinstance(value, tuple):
        return [named(one, weights) for one in value]
    if hasattr(value, "key_name"):
        parts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        if "method" in parts:
            parts["method"] = _FIRST_METHOD_NAMES.get(parts["method"], parts["method"])
        return [value.key_name, *(named(part, weights) for part in parts.values())]
    return value


@dataclass(frozen=True)
class Anchor(Model):
    """The pretrained model, w0."""

    key_name: ClassVar[str] = "Anchor"

    def build(self, weights: Weights) -> PyTree:
        """See `Model`."""
        return weights.anchor()


@dataclass(frozen=True)
class Start(Model):
    """What the replicas of a run start from: the anchor, or under a probed head."""

    key_name: ClassVar[str] = "Start"

    run: Run

    def build(self, weights: Weights) -> PyTree:
        """See `Model`."""
        return weights.start(self.run)


@dataclass(frozen=True)
class Replica(Model):
    """One fine-tuned model, w_i; at the end of an epoch, or of the run (None)."""

    key_name: ClassVar[str] = "Replica"

    run: Run
    index: int = 0
    epoch: float | None = None

    def build(self, weights: Weights) -> PyTree:
        """See `Model`."""
        return weights.replica(self.run, self.index, self.epoch)


@dataclass(frozen=True)
class Merged(Model):
    """What a run with merges ends in."""

    key_name: ClassVar[str] = "Merged"

    run: Run

    def build(self, weights: Weights) -> PyTree:
        """See `Model`."""
        return weights.merged(self.run)


@dataclass(frozen=True)
class Mean(Model):
    """The uniform mean, w_avr."""

    key_name: ClassVar[str] = "Mean"

    of: tuple[Model, ...]

    def build(self, weights: Weights) -> PyTree:
        """See `Model`; one model at a time is in memory beside the sum."""
        total = self.of[0].build(weights)
        for number, one in enumerate(self.of[1:], 2):
            model = one.build(weights)
            total = jax.tree.map(lambda m, w, n=number: m + (w - m) / n, total, model)
        return total


@dataclass(frozen=True)
class Merge(Model):
    """A merge after training by one of `registry.METHODS`, or by `unclamped`."""

    key_name: ClassVar[str] = "Merge"

    of: tuple[Model, ...]
    method: str = "model_stock"
    unit: str = "tensor"

    def build(self, weights: Weights) -> PyTree:
        """See `Model`."""
        return merge_of(weights, self.of, self.method, self.unit)[0]


@dataclass(frozen=True)
class MergeFrom(Model):
    """Equation 3 of models that started elsewhere than at the anchor."""

    key_name: ClassVar[str] = "MergeFrom"

    of: tuple[Model, ...]
    start: Model

    def build(self, weights: Weights) -> PyTree:
        """See `Model`."""
        merged, _ = merging.model_stock(self.start.build(weights), stacked(weights, self.of))
        return merged


@dataclass(frozen=True)
class Between(Model):
    """A point of the line from the anchor through a model, w0 + alpha (w - w0): WiSE-FT's curve."""

    key_name: ClassVar[str] = "Between"

    model: Model
    alpha: float

    def build(self, weights: Weights) -> PyTree:
        """See `Model`."""
        return plane(weights.anchor(), self.model.build(weights), None, self.alpha, 0.0)


@dataclass(frozen=True)
class InPlane(Model):
    """A point of the plane of three models, w0 + x (u - w0) + y (v - w0) (Figure 3)."""

    key_name: ClassVar[str] = "InPlane"

    u: Model
    v: Model
    x: float
    y: float

    def build(self, weights: Weights) -> PyTree:
        """See `Model`."""
        u, v = self.u.build(weights), self.v.build(weights)
        return plane(weights.anchor(), u, v, self.x, self.y)


@dataclass(frozen=True)
class Noisy(Model):
    """The mean of models and Gaussian noise, of each tensor's own size (Figure 4).

        w = mean_i(w_i) + scale s z,  z ~ N(0, I),

    where s^2 is the tensor's variance over the models (and over its elements): at scale 1 such a
    model lies as far from the center as a fine-tuned one.
    """

    key_name: ClassVar[str] = "Noisy"

    of: tuple[Model, ...]
    scale: float
    seed: int

    def build(self, weights: Weights) -> PyTree:
        """See `Model`."""
        return noisy(stacked(weights, self.of), self.scale, jax.random.key(self.seed))


@dataclass(frozen=True)
class Best(Model):
    """The model with the highest accuracy on the validation set; the first of equals."""

    key_name: ClassVar[str] = "Best"

    of: tuple[Model, ...]

    def build(self, weights: Weights) -> PyTree:
        """See `Model`."""
        return max(self.of, key=weights.held_out).build(weights)


@dataclass(frozen=True)
class Greedy(Model):
    """The greedy soup, chosen on the validation set (Wortsman et al. 2022, Recipe 1)."""

    key_name: ClassVar[str] = "Greedy"

    of: tuple[Model, ...]

    def build(self, weights: Weights) -> PyTree:
        """See `Model`."""
        loaders = [partial(one.build, weights) for one in self.of]
        scores = [weights.held_out(one) for one in self.of]
        return merging.greedy_soup(None, loaders, weights.validate, scores=scores).params


def merge_of(
    weights: Weights, models: Sequence[Model], method: str = "model_stock", unit: str = "tensor"
) -> tuple[PyTree, merging.Stats]:
    """Models merged by a method of `Merge`, and the merge's measures."""
    own = method == "unclamped"
    merge = unclamped if own else getattr(merging, method)
    replicas = stacked(weights, models)
    return merge(weights.anchor(), replicas, unit=unit, num_heads=weights.num_heads)


def stacked(weights: Weights, models: Sequence[Model]) -> PyTree:
    """Models as one tree with a leading axis."""
    return merging.stack_replicas([model.build(weights) for model in models])


def plane(w0: PyTree, u: PyTree, v: PyTree | None, x: float, y: float) -> PyTree:
    """w0 + x (u - w0) + y (v - w0); v may be None.

    In the weights' own float32, as all points of the ledger were made: merges and planes of
    `merging` sum in float64, and differ in the last bit of many weights.
    """
    along = jax.tree.map(lambda a, b: a + x * (b - a), w0, u)
    if v is None:
        return along
    return jax.tree.map(lambda w, a, b: w + y * (b - a), along, w0, v)


@jax.jit
def noisy(models: PyTree, scale: float, key: jax.Array) -> PyTree:
    """See `Noisy`; a leading axis runs over the models.

    The size is the models' deviation, so that a draw's distance varies as a model's does;
    `merging.random_point` brings each draw to one given distance.
    """
    leaves, structure = jax.tree.flatten(models)
    keys = jax.random.split(key, len(leaves))
    drawn = [
        w.mean(0) + scale * jnp.sqrt(w.var(0, ddof=1).mean()) * jax.random.normal(k, w.shape[1:])
        for k, w in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, drawn)


# Merges that only a study makes: what Model Stock would be without one of its rules.


def unclamped(
    pretrained: Any,
    finetuned: Any,
    unit: str = "tensor",
    *,
    num_heads: int | Mapping[str, int] | None = None,
) -> tuple[Any, Stats]:
    """Equation 3 where cos <= 0 as well: t = N cos / (1 + (N - 1) cos), below zero there.

    Args:
      pretrained: as `model_stock`.
      finetuned: as `model_stock`.
      unit: as `model_stock`.
      num_heads: as `model_stock`.

    Returns:
      The merged tree, and `Stats`.

    Example:
      >>> w0 = {"w": jnp.zeros(2)}
      >>> w = {"w": jnp.array([[1.0, 0.0], [-0.5, 0.75**0.5]])}  # 120 degrees apart
      >>> round(float(unclamped(w0, w)[1].ratio["w"]), 3)
      -2.0
    """
    merged, stats, _ = merge(
        _equation_3_everywhere, pretrained, finetuned, unit=unit, num_heads=num_heads
    )
    return merged, stats


def _equation_3_everywhere(gram, single) -> UnitSolution:
    seen = measure(gram)
    number = jnp.maximum(seen.num_active, 1.0)
    # 0 / 0 of two opposite task vectors: their mean is the anchor, whatever t.
    below = 1.0 + (number - 1.0) * seen.cosine
    ratio = jnp.where(below > 0, number * seen.cosine / jnp.where(below > 0, below, 1.0), 0.0)
    ratio = jnp.where(single | (seen.num_active < 2), 1.0, ratio)
    share = jnp.where(seen.active, (ratio / number)[None], 0.0)
    return solve_with_coefficients(gram, seen, single, share)
