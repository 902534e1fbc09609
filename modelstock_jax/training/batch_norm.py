"""Statistics of batch norms after a merge, estimated on training images as in SWA."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from modelstock_jax.data.benchmark import Benchmark
from modelstock_jax.data.loader import Batch, LoaderOptions, steps_per_epoch, train_batches
from modelstock_jax.errors import UserError
from modelstock_jax.merging.trees import PyTree, named_leaves
from modelstock_jax.models.config import ModelConfig
from modelstock_jax.models.model import batch_statistics
from modelstock_jax.reporting.progress import Progress
from modelstock_jax.training import multihost
from modelstock_jax.training.classifier import Classifier
from modelstock_jax.training.finetune import single_replica_config, train_transforms
from modelstock_jax.training.state import is_statistic

STATISTICS = ("keep", "re_estimate")


def check_statistics(config: ConfigDict, params: PyTree) -> None:
    """Raise a UserError if statistics are to be estimated and the model has none."""
    if config.merge.batch_norm_statistics == "keep":
        return
    if not any(map(is_statistic, named_leaves(params))):
        raise UserError(
            "merge.batch_norm_statistics='re_estimate': this model has no batch norm; set "
            "merge.batch_norm_statistics='keep'"
        )


def estimate_statistics(
    config: ConfigDict, anchor: Classifier, data: Benchmark, params: PyTree
) -> PyTree:
    """Replace the statistics of all batch norms by those of the training images.

    Stochastic weight averaging (Izmailov et al. 2018) does this after averaging weights: the
    activations of averaged weights have other means and variances than those of any model that was
    averaged. In one pass over the training set, with its augmentation, every batch is normalized
    with its own statistics; mean and variance are averages over the batches, as in torch's
    `update_bn`. (torch divides a variance by n - 1, this function by n = B H W.)

    Args:
      config: options of the run; batch size, augmentation and seed are used
      anchor: the model's architecture and preprocessing
      data: provides the training set
      params: {"image_tower", ...}, NumPy arrays

    Returns:
      `params` with other statistics; `params` itself if `merge.batch_norm_statistics='keep'`
    """
    model = anchor.model
    if config.merge.batch_norm_statistics == "keep" or model is None:
        return params
    count, total = steps_per_epoch(len(data.train), config.batch_size), None
    statistics_of = jax.jit(partial(_statistics, model, config.seed, anchor, data))
    main = multihost.is_main()
    with Progress("batch norms", count, unit="batches", enabled=main) as progress:
        for step, batch in zip(range(count), _batches(config, anchor, data), strict=False):
            found = statistics_of(step, params["image_tower"], batch["image"][0])
            # Sums on the host in float64, in a fixed order.
            found = jax.tree.map(np.float64, jax.device_get(found))
            total = found if total is None else jax.tree.map(np.add, total, found)
            progress.update(step + 1)
    mean = jax.tree.map(lambda x: np.asarray(x / count, np.float32), total)
    return params | {"image_tower": _updated(params["image_tower"], mean)}


def _batches(config: ConfigDict, anchor: Classifier, data: Benchmark) -> Iterator[Batch]:
    """Yield the batches of a single replica of the run's seed."""
    normalize, single = anchor.normalize, single_replica_config(config)
    return train_batches(
        data.train,
        batch_size=config.batch_size,
        seed=config.seed,
        num_replicas=1,
        start_step=0,
        transform=train_transforms(single, normalize.image_size, normalize.resample),
        loader=LoaderOptions(**config.data.loader),
    )


def _statistics(
    model: ModelConfig,
    seed: int,
    anchor: Classifier,
    data: Benchmark,
    step: jax.Array,
    tower: PyTree,
    images: Any,
) -> PyTree:
    key = jax.random.fold_in(jax.random.key(seed), step)
    images = anchor.normalize(data.augment(key, images))
    return batch_statistics(model, tower, images)


def _updated(tree: PyTree, new: PyTree) -> PyTree:
    """Return a tree with the leaves of `new`, a tree of a part of its leaves."""
    merged = {k: _updated(tree[k], x) if isinstance(x, dict) else x for k, x in new.items()}
    return tree | merged
