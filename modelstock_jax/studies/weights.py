"""Where expressions of models get trained weights from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from modelstock_jax.studies.runs import Run

if TYPE_CHECKING:
    from modelstock_jax.studies.models import Model

PyTree = Any


class Weights(Protocol):
    """What a bench gives to `Model.build`; `Bench` is one."""

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

    def held_out(self, model: Model) -> float:
        """Accuracy on the validation set, in percent."""

    def validate(self, params: PyTree) -> float:
        """The same, of weights that no expression names."""
