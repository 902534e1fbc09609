"""Small arrays laid end to end in a few: what a checkpoint costs goes by their number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from modelstock_jax.training.persistence.digests import named_leaves
from modelstock_jax.training.sharding import AXES

PyTree = Any
_REPLICA = AXES[0]
# 1 MiB: a kernel of a CLIP is larger, its biases and norms, two thirds of its arrays, are not.
LEAST = 2**20


class Pack(NamedTuple):
    """Which leaves lie in one array, and how.

    Attributes:
      names: of the leaves, in order.
      rows: R where the leaves [R, ...] lie as [R, n] in it, 0 where they lie as [n].
    """

    names: list[str]
    rows: int


def plan(tree: PyTree) -> dict[str, Pack]:
    """Which leaves of a tree of arrays are packed: small ones, whole or with a replica axis.

    Those of one dtype that lie alike share a pack: a device packs what it holds, and nothing is
    sent. The replica axis stays one of the pack's, so that it may be restored on any mesh.

    >>> plan({"w": jnp.zeros((2, 3)), "b": jnp.zeros(3), "step": jnp.int32(0)})
    {'packed_0': Pack(names=['b', 'w'], rows=0), 'packed_1': Pack(names=['step'], rows=0)}
    """
    alike: dict[Any, Pack] = {}
    for name, x in named_leaves(tree).items():
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) or x.nbytes >= LEAST:
            continue
        rows = x.shape[0] if _axes(x.sharding)[:1] == (_REPLICA,) else 0
        if any(_axes(x.sharding)[bool(rows) :]) or not (rows or x.sharding.is_fully_replicated):
            continue
        key = x.dtype, rows, tuple(sorted(device.id for device in x.sharding.device_set))
        alike.setdefault(key, Pack([], rows)).names.append(name)
    return {f"packed_{number}": one for number, one in enumerate(alike.values())}


def pack(tree: PyTree, packs: Mapping[str, Pack]) -> dict[str, jax.Array]:
    """The arrays to be saved: each pack, and the leaves that are in none, by name.

    Args:
      tree: arrays on their devices; small ones are copied to the host and back.
      packs: what `plan` said of them.

    Returns:
      {name: array}; a leaf's "/" has become ".", as a file system would take it for a folder.
    """
    leaves = named_leaves(tree)
    arrays = {_file_name(name): leaves[name] for name in _alone(leaves, packs)}
    for key, one in packs.items():
        arrays[key] = _joined([leaves[name] for name in one.names], one.rows)
    return arrays


def abstract(like: PyTree, packs: Mapping[str, Pack] | None) -> PyTree:
    """Shapes, dtypes and shardings of what `pack` gave, to restore it by.

    Args:
      like: those of the tree that is wanted; on any mesh.
      packs: as they were saved; None where the tree was saved as it is.
    """
    if packs is None:
        return like
    leaves = named_leaves(like)
    arrays = {_file_name(name): leaves[name] for name in _alone(leaves, packs)}
    for key, one in packs.items():
        inside = [leaves[name] for name in one.names]
        size = sum(math.prod(x.shape) for x in inside)
        shape = (one.rows, size // one.rows) if one.rows else (size,)
        sharding = _whole_but_rows(inside, one.rows)
        arrays[key] = jax.ShapeDtypeStruct(shape, inside[0].dtype, sharding=sharding)
    return arrays


def unpack(
    arrays: Mapping[str, jax.Array], like: PyTree, packs: Mapping[str, Pack] | None
) -> PyTree:
    """The tree, placed as `like` says; undoes `pack`."""
    if packs is None:
        return arrays
    leaves = named_leaves(like)
    found = {name: arrays[_file_name(name)] for name in _alone(leaves, packs)}
    for key, one in packs.items():
        host, start = _on_host(arrays[key]), 0
        for name in one.names:
            leaf = leaves[name]
            stop = start + math.prod(leaf.shape) // max(one.rows, 1)
            part = host[..., start:stop].reshape(leaf.shape)
            found[name] = jax.make_array_from_callback(
                leaf.shape, leaf.sharding, lambda index, part=part: part[index]
            )
            start = stop
    return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in leaves])


def _alone(leaves: Mapping[str, Any], packs: Mapping[str, Pack]) -> list[str]:
    packed = {name for one in packs.values() for name in one.names}
    return [name for name in leaves if name not in packed]


def _file_name(name: str) -> str:
    return name.replace("/", ".")


def _axes(sharding: Sharding) -> tuple[Any, ...]:
    """The mesh axes that each axis of an array is split over, be they of one device."""
    return tuple(sharding.spec) if isinstance(sharding, NamedSharding) else ()


def _whole_but_rows(leaves: Sequence[Any], rows: int) -> Sharding:
    """Where a pack of these leaves lies: by replicas where all of them do, else whole."""
    first = leaves[0].sharding
    if not isinstance(first, NamedSharding):
        return first
    split = rows and all(_axes(x.sharding)[:1] == (_REPLICA,) for x in leaves)
    return NamedSharding(first.mesh, PartitionSpec(_REPLICA) if split else PartitionSpec())


def _joined(leaves: Sequence[jax.Array], rows: int) -> jax.Array:
    for x in leaves:
        x.copy_to_host_async()
    parts: dict[jax.Device, list[np.ndarray]] = {}
    for x in leaves:
        for shard in x.addressable_shards:
            data = np.asarray(shard.data)
            parts.setdefault(shard.device, []).append(
                data.reshape(data.shape[0], -1) if rows else data.reshape(-1)
            )
    size = sum(x.size for x in leaves)
    return jax.make_array_from_single_device_arrays(
        (rows, size // rows) if rows else (size,),
        _whole_but_rows(leaves, rows),
        [jax.device_put(np.concatenate(part, axis=-1), device) for device, part in parts.items()],
    )


def _on_host(x: jax.Array) -> np.ndarray:
    """What this process holds of an array; zeros, which nothing reads, in the place of the rest."""
    host = np.zeros(x.shape, x.dtype)
    for shard in x.addressable_shards:
        host[shard.index] = np.asarray(shard.data)
    return host
