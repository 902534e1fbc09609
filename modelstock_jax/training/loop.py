"""The loop: batches in, steps and merges on the device, checkpoints and metrics out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from modelstock_jax.errors import UserError
from modelstock_jax.merging import Stats, check_finite, report, zero_noise
from modelstock_jax.reporting.metrics import MetricsWriter
from modelstock_jax.reporting.progress import Progress
from modelstock_jax.training import sharding
from modelstock_jax.training.checkpoints import Checkpoints
from modelstock_jax.training.interruption import STOPPED, Interruption
from modelstock_jax.training.merge import make_merge, steps_between_merges
from modelstock_jax.training.objectives import Loss
from modelstock_jax.training.optimizer import make_optimizer
from modelstock_jax.training.state import TrainState, init_state
from modelstock_jax.training.step import make_train_step

PyTree = Any


@dataclass(frozen=True)
class Task:
    """What a run trains: weights, their loss and their data.

    Attributes:
      params: the weights every replica starts from; the anchor of its merges.
      loss_fn: see `objectives`.
      batches: start_step -> endless batches {name: [R, B, ...]}, restored by that number alone.
      steps_per_epoch: steps a pass takes.
      num_steps: steps of the whole run.
      num_heads: attention heads of the image tower, for the merge unit `head`.
    """

    params: PyTree
    loss_fn: Loss
    batches: Callable[[int], Iterator[dict[str, np.ndarray]]]
    steps_per_epoch: int
    num_steps: int
    num_heads: int


@dataclass(frozen=True)
class Result:
    """The end of a run: its state, and the last merged weights (None where none merged)."""

    state: TrainState
    merged: PyTree


class Trainer:
    """Compiled step and merges of one `Task` on one mesh, and its directory."""

    def __init__(self, config: ConfigDict, task: Task, workdir: str | Path, name: str) -> None:
        """Places the replicas on the mesh; nothing is read or written yet."""
        self.config, self.task, self.name = config, task, name
        self.workdir = Path(workdir) / "runs" / name
        self.mesh = sharding.make_mesh(
            config.mesh.replica,
            config.mesh.data,
            num_replicas=config.num_replicas,
            batch_size=config.batch_size,
        )
        self.merge_steps = steps_between_merges(
            str(config.merge.every), task.steps_per_epoch, task.num_steps
        )
        if self.merge_steps and config.num_replicas < 2:
            raise UserError(
                f"num_replicas={config.num_replicas}: a merge needs at least 2 replicas; "
                "set --config.num_replicas=2 or --config.merge.every=never"
            )
        self.tx, schedule = make_optimizer(config.optimizer, task.num_steps)
        whole = sharding.whole_sharding(self.mesh)
        self.anchor = jax.device_put(task.params, whole)
        noise = None
        if self.merge_steps and config.merge.carry_noise != "off":
            noise = zero_noise(task.params, unit=config.merge.unit, num_heads=task.num_heads)

        def start(params):
            return init_state(
                params,
                self.tx,
                num_replicas=config.num_replicas,
                seed=config.seed,
                noise=noise,
            )

        self.shardings = sharding.state_sharding(self.mesh, jax.eval_shape(start, task.params))
        self.start = jax.jit(start, out_shardings=self.shardings)
        self.step = jax.jit(
            make_train_step(task.loss_fn, self.tx, schedule, self._execution()),
            donate_argnums=0,
            out_shardings=(self.shardings, None),
        )
        self.merges = {
            last: jax.jit(
                make_merge(config.merge, self.tx, task.num_heads, last=last),
                donate_argnums=1,
                out_shardings=(self.shardings, whole, whole),
            )
            for last in (False, True)
        }

    def _execution(self) -> str:
        execution = self.config.compute.execution
        if execution == "auto":
            # On a CPU one replica after the other was 1.0 to 1.5 times faster than both at once.
            alone = self.mesh.shape["replica"] == 1 and jax.default_backend() == "cpu"
            return "map" if alone else "vmap"
        if execution not in ("vmap", "map"):
            raise UserError(f"compute.execution={execution!r}: choose 'auto', 'vmap' or 'map'")
        if execution == "map" and self.mesh.shape["replica"] > 1:
            raise UserError(
                "compute.execution='map' would gather the weights over the mesh's replica axis "
                f"({self.mesh.shape['replica']} devices); use 'vmap' or mesh.replica=1"
            )
        return execution

    def run(self) -> Result:
        """Trains from the newest checkpoint, or from the anchor, to the end.

        Raises:
          UserError: on a non-finite loss or weight, or a workdir that cannot be written.
          SystemExit: after SIGTERM, once the state is saved.
        """
        task, config = self.task, self.config
        keep = config.checkpoint
        with (
            Checkpoints(self.workdir / "anchor", keep=1) as anchors,
            Checkpoints(self.workdir / "state", keep=keep.keep) as states,
            Checkpoints(self.workdir / "merged", keep=keep.keep_merged) as merges,
        ):
            if not anchors.steps:
                anchors.save(0, self.anchor)
            state, merged = self._restore(states, merges)
            first = int(state.step)
            if first == task.num_steps:
                return Result(state, merged)
            batches = task.batches(first)
            images = config.num_replicas * config.batch_size
            with (
                MetricsWriter(self.workdir, first or None) as metrics,
                Interruption() as interruption,
                Progress(self.name, task.num_steps, done=first, images_per_step=images) as progress,
            ):
                late = None
                if first:
                    progress.log(f"{self.name}: goes on from step {first}")
                for step in range(first + 1, task.num_steps + 1):
                    batch = sharding.put_batch(self.mesh, next(batches))
                    state, values = self.step(state, batch)
                    # Reading a step's metrics before the next is dispatched would stall the device.
                    if late is not None:
                        self._log(metrics, progress, *late)
                    due = step % config.log_every == 0 or step == task.num_steps
                    late = (step, values) if due else None
                    progress.update(step)
                    at_end = step == task.num_steps
                    if self.merge_steps and (step % self.merge_steps == 0 or at_end):
                        state, merged, stats = self.merges[at_end](self.anchor, state)
                        self._record_merge(metrics, step, stats)
                        merges.save(step, merged)
                        saving = True
                    else:
                        saving = step % keep.every == 0 or at_end
                    if saving or interruption.requested:
                        if late is not None:
                            self._log(metrics, progress, *late)
                            late = None
                        metrics.flush()
                        # The merged model first: a state is never newer than its merge.
                        merges.wait()
                        states.save(step, _saved(state))
                    if interruption.requested and not at_end:
                        states.wait()
                        progress.log(
                            f"{self.name}: stopped at step {step}; the same command goes on from it"
                        )
                        raise SystemExit(STOPPED)
        return Result(state, merged)

    def _restore(self, states: Checkpoints, merges: Checkpoints) -> tuple[TrainState, PyTree]:
        state, merged = self.start(self.task.params), None
        if states.steps:
            step = states.steps[-1]
            state = state._replace(**states.restore(step, _saved(state)))
            done = [s for s in merges.steps if s <= step]
            if self.merge_steps and done:
                merged = merges.restore(done[-1], self.anchor)
        return state, merged

    def _log(self, metrics: MetricsWriter, progress: Progress, step: int, values) -> None:
        values = {name: np.asarray(value) for name, value in values.items()}
        for replica, loss in enumerate(values["loss"]):
            if not np.isfinite(loss):
                raise UserError(
                    f"replica {replica} diverged: its loss is {loss} at step {step}; lower "
                    "optimizer.learning_rate. The last checkpoint is untouched"
                )
        scalars = {
            f"train/{name}/replica_{r}": float(x)
            for name, v in values.items()
            for r, x in enumerate(v)
        }
        metrics.write(step, scalars)
        progress.update(step, {name: values[name].mean() for name in ("loss", "accuracy")})

    def _record_merge(self, metrics: MetricsWriter, step: int, stats: Stats) -> None:
        stats = jax.device_get(stats)
        check_finite(stats)
        values = {"merge/epoch": step / self.task.steps_per_epoch}
        for row in report(stats):
            values[f"merge/cosine/{row['name']}"] = row["cosine"]
            values[f"merge/ratio/{row['name']}"] = row["ratio"]
        metrics.write(step, values)


def _saved(state: TrainState) -> dict[str, PyTree]:
    return {name: value for name, value in state._asdict().items() if value is not None}
