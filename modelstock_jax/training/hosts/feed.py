"""From what each process has to one array over all devices of all processes."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

PyTree = Any


def held(sharding: NamedSharding, shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """What this process's devices hold of a global array, dimension by dimension.

    On one process that is everything; on a mesh that keeps a replica to a host, the host's own
    replicas and every example of theirs.

    Args:
      sharding: of the array.
      shape: of the array; may leave out trailing dimensions that are not split.

    Returns:
      For each dimension the ascending indices, int64.
    """
    every = sharding.addressable_devices_indices_map(shape).values()
    blocks = [block for block in every if block is not None]
    dims = zip(*([range(*one.indices(size)) for one, size in zip(b, shape, strict=True)]
                 for b in blocks), strict=True)  # fmt: skip
    return tuple(np.unique(np.concatenate(ranges)) for ranges in dims)


def place(sharding: NamedSharding, value: np.ndarray, shape: tuple[int, ...]) -> jax.Array:
    """The global array of which this process gives what it holds.

    Args:
      sharding: of the array.
      value: this process's part: the rows and columns of `held(sharding, shape)`.
      shape: global sizes of the leading dimensions; the others are those of `value`.
    """
    parts, shape = held(sharding, shape), (*shape, *value.shape[len(shape) :])

    def block(index: tuple[slice, ...] | None) -> np.ndarray:
        local = []
        for part, one, size in zip(parts, index or (), shape, strict=False):
            start, stop, _ = one.indices(size)
            local.append(slice(*np.searchsorted(part, (start, stop))))
        return value[tuple(local)]

    return jax.make_array_from_callback(shape, sharding, block)


def spread(tree: PyTree, shardings: PyTree) -> PyTree:
    """Places values that every process has whole; nothing is sent between processes.

    `jax.device_put` would compare them between all processes first, on the devices.

    Args:
      tree: of NumPy arrays, or arrays on this process's devices; equal on all processes.
      shardings: one for each leaf.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def global_array(leaf: Any, sharding: NamedSharding) -> jax.Array:
        value = np.asarray(leaf)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return jax.tree.map(global_array, tree, shardings)
