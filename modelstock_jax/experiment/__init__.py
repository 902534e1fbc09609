"""A whole run: train, merge, evaluate every method on every set, write the results."""

from modelstock_jax.experiment.evaluate import evaluate_checkpoint
from modelstock_jax.experiment.run import run

__all__ = ["evaluate_checkpoint", "run"]
