"""The mesh ("replica", "data"), and where state, weights and batches lie on it."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from modelstock_jax.errors import UserError
from modelstock_jax.merging.gram import PyTree
from modelstock_jax.training.state import TrainState

AXES = ("replica", "data")


def make_mesh(
    replica: int,
    data: int,
    *,
    num_replicas: int,
    batch_size: int,
    gradient_accumulation_steps: int = 1,
) -> Mesh:
    """A mesh ("replica", "data") over all devices, or over the first replica x data of them.

    Replicas meet only to merge, so the replica axis is the outer one: it lies across hosts, and
    across the slices of a TPU where there are several, and the data axis inside them.

    Args:
      replica: see `mesh_shape`, as the other arguments.
      data: see `mesh_shape`.
      num_replicas: R.
      batch_size: B.
      gradient_accumulation_steps: A.

    Raises:
      UserError: as `mesh_shape`, or if a process has no device in the mesh.
    """
    shape = replica, data = mesh_shape(
        jax.device_count(),
        replica,
        data,
        num_replicas=num_replicas,
        batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
    )
    devices = jax.devices()[: replica * data]
    processes = {device.process_index for device in devices}
    if len(processes) < jax.process_count():
        raise UserError(
            f"mesh: replica {replica} x data {data} leaves {jax.process_count() - len(processes)} "
            f"of {jax.process_count()} processes without a device; use all {jax.device_count()}"
        )
    axis_types = (AxisType.Auto, AxisType.Auto)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return jax.make_mesh(shape, AXES, axis_types=axis_types, devices=devices)
    if replica % slices:
        raise UserError(
            f"mesh.replica={replica} is not a multiple of the {slices} TPU slices: a replica's "
            "devices would lie on both sides of the slow network; use one slice a replica"
        )
    inside = (replica // slices, data)
    arranged = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1), devices)
    return Mesh(arranged, AXES, axis_types=axis_types)


def mesh_shape(
    devices: int,
    replica: int,
    data: int,
    *,
    num_replicas: int,
    batch_size: int,
    gradient_accumulation_steps: int = 1,
) -> tuple[int, int]:
    """Sizes of the mesh's axes ("replica", "data").

    Args:
      devices: how many there are, on all hosts.
      replica: devices along the replica axis; 0 picks the largest number that divides both
        the replicas and the devices.
      data: devices along the data axis; 0 takes all that are left.
      num_replicas: R; must be a multiple of `replica`.
      batch_size: B.
      gradient_accumulation_steps: A, parts of a batch; B must be a multiple of A and B / A of `data`.

    Raises:
      UserError: if the sizes do not divide what they split.

    Two replicas on one device, on two and on eight:

    >>> [mesh_shape(n, 0, 0, num_replicas=2, batch_size=8) for n in (1, 2, 8)]
    [(1, 1), (2, 1), (2, 4)]
    """
    for name, size in (("replica", replica), ("data", data)):
        if size < 0:
            raise UserError(f"mesh.{name}={size}: give a number of devices, or 0 for the best")
    replica = replica or math.gcd(max(devices // (data or 1), 1), num_replicas)
    data = data or max(devices // replica, 1)
    if replica * data > devices:
        raise UserError(
            f"mesh: replica {replica} x data {data} needs {replica * data} devices; "
            f"{devices} are here"
        )
    if num_replicas % replica:
        raise UserError(f"mesh.replica={replica} does not divide num_replicas={num_replicas}")
    if gradient_accumulation_steps < 1 or batch_size % gradient_accumulation_steps:
        raise UserError(
            f"gradient_accumulation_steps={gradient_accumulation_steps} does not cut batch_size={batch_size} into equal "
            "parts"
        )
    part = batch_size // gradient_accumulation_steps
    if part % data:
        whole = (
            f" / gradient_accumulation_steps={gradient_accumulation_steps}"
            if gradient_accumulation_steps > 1
            else ""
        )
        raise UserError(f"mesh.data={data} does not divide batch_size={batch_size}{whole}")
    return replica, data


# Where each array lies on the mesh.


def state_sharding(mesh: Mesh, state: TrainState, min_size: int = 0) -> TrainState:
    """A `TrainState` of shardings, leaf by leaf; keys, counters and carried noise are whole."""
    return jax.tree.map(lambda _: replicated_sharding(mesh), state)._replace(
        key=NamedSharding(mesh, PartitionSpec("replica")),
        params=replicas_sharding(mesh, state.params, min_size),
        opt_state=replicas_sharding(mesh, state.opt_state, min_size),
    )


def replicas_sharding(mesh: Mesh, replicas: PyTree, min_size: int) -> PyTree:
    """A sharding for each leaf [R, ...]: R over "replica", the rest as one replica's leaf."""

    def place(x):
        spec = fsdp_spec(x.shape[1:], mesh.shape["data"], min_size)
        return NamedSharding(mesh, PartitionSpec("replica", *spec))

    return jax.tree.map(place, replicas)


