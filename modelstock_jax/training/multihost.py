"""Many processes as one run: who writes, what all agree on, and how an array is made whole.

Every function is free where there is one process: nothing is started and nothing is sent.
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

from modelstock_jax.merging.gram import PyTree

Value = TypeVar("Value", bool, int)
Made = TypeVar("Made")


def is_main() -> bool:
    """Whether this is process 0, the one that writes files and text."""
    return jax.process_index() == 0


def broadcast_from_main(value: Value) -> Value:
    """Process 0's value, on every process; all must call it in the same order.

    Args:
      value: a bool or an int of 31 bits; that of the other processes is not looked at.
    """
    if jax.process_count() == 1:
        return value
    return type(value)(multihost_utils.broadcast_one_to_all(np.int32(value)))


def barrier(name: str) -> None:
    """Waits until every process is here; what process 0 wrote before is then on disk for all."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def warm_up_collectives(mesh: Mesh) -> None:
    """Joins the processes along each axis of the mesh, while none of them compiles.

    Gloo, between CPUs, joins those that share a program when its first collective runs, and waits
    30 s for the last of them to have compiled it; what is joined once waits as long as it takes.
    """
    if jax.process_count() == 1 or jax.default_backend() != "cpu":
        return
    for axis, length in mesh.shape.items():
        barrier(f"to be joined along {axis}")
        split, whole = (NamedSharding(mesh, PartitionSpec(*along)) for along in ((axis,), ()))
        flags = jax.make_array_from_callback((length,), split, np.ones(length).__getitem__)
        jax.block_until_ready(jax.jit(jnp.sum, out_shardings=whole)(flags))


def main_process_first(make: Callable[[], Made]) -> Made:
    """`make()` on process 0, and then on all others: they find the files that it left.

    What it writes must be on a disk that all share.
    """
    if is_main():
        made = make()
        barrier("made by process 0")
        return made
    barrier("made by process 0")
    return make()


def sum_over_processes(sums: np.ndarray) -> np.ndarray:
    """The sum over processes, modulo the dtype's range; the same array on all of them."""
    if jax.process_count() == 1:
        return sums
    return multihost_utils.process_allgather(sums).sum(axis=0, dtype=sums.dtype)


def block_on_multihost_cpu(tree: PyTree) -> PyTree:
    """`tree`, computed, where two programs under way would take each other's messages.

    That is on the CPUs of several processes: a device with streams keeps to the order by itself.
    """
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        jax.block_until_ready(tree)
    return tree


def any_process(flag: bool) -> jax.Array:
    """Whether `flag` is set on any process: bool [], sent at once; reading it waits for it."""
    flags = np.full(jax.local_device_count(), flag)
    split, anyone = _any_flag()
    return block_on_multihost_cpu(anyone(jax.make_array_from_process_local_data(split, flags)))


def to_host(tree: PyTree) -> PyTree:
    """Every leaf as a NumPy array on every process, however it is sharded and over whatever hosts.

    All processes must ask for the same, since they send each other their parts. Leaves are
    gathered one by one: a device holds no more than one of them whole.
    """
    return jax.tree.map(_whole, tree)


def _whole(leaf: Any) -> np.ndarray:
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return np.asarray(leaf)
    if not leaf.is_fully_replicated:
        if not isinstance(leaf.sharding, NamedSharding):
            raise TypeError(f"an array over several processes lies on no mesh: {leaf.sharding}")
        leaf = _gather(leaf.sharding.mesh)(leaf)
    return np.asarray(leaf.addressable_data(0))


@cache
def _gather(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))


@cache
def _any_flag() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
    mesh = Mesh(np.array(jax.devices()), "device")
    split = NamedSharding(mesh, PartitionSpec("device"))
    return split, jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))
