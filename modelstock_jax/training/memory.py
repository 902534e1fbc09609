"""What a run takes on one device, from the compiled programs alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax

from modelstock_jax.training.programs import Programs

PyTree = Any


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      anchor: the pretrained weights.
      params: the weights of the replicas that this device holds.
      opt_state: the optimizer's moments of them.
      merged: the last merged model, kept for the run's result; 0 where replicas never merge.
      batch: a step's images and labels.
      gradients: of the replicas that run side by side; a part of `step_temporary`.
      step_temporary: what a step needs beside its arguments: gradients, activations.
      merge_temporary: what a merge needs beside its arguments and the merged model.
    """

    anchor: int
    params: int
    opt_state: int
    merged: int
    batch: int
    gradients: int
    step_temporary: int
    merge_temporary: int

    @property
    def held(self) -> int:
        """What stays from step to step."""
        return self.anchor + self.params + self.opt_state + self.merged

    @property
    def step(self) -> int:
        """The most during a step: the next batch arrives while it runs."""
        return self.held + 2 * self.batch + self.step_temporary

    @property
    def merge(self) -> int:
        """The most during a merge, before the merged model of the last one is let go."""
        return self.held + self.merged + self.merge_temporary if self.merged else 0

    @property
    def peak(self) -> int:
        """The larger of the two."""
        return max(self.step, self.merge)


def memory(programs: Programs, compiled: dict[str, jax.stages.Compiled], batch: PyTree) -> Memory:
    """Reads the compiler's own account of the step and the merge.

    Temporary memory is the compiler's for the device it compiled for: an analysis made on a CPU
    is the CPU's, where other kernels are chosen than on a GPU.

    Args:
      programs: of the run.
      compiled: what `Programs.lower` gives, compiled.
      batch: shapes [R, B, ...] and dtypes.
    """
    state = programs.abstract_state
    anchor, params = device_bytes(programs.abstract_anchor), device_bytes(state.params)
    merges = "merge" in compiled
    return Memory(
        anchor=anchor,
        params=params,
        opt_state=device_bytes(state.opt_state),
        merged=anchor if merges else 0,
        batch=device_bytes(batch),
        gradients=anchor if programs.execution == "map" else params,
        step_temporary=extra_bytes(compiled["step"]),
        merge_temporary=extra_bytes(compiled["merge"]) - anchor if merges else 0,
    )


def device_bytes(tree: PyTree) -> int:
    """Bytes of a tree of placed shapes, or of arrays, on one device.

    >>> device_bytes([jax.numpy.zeros((3, 5))])
    60
    """

    def one(x) -> int:
        shape = x.sharding.shard_shape(x.shape)
        return math.prod(shape) * x.dtype.itemsize

    return sum(map(one, jax.tree.leaves(tree)))


def extra_bytes(compiled: jax.stages.Compiled) -> int:
    """What a program needs beside its arguments: temporaries, and outputs apart from them."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise ValueError("this backend gives no account of a program's memory")
    fresh = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return analysis.temp_size_in_bytes + max(fresh, 0)
