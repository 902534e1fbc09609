"""The jitted functions of a run on one mesh: initialization, train step and merge step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from modelstock_jax.errors import UserError, check_choice
from modelstock_jax.merging import init_noise
from modelstock_jax.merging.trees import PyTree
from modelstock_jax.training import sharding
from modelstock_jax.training.losses import Loss
from modelstock_jax.training.merge_step import make_merge_step
from modelstock_jax.training.optimizer import make_optimizer, reads_pretrained
from modelstock_jax.training.sharding import device_put_global
from modelstock_jax.training.state import IsTrained, StepConstants, TrainState, init_state
from modelstock_jax.training.train_step import Augment, ReplicaMode, make_train_step

REPLICA_MODES = ("auto", "vmap", "map")


@dataclass(frozen=True)
class Task:
    """The training task: initial parameters, loss, augmentation and number of steps.

    Attributes:
      params: initial parameters of every replica; the anchor of the merges
      loss_fn: see `losses`
      steps_per_epoch: steps per epoch
      num_steps: steps of the run
      num_heads: attention heads of the image tower, for `merge.unit='head'`
      augment: (key, batch) -> batch, applied once per step to the full batch of a replica
      checksum: checksum of the pretrained checkpoint; "" if there is none
      trained: predicate on the leaf name; None trains all leaves
      reads_pretrained: whether the loss reads the pretrained parameters
      hyper: per-replica hyperparameters, each [R] (the config group `per_replica`)
      convolutional: whether the model contains convolutions other than patches
    """

    params: PyTree
    loss_fn: Loss
    steps_per_epoch: int
    num_steps: int
    num_heads: int
    augment: Augment
    checksum: str = ""
    trained: IsTrained | None = None
    reads_pretrained: bool = False
    hyper: Mapping[str, np.ndarray] = field(default_factory=dict)
    convolutional: bool = False


def mesh_from_config(config: ConfigDict) -> Mesh:
    """Return the mesh that the config describes.

    Raises:
      UserError: see `sharding.make_mesh`
    """
    return sharding.make_mesh(
        config.mesh.replica,
        config.mesh.data,
        num_replicas=config.num_replicas,
        batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
    )


class StepFunctions:
    """The jitted functions of a run.

    They are compiled once and shared by all seeds, with and without merging.

    The parameters of the task may be `jax.ShapeDtypeStruct`s if the functions are only lowered.

    Attributes:
      task: the training task
      mesh: the mesh ("replica", "data")
      params_sharding: sharding of each leaf of a model without a replica axis
      abstract_state: shapes, dtypes and shardings of the training state
      abstract_anchor: shapes, dtypes and shardings of the anchor
      merges: whether the run merges its replicas
      train_step: (state, batch, constants) -> (state, metrics); the state is donated
    """

    def __init__(self, config: ConfigDict, task: Task) -> None:
        """Check the options on shapes only; nothing is compiled or placed on a device yet.

        Raises:
          UserError: if the options are inconsistent
        """
        self.task, self._config = task, config
        self.merges = config.merge.every != "never"
        self.mesh = mesh_from_config(config)
        self._tx, schedule = make_optimizer(config.optimizer, task.num_steps, task.trained)
        min_size = config.mesh.fsdp_min_size
        self.params_sharding = sharding.params_sharding(self.mesh, task.params, min_size)
        state = jax.eval_shape(self._init, task.params, 0)
        merge_steps = [
            make_merge_step(
                config.merge,
                self._tx,
                task.num_heads,
                last=last,
                merge_sharding=sharding.merge_sharding(self.mesh, state.params, min_size),
                params_sharding=self.params_sharding,
            )
            for last in (False, True)
        ]
        # The last merge differs from the others only if it shrinks carried noise.
        self._merge_steps = merge_steps if config.merge.carry_noise != "off" else merge_steps[:1]
        self._state_sharding = sharding.state_sharding(self.mesh, state, min_size)
        self.abstract_state = _with_sharding(state, self._state_sharding)
        self.abstract_anchor = _with_sharding(task.params, self.params_sharding)
        # Trace the merge now: an invalid merge unit would otherwise fail hours later.
        if config.num_replicas > 1:
            self.merge_step[False].trace(self.abstract_anchor, self.abstract_state)
        self._init_state = jax.jit(self._init, out_shardings=self._state_sharding)
        self.train_step = jax.jit(
            make_train_step(
                self._loss,
                self._tx,
                schedule,
                self.replica_mode,
                augment=task.augment,
                gradient_accumulation_steps=config.gradient_accumulation_steps,
                on_non_finite=config.monitor.on_non_finite,
            ),
            donate_argnums=0,
            out_shardings=(self._state_sharding, None),
        )

    @cached_property
    def anchor(self) -> PyTree:
        """The initial parameters on the devices, sharded by `params_sharding`."""
        return device_put_global(self.task.params, self.params_sharding)

    def init_state(self, seed: int) -> TrainState:
        """Return the initial state: every replica at the anchor, with the PRNG keys of the seed."""
        return self._init_state(self.anchor, np.uint32(seed))

    @cached_property
    def merge_step(self) -> dict[bool, jax.stages.Wrapped]:
        """(anchor, state) -> (state, merged, stats), by whether it is the last merge of the run.

        The state is donated.
        """
        replicated = sharding.replicated_sharding(self.mesh)
        jitted = [
            jax.jit(
                merge_step,
                donate_argnums=1,
                out_shardings=(self._state_sharding, self.params_sharding, replicated),
            )
            for merge_step in self._merge_steps
        ]
        return {False: jitted[0], True: jitted[-1]}

    def step_constants(self, anchor: PyTree = None, merged: PyTree = None) -> StepConstants:
        """Return the inputs of a train step besides its state and batch.

        Models that no option reads are None, so that they take no memory.

        Args:
          anchor: parameters or their shapes; None uses the shapes
          merged: the last merged model; None uses the anchor
        """
        anchor = self.abstract_anchor if anchor is None else anchor
        last_merged = anchor if merged is None else merged
        needs_merged = self._config.monitor.on_non_finite == "restore_last_merge"
        needs_anchor = self.task.reads_pretrained or reads_pretrained(self._config.optimizer)
        return StepConstants(
            pretrained=anchor if needs_anchor else None,
            last_merged=last_merged if needs_merged else None,
            hyper=self._hyper,
        )

    @cached_property
    def _hyper(self) -> dict[str, jax.Array]:
        """The per-replica hyperparameters on the devices: no step transfers them again."""
        hyper = dict(self.task.hyper)
        return device_put_global(hyper, dict.fromkeys(hyper, sharding.replica_sharding(self.mesh)))

    def lower(self, batch: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.stages.Lowered]:
        """Lower the train step and, if the config merges, the merge step; no arrays are allocated.

        Args:
          batch: abstract batch, see `abstract_batch`

        Returns:
          {"step": lowered} or {"step": lowered, "merge": lowered}
        """
        state, anchor = self.abstract_state, self.abstract_anchor
        lowered = {"step": self.train_step.lower(state, batch, self.step_constants())}
        if self.merges:
            lowered["merge"] = self.merge_step[False].lower(anchor, state)
        return lowered

    def abstract_batch(self, image_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return shapes [R, B, ...], dtypes and shardings of a batch of images and labels."""
        leading = (self._config.num_replicas, self._config.batch_size)
        shapes = {
            "image": jax.ShapeDtypeStruct((*leading, image_size, image_size, 3), np.uint8),
            "label": jax.ShapeDtypeStruct(leading, np.int32),
        }
        return _with_sharding(shapes, dict.fromkeys(shapes, sharding.batch_sharding(self.mesh)))

    def _loss(self, params: PyTree, *rest: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        return self.task.loss_fn(sharding.all_gather_params(params, self.params_sharding), *rest)

    def _init(self, params: PyTree, seed: jax.Array) -> TrainState:
        config, noise = self._config, None
        if config.merge.carry_noise != "off":
            noise = init_noise(params, unit=config.merge.unit, num_heads=self.task.num_heads)
        return init_state(
            params, self._tx, num_replicas=config.num_replicas, seed=seed, noise=noise
        )

    @cached_property
    def replica_mode(self) -> ReplicaMode:
        """How the replicas are executed: 'vmap' (in parallel) or 'map' (one after the other)."""
        mode, replica_devices = self._config.compute.replica_mode, self.mesh.shape["replica"]
        check_choice("compute.replica_mode", mode, REPLICA_MODES)
        if mode == "auto":
            on_cpu = jax.default_backend() == "cpu"
            return automatic_replica_mode(replica_devices, self.task.convolutional, on_cpu)
        if mode == "map" and replica_devices > 1:
            raise UserError(
                "compute.replica_mode='map' would gather the parameters over the replica axis of "
                f"the mesh ({replica_devices} devices): set compute.replica_mode='vmap' or "
                "mesh.replica=1"
            )
        return mode


def automatic_replica_mode(replica_devices: int, convolutional: bool, on_cpu: bool) -> ReplicaMode:
    """Return what `compute.replica_mode='auto'` means.

    Args:
      replica_devices: size of the mesh axis "replica"
      convolutional: see `Task`
      on_cpu: whether the devices are CPUs
    """
    # The windows of convolutions take many times the memory of their input: one replica's at a
    # time. On a CPU it depends on the size which is faster (benchmarks/README.md).
    return "map" if replica_devices == 1 and (convolutional or on_cpu) else "vmap"


def _with_sharding(shapes: PyTree, shardings: PyTree) -> PyTree:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
