"""The training loop: train steps, merges, checkpoints and metrics of one run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType

import jax
import numpy as np
from ml_collections import ConfigDict

from modelstock_jax.errors import UserError
from modelstock_jax.merging.trees import PyTree
from modelstock_jax.reporting.timeline import Timeline
from modelstock_jax.training.checkpoints import Checkpoints, resume, save_or_check_anchor
from modelstock_jax.training.launcher import STOPPED, PreemptionHandler
from modelstock_jax.training.merge_step import steps_between_merges
from modelstock_jax.training.metrics import TrainLogger
from modelstock_jax.training.multihost import block_on_multihost_cpu
from modelstock_jax.training.sharding import put_batch
from modelstock_jax.training.state import TrainState
from modelstock_jax.training.step_fns import StepFunctions
from modelstock_jax.training.train_step import Batch

TRANSFER_GUARDS = ("allow", "log", "disallow")


@dataclass(frozen=True)
class Result:
    """The result of a run.

    Attributes:
      state: the final training state
      merged: the last merged parameters; None if the run never merged
    """

    state: TrainState
    merged: PyTree


class Trainer:
    """One training run."""

    def __init__(
        self,
        config: ConfigDict,
        step_functions: StepFunctions,
        batches: Callable[[int], Iterator[dict[str, np.ndarray]]],
        workdir: str | Path,
        name: str,
        timeline: Timeline | None = None,
        title: str | None = None,
        prepare: Callable[[Batch], Batch] = lambda batch: batch,
    ) -> None:
        """Check the options; nothing is read or written yet.

        Args:
          config: options of the run; `seed` and `merge.every` may differ from those of
            `step_functions`
          step_functions: jitted functions for this task, shared with other runs
          batches: start_step -> endless batches {name: [R, B, ...]} from this step
          workdir: the run is stored in workdir/runs/name
          name: directory of the run
          timeline: records the time of all runs in workdir
          title: name in progress output; None uses `name`
          prepare: the last step of the input on the devices: global batch -> batch of the train
            step

        Raises:
          UserError: if `merge.every` is invalid, or there is only one replica to merge
        """
        self.config, self.step_functions, self.title = config, step_functions, title or name
        self.task, self.batches, self.prepare = step_functions.task, batches, prepare
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
        """Train from the newest checkpoint, or from the anchor, to the last step.

        Raises:
          UserError: if a loss, gradient or parameter is not finite, or workdir cannot be written
          SystemExit: after SIGTERM, when the state is saved
        """
        config, fns, timeline = self.config, self.step_functions, self.timeline
        last = self.task.num_steps
        with RunCheckpoints(self.workdir, config, fns, self.merge_steps, timeline) as checkpoints:
            anchor, state, merged = checkpoints.restore()
            start = int(state.step)
            if start == last:
                return Result(state, merged)
            batches = self.batches(start)
            with (
                TrainLogger(config, self.task, self.workdir, self.title, start, timeline) as logger,
                PreemptionHandler() as preemption,
            ):
                constants = fns.step_constants(anchor, merged)
                for step in range(start + 1, last + 1):
                    with self._phase("data"):
                        batch = self.prepare(put_batch(fns.mesh, next(batches)))
                    with self._phase("train"):
                        state, metrics = block_on_multihost_cpu(
                            fns.train_step(state, batch, constants)
                        )
                        logger.log_step(step, metrics)
                    merge = self.merge_steps and (step % self.merge_steps == 0 or step == last)
                    stop = preemption.should_stop(step)
                    save = step % config.checkpoint.save_every_steps == 0 or step == last
                    if not (merge or save or stop):
                        continue
                    with self._phase("train"):
                        logger.flush_pending()
                    if merge:
                        with self._phase("merge", step):
                            state, merged, stats = block_on_multihost_cpu(
                                fns.merge_step[step == last](anchor, state)
                            )
                            logger.log_merge(step, stats)
                        constants = fns.step_constants(anchor, merged)
                        checkpoints.save_merged(step, merged)
                    logger.flush()
                    checkpoints.save(step, state)
                    if stop:
                        checkpoints.wait()
                        logger.log(
                            f"{self.title}: stopped and saved at step {step}; run the same command "
                            "again to resume"
                        )
                        raise SystemExit(STOPPED)
                logger.finish(last)
        return Result(state, merged)

    @contextlib.contextmanager
    def _phase(self, name: str, step: int | None = None) -> Iterator[None]:
        """Record a phase, with the guard of `monitor.transfer_guard`; saving is not guarded."""
        with (
            self.timeline.phase(name, step),
            jax.transfer_guard(self.config.monitor.transfer_guard),
        ):
            yield


class RunCheckpoints:
    """The checkpoints of one run: its anchor, training states and merged models.

    Saves are asynchronous. The timeline records when a save starts and ends on disk; of its
    seconds, it counts those that training waits for.

    Args:
      workdir: directory of the run
      config: options of the run
      step_functions: define the structure and sharding of the state
      merge_steps: steps between merges; 0 if the replicas are never merged
      timeline: records the time
    """

    def __init__(
        self,
        workdir: Path,
        config: ConfigDict,
        step_functions: StepFunctions,
        merge_steps: int,
        timeline: Timeline,
    ) -> None:
        self._workdir, self._seed, self._config = workdir, config.seed, config.checkpoint
        self._step_functions, self._merge_steps = step_functions, merge_steps
        self._timeline = timeline

    def __enter__(self) -> RunCheckpoints:
        keep, keep_merged = self._config.keep, self._config.keep_merged
        if keep_merged:  # Every state that is kept needs the merge before it.
            keep_merged = max(keep_merged, keep + 1) if keep else 0
        with contextlib.ExitStack() as stack:
            self._states = stack.enter_context(Checkpoints(self._workdir / "state", keep))
            merges = merged_directory(self._workdir)
            self._merges = stack.enter_context(Checkpoints(merges, keep_merged))
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._timeline.spend("save"):
            self._exit.__exit__(kind, error, trace)

    def restore(self) -> tuple[PyTree, TrainState, PyTree]:
        """Return (anchor, state, merged) to resume from.

        The state is the newest intact one, or the initial state. `merged` is the last merged model
        before it, or None.

        Raises:
          UserError: if the anchor is not the one the run started with, or no checkpoint is intact
        """
        fns, num_steps = self._step_functions, self._step_functions.task.num_steps
        with self._timeline.phase("restore"):
            anchor = save_or_check_anchor(self._workdir / "anchor", fns.anchor, fns.task.checksum)
            steps_read_merged = fns.step_constants().last_merged is not None
            items, merged = resume(
                self._states,
                self._merges,
                checkpoint_items(fns.abstract_state),
                fns.abstract_anchor,
                self._last_merge,
                needs_merged=lambda step: steps_read_merged or step == num_steps,
            )
            if items is None:
                return anchor, fns.init_state(self._seed), None
            return anchor, fns.abstract_state._replace(**items), merged

    def save_merged(self, step: int, merged: PyTree) -> None:
        """Start saving a merged model. Return as soon as it may be donated."""
        with self._timeline.spend("save"):
            self._save(self._merges, step, merged)

    def save(self, step: int, state: TrainState) -> None:
        """Start saving the state. Return as soon as it may be donated.

        This waits for the save of the merged model, so that a state on disk is never newer than its
        merge.
        """
        with self._timeline.spend("save"):
            self._merges.wait()
            self._save(self._states, step, checkpoint_items(state))

    def wait(self) -> None:
        """Wait until everything is on disk."""
        with self._timeline.spend("save"):
            self._states.wait()

    def _save(self, checkpoints: Checkpoints, step: int, tree: PyTree) -> None:
        self._timeline.begin("save", step)
        checkpoints.save(step, tree, on_saved=partial(self._timeline.end, "save", step))

    def _last_merge(self, step: int) -> int:
        if not self._merge_steps or step == self._step_functions.task.num_steps:
            return step if self._merge_steps else 0
        return step - step % self._merge_steps


def merged_directory(workdir: Path) -> Path:
    """Return the directory of a run's merged models; runs of older versions continue in theirs.

    Args:
      workdir: directory of the run
    """
    old = workdir / "merged"
    return old if old.is_dir() else workdir / "models"


def checkpoint_items(state: TrainState) -> dict[str, PyTree]:
    """Return the fields of a state that a checkpoint stores: those that are not None."""
    return {name: value for name, value in state._asdict().items() if value is not None}
