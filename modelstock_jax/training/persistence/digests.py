"""Digests of a tree of arrays on its devices: one changed bit shows, one moved element shows."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from modelstock_jax.training.hosts import distributed

PyTree = Any
_STRIDE = np.uint32(0x9E3779B9)  # Odd, so that no two of 2^32 places share a multiple of it.
_KEY = np.uint32(0x6A09E667)


def tree_digest(tree: PyTree) -> dict[str, str]:
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
      >>> tree_digest({"w": w}) == tree_digest({"w": w + 0.0})
      True
      >>> tree_digest({"w": w}) == tree_digest({"w": w[::-1]})
      False
    """
    leaves = named_leaves(tree)
    # A program for each shape, not one for the tree: of 462 leaves that one takes 14 s to compile.
    parts = jax.device_get([_of_shards(x) for x in leaves.values()])
    sums = np.array([np.sum(part, axis=0, dtype=np.uint32) for part in parts], np.uint32)
    sums = distributed.total(sums.reshape(len(leaves), 2))
    return {name: f"{a:08x}{b:08x}" for name, (a, b) in zip(leaves, sums.tolist(), strict=True)}


def describe(tree: PyTree) -> dict[str, list]:
    """{leaf name: [dtype, shape, digest]}, as a checkpoint records its arrays."""
    digests = tree_digest(tree)
    return {n: [x.dtype.name, list(x.shape), digests[n]] for n, x in named_leaves(tree).items()}


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """{path: leaf}, a path's keys joined by "/"."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): x
        for path, x in jax.tree.leaves_with_path(tree)
    }


def json_digest(value: Any) -> str:
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
