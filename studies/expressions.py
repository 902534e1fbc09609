"""Models as expressions of trained models.

The key of an expression identifies its model, so that studies share the measurements of equal
models. `build` computes the weights.
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
from modelstock_jax.merging import Stats, geometry
from modelstock_jax.merging.engine import merge
from modelstock_jax.merging.rules import UnitSolution, measure, solve_with_coefficients
from modelstock_jax.merging.trees import PyTree
from modelstock_jax.registry import RENAMED_METHODS
from studies.runs import Run


class Expression(Protocol):
    """A model that can be built; every `expressions.Model` is one."""

    def build(self, source: ModelSource) -> PyTree:
        """Return the weights."""


class ModelSource(Protocol):
    """The part of `context.StudyContext` that a model's `build` uses."""

    num_heads: int

    def name(self, run: Run) -> str:
        """Return the checksum of a run, with its seed."""

    def anchor(self) -> PyTree:
        """Return the pretrained weights."""

    def start(self, run: Run) -> PyTree:
        """Return the initial weights of a run's replicas: the anchor, for LP-FT the probed one."""

    def replica(self, run: Run, index: int, epoch: float | None) -> PyTree:
        """Return a replica at the end of the run, or at an epoch (0.5: middle of the first)."""

    def merged(self, run: Run) -> PyTree:
        """Return the last merged model of a run."""

    def held_out(self, model: Expression) -> float:
        """Return the accuracy on the validation set, in percent."""

    def validate(self, params: PyTree) -> float:
        """Return the accuracy of weights on the validation set, in percent."""


class MeasurementContext(ModelSource, Protocol):
    """The part of `context.StudyContext` that a measurement uses."""

    def sets(self, shifts: bool) -> list[Any]:
        """Return names and sizes of the test sets, which are part of an accuracy's key."""

    def accuracy(self, params: PyTree, *, shifts: bool) -> dict[str, Any]:
        """Return top-1 accuracies in percent: {"id": ..., "shifts": {name: ...}}."""

    def validation_set(self) -> list[Any]:
        """Return name and size of the validation set, which are part of a measurement's key."""


class Model(abc.ABC):
    """An expression: a frozen dataclass of runs, models and parameters.

    Attributes:
      key_name: name in the ledger's keys. It never changes, even if the class is renamed, because
        finished measurements are found by it.
    """

    key_name: ClassVar[str]

    def key(self, source: ModelSource) -> list[Any]:
        """Return a JSON value that identifies the model."""
        return named(self, source)

    @abc.abstractmethod
    def build(self, source: ModelSource) -> PyTree:
        """Return the weights."""


# Keys contain the names that merge methods had at the time of the first measurements.
_FIRST_METHOD_NAMES = {new: old for old, new in RENAMED_METHODS.items()} | {
    "unclamped": "not_clipped"
}


def named(value: Any, source: ModelSource) -> Any:
    """Return the JSON value of an expression or measurement: its key name and its fields."""
    if isinstance(value, Run):
        return source.name(value)
    if isinstance(value, tuple):
        return [named(item, source) for item in value]
    if hasattr(value, "key_name"):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        if "method" in fields:
            fields["method"] = _FIRST_METHOD_NAMES.get(fields["method"], fields["method"])
        return [value.key_name, *(named(item, source) for item in fields.values())]
    return value


@dataclass(frozen=True)
class Anchor(Model):
    """The pretrained model, w0."""

    key_name: ClassVar[str] = "Anchor"

    def build(self, source: ModelSource) -> PyTree:
        """See `Model`."""
        return source.anchor()


@dataclass(frozen=True)
class Start(Model):
    """The initial model of a run's replicas: the anchor, or the anchor with a probed head."""

    key_name: ClassVar[str] = "Start"

    run: Run

    def build(self, source: ModelSource) -> PyTree:
        """See `Model`."""
        return source.start(self.run)


@dataclass(frozen=True)
class Replica(Model):
    """A single fine-tuned model, w_i, at an epoch or at the end of the run (None)."""

    key_name: ClassVar[str] = "Replica"

    run: Run
    index: int = 0
    epoch: float | None = None

    def build(self, source: ModelSource) -> PyTree:
        """See `Model`."""
        return source.replica(self.run, self.index, self.epoch)


