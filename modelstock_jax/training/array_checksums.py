"""Checksums of a pytree of arrays, and packing of its small arrays for a checkpoint.

Checksums are computed on the devices that store the arrays. They change if a single bit changes or
elements change their order.
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

from modelstock_jax.merging import trees
from modelstock_jax.merging.trees import PyTree
from modelstock_jax.training import multihost
from modelstock_jax.training.sharding import AXES

_STRIDE = np.uint32(0x9E3779B9)  # Odd, so that the multiples of 2^32 indices are all different.
_KEY = np.uint32(0x6A09E667)


def tree_checksum(tree: PyTree) -> dict[str, str]:
    """Return a checksum of each leaf's bits and their order, for any sharding.

    With x_i the i-th 32-bit word of a leaf in row-major order, c odd, and m a bijection on words,

        h_i = m(x_i + c i),    checksum = (sum of h_i, sum of m(h_i + key))  modulo 2^32.

    Integer sums do not depend on their order, so equal values have equal checksums under every
    sharding, mesh and number of hosts. A change of one word changes one term of each sum, and
    therefore always changes both. A change of several words, such as two swapped elements, is
    missed once in 2^64. The checksum detects corruption, not manipulation.

    Args:
      tree: jax arrays of any shape and sharding, with dtypes of 1, 2, 4 or 8 bytes (including
        bool), or PRNG keys. Elements with fewer than 32 bits use one word each, elements with 64
        bits two words.

    Returns:
      leaf path ("params/head/bias") -> 16 hexadecimal digits; empty leaves have checksum 0

    Example:
      >>> w = jnp.arange(3.0)
      >>> tree_checksum({"w": w}) == tree_checksum({"w": w + 0.0})
      True
      >>> tree_checksum({"w": w}) == tree_checksum({"w": w[::-1]})
      False
    """
    leaves = named_leaves(tree)
    # Jit per shape: one program for all 462 leaves takes 14 s to compile.
    shard_sums = jax.device_get([_shard_sums(x) for x in leaves.values()])
    sums = np.array([np.sum(s, axis=0, dtype=np.uint32) for s in shard_sums], np.uint32)
    sums = multihost.sum_over_processes(sums.reshape(len(leaves), 2))
    return {name: f"{a:08x}{b:08x}" for name, (a, b) in zip(leaves, sums.tolist(), strict=True)}


def describe_leaves(tree: PyTree) -> dict[str, list]:
    """Return {leaf name: [dtype, shape, checksum]}, as a checkpoint stores it."""
    checksums = tree_checksum(tree)
    return {n: [x.dtype.name, list(x.shape), checksums[n]] for n, x in named_leaves(tree).items()}


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Return {path: leaf}; path keys are joined by "/", as in checkpoints."""
    return trees.named_leaves(tree, separator="/")


def json_checksum(value: Any) -> str:
    """Return the SHA-256 of a value as JSON, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _shard_sums(x: jax.Array) -> list[jax.Array | np.ndarray]:
    """Return the sums of this process's shards of a leaf, computed without communication.

    Of a replicated shard, only one copy counts, over all processes.
    """
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    strides = np.cumprod([1, *x.shape[:0:-1]], dtype=np.uint64)[::-1] if x.ndim else []
    sums: list[jax.Array | np.ndarray] = [np.zeros(2, np.uint32)]
    for shard in x.addressable_shards:
        if shard.replica_id == 0:
            starts = (index.start or 0 for index in shard.index)
            offset = sum(a * int(b) for a, b in zip(starts, strides, strict=True))
            sums.append(_sums(shard.data, np.uint32(offset % 2**32), np.array(strides, np.uint32)))
    return sums


@jax.jit
def _sums(x: jax.Array, offset: jax.Array, strides: jax.Array) -> jax.Array:
    """Return both sums of a shard: uint32 [2].

    Args:
      x: the shard
      offset: index of its first element in the flattened leaf, modulo 2^32
      strides: strides of the leaf, in elements
    """
    words = _words(x)
    index = jnp.full(x.shape, offset)
    for axis in range(x.ndim):
        index += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * strides[axis]
    if words.ndim > x.ndim:
        index = 2 * index[..., None] + jnp.arange(2, dtype=jnp.uint32).reshape(*[1] * x.ndim, 2)
    hashes = _mix(words + index * _STRIDE)
    return jnp.stack([hashes.sum(dtype=jnp.uint32), _mix(hashes + _KEY).sum(dtype=jnp.uint32)])


def _words(x: jax.Array) -> jax.Array:
    """Return the bits of each element as uint32; 64-bit elements add an axis of size 2."""
    if x.dtype == bool:
        return x.astype(jnp.uint32)
    size = np.dtype(x.dtype).itemsize
    if size == 8:
        return jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, f"uint{8 * size}").astype(jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """Apply MurmurHash3's finalizer: a bijection on uint32 whose output bits depend on all of x."""
    x ^= x >> 16
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> 13
    x *= np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


# Packing: the time to write a checkpoint grows with the number of arrays.

_REPLICA = AXES[0]
# 1 MiB: smaller than the kernels of a CLIP model, larger than its biases and norms, which are two
# thirds of its arrays.
MAX_PACKED_BYTES = 2**20


class Pack(NamedTuple):
    """Leaves that are saved as one array.

    Attributes:
      names: names of the leaves, in order
      rows: R if the leaves [R, ...] are saved as one array [R, n]; 0 if as [n]
    """

    names: list[str]
    rows: int


