"""Run a config in its workdir, and evaluate checkpoints."""

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
from modelstock_jax.experiment import export, results
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
from modelstock_jax.training.batch_norm import StatisticsEstimator, check_statistics
from modelstock_jax.training.checkpoints import Checkpoints
from modelstock_jax.training.finetune import make_trainer
from modelstock_jax.training.metrics import count_compilation, show_compilation
from modelstock_jax.training.sharding import device_put_global, make_mesh, replicated_sharding
from modelstock_jax.training.stages import check_validation_images, linear_probe
from modelstock_jax.training.step_fns import mesh_from_config
from modelstock_jax.training.trainer import merged_directory


def run(
    config: ConfigDict,
    workdir: str | Path,
    argv: Sequence[str] = (),
    allow_config_change: bool = False,
) -> None:
    """Run the config's task, resuming from an earlier call.

    If the run is finished, only print its table: nothing is opened, compiled or written.

    Args:
      config: see `configs/default.py`
      workdir: output directory, created if missing
      argv: command-line arguments of Python, for the model card
      allow_config_change: resume in a workdir whose config differs only in options that affect
        rounding or file locations ("numerical" and "path" in `options.OPTIONS`)

    Raises:
      UserError: any user error; earlier output is preserved
    """
    workdir = Path(workdir)
    # Validate before locking the workdir, so that fixing a typo does not count as a config change.
    check_and_set_up(config, workdir=str(workdir))
    multihost.warm_up_collectives(mesh_from_config(config))
    finished = results.finished(workdir, config) if multihost.is_main() else None
    if multihost.broadcast_from_main(finished is not None):
        if finished is not None:
            print("finished before with this config: nothing is trained or written")
            results.show(workdir, config, finished)
        return
    if multihost.is_main():
        lock_workdir(workdir, config, allow_change=allow_config_change)
    multihost.barrier("workdir locked")
    timeline_path = workdir / "timeline.jsonl"
    try:
        with Timeline(timeline_path, multihost.is_main()) as timeline, count_compilation(timeline):
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
    """Train and compare every seed; write the results and the exported model."""
    check_data(config)
    pretrained = open_anchor(config)
    export.check_export(config, pretrained)
    data = open_data(config)
    check_validation_images(config, data)
    export.check_validation(config, data)
    anchor = classify(config, pretrained, data, workdir / "heads")
    probed = linear_probe(config, anchor, data, workdir)
    comparison = Comparison(config, workdir, probed, data, timeline)
    documents = [comparison.evaluate_anchor(anchor)]
    for seed in range(config.seed, config.seed + config.num_seeds):
        documents.append(comparison.run_seed(seed))
    exported = comparison.exported_model(documents[1].get("rows", []))
    if not multihost.is_main():
        return
    with timeline.phase("export"):
        if exported is not None:
            index, params = exported
            row = documents[1]["rows"][index]
            row["exported"] = True
            export.export(
                workdir,
                config,
                pretrained,
                params | comparison.anchor.classify(params),
                data.class_names,
                [documents[0]["rows"][0], row],
                results.merge_ratios(workdir, f"seed_{config.seed}/merged", row, documents[1]),
                command,
            )
        else:
            print(
                f"no model is exported: the run has none for export.which={config.export.which!r}; "
                "--config.export.which=best exports the best on validation images"
            )
        results.write(workdir, config, documents)