@dataclass(frozen=True)
class Merged(Model):
    """The last merged model of a run with merging."""

    key_name: ClassVar[str] = "Merged"

    run: Run

    def build(self, source: ModelSource) -> PyTree:
        """See `Model`."""
        return source.merged(self.run)


@dataclass(frozen=True)
class Mean(Model):
    """The uniform mean, w_avr."""

    key_name: ClassVar[str] = "Mean"

    models: tuple[Model, ...]

    def build(self, source: ModelSource) -> PyTree:
        """See `Model`; only one model and the sum are in memory at a time."""
        mean = self.models[0].build(source)
        for number, model in enumerate(self.models[1:], 2):
            weights = model.build(source)
            mean = jax.tree.map(lambda m, w, n=number: m + (w - m) / n, mean, weights)
        return mean


@dataclass(frozen=True)
class Merge(Model):
    """A merge after training by one of `registry.METHODS`, or by `unclamped`."""

    key_name: ClassVar[str] = "Merge"

    models: tuple[Model, ...]
    method: str = "model_stock"
    unit: str = "tensor"

    def build(self, source: ModelSource) -> PyTree:
        """See `Model`."""
        return merge_of(source, self.models, self.method, self.unit)[0]


@dataclass(frozen=True)
class MergeFrom(Model):
    """Equation 3 for models with an initial model other than the anchor."""

    key_name: ClassVar[str] = "MergeFrom"

    models: tuple[Model, ...]
    start: Model

    def build(self, source: ModelSource) -> PyTree:
        """See `Model`."""
        merged, _ = merging.model_stock(self.start.build(source), stacked(source, self.models))
        return merged


@dataclass(frozen=True)
class Between(Model):
    """A point of a model's WiSE-FT curve, w0 + alpha (w - w0)."""

    key_name: ClassVar[str] = "Between"

    model: Model
    alpha: float

    def build(self, source: ModelSource) -> PyTree:
        """See `Model`."""
        return plane(source.anchor(), self.model.build(source), None, self.alpha, 0.0)


@dataclass(frozen=True)
class MonoSoup(Model):
    """A model whose update is scaled by singular direction (arXiv 2602.09689)."""

    key_name: ClassVar[str] = "MonoSoup"

    model: Model

    def build(self, source: ModelSource) -> PyTree:
        """See `Model`."""
        return merging.monosoup(source.anchor(), stacked(source, [self.model]))[0]


@dataclass(frozen=True)
class LiNeS(Model):
    """A model whose update is scaled by layer, from alpha to 1 (arXiv 2410.17146)."""

    key_name: ClassVar[str] = "LiNeS"

    model: Model
    alpha: float

    def build(self, source: ModelSource) -> PyTree:
        """See `Model`."""
        return merging.lines(source.anchor(), stacked(source, [self.model]), self.alpha)[0]


@dataclass(frozen=True)
class InPlane(Model):
    """A point of the plane of three models, w0 + x (u - w0) + y (v - w0) (Figure 3)."""

    key_name: ClassVar[str] = "InPlane"

    u: Model
    v: Model
    x: float
    y: float

    def build(self, source: ModelSource) -> PyTree:
        """See `Model`."""
        u, v = self.u.build(source), self.v.build(source)
        return plane(source.anchor(), u, v, self.x, self.y)


@dataclass(frozen=True)
class Noisy(Model):
    """The mean of models plus Gaussian noise, scaled separately for each tensor (Figure 4).

        w = mean_i(w_i) + scale s z,  z ~ N(0, I),

    where s^2 is the tensor's variance over the models, averaged over its elements. At scale 1 the
    distance to the center equals that of a fine-tuned model.
    """

    key_name: ClassVar[str] = "Noisy"

    models: tuple[Model, ...]
    scale: float
    seed: int

    def build(self, source: ModelSource) -> PyTree:
        """See `Model`."""
        return noisy(stacked(source, self.models), self.scale, jax.random.key(self.seed))


@dataclass(frozen=True)
class Best(Model):
    """The model with the highest accuracy on the validation set; the first one of a tie."""

    key_name: ClassVar[str] = "Best"

    models: tuple[Model, ...]

    def build(self, source: ModelSource) -> PyTree:
        """See `Model`."""
        return max(self.models, key=source.held_out).build(source)


