"""Where arrays are: on which devices, sharded over which mesh axes, varying over which.

A merge needs all replicas of an element on one device. On a mesh with Explicit axes, and for arrays
outside of jit, shardings are known, and the functions here move the replicas together. With Auto
axes under jit, XLA's partitioner decides.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P


def on_this_host(tree: Any) -> bool:
    """Return whether every array is concrete and fully addressable by this process."""
    return all(
        not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)
        for x in jax.tree.leaves(tree)
    )


def gather_replicas(pretrained: Any, finetuned: Any) -> tuple[Any, Any]:
    """Move the replicas of each element to one device, if the replica axis is sharded.

    The mesh axes of the replica axis move to the longest axis of the tensor that they divide, in an
    all-to-all: no device holds a complete tensor that did not before. A tensor without such an axis
    is replicated over them.

    Args:
      pretrained: w0, [...]
      finetuned: [N, ...]

    Returns:
      both, equal in value
    """
    sharding = _known_sharding(finetuned)
    if sharding is None or not len(sharding.spec) or sharding.spec[0] is None:
        return pretrained, finetuned
    moved, *rest = _axis_names(sharding.spec, finetuned.ndim)
    mesh = sharding.mesh
    num_shards = math.prod(mesh.shape[name] for name in moved)
    for axis in sorted(range(pretrained.ndim), key=lambda axis: -pretrained.shape[axis]):
        shards = num_shards * math.prod(mesh.shape[name] for name in rest[axis])
        if pretrained.shape[axis] % shards == 0:
            rest[axis] = (*rest[axis], *moved)
            break
    spec = P(*(names or None for names in rest))
    return _move(pretrained, mesh, spec), _move(finetuned, mesh, P(None, *spec))


def place_like(array: Any, like: Any) -> Any:
    """Return `array`, sharded as `like` if both shardings are known."""
    sharding, target = _known_sharding(array), _known_sharding(like)
    if isinstance(array, jax.core.Tracer):
        if target is None or sharding == target:
            return array
        return jax.sharding.reshard(array, target.spec)
    concrete = getattr(like, "sharding", None)
    if concrete is None or array.sharding.is_equivalent_to(concrete, array.ndim):
        return array
    return jax.device_put(array, concrete) if like.committed else array


def replicate(array: Any) -> Any:
    """Return a traced array whose Explicit mesh axes are not sharded."""
    sharding = _known_sharding(array)
    if sharding is None or not any(_axis_names(sharding.spec, array.ndim)):
        return array
    return jax.sharding.reshard(array, P())


def put_near(arrays: dict[Any, np.ndarray], likes: dict[Any, Any]) -> dict[Any, Any]:
    """Copy small arrays to the devices of the arrays `likes`, replicated over them."""
    by_sharding: dict[Any, list] = {}
    for key, like in likes.items():
        sharding = like.sharding if getattr(like, "committed", False) else None
        if isinstance(sharding, NamedSharding):
            sharding = NamedSharding(sharding.mesh, P())
        elif sharding is not None and len(sharding.device_set) > 1:
            sharding = None
        by_sharding.setdefault(sharding, []).append(key)
    placed = {}
    for sharding, keys in by_sharding.items():
        placed |= zip(keys, jax.device_put([arrays[key] for key in keys], sharding), strict=True)
    return placed


def varying_type(array: Any) -> Hashable:
    """Return the manual mesh axes that a traced array varies over, under `jax.shard_map`.

    Arrays of different types cannot be joined: the result would vary over the axes of both.
    """
    aval = jax.typeof(array)
    return getattr(aval, "manual_axis_type", None) or getattr(aval, "vma", None)


def _known_sharding(array: Any) -> NamedSharding | None:
    """Return the sharding of a concrete array, or of a traced one over Explicit mesh axes."""
    sharding = jax.typeof(array).sharding if isinstance(array, jax.core.Tracer) else None
    if sharding is None:
        sharding = getattr(array, "sharding", None)
        return sharding if isinstance(sharding, NamedSharding) else None
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def _move(array: Any, mesh: Any, spec: P) -> Any:
    if isinstance(array, jax.core.Tracer):
        return jax.sharding.reshard(array, spec)
    return jax.device_put(array, NamedSharding(mesh, spec))


def _axis_names(spec: Iterable, ndim: int) -> list[tuple[str, ...]]:
    """Return the mesh axes of each array axis."""
    names = [() if entry is None else entry for entry in spec]
    names = [(entry,) if isinstance(entry, str) else tuple(entry) for entry in names]
    return names + [()] * (ndim - len(names))
