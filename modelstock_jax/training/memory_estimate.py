"""Memory of a train step, computed without a compiler and without the device.

Activations are the arrays that automatic differentiation stores for the backward pass. All other
arrays have known shapes. docs/memory.md compares the estimate with XLA's plan.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import Var

from modelstock_jax.merging.trees import PyTree
from modelstock_jax.training.cost_analysis import Memory
from modelstock_jax.training.sharding import fsdp_spec
from modelstock_jax.training.state import StepConstants
from modelstock_jax.training.step_fns import StepFunctions, Task

# Names of the primitive of `jax.checkpoint`.
_CHECKPOINT = ("checkpoint", "remat", "remat2")


class Activations(NamedTuple):
    """Bytes that the forward pass of one replica stores: fixed + B per_image + recomputed B.

    Attributes:
      fixed: weights cast to the compute dtype; they do not depend on the batch
      per_image: stored until the backward pass reads them
      recomputed: per image, of the one block whose activations `remat` recomputes at a time
    """

    fixed: int
    per_image: int
    recomputed: int = 0

    def of(self, images: int) -> int:
        """Return the bytes of a micro-batch."""
        return self.fixed + images * (self.per_image + self.recomputed)


class Placement(NamedTuple):
    """How a step is divided.

    Attributes:
      replica: size of the mesh axis "replica"
      data: size of the mesh axis "data"
      batch_size: images per replica and step
      accumulation: micro-batches per step
      replica_mode: 'vmap' or 'map'
      fsdp_min_size: min number of elements of a tensor that is sharded over "data"
    """

    replica: int
    data: int
    batch_size: int
    accumulation: int
    replica_mode: str
    fsdp_min_size: int

    @property
    def images(self) -> int:
        """Images of one replica that a device computes at a time."""
        return self.batch_size // self.accumulation // self.data


def activations(task: Task, image_size: int, without_remat: Task | None = None) -> Activations:
    """Count what automatic differentiation stores for the backward pass, from traces of the loss.

    Args:
      task: the training task; its parameters may be shapes
      image_size: side of the images
      without_remat: the same task without rematerialization, if `task` has it
    """
    one, two = (_stored_bytes(task, image_size, images) for images in (1, 2))
    counted = Activations(2 * one - two, two - one)
    if without_remat is None:
        return counted
    complete = activations(without_remat, image_size)
    recomputed = complete.per_image - counted.per_image
    return counted._replace(recomputed=recomputed // max(_num_checkpoints(task, image_size), 1))


def estimate(
    programs: StepFunctions, stored: Activations, placement: Placement, image_size: int
) -> Memory:
    """Return the memory of one device, for any placement; no device is needed.

    Args:
      programs: functions of the run; only the shapes of their state are read
      stored: see `activations`
      placement: mesh, batch and replica mode
      image_size: side of the images
    """
    state, replica, data = programs.abstract_state, placement.replica, placement.data

    def device_bytes(tree: PyTree, replica_axes: int) -> int:
        sizes = (_shard_bytes(x, replica_axes, placement) for x in jax.tree.leaves(tree))
        return sum(sizes) // (replica if replica_axes else 1)

    params, opt_state = device_bytes(state.params, 1), device_bytes(state.opt_state, 1)
    anchor = device_bytes(programs.task.params, 0)
    replicas = state.key.shape[0] // replica
    parallel = 1 if placement.replica_mode == "map" else replicas
    temporary = parallel * (anchor + stored.of(placement.images))
    if data > 1:  # the gathered weights
        complete = sum(_bytes(x) for x in jax.tree.leaves(programs.task.params))
        temporary += parallel * complete
        if placement.accumulation > 1:  # sums and terms of the gradient, which XLA does not shard
            temporary += 2 * parallel * complete
    if placement.replica_mode == "map":  # a loop writes its results to new memory
        temporary += params + opt_state
    return Memory(
        anchor=anchor,
        params=params,
        opt_state=opt_state,
        merged=anchor if programs.merges else 0,
        batch=replicas * placement.batch_size // data * (3 * image_size**2 + 4),
        gradients=parallel * anchor,
        step_temporary=temporary,
        merge_temporary=0,
    )


def _shard_bytes(leaf: Any, replica_axes: int, placement: Placement) -> int:
    spec = fsdp_spec(leaf.shape[replica_axes:], placement.data, placement.fsdp_min_size)
    return _bytes(leaf) // (placement.data if any(spec) else 1)


def _bytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def _abstract_inputs(task: Task, image_size: int, images: int) -> tuple[Any, ...]:
    """Return shapes of (params, batch, constants) of one replica."""
    batch = {
        "image": jax.ShapeDtypeStruct((images, image_size, image_size, 3), np.uint8),
        "label": jax.ShapeDtypeStruct((images,), np.int32),
    }
    hyper: dict[str, Any] = {
        name: jax.ShapeDtypeStruct((), x.dtype) for name, x in task.hyper.items()
    }
    key = jax.random.key(0)
    # The augmentation may add labels of mixup, or texts.
    augmented = jax.eval_shape(lambda batch: task.augment(key, batch), batch | hyper)
    batch = {name: value for name, value in augmented.items() if name not in hyper}
    pretrained = task.params if task.reads_pretrained else None
    return task.params, batch, StepConstants(pretrained, hyper=hyper)


def _stored_bytes(task: Task, image_size: int, images: int) -> int:
    """Return the bytes between the forward and the backward pass, without the parameters."""

    def backward(params, batch, constants):
        def loss(params):
            return task.loss_fn(params, batch, constants)

        return jax.vjp(loss, params, has_aux=True)[1]

    jaxpr = jax.make_jaxpr(backward)(*_abstract_inputs(task, image_size, images)).jaxpr
    inputs = set(jaxpr.invars)
    stored = {x for x in jaxpr.outvars if isinstance(x, Var) and x not in inputs}
    return sum(_bytes(x.aval) for x in stored)


def _num_checkpoints(task: Task, image_size: int) -> int:
    """Return the number of blocks that `remat` recomputes."""
    jaxpr = jax.make_jaxpr(task.loss_fn)(*_abstract_inputs(task, image_size, 1)).jaxpr
    return sum(equation.primitive.name in _CHECKPOINT for equation in jaxpr.eqns)
