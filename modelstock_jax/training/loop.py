"""The loop: batches in, steps and merges on the device, checkpoints and metrics out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from modelstock_jax.errors import UserError
from modelstock_jax.reporting.timeline import Timeline
from modelstock_jax.training.hosts.distributed import in_order
from modelstock_jax.training.hosts.interruption import STOPPED, Interruption
from modelstock_jax.training.merge import steps_between_merges
from modelstock_jax.training.monitoring.record import Record
from modelstock_jax.training.persistence.stores import Stores
from modelstock_jax.training.programs import Programs
from modelstock_jax.training.sharding import put_batch
from modelstock_jax.training.state import TrainState

PyTree = Any


@dataclass(frozen=True)
class Result:
    """The end of a run: its state, and the last merged weights (None where none merged)."""

    state: TrainState
    merged: PyTree


class Trainer:
    """One training run: its seed, its data, when it merges and where it is kept."""

    def __init__(
        self,
        config: ConfigDict,
        programs: Programs,
        batches: Callable[[int], Iterator[dict[str, np.ndarray]]],
        workdir: str | Path,
        name: str,
        timeline: Timeline | None = None,
        title: str | None = None,
    ) -> None:
        """Checks the options; nothing is read or written yet.

        Args:
          config: the run's options; its seed and `merge.every` are this run's own.
          programs: compiled for this task, and shared with other runs.
          batches: start_step -> endless batches {name: [R, B, ...]}, restored by that number.
          workdir: the run lies in workdir/runs/name.
          name: the run's directory.
          timeline: where the time of all runs in workdir goes.
          title: as progress shows it, where that is not the name.

        Raises:
          UserError: if there is nothing to merge with, or no such time to merge.
        """
        self.config, self.programs, self.title = config, programs, title or name
        self.task, self.batches = programs.task, batches
        self.workdir = Path(workdir) / "runs" / name
        self.timeline = timeline or Timeline(None)
        self.merge_steps = steps_between_merges(
            str(config.merge.every), self.task.steps_per_epoch, self.task.num_steps
        )
        if self.merge_steps and config.num_replicas < 2:
            raise UserError(
                f"num_replicas={config.num_replicas}: a merge needs at least 2 replicas; "
                "set --config.num_replicas=2 or --config.merge.every=never"
            )

    def run(self) -> Result:
        """Trains from the newest checkpoint, or from the anchor, to the end.

        Raises:
          UserError: on a non-finite loss, gradient or weight, or a workdir that cannot be written.
          SystemExit: after SIGTERM, once the state is saved.
        """
        config, programs, timeline = self.config, self.programs, self.timeline
        last = self.task.num_steps
        with Stores(self.workdir, config, programs, self.merge_steps, timeline) as stores:
            anchor, state, merged = stores.restore()
            first = int(state.step)
            if first == last:
                return Result(state, merged)
            batches = self.batches(first)
            with (
                Record(config, self.task, self.workdir, self.title, first, timeline) as record,
                Interruption() as interruption,
            ):
                reference = programs.reference(anchor, merged)
                for step in range(first + 1, last + 1):
                    with timeline.phase("data"):
                        batch = put_batch(programs.mesh, next(batches))
                    with timeline.phase("train"):
                        state, values = in_order(programs.step(state, batch, reference))
                        record.step(step, values)
                    merging = self.merge_steps and (step % self.merge_steps == 0 or step == last)
                    stopping = interruption.granted(step)
                    saving = step % config.checkpoint.every == 0 or step == last
                    if not (merging or saving or stopping):
                        continue
                    with timeline.phase("train"):
                        record.settle()
                    if merging:
                        with timeline.phase("merge", step):
                            merge = programs.merge[step == last]
                            state, merged, stats = in_order(merge(anchor, state))
                            record.merge(step, stats)
                        reference = programs.reference(anchor, merged)
                        stores.save_merged(step, merged)
                    record.flush()
                    stores.save(step, state)
                    if stopping:
                        stores.wait()
                        record.log(
                            f"{self.title}: stopped at step {step}; the same command goes on "
                            "from it"
                        )
                        raise SystemExit(STOPPED)
                record.finish(last)
        return Result(state, merged)
