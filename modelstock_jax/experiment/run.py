"""One run: what the config says to do, in a workdir of its own, to results and a merged model."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from modelstock_jax.experiment import export, results
from modelstock_jax.experiment.agreement import check_same
from modelstock_jax.experiment.comparison import Comparison
from modelstock_jax.experiment.learning_rate import choose_learning_rate
from modelstock_jax.experiment.opening import check_data, classify, open_data
from modelstock_jax.experiment.options import check_options
from modelstock_jax.experiment.pretrained import open_anchor, pretrain
from modelstock_jax.experiment.workdir import claim, release
from modelstock_jax.reporting.timeline import Timeline
from modelstock_jax.training import multihost
from modelstock_jax.training.launcher import use_cores
from modelstock_jax.training.metrics import counted
from modelstock_jax.training.stages import probe
from modelstock_jax.training.step_fns import mesh_of, use_compilation_cache


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
        things lie (`workdir.ROUNDING`, `workdir.PLACES`).

    Raises:
      UserError: on any mistake of a user; nothing written before is lost.
    """
    workdir = Path(workdir)
    check_options(config)  # Before the workdir is theirs: a mended name is no other config.
    use_cores(config)
    mesh = mesh_of(config)  # Nor does it take a zero-shot head to know that devices are missing.
    use_compilation_cache(config.compute.compilation_cache)
    check_same(config, workdir=str(workdir))
    multihost.connect(mesh)
    if multihost.is_main():
        claim(workdir, config, allow_change=allow_config_change)
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
        release(workdir)


def finetune(config: ConfigDict, workdir: Path, command: str, timeline: Timeline) -> None:
    """Trains and compares every seed; writes the results and the merged model."""
    check_data(config)
    pretrained = open_anchor(config)
    export.check(config, pretrained)
    data = open_data(config)
    anchor = classify(config, pretrained, data, workdir / "heads")
    probed = probe(config, anchor, data, workdir)
    comparison = Comparison(config, workdir, probed, data, timeline)
    documents = [comparison.before_training(anchor)]
    for seed in range(config.seed, config.seed + config.num_seeds):
        documents.append(comparison.one_seed(seed))
    merged = None
    if comparison.merges:
        merged = multihost.whole(comparison.train(config.seed, "merged").merged)
    if not multihost.is_main():
        return
    with timeline.phase("export"):
        if merged is not None:
            rows = [documents[0]["rows"][0], documents[1]["rows"][-1]]
            export.export(
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
