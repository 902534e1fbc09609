"""The compiled programs of a run: start, step and merge on one mesh."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh
from ml_collections import ConfigDict

from modelstock_jax.errors import UserError, check_choice
from modelstock_jax.merging import init_noise
from modelstock_jax.merging.gram import PyTree
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
    """What a run trains: weights and their loss, and for how long.

    Attributes:
      params: the weights every replica starts from; the anchor of its merges.
      loss_fn: see `losses`.
      steps_per_epoch: steps a pass takes.
      num_steps: steps of the whole run.
      num_heads: attention heads of the image tower, for the merge unit `head`.
      augment: (key, batch) -> batch, drawn once a step for a replica's whole batch.
      fingerprint: of the pretrained checkpoint that the weights come from; "" where there is none.
      trained: which leaves move, by name; None for all.
      reads_pretrained: whether the loss compares with the pretrained weights.
      hyper: numbers that are each replica's own, [R] each (`per_replica`).
    """

    params: PyTree
    loss_fn: Loss
    steps_per_epoch: int
    num_steps: int
    num_heads: int
    augment: Augment
    fingerprint: str = ""
    trained: IsTrained | None = None
    reads_pretrained: bool = False
    hyper: Mapping[str, np.ndarray] = field(default_factory=dict)


def mesh_of(config: ConfigDict) -> Mesh:
    """The mesh of a run's options; refused as `sharding.make_mesh` refuses it."""
    return sharding.make_mesh(
        config.mesh.replica,
        config.mesh.data,
        num_replicas=config.num_replicas,
        batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
    )


class StepFunctions:
    """What is compiled once and serves every seed and every arm of a run.

    The task's weights may be `jax.ShapeDtypeStruct`s where programs are lowered and not run.

    Attributes:
      task: what is trained.
      mesh: the mesh ("replica", "data").
      whole: the sharding of what every device holds a copy of.
      weights_sharding: that of each leaf of a model without a replica axis.
      abstract_state: shapes, dtypes and places of the training state.
      abstract_anchor: those of the anchor.
      step: (state, batch, reference) -> (state, metrics); the state is donated.
    """

    def __init__(self, config: ConfigDict, task: Task) -> None:
        """Checks the options by shapes; nothing is placed on a device or compiled yet.

        Raises:
          UserError: if the options do not fit together.
        """
        self.task, self._config = task, config
        self.mesh = mesh_of(config)
        self._tx, schedule = make_optimizer(config.optimizer, task.num_steps, task.trained)
        self._replicated = sharding.replicated_sharding(self.mesh)
        least = config.mesh.fsdp_min_size
        self.params_sharding = sharding.params_sharding(self.mesh, task.params, least)
        state = jax.eval_shape(self._init, task.params, 0)
        merges = [
            make_merge_step(
                config.merge,
                self._tx,
                task.num_heads,
                last=last,
                together=sharding.merge_sharding(self.mesh, state.params, least),
                weights=self.params_sharding,
            )
            for last in (False, True)
        ]
        # The last merge differs from the others only in the noise that it may have to shrink.
        self._merges = merges if config.merge.carry_noise != "off" else merges[:1]
        # A merge unit's mistake would show hours later, at the first merge.
        if config.num_replicas > 1:
            jax.eval_shape(self._merges[0], task.params, state)
        self._shardings = sharding.state_sharding(self.mesh, state, least)
        self.abstract_state = _placed(state, self._shardings)
        self.abstract_anchor = _placed(task.params, self.params_sharding)
        self._init_state = jax.jit(self._init, out_shardings=self._shardings)
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
            out_shardings=(self._shardings, None),
        )

    @cached_property
    def anchor(self) -> PyTree:
        """The task's weights, placed as `params_sharding` says."""
        return device_put_global(self.task.params, self.params_sharding)

    def init_state(self, seed: int) -> TrainState:
        """Every replica at the anchor, with the random keys of this seed."""
        return self._init_state(self.anchor, np.uint32(seed))

    @cached_property
    def merge_step(self) -> dict[bool, jax.stages.Wrapped]:
        """For the last merge and the others: (anchor, state) -> (state, merged, stats)."""
        compiled = [
            jax.jit(
                merge,
                donate_argnums=1,
                out_shardings=(self._shardings, self.params_sharding, self._replicated),
            )
            for merge in self._merges
        ]
        return {False: compiled[0], True: compiled[-1]}

    def step_constants(self, anchor: PyTree = None, merged: PyTree = None) -> StepConstants:
        """What a step reads beside its state; nothing that no option reads is kept in memory.

        Args:
          anchor: weights or their shapes; None takes the shapes.
          merged: the last merged model; None takes the anchor.
        """
        anchor = self.abstract_anchor if anchor is None else anchor
        last = anchor if merged is None else merged
        restores = self._config.monitor.on_non_finite == "restore_last_merge"
        compares = self.task.reads_pretrained or reads_pretrained(self._config.optimizer)
        return StepConstants(
            pretrained=anchor if compares else None,
            last_merged=last if restores else None,
            hyper=dict(self.task.hyper),
        )

    def lower(self, batch: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.stages.Lowered]:
        """The step, and the merge where replicas merge, for shapes alone: no memory is spent.

        Args:
          batch: placed shapes [R, B, ...] and dtypes, as `abstract_batch` gives them.
        """
        lowered = {"step": self.train_step.lower(self.abstract_state, batch, self.step_constants())}
        if self._config.merge.every != "never":
            lowered["merge"] = self.merge_step[False].lower(self.abstract_anchor, self.abstract_state)
        return lowered

    def abstract_batch(self, image_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """A step's square images and labels: shapes [R, B, ...], dtypes and places."""
        lead = (self._config.num_replicas, self._config.batch_size)
        shapes = {
            "image": jax.ShapeDtypeStruct((*lead, image_size, image_size, 3), np.uint8),
            "label": jax.ShapeDtypeStruct(lead, np.int32),
        }
        return _placed(shapes, dict.fromkeys(shapes, sharding.batch_sharding(self.mesh)))

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
        """How the replicas run: 'vmap' or 'map'."""
        execution = self._config.compute.replica_mode
        check_choice("compute.replica_mode", execution, REPLICA_MODES)
        if execution == "auto":
            # Vmapped convolutions are slow on a CPU: ResNet, ConvNeXt. CLIP has none.
            alone = self.mesh.shape["replica"] == 1 and jax.default_backend() == "cpu"
            return "map" if alone else "vmap"
        if execution == "map" and self.mesh.shape["replica"] > 1:
            raise UserError(
                "compute.replica_mode='map' would gather the weights over the mesh's replica axis "
                f"({self.mesh.shape['replica']} devices); use 'vmap' or mesh.replica=1"
            )
        return execution


def use_compilation_cache(directory: str) -> None:
    """Keeps compiled programs in `directory` from run to run; "" leaves it to JAX's own settings.

    To be called before anything is compiled; JAX_COMPILATION_CACHE_DIR says the same to JAX. What
    lies there is run: it must be a directory in which nobody else can write.

    Raises:
      UserError: if it cannot be made or written.
    """
    if not directory:
        return
    path = Path(directory).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"compute.compilation_cache={directory}: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise UserError(f"compute.compilation_cache={directory}: not writable")
    jax.config.update("jax_compilation_cache_dir", str(path))
    compilation_cache.reset_cache()  # JAX decides once, when it first compiles, whether to use it.


def _placed(shapes: PyTree, shardings: PyTree) -> PyTree:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
