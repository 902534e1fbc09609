"""Where arrays are: on which devices, sharded over which mesh axes, varying over which.

A merge needs all replicas of an element on one device. On a mesh with Explicit axes, and for arrays
outside of jit, shardings are known, and the functions here move the replicas together. With Auto
axes under jit, XLA's partitioner decides.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
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


def colocate_replicas(pretrained: Any, finetuned: Any) -> tuple[Any, Any]:
    """Move the replicas of each element, and the anchor's element, to one device.

    The mesh axes of the replica axis move to the longest axis of the tensor that they divide, in an
    all-to-all: no device holds a complete tensor that did not before. A tensor without such an axis
    is replicated over them. The anchor is sharded as the replicas are.

    Args:
      pretrained: w0, [...]; None if there is no anchor
      finetuned: [N, ...]

    Returns:
      both, equal in value
    """
    sharding, of_anchor = _known_sharding(finetuned), _known_sharding(pretrained)
    if sharding is None:
        return pretrained, finetuned
    mesh, shape = sharding.mesh, finetuned.shape[1:]
    moved, *axes = _axis_names(sharding.spec, finetuned.ndim)
    if of_anchor is not None and of_anchor.mesh == mesh:
        used = {name for names in (moved, *axes) for name in names}
        for k, names in enumerate(_axis_names(of_anchor.spec, len(shape))):
            axes[k] = axes[k] or (() if used & set(names) else names)
    if moved:
        num_shards = math.prod(mesh.shape[name] for name in moved)
        for k in sorted(range(len(shape)), key=lambda k: -shape[k]):
            if shape[k] % (num_shards * math.prod(mesh.shape[name] for name in axes[k])) == 0:
                axes[k] = (*axes[k], *moved)
                break
    elif AxisType.Explicit not in mesh.axis_types:
        return pretrained, finetuned
    spec = P(*(names or None for names in axes))
    if pretrained is not None:
        pretrained = _move(pretrained, mesh, spec)
    return pretrained, _move(finetuned, mesh, P(None, *spec))


def place_like(array: Any, like: Any) -> Any:
    """Return `array`, sharded as `like` if the sharding of `like` is known."""
    if isinstance(array, jax.core.Tracer) or isinstance(like, jax.core.Tracer):
        target = _known_sharding(like)
        return array if target is None else _move(array, target.mesh, target.spec)
    if array.sharding.is_equivalent_to(like.sharding, array.ndim) or not like.committed:
        return array
    return settled(jax.device_put(array, like.sharding))


def replicate(array: Any) -> Any:
    """Return an array whose Explicit mesh axes are not sharded."""
    sharding = _known_sharding(array)
    if sharding is None or AxisType.Explicit not in sharding.mesh.axis_types:
        return array
    return _move(array, sharding.mesh, P())


def broadcast_like(values: Any, axes: Sequence[int], like: Any) -> Any:
    """Broadcast to the shape and the sharding of `like`; `axes` are the axes of `values` in it."""
    sharding = _known_sharding(like) if isinstance(like, jax.core.Tracer) else None
    return jax.lax.broadcast_in_dim(values, like.shape, axes, out_sharding=sharding)


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


def settled(array: Any) -> Any:
    """Wait for a concrete array that several CPU devices compute; return it.

    XLA's CPU devices share a few threads. Programs with collectives that run at the same time can
    take them from each other, and then all of them wait forever.
    """
    devices = () if isinstance(array, jax.core.Tracer) else array.sharding.device_set
    if len(devices) > 1 and next(iter(devices)).platform == "cpu":
        array.block_until_ready()
    return array


def varying_type(array: Any) -> Hashable:
    """Return the manual mesh axes that a traced array varies over, under `jax.shard_map`.

    Arrays of different types cannot be joined: the result would vary over the axes of both.
    """
    aval = jax.typeof(array)
    return getattr(aval, "manual_axis_type", None) or getattr(aval, "vma", None)


def _known_sharding(array: Any) -> NamedSharding | None:
    """Return the sharding of a concrete array, or of a traced one over Explicit mesh axes."""
    if not isinstance(array, jax.core.Tracer):
        sharding = getattr(array, "sharding", None)
        return sharding if isinstance(sharding, NamedSharding) else None
    sharding = jax.typeof(array).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def _move(array: Any, mesh: Any, spec: P) -> Any:
    current = _known_sharding(array)
    if current is not None and current.mesh == mesh:
        if _axis_names(current.spec, array.ndim) == _axis_names(spec, array.ndim):
            return array
    target = NamedSharding(mesh, spec)
    if isinstance(array, jax.core.Tracer):
        return jax.sharding.reshard(array, target)
    return settled(jax.device_put(array, target))


def _axis_names(spec: Iterable, ndim: int) -> list[tuple[str, ...]]:
    """Return the mesh axes of each array axis."""
    names = [() if entry is None else entry for entry in spec]
    names = [(entry,) if isinstance(entry, str) else tuple(entry) for entry in names]
    return names + [()] * (ndim - len(names))