def params_sharding(mesh: Mesh, params: PyTree, min_size: int) -> PyTree:
    """A sharding for each leaf [...] of a model without a replica axis: anchor, merged weights."""
    return jax.tree.map(
        lambda x: NamedSharding(mesh, fsdp_spec(x.shape, mesh.shape["data"], min_size)),
        params,
    )


def merge_sharding(mesh: Mesh, replicas: PyTree, min_size: int) -> PyTree:
    """Where the leaves [R, ...] lie while they are merged: all R replicas of a part together.

    The devices of the replica axis, too, split a tensor's own dimensions. From `replicas_sharding`
    each device sends away what is not its part (an all-to-all), every product of task vectors is
    then local, and what travels back is the merged tensor alone.
    """
    replica, data = (mesh.shape[axis] for axis in AXES)

    def place(x):
        shape = x.shape[1:]
        axes = [*fsdp_spec(shape, data, min_size), *[None] * len(shape)][: len(shape)]
        part = [size // (data if axis else 1) for size, axis in zip(shape, axes, strict=True)]
        dims = [dim for dim, size in enumerate(part) if size and size % replica == 0]
        if replica > 1 and dims:
            widest = max(dims, key=lambda dim: part[dim])
            axes[widest] = ("data", "replica") if axes[widest] else "replica"
        return NamedSharding(mesh, PartitionSpec(None, *axes))

    return jax.tree.map(place, replicas)


def fsdp_spec(shape: tuple[int, ...], data: int, min_size: int) -> PartitionSpec:
    """How one tensor of a model is split over the data axis (FSDP, or ZeRO stage 3).

    Along its largest dimension that `data` divides, the first of equals; whole where it has fewer
    than `min_size` elements, where no dimension can be cut, on one device, and for a `min_size` of
    0. The shape alone decides, so that a moment lies where its parameter does.

    >>> tuple(fsdp_spec((768, 3072), 4, 2**18))
    (None, 'data')
    >>> tuple(fsdp_spec((768,), 4, 2**18)), tuple(fsdp_spec((768, 3072), 4, 0))
    ((), ())
    """
    dims = [dim for dim, size in enumerate(shape) if size and size % data == 0]
    if data == 1 or not min_size or math.prod(shape) < min_size or not dims:
        return PartitionSpec()
    widest = max(dims, key=lambda dim: shape[dim])
    return PartitionSpec(*[None] * widest, "data")


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leaves [R, B, ...]: replicas and examples both split."""
    return NamedSharding(mesh, PartitionSpec("replica", "data"))


def all_gather_params(params: PyTree, shardings: PyTree) -> PyTree:
    """Weights as a replica computes with them: whole, where they lie split over the data axis.

    Their gradients go the other way: summed over the devices and split again at once (an all-gather
    there, a reduce-scatter back). Said where weights enter the loss, it keeps the compiler from
    cutting the activations along with the weights.

    Args:
      weights: of one replica, [...] a leaf.
      split: their shardings, as `params_sharding` gives them.
    """

    def leaf(x, sharding):
        if sharding.is_fully_replicated:
            return x
        whole = replicated_sharding(sharding.mesh)
        place = jax.lax.with_sharding_constraint

        @jax.custom_vjp
        def gather(x):
            return place(x, whole)

        gather.defvjp(lambda x: (gather(x), None), lambda _, g: (place(g, sharding),))
        return gather(x)

    return jax.tree.map(leaf, params, shardings)


# From what each process has to one array over all devices of all processes.


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, Any]:
    """Places this process's part of a batch [R, B, ...] on the mesh, R and B both split.

    Args:
      mesh: over the devices of all processes.
      batch: what `sharding.local_indices` says of it; on one process, all.
    """
    sharding = batch_sharding(mesh)
    axes = tuple(mesh.shape.values())
    here = [len(blocks) for blocks in local_indices(sharding, axes)]

    def global_array(value):
        sizes = zip(value.shape, axes, here, strict=False)
        return make_global_array(
            sharding, value, tuple(n * axis // mine for n, axis, mine in sizes)
        )

    return {name: global_array(value) for name, value in batch.items()}


def local_indices(sharding: NamedSharding, shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
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


def make_global_array(
    sharding: NamedSharding, value: np.ndarray, shape: tuple[int, ...]
) -> jax.Array:
    """The global array of which this process gives what it holds.

    Args:
      sharding: of the array.
      value: this process's part: the rows and columns of `held(sharding, shape)`.
      shape: global sizes of the leading dimensions; the others are those of `value`.
    """
    parts, shape = local_indices(sharding, shape), (*shape, *value.shape[len(shape) :])

    def block(index: tuple[slice, ...] | None) -> np.ndarray:
        local = []
        for part, one, size in zip(parts, index or (), shape, strict=False):
            start, stop, _ = one.indices(size)
            local.append(slice(*np.searchsorted(part, (start, stop))))
        return value[tuple(local)]

    return jax.make_array_from_callback(shape, sharding, block)


def device_put_global(tree: PyTree, shardings: PyTree) -> PyTree:
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
