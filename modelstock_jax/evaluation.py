"""Top-1 accuracy on the in-distribution set and on every shift."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from modelstock_jax.data.image_set import ImageSet
from modelstock_jax.data.pipeline import eval_batches

PyTree = Any


def make_evaluator(
    apply: Callable[[PyTree, jax.Array], jax.Array],
    prepare: Callable[[jax.Array], jax.Array],
    mesh: Mesh,
    batch_size: int,
) -> Callable[[PyTree, Iterable[ImageSet]], dict[str, float]]:
    """Builds (params, image sets) -> {set's name: top-1 accuracy in percent}.

    Every image counts once: the last batch is padded, and its padding masked. Where a set
    holds some of the classes only (`ImageSet.classes`), the other logits are out of the race,
    as in the protocols of ImageNet-R and ImageNet-A.

    Args:
      apply: (params, images float [B, H, W, 3]) -> logits [B, K].
      prepare: images uint8 -> float, normalised.
      mesh: batches are split over all of its devices.
      batch_size: B; rounded up to a multiple of the devices.
    """
    devices = mesh.devices.size
    batch_size = -(-batch_size // devices) * devices
    split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))

    @jax.jit
    def count_right(params, batch, allowed):
        logits = apply(params, prepare(batch["image"]))
        logits = jnp.where(allowed[None, :], logits, -jnp.inf)
        right = (logits.argmax(-1) == batch["label"]) & batch["mask"]
        return right.sum()

    def evaluate(params, image_sets):
        num_classes = params["head"]["bias"].shape[-1]
        pending = {}
        for image_set in image_sets:
            allowed = np.ones(num_classes, bool)
            if image_set.classes is not None:
                allowed[:] = False
                allowed[list(image_set.classes)] = True
            pending[image_set.name] = (
                [
                    count_right(params, jax.device_put(batch, split), allowed)
                    for batch in eval_batches(image_set, batch_size)
                ],
                len(image_set.labels),
            )
        return {
            name: 100.0 * sum(int(count) for count in counts) / total
            for name, (counts, total) in pending.items()
        }

    return evaluate
