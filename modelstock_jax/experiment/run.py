"""One run: what the config says to do, in a workdir of its own, to results and a merged model."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict
from rich.console import Console

from modelstock_jax.data.caches import cache_directory
from modelstock_jax.errors import UserError
from modelstock_jax.evaluation import ModelEvaluator, classifier_evaluator
from modelstock_jax.experiment import results
from modelstock_jax.experiment.comparison import Comparison
from modelstock_jax.experiment.setup import (
    check_and_set_up,
    check_data,
    classify,
    open_anchor,
    open_data,
    open_experiment,
    pretrain,
)
from modelstock_jax.experiment.workdir import lock_workdir, unlock_workdir
from modelstock_jax.fileio import write_json
from modelstock_jax.reporting.progress import Progress
from modelstock_jax.reporting.tables import mean_and_error, screen_table
from modelstock_jax.reporting.timeline import Timeline
from modelstock_jax.training import multihost
from modelstock_jax.training.checkpoints import Checkpoints
from modelstock_jax.training.finetune import make_trainer
from modelstock_jax.training.metrics import counted
from modelstock_jax.training.sharding import device_put_global, make_mesh, replicated_sharding
from modelstock_jax.training.stages import linear_probe
from modelstock_jax.training.step_fns import mesh_of


def run(
    config: ConfigDict,
    workdir: str | Path,
    argv: Sequence[str] = (),
    allow_config_change: bool = False,
) -> None:
    """Does what the config says, and goes on where an earlier call stopped.

    Args:
      config: see `configs/default.py`.
      workdir: everything is written there; made if missing.
      argv: how Python was started, for the model card.
      allow_config_change: go on in a workdir whose config differs only in what rounds, or in where
        things lie ("rounding" and "place" of `options.OPTIONS`).

    Raises:
      UserError: on any mistake of a user; nothing written before is lost.
    """
    workdir = Path(workdir)
    # Before the workdir is locked: fixing a typo, or adding devices, is no other config.
    check_and_set_up(config, workdir=str(workdir))
    multihost.warm_up_collectives(mesh_of(config))
    if multihost.is_main():
        lock_workdir(workdir, config, allow_change=allow_config_change)
    multihost.barrier("the workdir is ours")
    lines = workdir / "timeline.jsonl"
    try:
        with Timeline(lines, multihost.is_main()) as timeline, counted(timeline):
            if config.task == "pretrain":
                pretrain(config, workdir, timeline)
            elif config.task == "learning_rate":
                choose_learning_rate(config, workdir, timeline)
            else:
                command = shlex.join(["python", *argv]) if argv else ""
                finetune(config, workdir, command, timeline)
            if multihost.is_main():
                timeline.show()
    finally:
        unlock_workdir(workdir)


def finetune(config: ConfigDict, workdir: Path, command: str, timeline: Timeline) -> None:
    """Trains and compares every seed; writes the results and the merged model."""
    check_data(config)
    pretrained = open_anchor(config)
    results.check_export(config, pretrained)
    data = open_data(config)
    anchor = classify(config, pretrained, data, workdir / "heads")
    probed = linear_probe(config, anchor, data, workdir)
    comparison = Comparison(config, workdir, probed, data, timeline)
    documents = [comparison.evaluate_anchor(anchor)]
    for seed in range(config.seed, config.seed + config.num_seeds):
        documents.append(comparison.run_seed(seed))
    merged = None
    if comparison.merges:
        merged = multihost.to_host(comparison.trainer(config.seed, "merged").run().merged)
    if not multihost.is_main():
        return
    with timeline.phase("export"):
        if merged is not None:
            rows = [documents[0]["rows"][0], documents[1]["rows"][-1]]
            results.export(
                workdir / "model",
                config,
                pretrained,
                merged | comparison.anchor.classify(merged),
                data.class_names,
                rows,
                results.last_ratios(workdir, f"seed_{config.seed}/merged"),
                command,
            )
        results.write(workdir, config, documents)


def choose_learning_rate(config: ConfigDict, workdir: Path, timeline: Timeline) -> float:
    """Trains unmerged replicas at each of `search.learning_rates`; keeps the best on validation.

    No test set and no shift is looked at. Writes learning_rate.json and prints the table.

    Returns:
      The rate with the highest mean validation accuracy over replicas.
    """
    _, data, anchor = open_experiment(config, workdir / "heads")
    anchor = linear_probe(config, anchor, data, workdir)
    tried: dict[float, list[float]] = {}
    for rate in config.search.learning_rates:
        one = config.copy_and_resolve_references()
        one.merge.every = "never"
        one.optimizer.learning_rate = rate
        name = f"learning_rate_{rate:g}"
        trainer = make_trainer(one, anchor, data, workdir, name, timeline=timeline)
        replicas = multihost.to_host(trainer.run().state.params)
        evaluate = classifier_evaluator(config, anchor, trainer.step_functions.mesh)
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


def evaluate_checkpoint(config: ConfigDict, path: str | None) -> dict[str, Any]:
    """Evaluates any checkpoint that the code can read; prints the table and returns the row.

    Nothing is written but the zero-shot head, in the user's cache directory.

    Args:
      config: names the data, and the anchor and the objective of a run's checkpoints.
      path: a CLIP as `config.pretrained` names one (a directory or a hub id; without a head it
        gets the zero-shot one), or a step of a run's Orbax checkpoints of merged weights.

    Raises:
      UserError: if there is no such checkpoint, or it does not fit the data.
    """
    if not path:
        raise UserError("--mode=eval needs --checkpoint=DIR")
    check_and_set_up(config, checkpoint=path)
    directory, details = Path(path), {}
    _check_place(directory)
    is_step = directory.name.isdigit() and directory.is_dir()
    if not is_step:
        config = config.copy_and_resolve_references()
        config.pretrained = path
        details["distance_to_anchor"] = None  # It is the model itself that is measured.
    _, data, anchor = open_experiment(config, _heads())
    mesh = make_mesh(1, 0, num_replicas=1, batch_size=jax.device_count())
    params = anchor.params
    if is_step:
        start = anchor.initial_params(config)
        everywhere = jax.tree.map(lambda _: replicated_sharding(mesh), start)
        with Checkpoints(directory.parent, keep=0, read_only=True) as checkpoints:
            restored = checkpoints.restore(
                int(directory.name), device_put_global(start, everywhere)
            )
        params = anchor.classify(multihost.to_host(restored))
    measure = ModelEvaluator(config, anchor, data, mesh)
    with Progress(
        "evaluate", measure.num_images, unit="images", enabled=multihost.is_main()
    ) as progress:
        row = measure.row(
            directory.name, params, measured=progress.update, seed=None, cost=None, **details
        )
    if multihost.is_main():
        screen_table([row])
    return row


def _check_place(path: Path) -> None:
    """Parts of a run's workdir that are no models, and are easily taken for one."""
    if (path / "runs").is_dir() and (path / "model").is_dir():
        raise UserError(f"{path} is a run's workdir; its merged model is {path / 'model'}")
    if path.name.isdigit() and path.parent.name == "state":
        raise UserError(
            f"{path} is a training state; the merged models of that run are the "
            f"numbers in {path.parent.parent / 'merged'}"
        )


def _heads() -> Path | None:
    """Where heads are kept between evaluations; None where the user's cache cannot be written."""
    place = cache_directory() / "heads"
    try:
        place.mkdir(parents=True, exist_ok=True)
        writable = os.access(place, os.W_OK)
    except OSError:
        writable = False
    return (
        place if multihost.broadcast_from_main(writable) else None
    )  # Process 0 is the one that writes.