def choose_learning_rate(config: ConfigDict, workdir: Path, timeline: Timeline) -> float:
    """Choose one of `search.learning_rates` by validation accuracy, without merging.

    Uses no test set and no shift. Writes learning_rate.json and prints the accuracies.

    Returns:
      learning rate with the highest mean validation accuracy over replicas
    """
    _, data, anchor = open_experiment(config, workdir / "heads")
    anchor = linear_probe(config, anchor, data, workdir)
    check_statistics(config, anchor.params)
    results_by_rate: dict[float, list[float]] = {}
    for rate in config.search.learning_rates:
        run_config = config.copy_and_resolve_references()
        run_config.merge.every = "never"
        run_config.optimizer.learning_rate = rate
        name = f"learning_rate_{rate:g}"
        trainer = make_trainer(run_config, anchor, data, workdir, name, timeline=timeline)
        replicas = multihost.to_host(trainer.run().state.params)
        evaluate = classifier_evaluator(config, anchor, trainer.step_functions.mesh)
        with timeline.phase("evaluate"):
            models = (
                jax.tree.map(lambda x, r=r: x[r], replicas) for r in range(run_config.num_replicas)
            )
            results_by_rate[rate] = [
                evaluate(anchor.classify(model), [data.validation])[data.validation.name]
                for model in models
            ]
    best = max(results_by_rate, key=lambda rate: sum(results_by_rate[rate]))
    if not multihost.is_main():
        return best
    rows = [
        {"learning_rate": rate, "validation": accuracies}
        for rate, accuracies in results_by_rate.items()
    ]
    write_json(workdir / "learning_rate.json", {"rows": rows, "best": best})
    console = Console()
    for rate, accuracies in results_by_rate.items():
        mean, error = mean_and_error(accuracies)
        mark = "  <- best" if rate == best else ""
        console.print(
            f"learning rate {rate:<8g} validation {mean:.2f} % "
            f"± {error or 0:.2f} over {len(accuracies)} replicas{mark}",
            highlight=False,
        )
    return best


def evaluate_checkpoint(config: ConfigDict, path: str | None) -> dict[str, Any]:
    """Evaluate a checkpoint; print the table and return the row.

    Writes only the zero-shot head, to the user's cache directory.

    Args:
      config: options with the data and, for checkpoints of a run, the anchor and the objective
      path: a checkpoint directory or hub id, as in `config.pretrained` (a CLIP or SigLIP without a
        head gets the zero-shot head), or a step of a run's Orbax checkpoints of merged weights

    Raises:
      UserError: no such checkpoint, or it does not match the data
    """
    if not path:
        raise UserError("--mode=eval needs --checkpoint=DIR")
    check_and_set_up(config, checkpoint=path)
    directory, details = Path(path), {}
    _check_not_run_files(directory)
    is_step = directory.name.isdigit() and directory.is_dir()
    if not is_step:
        config = config.copy_and_resolve_references()
        config.pretrained = path
        details["distance_to_anchor"] = None  # The model is its own anchor.
    # A step may need training images for the statistics of batch norms.
    _, data, anchor = open_experiment(config, _heads(), training=is_step)
    mesh = make_mesh(1, 0, num_replicas=1, batch_size=jax.device_count())
    params = anchor.params
    if is_step:
        start = anchor.initial_params(config)
        shardings = jax.tree.map(lambda _: replicated_sharding(mesh), start)
        with Checkpoints(directory.parent, keep=0, read_only=True) as checkpoints:
            restored = checkpoints.restore(int(directory.name), device_put_global(start, shardings))
        merged = StatisticsEstimator(config, anchor, data, mesh)(multihost.to_host(restored))
        params = anchor.classify(merged)
    evaluator = ModelEvaluator(config, anchor, data, mesh)
    progress = Progress(
        "evaluate", evaluator.num_images, unit="images", enabled=multihost.is_main()
    )
    with progress, show_compilation(progress):
        row = evaluator.row(
            directory.name, params, on_progress=progress.update, seed=None, cost=None, **details
        )
    if multihost.is_main():
        screen_table([row], synthetic=config.data.name == "glyphs")
    return row


def _check_not_run_files(path: Path) -> None:
    """Reject parts of a workdir that are easily mistaken for models."""
    if (path / "runs").is_dir() and (path / "model").is_dir():
        raise UserError(f"{path} is the workdir of a run; pass its merged model {path / 'model'}")
    if path.name.isdigit() and path.parent.name == "state":
        raise UserError(
            f"{path} is a training state; pass a merged model of that run, one of the numbered "
            f"directories in {merged_directory(path.parent.parent)}"
        )


def _heads() -> Path | None:
    """Return the cache directory of zero-shot heads; None if it cannot be written."""
    path = cache_directory() / "heads"
    try:
        path.mkdir(parents=True, exist_ok=True)
        writable = os.access(path, os.W_OK)
    except OSError:
        writable = False
    # Only process 0 writes.
    return path if multihost.broadcast_from_main(writable) else None
