"""What models are built of, and what measures them: `bench.Bench` is both."""

from __future__ import annotations

from typing import Any, Protocol

from modelstock_jax.studies.measuring.runs import Run

PyTree = Any


class Expression(Protocol):
    """A model by what it is made of: every `models.Model` is one."""

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