@dataclass(frozen=True)
class Greedy(Model):
    """The greedy soup, selected on the validation set (Wortsman et al. 2022, Recipe 1)."""

    key_name: ClassVar[str] = "Greedy"

    models: tuple[Model, ...]

    def build(self, source: ModelSource) -> PyTree:
        """See `Model`."""
        loaders = [partial(model.build, source) for model in self.models]
        scores = [source.held_out(model) for model in self.models]
        return merging.greedy_soup(None, loaders, source.validate, scores=scores).params


def merge_of(
    source: ModelSource, models: Sequence[Model], method: str = "model_stock", unit: str = "tensor"
) -> tuple[PyTree, merging.Stats]:
    """Merge models by a method of `Merge`; return the merged weights and `Stats`."""
    merge = unclamped if method == "unclamped" else getattr(merging, method)
    replicas = stacked(source, models)
    return merge(source.anchor(), replicas, unit=unit, num_heads=source.num_heads)


def stacked(source: ModelSource, models: Sequence[Model]) -> PyTree:
    """Return models as one tree with a leading replica axis."""
    return merging.stack_replicas([model.build(source) for model in models])


def plane(w0: PyTree, u: PyTree, v: PyTree | None, x: float, y: float) -> PyTree:
    """Return w0 + x (u - w0) + y (v - w0); v may be None.

    Computes in the weights' float32, as for all points in the ledger. Merges and planes of
    `merging` sum in float64 and differ in the last bit of many weights.
    """
    along = jax.tree.map(lambda a, b: a + x * (b - a), w0, u)
    if v is None:
        return along
    return jax.tree.map(lambda w, a, b: w + y * (b - a), along, w0, v)


@jax.jit
def noisy(models: PyTree, scale: float, key: jax.Array) -> PyTree:
    """See `Noisy`; `models` has a leading replica axis.

    The noise has the models' standard deviation, so the distance of a draw varies like that of a
    model. `merging.random_point` instead scales each draw to a fixed distance.
    """
    leaves, structure = jax.tree.flatten(models)
    keys = jax.random.split(key, len(leaves))
    noisy_leaves = [
        w.mean(0) + scale * jnp.sqrt(w.var(0, ddof=1).mean()) * jax.random.normal(k, w.shape[1:])
        for k, w in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, noisy_leaves)


def unclamped(
    pretrained: PyTree,
    finetuned: PyTree,
    unit: str = "tensor",
    *,
    num_heads: int | Mapping[str, int] | None = None,
) -> tuple[Any, Stats]:
    """Merge by equation 3 without clamping: t = N cos / (1 + (N - 1) cos) < 0 if cos < 0.

    Only studies use this control.

    Args:
      pretrained: as for `model_stock`.
      finetuned: as for `model_stock`.
      unit: as for `model_stock`.
      num_heads: as for `model_stock`.

    Returns:
      The merged tree and `Stats`.

    Example:
      >>> w0 = {"w": jnp.zeros(2)}
      >>> w = {"w": jnp.array([[1.0, 0.0], [-0.5, 0.75**0.5]])}  # 120 degrees apart
      >>> round(float(unclamped(w0, w)[1].ratio["w"]), 3)
      -2.0
    """
    merged, stats, _ = merge(
        _unclamped_equation_3, pretrained, finetuned, unit=unit, num_heads=num_heads
    )
    return merged, stats


def _unclamped_equation_3(gram, is_scalar) -> UnitSolution:
    xp = geometry.namespace(gram)
    stats = measure(gram)
    number = xp.maximum(stats.num_active, 1.0)
    # Two opposite task vectors give 0 / 0. Their mean is the anchor for every t.
    divisor = 1.0 + (number - 1.0) * stats.cosine
    ratio = xp.where(divisor > 0, number * stats.cosine / xp.where(divisor > 0, divisor, 1.0), 0.0)
    ratio = xp.where(is_scalar | (stats.num_active < 2), 1.0, ratio)
    coefficients = xp.where(stats.active, (ratio / number)[None], 0.0)
    return solve_with_coefficients(gram, stats, is_scalar, coefficients)
