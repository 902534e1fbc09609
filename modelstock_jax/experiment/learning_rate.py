"""The choice of the learning rate, on the in-distribution validation set and nothing else."""

from __future__ import annotations

from pathlib import Path

import jax
from ml_collections import ConfigDict
from rich.console import Console

from modelstock_jax.evaluation import classifier_evaluator
from modelstock_jax.experiment.opening import open_all
from modelstock_jax.fileio import write_json
from modelstock_jax.reporting.tables import mean_and_error
from modelstock_jax.reporting.timeline import Timeline
from modelstock_jax.training import multihost
from modelstock_jax.training.finetune import finetuning_programs, finetuning_trainer
from modelstock_jax.training.stages import probe


def choose_learning_rate(config: ConfigDict, workdir: Path, timeline: Timeline) -> float:
    """Trains unmerged replicas at each of `search.learning_rates`; keeps the best on validation.

    No test set and no shift is looked at. Writes learning_rate.json and prints the table.

    Returns:
      The rate with the highest mean validation accuracy over replicas.
    """
    _, data, anchor = open_all(config, workdir / "heads")
    anchor = probe(config, anchor, data, workdir)
    tried: dict[float, list[float]] = {}
    for rate in config.search.learning_rates:
        one = config.copy_and_resolve_references()
        one.merge.every = "never"
        one.optimizer.learning_rate = rate
        programs = finetuning_programs(one, anchor, data)
        name = f"learning_rate_{rate:g}"
        trainer = finetuning_trainer(one, anchor, data, programs, workdir, name, timeline)
        replicas = multihost.whole(trainer.run().state.params)
        evaluate = classifier_evaluator(config, anchor, programs.mesh)
        with timeline.phase("evaluate"):
            models = (jax.tree.map(lambda x, r=r: x[r], replicas) for r in range(one.num_replicas))
            tried[rate] = [
                evaluate(anchor.classify(model), [data.validation])[data.validation.name]
                for model in models
            ]
    best = max(tried, key=lambda rate: sum(tried[rate]))
    if not multihost.is_main():
        return best
    rows = [{"learning_rate": rate, "validation": found} for rate, found in tried.items()]
    write_json(workdir / "learning_rate.json", {"rows": rows, "best": best})
    console = Console()
    for rate, accuracies in tried.items():
        mean, error = mean_and_error(accuracies)
        chosen = "  <- best" if rate == best else ""
        console.print(
            f"learning rate {rate:<8g} validation {mean:.2f} % "
            f"± {error or 0:.2f} over {len(accuracies)} replicas{chosen}",
            highlight=False,
        )
    return best
