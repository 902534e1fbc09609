"""The mesh ("replica", "data") and the sharding of state, parameters and batches on it."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from modelstock_jax.errors import UserError
from modelstock_jax.merging.trees import PyTree
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
    """Return a mesh ("replica", "data") over all devices, or over the first replica x data.

    Replicas communicate only to merge. Therefore the replica axis is the outer axis: it spans hosts
    (and TPU slices, if there are several), and the data axis stays within them.

    Args:
      replica: see `mesh_shape`
      data: see `mesh_shape`
      num_replicas: R
      batch_size: B
      gradient_accumulation_steps: A

    Raises:
      UserError: see `mesh_shape`; also if a process has no device in the mesh, or a replica would
        span TPU slices
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
            f"of {jax.process_count()} processes without a device; set mesh.replica and mesh.data "
            f"so that all {jax.device_count()} devices are used"
        )
    axis_types = (AxisType.Auto, AxisType.Auto)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return jax.make_mesh(shape, AXES, axis_types=axis_types, devices=devices)
    if replica % slices:
        raise UserError(
            f"mesh.replica={replica} is not a multiple of the {slices} TPU slices, so a replica "
            "would span the slow network between slices; set mesh.replica to a multiple of "
            f"{slices}"
        )
    slice_shape = (replica // slices, data)
    device_mesh = mesh_utils.create_hybrid_device_mesh(slice_shape, (slices, 1), devices)
    return Mesh(device_mesh, AXES, axis_types=axis_types)


def mesh_shape(
    devices: int,
    replica: int,
    data: int,
    *,
    num_replicas: int,
    batch_size: int,
    gradient_accumulation_steps: int = 1,
) -> tuple[int, int]:
    """Return the sizes of the mesh axes ("replica", "data").

    Args:
      devices: number of devices of all hosts
      replica: size of the replica axis; 0 picks the largest size that divides both the number of
        replicas and the number of devices
      data: size of the data axis; 0 uses all remaining devices
      num_replicas: R, a multiple of `replica`
      batch_size: B, a multiple of A
      gradient_accumulation_steps: A; B / A must be a multiple of `data`

    Raises:
      UserError: if a size does not divide what it splits

    Example:
      Two replicas on one, two and eight devices:

      >>> [mesh_shape(n, 0, 0, num_replicas=2, batch_size=8) for n in (1, 2, 8)]
      [(1, 1), (2, 1), (2, 4)]
    """
    for name, size in (("replica", replica), ("data", data)):
        if size < 0:
            raise UserError(
                f"mesh.{name}={size} must be >= 0: set a number of devices, or 0 to choose it "
                "automatically"
            )
    replica = replica or math.gcd(max(devices // (data or 1), 1), num_replicas)
    data = data or max(devices // replica, 1)
    if replica * data > devices:
        raise UserError(
            f"mesh: replica {replica} x data {data} needs {replica * data} devices; "
            f"only {devices} available; lower mesh.replica or mesh.data, or set both to 0"
        )
    if num_replicas % replica:
        raise UserError(f"mesh.replica={replica} does not divide num_replicas={num_replicas}")
    steps = gradient_accumulation_steps
    if steps < 1 or batch_size % steps:
        raise UserError(
            f"gradient_accumulation_steps={steps} does not divide batch_size={batch_size}"
        )
    if batch_size // steps % data:
        divisor = f" / gradient_accumulation_steps={steps}" if steps > 1 else ""
        raise UserError(f"mesh.data={data} does not divide batch_size={batch_size}{divisor}")
    return replica, data


def state_sharding(mesh: Mesh, state: TrainState, min_size: int = 0) -> TrainState:
    """Return the sharding of every leaf of a `TrainState`.

    Parameters and optimizer state are sharded over both axes, keys over the replica axis. The step
    count and the carried noise are replicated.
    """
    return jax.tree.map(lambda _: replicated_sharding(mesh), state)._replace(
        key=replica_sharding(mesh),
        params=replicas_sharding(mesh, state.params, min_size),
        opt_state=replicas_sharding(mesh, state.opt_state, min_size),
    )


def replicas_sharding(mesh: Mesh, replicas: PyTree, min_size: int) -> PyTree:
    """Return the sharding of leaves [R, ...]: R over "replica", the other axes by `fsdp_spec`."""

    def leaf_sharding(x):
        spec = fsdp_spec(x.shape[1:], mesh.shape["data"], min_size)
        return NamedSharding(mesh, PartitionSpec("replica", *spec))

    return jax.tree.map(leaf_sharding, replicas)


def params_sharding(mesh: Mesh, params: PyTree, min_size: int) -> PyTree:
    """Return the sharding of leaves without a replica axis: anchor and merged model."""
    return jax.tree.map(
        lambda x: NamedSharding(mesh, fsdp_spec(x.shape, mesh.shape["data"], min_size)),
        params,
    )


def merge_sharding(mesh: Mesh, replicas: PyTree, min_size: int) -> PyTree:
    """Return the sharding of leaves [R, ...] during a merge: all R replicas of a shard together.

    The replica axis of the mesh then shards the tensor's own dimensions too. Coming from
    `replicas_sharding`, each device sends the parts that are not its own (an all-to-all). Every
    product of task vectors is then local, and only the merged tensor is sent back.
    """
    replica, data = (mesh.shape[axis] for axis in AXES)

    def leaf_sharding(x):
        shape = x.shape[1:]
        axes = [*fsdp_spec(shape, data, min_size), *[None] * len(shape)][: len(shape)]
        shard = [size // (data if axis else 1) for size, axis in zip(shape, axes, strict=True)]
        dims = [dim for dim, size in enumerate(shard) if size and size % replica == 0]
        if replica > 1 and dims:
            largest = max(dims, key=lambda dim: shard[dim])
            axes[largest] = ("data", "replica") if axes[largest] else "replica"
        return NamedSharding(mesh, PartitionSpec(None, *axes))

    return jax.tree.map(leaf_sharding, replicas)


def fsdp_spec(shape: tuple[int, ...], data: int, min_size: int) -> PartitionSpec:
    """Return how a tensor is sharded over the data axis (FSDP, ZeRO stage 3).

    The tensor is split along its largest dimension that `data` divides (the first, if several are
    equal). It is replicated if it has fewer than `min_size` elements, if no dimension is divisible,
    if `data` is 1, or if `min_size` is 0. The result depends only on the shape, so that optimizer
    state is sharded like its parameter.

    Example:
      >>> tuple(fsdp_spec((768, 3072), 4, 2**18))
      (None, 'data')
      >>> tuple(fsdp_spec((768,), 4, 2**18)), tuple(fsdp_spec((768, 3072), 4, 0))
      ((), ())
    """
    dims = [dim for dim, size in enumerate(shape) if size and size % data == 0]
    if data == 1 or not min_size or math.prod(shape) < min_size or not dims:
        return PartitionSpec()
    largest = max(dims, key=lambda dim: shape[dim])
    return PartitionSpec(*[None] * largest, "data")


def replica_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays [R] with one value per replica."""
    return NamedSharding(mesh, PartitionSpec("replica"))


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device has a copy of."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of batches [R, B, ...]: both leading axes are split."""
    return NamedSharding(mesh, PartitionSpec("replica", "data"))


def all_gather_params(params: PyTree, shardings: PyTree) -> PyTree:
    """All-gather the parameters that are sharded over the data axis, and reduce-scatter gradients.

    The backward pass sums the gradients over the devices and shards them again at once. Applied
    where parameters enter the loss, it keeps the compiler from sharding the activations like the
    parameters.

    Args:
      params: parameters of one replica, leaves [...]
      shardings: their shardings, see `params_sharding`
    """

    def all_gather(x, sharding):
        if sharding.is_fully_replicated:
            return x
        replicated = replicated_sharding(sharding.mesh)
        constrain = jax.lax.with_sharding_constraint

        @jax.custom_vjp
        def gather(x):
            return constrain(x, replicated)

        gather.defvjp(lambda x: (gather(x), None), lambda _, g: (constrain(g, sharding),))
        return gather(x)

    return jax.tree.map(all_gather, params, shardings)


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, Any]:
    """Make global arrays of a batch [R, B, ...], sharded by `batch_sharding`.

    Args:
      mesh: over the devices of all processes
      batch: the replicas and examples of this process (`local_indices`); all of them if there is
        one process
    """
    sharding = batch_sharding(mesh)
    axes = tuple(mesh.shape.values())
    local_axes = [len(indices) for indices in local_indices(sharding, axes)]

    def global_array(value):
        sizes = zip(value.shape, axes, local_axes, strict=False)
        return make_global_array(
            sharding, value, tuple(size * axis // local for size, axis, local in sizes)
        )

    return {name: global_array(value) for name, value in batch.items()}


def local_indices(sharding: NamedSharding, shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Return the indices of a global array that this process's devices store, per dimension.

    With one process these are all indices. If the mesh keeps a replica within a host, they are the
    host's own replicas and all of their examples.

    Args:
      sharding: sharding of the array
      shape: shape of the array; trailing dimensions that are not split may be omitted

    Returns:
      for each dimension, the ascending indices, int64
    """
    all_blocks = sharding.addressable_devices_indices_map(shape).values()
    blocks = [block for block in all_blocks if block is not None]
    dims = zip(*([range(*index.indices(size)) for index, size in zip(b, shape, strict=True)]
                 for b in blocks), strict=True)  # fmt: skip
    return tuple(np.unique(np.concatenate(ranges)) for ranges in dims)


def make_global_array(
    sharding: NamedSharding, value: np.ndarray, shape: tuple[int, ...]
) -> jax.Array:
    """Make a global array from this process's part of it.

    Args:
      sharding: sharding of the array
      value: the rows and columns `local_indices(sharding, shape)` of the array
      shape: global sizes of the leading dimensions; the others are those of `value`
    """
    indices, shape = local_indices(sharding, shape), (*shape, *value.shape[len(shape) :])

    def block(index: tuple[slice, ...] | None) -> np.ndarray:
        local = []
        for local_index, global_slice, size in zip(indices, index or (), shape, strict=False):
            start, stop, _ = global_slice.indices(size)
            local.append(slice(*np.searchsorted(local_index, (start, stop))))
        return value[tuple(local)]

    devices = sharding.addressable_devices_indices_map(shape)
    # An explicit transfer, which `jax.transfer_guard` allows; that of a callback is implicit.
    blocks = jax.device_put([block(index) for index in devices.values()], list(devices))
    return jax.make_array_from_single_device_arrays(shape, sharding, blocks)


def device_put_global(tree: PyTree, shardings: PyTree) -> PyTree:
    """Put values that every process has in full on the devices, without communication.

    `jax.device_put` would first compare them between all processes, on the devices.

    Args:
      tree: NumPy arrays, or arrays on this process's devices; equal on all processes
      shardings: one sharding per leaf
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def global_array(leaf: Any, sharding: NamedSharding) -> jax.Array:
        value = np.asarray(leaf)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return jax.tree.map(global_array, tree, shardings)
