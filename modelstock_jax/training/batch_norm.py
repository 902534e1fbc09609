"""Statistics of batch norms after a merge, estimated on training images as in SWA."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from modelstock_jax.data.benchmark import Benchmark
from modelstock_jax.data.device_resize import resize_batch
from modelstock_jax.data.loader import Batch, LoaderOptions, steps_per_epoch, train_batches
from modelstock_jax.errors import UserError
from modelstock_jax.merging.trees import PyTree, named_leaves
from modelstock_jax.models.model import batch_statistics
from modelstock_jax.reporting.progress import Progress
from modelstock_jax.training import multihost
from modelstock_jax.training.classifier import Classifier
from modelstock_jax.training.finetune import single_replica_config, train_transforms
from modelstock_jax.training.sharding import device_put_global, local_indices, make_global_array
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


class StatisticsEstimator:
    """Replaces the statistics of all batch norms by those of the training images.

    Stochastic weight averaging (Izmailov et al. 2018) does this after averaging weights: the
    activations of averaged weights have other means and variances than those of any model that was
    averaged. In one pass over the training set, with its augmentation, every batch is normalized
    with its own statistics; mean and variance are averages over the batches, as in torch's
    `update_bn`. (torch divides a variance by n - 1, this class by n = B H W.)

    One compiled function serves all models of a run. A batch is split over all devices.
    """

    def __init__(self, config: ConfigDict, anchor: Classifier, data: Benchmark, mesh: Mesh) -> None:
        """Prepare the estimation; nothing is compiled yet.

        Args:
          config: options of the run; batch size, augmentation and seed are used
          anchor: the model's architecture and preprocessing
          data: provides the training set
          mesh: all devices
        """
        self._config, self._anchor, self._data = config, anchor, data
        devices = mesh.devices.size
        self._batch_size = -(-config.batch_size // devices) * devices
        self._split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._replicated = NamedSharding(mesh, PartitionSpec())
        self._statistics_of = jax.jit(self._statistics, out_shardings=self._replicated)

    def __call__(self, params: PyTree) -> PyTree:
        """Return a model with other statistics.

        Args:
          params: {"image_tower", ...}, NumPy arrays

        Returns:
          `params` with other statistics; `params` itself if `merge.batch_norm_statistics='keep'`
        """
        if self._config.merge.batch_norm_statistics == "keep" or self._anchor.model is None:
            return params
        count, total = steps_per_epoch(len(self._data.train), self._batch_size), None
        shardings = jax.tree.map(lambda _: self._replicated, params["image_tower"])
        tower = device_put_global(params["image_tower"], shardings)
        main = multihost.is_main()
        with Progress("batch norms", count, unit="batches", enabled=main) as progress:
            for step, batch in zip(range(count), self._batches(), strict=False):
                images = self._images(batch)
                # Sums on the host in float64, in a fixed order.
                found = jax.device_get(self._statistics_of(step, tower, images))
                found = jax.tree.map(np.float64, found)
                total = found if total is None else jax.tree.map(np.add, total, found)
                progress.update(step + 1)
        mean = jax.tree.map(lambda x: np.asarray(x / count, np.float32), total)
        return params | {"image_tower": _updated(params["image_tower"], mean)}

    def _batches(self) -> Iterator[Batch]:
        """Yield this process's part of the batches of a single replica of the run's seed."""
        config, normalize = single_replica_config(self._config), self._anchor.normalize
        (examples,) = local_indices(self._split, (self._batch_size,))
        return train_batches(
            self._data.train,
            batch_size=self._batch_size,
            seed=config.seed,
            num_replicas=1,
            start_step=0,
            examples=examples.tolist(),
            transform=train_transforms(
                config, normalize.image_size, normalize.resample, config.data.resize_on
            ),
            loader=LoaderOptions(**config.data.loader),
        )

    def _images(self, batch: Batch) -> jax.Array:
        """Return the images of a batch on the devices, uint8 [B, H, W, 3]."""
        normalize = self._anchor.normalize
        placed = {
            name: make_global_array(self._split, values[0], (self._batch_size,))
            for name, values in batch.items()
        }
        return resize_batch(placed, self._split, normalize.image_size, normalize.resample)["image"]

    def _statistics(self, step: jax.Array, tower: PyTree, images: jax.Array) -> PyTree:
        key = jax.random.fold_in(jax.random.key(self._config.seed), step)
        images = self._anchor.normalize(self._data.augment(key, images))
        assert self._anchor.model is not None
        return batch_statistics(self._anchor.model, tower, images)


def _updated(tree: PyTree, new: PyTree) -> PyTree:
    """Return a tree with the leaves of `new`, a tree of a part of its leaves."""
    merged = {k: _updated(tree[k], x) if isinstance(x, dict) else x for k, x in new.items()}
    return tree | merged