def plan_packs(tree: PyTree) -> dict[str, Pack]:
    """Choose the leaves to pack: small arrays, replicated or sharded over the replica axis only.

    Leaves of one pack have the same dtype, devices and sharding: each device packs its own shards,
    without communication. The replica axis remains an axis of the pack, so that the pack can be
    restored on any mesh.

    Example:
      >>> plan_packs({"w": jnp.zeros((2, 3)), "b": jnp.zeros(3), "step": jnp.int32(0)})
      {'packed_0': Pack(names=['b', 'w'], rows=0), 'packed_1': Pack(names=['step'], rows=0)}
    """
    packs: dict[Any, Pack] = {}
    for name, x in named_leaves(tree).items():
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) or x.nbytes >= MAX_PACKED_BYTES:
            continue
        rows = x.shape[0] if _axes(x.sharding)[:1] == (_REPLICA,) else 0
        if any(_axes(x.sharding)[bool(rows) :]) or not (rows or x.sharding.is_fully_replicated):
            continue
        key = x.dtype, rows, tuple(sorted(device.id for device in x.sharding.device_set))
        packs.setdefault(key, Pack([], rows)).names.append(name)
    return {f"packed_{number}": group for number, group in enumerate(packs.values())}


def pack(tree: PyTree, packs: Mapping[str, Pack]) -> dict[str, jax.Array]:
    """Return the arrays to save: every pack, and the leaves that are in no pack.

    Args:
      tree: arrays on their devices; packed ones are copied to the host and back
      packs: see `plan_packs`

    Returns:
      {name: array}; "/" in leaf names is replaced by ".", because a file system would create a
      directory
    """
    leaves = named_leaves(tree)
    arrays = {_file_name(name): leaves[name] for name in _unpacked(leaves, packs)}
    for key, group in packs.items():
        arrays[key] = _concatenate([leaves[name] for name in group.names], group.rows)
    return arrays


def abstract_packed(abstract_tree: PyTree, packs: Mapping[str, Pack] | None) -> PyTree:
    """Return shapes, dtypes and shardings of the arrays of `pack`, to restore them.

    Args:
      abstract_tree: shapes, dtypes and shardings of the tree to restore, on any mesh
      packs: as saved; None if the tree was saved without packing
    """
    if packs is None:
        return abstract_tree
    leaves = named_leaves(abstract_tree)
    arrays = {_file_name(name): leaves[name] for name in _unpacked(leaves, packs)}
    for key, group in packs.items():
        members = [leaves[name] for name in group.names]
        size = sum(math.prod(x.shape) for x in members)
        shape = (group.rows, size // group.rows) if group.rows else (size,)
        sharding = _pack_sharding(members, group.rows)
        arrays[key] = jax.ShapeDtypeStruct(shape, members[0].dtype, sharding=sharding)
    return arrays


def unpack(
    arrays: Mapping[str, jax.Array], abstract_tree: PyTree, packs: Mapping[str, Pack] | None
) -> PyTree:
    """Return the tree with the shardings of `abstract_tree`; the inverse of `pack`."""
    if packs is None:
        return arrays
    leaves = named_leaves(abstract_tree)
    restored = {name: arrays[_file_name(name)] for name in _unpacked(leaves, packs)}
    for key, group in packs.items():
        host, start = _local_to_host(arrays[key]), 0
        for name in group.names:
            leaf = leaves[name]
            stop = start + math.prod(leaf.shape) // max(group.rows, 1)
            values = host[..., start:stop].reshape(leaf.shape)
            restored[name] = jax.make_array_from_callback(
                leaf.shape, leaf.sharding, lambda index, values=values: values[index]
            )
            start = stop
    return jax.tree.unflatten(jax.tree.structure(abstract_tree), [restored[n] for n in leaves])


def _unpacked(leaves: Mapping[str, Any], packs: Mapping[str, Pack]) -> list[str]:
    """Return the names of the leaves that are in no pack."""
    packed = {name for group in packs.values() for name in group.names}
    return [name for name in leaves if name not in packed]


def _file_name(name: str) -> str:
    return name.replace("/", ".")


def _axes(sharding: Sharding) -> tuple[Any, ...]:
    """Return the mesh axes that each array axis is split over, including axes of size 1."""
    return tuple(sharding.spec) if isinstance(sharding, NamedSharding) else ()


def _pack_sharding(leaves: Sequence[Any], rows: int) -> Sharding:
    """Return a pack's sharding: over the replica axis if all leaves are, else replicated."""
    first = leaves[0].sharding
    if not isinstance(first, NamedSharding):
        return first
    split = rows and all(_axes(x.sharding)[:1] == (_REPLICA,) for x in leaves)
    return NamedSharding(first.mesh, PartitionSpec(_REPLICA) if split else PartitionSpec())


def _concatenate(leaves: Sequence[jax.Array], rows: int) -> jax.Array:
    for x in leaves:
        x.copy_to_host_async()
    shards: dict[jax.Device, list[np.ndarray]] = {}
    for x in leaves:
        for shard in x.addressable_shards:
            data = np.asarray(shard.data)
            shards.setdefault(shard.device, []).append(
                data.reshape(data.shape[0], -1) if rows else data.reshape(-1)
            )
    size = sum(x.size for x in leaves)
    return jax.make_array_from_single_device_arrays(
        (rows, size // rows) if rows else (size,),
        _pack_sharding(leaves, rows),
        [jax.device_put(np.concatenate(data, axis=-1), device) for device, data in shards.items()],
    )


def _local_to_host(x: jax.Array) -> np.ndarray:
    """Return this process's part of an array; the rest is zeros, which nothing reads."""
    host = np.zeros(x.shape, x.dtype)
    for shard in x.addressable_shards:
        host[shard.index] = np.asarray(shard.data)
    return host
