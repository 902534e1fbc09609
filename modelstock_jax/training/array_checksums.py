"""A tree of arrays as a checkpoint holds it: a digest of each, small ones packed in a few.

A digest is made where the array lies: one changed bit shows, one moved element shows.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from modelstock_jax.merging import gram
from modelstock_jax.merging.gram import PyTree
from modelstock_jax.training import multihost
from modelstock_jax.training.sharding import AXES

_STRIDE = np.uint32(0x9E3779B9)  # Odd, so that no two of 2^32 places share a multiple of it.
_KEY = np.uint32(0x6A09E667)


def tree_checksum(tree: PyTree) -> dict[str, str]:
    """A digest of each leaf's bits and their places, whatever devices they lie on.

    With x_i the i-th 32-bit word of a leaf in row-major order, c odd, and m one-to-one on words,

        h_i = m(x_i + c i),    digest = (sum of h_i, sum of m(h_i + key))  modulo 2^32.

    Integer sums depend on no order, so the same values give the same digest under every sharding,
    mesh and number of hosts. One changed word changes one term of each sum, and hence both: that is
    certain. Changes of several words, such as two elements that changed places, go unseen once in
    2^64. It guards against damage, not against an adversary.

    Args:
      tree: jax arrays of any shapes, shardings and dtypes of 1, 2, 4 or 8 bytes (booleans too),
        or random keys. A leaf of fewer bits than 32 has one element a word; of 64, two words.

    Returns:
      A leaf's path ("params/head/bias") -> 16 hexadecimal digits. Empty leaves have digest 0.

    Example:
      >>> w = jnp.arange(3.0)
      >>> tree_checksum({"w": w}) == tree_checksum({"w": w + 0.0})
      True
      >>> tree_checksum({"w": w}) == tree_checksum({"w": w[::-1]})
      False
    """
    leaves = named_leaves(tree)
    # A program for each shape, not one for the tree: of 462 leaves that one takes 14 s to compile.
    parts = jax.device_get([_of_shards(x) for x in leaves.values()])
    sums = np.array([np.sum(part, axis=0, dtype=np.uint32) for part in parts], np.uint32)
    sums = multihost.sum_over_processes(sums.reshape(len(leaves), 2))
    return {name: f"{a:08x}{b:08x}" for name, (a, b) in zip(leaves, sums.tolist(), strict=True)}


def describe_leaves(tree: PyTree) -> dict[str, list]:
    """{leaf name: [dtype, shape, digest]}, as a checkpoint records its arrays."""
    digests = tree_checksum(tree)
    return {n: [x.dtype.name, list(x.shape), digests[n]] for n, x in named_leaves(tree).items()}


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """{path: leaf}, a path's keys joined by "/", as checkpoints name their arrays."""
    return gram.named_leaves(tree, separator="/")


def json_checksum(value: Any) -> str:
    """SHA-256 of a value as JSON, in whatever order its keys are."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _of_shards(x: jax.Array) -> list[jax.Array | np.ndarray]:
    """Sums of this process's parts of a leaf, each computed where it lies: nothing is sent.

    Of a part that lies on several devices one copy counts, on whatever process it is.
    """
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    strides = np.cumprod([1, *x.shape[:0:-1]], dtype=np.uint64)[::-1] if x.ndim else []
    found: list[jax.Array | np.ndarray] = [np.zeros(2, np.uint32)]
    for shard in x.addressable_shards:
        if shard.replica_id == 0:
            starts = (part.start or 0 for part in shard.index)
            first = sum(a * int(b) for a, b in zip(starts, strides, strict=True))
            found.append(_sums(shard.data, np.uint32(first % 2**32), np.array(strides, np.uint32)))
    return found


@jax.jit
def _sums(x: jax.Array, first: jax.Array, strides: jax.Array) -> jax.Array:
    """Both sums of a part of a leaf: uint32 [2].

    Args:
      x: the part.
      first: the place of its first element in the leaf, modulo 2^32.
      strides: of the leaf, in elements.
    """
    words = _words(x)
    place = jnp.full(x.shape, first)
    for axis in range(x.ndim):
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * strides[axis]
    if words.ndim > x.ndim:
        place = 2 * place[..., None] + jnp.arange(2, dtype=jnp.uint32).reshape(*[1] * x.ndim, 2)
    mixed = _mixed(words + place * _STRIDE)
    return jnp.stack([mixed.sum(dtype=jnp.uint32), _mixed(mixed + _KEY).sum(dtype=jnp.uint32)])


def _words(x: jax.Array) -> jax.Array:
    """The bits of each element as uint32, with one more axis of two where it has 64."""
    if x.dtype == bool:
        return x.astype(jnp.uint32)
    size = np.dtype(x.dtype).itemsize
    if size == 8:
        return jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, f"uint{8 * size}").astype(jnp.uint32)


def _mixed(x: jax.Array) -> jax.Array:
    """MurmurHash3's finalizer: one-to-one on uint32, each bit of it hangs on all of x."""
    x ^= x >> 16
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> 13
    x *= np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


# Small arrays laid end to end in a few: what a checkpoint costs goes by their number.


_REPLICA = AXES[0]
# 1 MiB: a kernel of a CLIP is larger, its biases and norms, two thirds of its arrays, are not.
MAX_PACKED_BYTES = 2**20


class Pack(NamedTuple):
    """Which leaves lie in one array, and how.

    Attributes:
      names: of the leaves, in order.
      rows: R where the leaves [R, ...] lie as [R, n] in it, 0 where they lie as [n].
    """

    names: list[str]
    rows: int


def plan_packs(tree: PyTree) -> dict[str, Pack]:
    """Which leaves of a tree of arrays are packed: small ones, whole or with a replica axis.

    Those of one dtype that lie alike share a pack: a device packs what it holds, and nothing is
    sent. The replica axis stays one of the pack's, so that it may be restored on any mesh.

    >>> plan_packs({"w": jnp.zeros((2, 3)), "b": jnp.zeros(3), "step": jnp.int32(0)})
    {'packed_0': Pack(names=['b', 'w'], rows=0), 'packed_1': Pack(names=['step'], rows=0)}
    """
    alike: dict[Any, Pack] = {}
    for name, x in named_leaves(tree).items():
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) or x.nbytes >= MAX_PACKED_BYTES:
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
      packs: what `plan_packs` said of them.

    Returns:
      {name: array}; a leaf's "/" has become ".", as a file system would take it for a folder.
    """
    leaves = named_leaves(tree)
    arrays = {_file_name(name): leaves[name] for name in _alone(leaves, packs)}
    for key, one in packs.items():
        arrays[key] = _joined([leaves[name] for name in one.names], one.rows)
    return arrays


def abstract_packed(like: PyTree, packs: Mapping[str, Pack] | None) -> PyTree:
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
