"""The mesh ("replica", "data"), and where state and batches lie on it."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from modelstock_jax.errors import UserError
from modelstock_jax.training.state import TrainState


def make_mesh(
    replica: int, data: int, *, num_replicas: int, batch_size: int, accumulate_steps: int = 1
) -> Mesh:
    """A mesh ("replica", "data") over all devices.

    Args:
      replica: devices along the replica axis; 0 picks the largest number that divides both
        the replicas and the devices.
      data: devices along the data axis; 0 takes all that are left.
      num_replicas: R; must be a multiple of `replica`.
      batch_size: B.
      accumulate_steps: A, parts of a batch; B must be a multiple of A and B / A of `data`.

    Raises:
      UserError: if the sizes do not divide what they split.
    """
    devices = jax.device_count()
    replica = replica or int(np.gcd(devices, num_replicas))
    data = data or max(devices // replica, 1)
    if replica * data > devices:
        raise UserError(
            f"mesh: replica {replica} x data {data} needs {replica * data} devices; "
            f"{devices} are here"
        )
    if num_replicas % replica:
        raise UserError(f"mesh.replica={replica} does not divide num_replicas={num_replicas}")
    if accumulate_steps < 1 or batch_size % accumulate_steps:
        raise UserError(
            f"accumulate_steps={accumulate_steps} does not cut batch_size={batch_size} into equal "
            "parts"
        )
    part = batch_size // accumulate_steps
    if part % data:
        whole = f" / accumulate_steps={accumulate_steps}" if accumulate_steps > 1 else ""
        raise UserError(f"mesh.data={data} does not divide batch_size={batch_size}{whole}")
    return jax.make_mesh(
        (replica, data),
        ("replica", "data"),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=jax.devices()[: replica * data],
    )


def replicas_sharding(mesh: Mesh) -> NamedSharding:
    """Leaves [R, ...]: replicas split over "replica", each whole on its devices."""
    return NamedSharding(mesh, PartitionSpec("replica"))


def whole_sharding(mesh: Mesh) -> NamedSharding:
    """Leaves without a replica axis: a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leaves [R, B, ...]: replicas and examples both split."""
    return NamedSharding(mesh, PartitionSpec("replica", "data"))


def state_sharding(mesh: Mesh, state: TrainState) -> TrainState:
    """A `TrainState` of shardings, leaf by leaf."""
    replicas, whole = replicas_sharding(mesh), whole_sharding(mesh)
    carries = {"key", "params", "opt_state"}
    return TrainState(
        **{
            name: jax.tree.map(lambda _, s=(replicas if name in carries else whole): s, leaf)
            for name, leaf in state._asdict().items()
        }
    )


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, Any]:
    """Places this process's part of a batch [R, B, ...] on the mesh, R and B both split."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in batch.items()
    }
