"""Coordination of the processes of one run: barriers, broadcasts and gathering of arrays.

With a single process, every function returns at once: no collective runs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from modelstock_jax.merging.trees import PyTree

Value = TypeVar("Value", bool, int)
Result = TypeVar("Result")


def is_main() -> bool:
    """Return whether this is process 0, which writes files and prints."""
    return jax.process_index() == 0


def broadcast_from_main(value: Value) -> Value:
    """Return process 0's value on every process; all processes must call it in the same order.

    Args:
      value: a bool or an int of 31 bits; only process 0's is used
    """
    if jax.process_count() == 1:
        return value
    return type(value)(multihost_utils.broadcast_one_to_all(np.int32(value)))


def barrier(name: str) -> None:
    """Wait for all processes; files that process 0 wrote before are then visible to all."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def warm_up_collectives(mesh: Mesh) -> None:
    """Run one collective along each mesh axis, while no process compiles.

    Gloo (collectives between CPUs) connects the processes of a program when its first collective
    runs, and times out 30 s later if one of them is still compiling. Once they are connected, there
    is no such timeout.
    """
    if jax.process_count() == 1 or jax.default_backend() != "cpu":
        return
    for axis, length in mesh.shape.items():
        barrier(f"warm up collectives along {axis}")
        split, replicated = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((axis,), ()))
        flags = jax.make_array_from_callback((length,), split, np.ones(length).__getitem__)
        jax.block_until_ready(jax.jit(jnp.sum, out_shardings=replicated)(flags))


def main_process_first(make: Callable[[], Result]) -> Result:
    """Call `make()` on process 0, then on the other processes, which read the files it wrote.

    The files must be on a file system that all processes share.
    """
    if is_main():
        result = make()
        barrier("made by process 0")
        return result
    barrier("made by process 0")
    return make()


def sum_over_processes(sums: np.ndarray) -> np.ndarray:
    """Return the sum over processes, modulo the range of the dtype, on all processes."""
    if jax.process_count() == 1:
        return sums
    return multihost_utils.process_allgather(sums).sum(axis=0, dtype=sums.dtype)


def block_on_multihost_cpu(tree: PyTree) -> PyTree:
    """Block until `tree` is computed if this is a multi-process CPU run; return `tree`.

    There, two programs in flight would receive each other's messages. Devices with streams run
    programs in order.
    """
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        jax.block_until_ready(tree)
    return tree


def any_process(flag: bool) -> jax.Array:
    """Return whether `flag` is set on any process: bool [], dispatched asynchronously."""
    flags = np.full(jax.local_device_count(), flag)
    split, reduce_any = _any_over_devices()
    return block_on_multihost_cpu(reduce_any(jax.make_array_from_process_local_data(split, flags)))


def to_host(tree: PyTree) -> PyTree:
    """Return every leaf as a NumPy array on every process, whatever its sharding.

    All processes must call it with the same tree, because they exchange shards. Leaves are gathered
    one at a time: a device stores at most one full leaf.
    """
    return jax.tree.map(_leaf_to_host, tree)


def _leaf_to_host(leaf: Any) -> np.ndarray:
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return np.asarray(jax.device_get(leaf))  # An explicit transfer, for `jax.transfer_guard`.
    if not leaf.is_fully_replicated:
        if not isinstance(leaf.sharding, NamedSharding):
            raise TypeError(f"a multi-process array needs a NamedSharding, not {leaf.sharding}")
        leaf = _all_gather(leaf.sharding.mesh)(leaf)
    return np.asarray(leaf.addressable_data(0))


@cache
def _all_gather(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))


@cache
def _any_over_devices() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
    mesh = Mesh(np.array(jax.devices()), "device")
    split = NamedSharding(mesh, PartitionSpec("device"))
    return split, jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))
