"""What comes before the replicas' training and after it: a linear probe, and learned radii."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from modelstock_jax.data.benchmark import Benchmark
from modelstock_jax.data.loader import Loading, train_batches
from modelstock_jax.errors import UserError
from modelstock_jax.training.classifier import Classifier
from modelstock_jax.training.finetune import alone, finetuning_programs, finetuning_trainer
from modelstock_jax.training.hosts import distributed
from modelstock_jax.training.methods.method import check_method
from modelstock_jax.training.methods.objectives import cross_entropy
from modelstock_jax.training.methods.per_replica import train_views
from modelstock_jax.training.methods.tpgm import trainable_projection

PyTree = Any


def probe(config: ConfigDict, anchor: Classifier, data: Benchmark, workdir: Path) -> Classifier:
    """The first phase of LP-FT (Kumar et al. 2022): the head alone, the tower as it is.

    The second phase is a fine-tuning like any other, from what this returns.
    The probed model is then the replicas' anchor too, and so is shared by all seeds of a run, as
    Model Soups share theirs. A run that was stopped in either phase goes on there.

    Args:
      config: the run's options; `objective.probe_epochs` and `probe_learning_rate` are used in
        place of the second phase's, and no option of `merge`, `per_replica` or `projection`.
      anchor: where the probe starts.
      data: its training set.
      workdir: the probe lies in workdir/runs/probe.

    Returns:
      The anchor under the probed head, or the anchor itself where the objective is not `lp_ft`.
    """
    check_method(config)
    if config.objective.name != "lp_ft":
        return anchor
    one = alone(config)
    one.objective.name = "linear_probe"
    one.epochs = config.objective.probe_epochs
    one.optimizer.learning_rate = config.objective.probe_learning_rate
    one.optimizer.decay_to_pretrained = 0.0
    one.optimizer.projection.name = "none"
    programs = finetuning_programs(one, anchor, data)
    state = finetuning_trainer(one, anchor, data, programs, workdir, "probe").run().state
    head = jax.tree.map(lambda x: x[0], distributed.whole(state.params["head"]))
    return replace(anchor, params=anchor.params | {"head": head})


def hold(config: ConfigDict, anchor: Classifier, data: Benchmark, replicas: PyTree) -> PyTree:
    """TPGM after training: each replica within radii that validation images choose.

    Args:
      config: the run's options; `optimizer.projection` is used.
      anchor: what the replicas were trained from.
      data: its validation set, seen through the training's views.
      replicas: [R, ...] a leaf, NumPy arrays.

    Returns:
      The projected replicas, or the replicas themselves where the projection is not `tpgm`.

    Raises:
      UserError: if the validation set has fewer images than a batch.
    """
    rules, size = config.optimizer.projection, config.batch_size
    if rules.name != "tpgm":
        return replicas
    if len(data.validation) < size:
        raise UserError(
            f"optimizer.projection.name='tpgm' learns on validation images; {size} make a batch, "
            f"and there are {len(data.validation)}: lower batch_size or set data.held_out"
        )
    loss_fn = cross_entropy(anchor.apply, anchor.normalize)
    held = []
    for r, view in enumerate(train_views(config, anchor.normalize.image_size)):
        batches = train_batches(
            data.validation,
            batch_size=size,
            seed=config.seed,
            num_replicas=1,
            start_step=0,
            view=view,
            loading=Loading(**config.data.loading),
        )
        projected, _ = trainable_projection(
            lambda params, batch: loss_fn(params, batch)[0],
            jax.tree.map(lambda x, r=r: x[r], replicas),
            anchor.params,
            ({name: x[0] for name, x in b.items()} for b in islice(batches, rules.steps)),
            learning_rate=rules.learning_rate,
            norm=rules.norm,
        )
        held.append(jax.device_get(projected))
    return jax.tree.map(lambda *leaves: np.stack(leaves), *held)
