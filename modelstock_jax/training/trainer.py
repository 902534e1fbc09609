"""The loop: batches in, steps and merges on the device, checkpoints and metrics out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType

import numpy as np
from ml_collections import ConfigDict

from modelstock_jax.errors import UserError
from modelstock_jax.merging.gram import PyTree
from modelstock_jax.reporting.timeline import Timeline
from modelstock_jax.training.checkpoints import Checkpoints, resume, save_or_check_anchor
from modelstock_jax.training.launcher import STOPPED, PreemptionHandler
from modelstock_jax.training.merge_step import steps_between_merges
from modelstock_jax.training.metrics import TrainLogger
from modelstock_jax.training.multihost import block_on_multihost_cpu
from modelstock_jax.training.sharding import put_batch
from modelstock_jax.training.state import TrainState
from modelstock_jax.training.step_fns import StepFunctions


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
        step_functions: StepFunctions,
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
        self.config, self.step_functions, self.title = config, step_functions, title or name
        self.task, self.batches = step_functions.task, batches
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
        config, programs, timeline = self.config, self.step_functions, self.timeline
        last = self.task.num_steps
        with RunCheckpoints(self.workdir, config, programs, self.merge_steps, timeline) as stores:
            anchor, state, merged = stores.restore()
            first = int(state.step)
            if first == last:
                return Result(state, merged)
            batches = self.batches(first)
            with (
                TrainLogger(config, self.task, self.workdir, self.title, first, timeline) as record,
                PreemptionHandler() as interruption,
            ):
                reference = programs.step_constants(anchor, merged)
                for step in range(first + 1, last + 1):
                    with timeline.phase("data"):
                        batch = put_batch(programs.mesh, next(batches))
                    with timeline.phase("train"):
                        state, values = block_on_multihost_cpu(
                            programs.train_step(state, batch, reference)
                        )
                        record.log_step(step, values)
                    merging = self.merge_steps and (step % self.merge_steps == 0 or step == last)
                    stopping = interruption.should_stop(step)
                    saving = step % config.checkpoint.save_every_steps == 0 or step == last
                    if not (merging or saving or stopping):
                        continue
                    with timeline.phase("train"):
                        record.flush_pending()
                    if merging:
                        with timeline.phase("merge", step):
                            merge = programs.merge_step[step == last]
                            state, merged, stats = block_on_multihost_cpu(merge(anchor, state))
                            record.log_merge(step, stats)
                        reference = programs.step_constants(anchor, merged)
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


# What a run keeps on the disk to go on from: its anchor, its states and its merged models.


class RunCheckpoints:
    """The checkpoints of one run, and the time that they take.

    A save goes on while training does. It begins and ends on the timeline as it does on the disk;
    of its seconds, those that training waits for are counted.

    Args:
      workdir: the run's directory.
      config: the run's options.
      programs: know what is saved, and where it lies on the devices.
      merge_steps: steps between merges; 0 where replicas never merge.
      timeline: where time goes.
    """

    def __init__(
        self,
        workdir: Path,
        config: ConfigDict,
        step_functions: StepFunctions,
        merge_steps: int,
        timeline: Timeline,
    ) -> None:
        self._workdir, self._seed, self._keep = workdir, config.seed, config.checkpoint
        self._step_functions, self._merge_steps, self._timeline = step_functions, merge_steps, timeline

    def __enter__(self) -> RunCheckpoints:
        keep = self._keep.keep
        keep_merged = self._keep.keep_merged
        if keep_merged:  # A state that is kept needs the merge before it.
            keep_merged = max(keep_merged, keep + 1) if keep else 0
        with contextlib.ExitStack() as stack:
            self._states = stack.enter_context(Checkpoints(self._workdir / "state", keep))
            self._merges = stack.enter_context(Checkpoints(self._workdir / "merged", keep_merged))
            self._close = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._timeline.spend("save"):
            self._close.__exit__(kind, error, trace)

    def restore(self) -> tuple[PyTree, TrainState, PyTree]:
        """The run's anchor, its newest state that is whole (or its start), and the merge before it.

        Raises:
          UserError: if the anchor is not the one that the run began with, or nothing is whole.
        """
        programs, num_steps = self._step_functions, self._step_functions.task.num_steps
        with self._timeline.phase("restore"):
            place, fingerprint = self._workdir / "anchor", programs.task.fingerprint
            anchor = save_or_check_anchor(place, programs.anchor, fingerprint)
            like = programs.abstract_state
            always = programs.step_constants().last_merged is not None
            found, merged = resume(
                self._states,
                self._merges,
                saved(like),
                programs.abstract_anchor,
                self._last_merge,
                needs_merged=lambda step: always or step == num_steps,
            )
            if found is None:
                return anchor, programs.init_state(self._seed), None
            return anchor, like._replace(**found), merged

    def save_merged(self, step: int, merged: PyTree) -> None:
        """Starts saving a merged model; returns once it may be donated."""
        with self._timeline.spend("save"):
            self._save(self._merges, step, merged)

    def save(self, step: int, state: TrainState) -> None:
        """Starts saving the state; returns once it may be donated.

        The merged model first: a state is never newer than its merge.
        """
        with self._timeline.spend("save"):
            self._merges.wait()
            self._save(self._states, step, saved(state))

    def wait(self) -> None:
        """Waits until all of it is on the disk."""
        with self._timeline.spend("save"):
            self._states.wait()

    def _save(self, store: Checkpoints, step: int, tree: PyTree) -> None:
        self._timeline.begin("save", step)
        store.save(step, tree, on_saved=partial(self._timeline.end, "save", step))

    def _last_merge(self, step: int) -> int:
        if not self._merge_steps or step == self._step_functions.task.num_steps:
            return step if self._merge_steps else 0
        return step - step % self._merge_steps


def saved(state: TrainState) -> dict[str, PyTree]:
    """What of a state a checkpoint holds: the parts that there are, by name."""
    return {name: value for name, value in state._asdict().items() if value is not None}
