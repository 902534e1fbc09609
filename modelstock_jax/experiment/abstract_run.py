"""A run of abstract arrays: its step functions, its memory, and options that make it fit."""

from __future__ import annotations

import functools
import itertools
import math
import os
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from modelstock_jax.data import benchmark
from modelstock_jax.errors import UserError
from modelstock_jax.experiment.setup import sizes
from modelstock_jax.models.checkpoint import Checkpoint
from modelstock_jax.models.compute import Compute
from modelstock_jax.models.config import DualEncoderConfig
from modelstock_jax.models.model import abstract_params
from modelstock_jax.models.preprocessor import Preprocessor
from modelstock_jax.models.published import Sizes
from modelstock_jax.training.classifier import AbstractTextSide, make_classifier
from modelstock_jax.training.cost_analysis import Memory
from modelstock_jax.training.finetune import make_task
from modelstock_jax.training.memory_estimate import Activations, Placement, activations, estimate
from modelstock_jax.training.step_fns import StepFunctions, Task, automatic_replica_mode

# Variable that sets the fraction of a GPU's memory that JAX allocates.
FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
# Smaller micro-batches leave an accelerator idle.
_MIN_MICRO_BATCH = 8


def abstract_task(config: ConfigDict) -> tuple[Task, Sizes]:
    """Return the training task of a run for abstract arrays, and the sizes of its model.

    Raises:
      UserError: options contradict each other, or the sizes of the model are unknown
    """
    found, outline = sizes(config), benchmark.summarize(config.data)
    model, shapes = found.model, abstract_params(found.model)
    head = {
        "kernel": jax.ShapeDtypeStruct((model.feature_size, outline.num_classes), jnp.float32),
        "bias": jax.ShapeDtypeStruct((outline.num_classes,), jnp.float32),
    }
    pixels = Preprocessor((0.5,) * 3, (0.5,) * 3, found.image_size)
    params = {"image_tower": shapes["image_tower"], "head": head}
    anchor = make_classifier(config, model, params, pixels)
    if isinstance(model, DualEncoderConfig):
        names, compute = ("",) * outline.num_classes, Compute.of(config.compute)
        text = AbstractTextSide(Checkpoint(model, shapes, pixels), names, (), compute)
        anchor = replace(anchor, text=text)
    # Augmentation is left out: on the device it is small compared with the towers.
    return make_task(config, anchor, outline.num_train, lambda key, images: images), found


def abstract_step_functions(config: ConfigDict) -> tuple[StepFunctions, Sizes]:
    """Return the step functions of a run for abstract arrays, and the sizes of its model.

    Raises:
      UserError: options contradict each other, or the sizes of the model are unknown
    """
    task, found = abstract_task(config)
    return StepFunctions(config, task), found


class Change(NamedTuple):
    """Options with which a run fits, and its memory.

    Attributes:
      options: arguments of the command line; "" if nothing has to change
      accumulation: micro-batches per step
      remat: whether activations are recomputed
      memory: memory of a device with these options
    """

    options: str
    accumulation: int
    remat: bool
    memory: Memory


class MemoryPlan:
    """Estimated memory of one accelerator in a run, and options with which the run fits.

    Attributes:
      placement: mesh, batch and replica mode of the config
      remat: whether the config recomputes activations
    """

    def __init__(
        self, config: ConfigDict, programs: StepFunctions, image_size: int, mesh: tuple[int, int]
    ) -> None:
        """Create the plan for a mesh (replica, data), which need not exist on this machine."""
        self._config, self._programs, self._image_size = config, programs, image_size
        mode = config.compute.replica_mode
        if mode == "auto":
            mode = automatic_replica_mode(mesh[0], programs.task.convolutional, on_cpu=False)
        self.placement = Placement(
            *mesh,
            config.batch_size,
            config.gradient_accumulation_steps,
            mode,
            config.mesh.fsdp_min_size,
        )
        self.remat = bool(config.compute.remat)
        self._stored = functools.cache(self._count_stored)

    def _count_stored(self, remat: bool) -> Activations:
        plain = self._task(False)
        if not remat:
            return activations(plain, self._image_size)
        return activations(self._task(True), self._image_size, without_remat=plain)

    def _task(self, remat: bool) -> Task:
        if remat == self.remat:
            return self._programs.task
        config = self._config.copy_and_resolve_references()
        config.compute.remat = remat
        return abstract_task(config)[0]

    def describe(self) -> str:
        """Return the mesh and the replica mode in words."""
        replica, data = self.placement[:2]
        devices = f"{replica * data} device{'s' * (replica * data > 1)}"
        return (
            f"replica {replica} x data {data} on {devices}, replica mode "
            f"{self.placement.replica_mode}"
        )

    def memory(self, remat: bool | None = None, **changes: Any) -> Memory:
        """Return the memory of one device.

        Args:
          remat: whether to recompute activations; None uses the config's value
          **changes: fields of `Placement` that differ from the config
        """
        stored = self._stored(self.remat if remat is None else remat)
        placement = self.placement._replace(**changes)
        return estimate(self._programs, stored, placement, self._image_size)

    def changes_that_fit(self, limit: float) -> list[Change]:
        """Return options with which the run fits, those that change the least first.

        Args:
          limit: usable bytes of a device
        """
        replicas = [self.placement.replica]
        if replicas == [1] and self._config.num_replicas % 2 == 0:
            replicas.append(2)
        found = []
        for replica, remat in itertools.product(replicas, sorted({self.remat, True})):
            mode = self.placement.replica_mode if replica == replicas[0] else "vmap"
            placements = ({"accumulation": steps, "replica": replica, "replica_mode": mode}
                          for steps in self._accumulations())  # fmt: skip
            plans = ((p["accumulation"], self.memory(remat, **p)) for p in placements)
            steps, memory = next((plan for plan in plans if plan[1].peak <= limit), (0, None))
            if memory:
                options = self._options(replica, remat, steps)
                found.append(Change(options, steps, remat, memory))
                if replica != replicas[0]:
                    break
        return found

    def _accumulations(self) -> list[int]:
        first, images = self.placement.accumulation, self.placement.images
        steps = [first]
        while images % 2 == 0 and images // 2 >= _MIN_MICRO_BATCH:
            images //= 2
            steps.append(2 * steps[-1])
        return steps

    def _options(self, replica: int, remat: bool, steps: int) -> str:
        options = ["--config.compute.remat=True"] if remat and not self.remat else []
        if steps != self.placement.accumulation:
            options.append(f"--config.gradient_accumulation_steps={steps}")
        if replica != self.placement.replica:
            options.append(f"--config.mesh.replica={replica} (twice as many devices)")
        return " ".join(options)


def memory_fraction() -> float:
    """Return the fraction of a GPU's memory that JAX allocates; 0.75 is JAX's default.

    Raises:
      UserError: the environment variable is not a positive number
    """
    text = os.environ.get(FRACTION) or "0.75"
    try:
        fraction = float(text)
    except ValueError:
        fraction = math.nan
    if not 0 < fraction < math.inf:
        raise UserError(f"{FRACTION}={text} in the environment: it must be a number above 0")
    return fraction
