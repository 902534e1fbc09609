"""What a run keeps on the disk to go on from: its anchor, its states and its merged models."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from ml_collections import ConfigDict

from modelstock_jax.reporting.timeline import Timeline
from modelstock_jax.training.persistence.checkpoints import Checkpoints
from modelstock_jax.training.persistence.resume import keep_anchor, resume
from modelstock_jax.training.programs import Programs
from modelstock_jax.training.state import TrainState

PyTree = Any


class Stores:
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
        programs: Programs,
        merge_steps: int,
        timeline: Timeline,
    ) -> None:
        self._workdir, self._seed, self._keep = workdir, config.seed, config.checkpoint
        self._programs, self._merge_steps, self._timeline = programs, merge_steps, timeline

    def __enter__(self) -> Stores:
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
        programs, num_steps = self._programs, self._programs.task.num_steps
        with self._timeline.phase("restore"):
            place, fingerprint = self._workdir / "anchor", programs.task.fingerprint
            anchor = keep_anchor(place, programs.anchor, fingerprint)
            like = programs.abstract_state
            always = programs.reference().last_merged is not None
            found, merged = resume(
                self._states,
                self._merges,
                saved(like),
                programs.abstract_anchor,
                self._last_merge,
                needs_merged=lambda step: always or step == num_steps,
            )
            if found is None:
                return anchor, programs.start(self._seed), None
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
        if not self._merge_steps or step == self._programs.task.num_steps:
            return step if self._merge_steps else 0
        return step - step % self._merge_steps


def saved(state: TrainState) -> dict[str, PyTree]:
    """What of a state a checkpoint holds: the parts that there are, by name."""
    return {name: value for name, value in state._asdict().items() if value is not None}
