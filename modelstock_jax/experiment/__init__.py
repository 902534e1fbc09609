"""Complete runs: train, merge, evaluate every method on every dataset, write the results."""

from modelstock_jax.extras import require

require("train")

from modelstock_jax.experiment.dry_run import dry_run  # noqa: E402
from modelstock_jax.experiment.run import evaluate_checkpoint, run  # noqa: E402

__all__ = ["dry_run", "evaluate_checkpoint", "run"]
