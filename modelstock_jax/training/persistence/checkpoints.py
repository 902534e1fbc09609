"""Orbax behind one thin module: a sequence of checkpoints in one directory, each with digests."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint.experimental import v1 as ocp

from modelstock_jax.errors import UserError
from modelstock_jax.training.hosts.distributed import anywhere, barrier, is_main
from modelstock_jax.training.persistence import digests, packing
from modelstock_jax.training.persistence.damage import (
    DamagedCheckpoint,
    damaged_steps,
    end_given_up_reads,
    holds_only,
    one_line,
    put_aside,
    quiet,
    unwritable,
)

PyTree = Any
# The parts of a checkpoint: Orbax renames their folder into place, so both are there or neither.
_TREE, _DIGESTS = "tree", "digests"


class Checkpoints:
    """Numbered checkpoints of one pytree under `directory`, saved while training goes on.

    A save is written beside and renamed by Orbax, so a kill at any instant leaves the one
    before it whole. The digests of every leaf (`digests.tree_digest`) are saved with it, and what
    is restored is checked against them: TensorStore alone returns most flipped bits as data.

    Args:
      directory: made if missing.
      keep: how many of the newest to keep; 0 keeps all.
      read_only: nothing is written or tidied up: another process may be saving there.
    """

    def __init__(self, directory: str | Path, keep: int = 2, *, read_only: bool = False) -> None:
        self.directory = Path(directory).absolute()
        self._saving: ocp.AsyncResponse | None = None
        registry = ocp.handlers.local_registry()
        registry.add(ocp.handlers.JsonHandler, checkpointable_name=_DIGESTS)
        # All of them without a number. Any: Orbax's own annotations of a policy do not agree.
        newest: Any = ocp.training.preservation_policies.LatestN(keep or None)
        context = ocp.Context()
        context.checkpointables.registry = registry
        context.array.saving.enable_write_sharding_file = False  # `restore` is told where to.
        # Two stores save at once: barriers of one name would meet across them.
        context.multiprocessing.barrier_sync_key_prefix = "-".join(self.directory.parts[-3:])
        try:
            self._checkpointer = ocp.training.Checkpointer(
                str(self.directory),
                context=context,
                preservation_policy=newest,
                cleanup_tmp_directories=not read_only,
            )
        except OSError as error:
            raise UserError(f"cannot keep checkpoints in {self.directory}: {error}") from error

    @property
    def steps(self) -> list[int]:
        """The steps that are there, ascending."""
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    def save(
        self,
        step: int,
        tree: PyTree,
        *,
        details: Mapping[str, Any] | None = None,
        on_saved: Callable[[], None] | None = None,
    ) -> None:
        """Starts saving `tree` as `step`; returns once the arrays may be donated.

        Args:
          step: one that is there is replaced.
          tree: arrays on devices.
          details: what `record` is to give back, as JSON holds it.
          on_saved: called, on a thread of its own, when all of it is on the disk.

        Raises:
          UserError: if this save or the one before it could not be written (a full disk).
        """
        self.wait()  # A step still being written is neither among `steps` nor safe to overwrite.
        packs = packing.plan(tree)
        record = {"leaves": digests.describe(tree), "packs": packs, "details": dict(details or {})}
        saved = packing.pack(tree, packs)
        document = {"record": record, "sha256": digests.json_digest(record)}
        try:
            saving = self._checkpointer.save_checkpointables_async(
                step, {_TREE: saved, _DIGESTS: document}, force=True, overwrite=step in self.steps
            )
        except (OSError, ValueError) as error:
            raise unwritable(self.directory, error) from error
        self._saving = saving
        if saving is not None and on_saved is not None:
            saving.on_complete(lambda _: on_saved())

    def wait(self) -> None:
        """Waits until every save is on disk.

        Raises:
          UserError: if one could not be written.
        """
        saving, self._saving = self._saving, None
        try:
            if saving is not None:
                saving.result()  # Else its thread and its three files stay open for ever.
            self._checkpointer.wait()
        except (OSError, ValueError) as error:
            raise unwritable(self.directory, error) from error

    def record(self, step: int) -> dict[str, Any]:
        """What was saved: "leaves", {name: [dtype, shape, digest]}, "packs" and "details".

        Raises:
          DamagedCheckpoint: if that cannot be read or is not as it was written.
          UserError: if there is no such checkpoint, or it was saved without digests.
        """
        if step not in self.steps:
            there = ", ".join(map(str, self.steps)) or "none"
            raise UserError(f"no checkpoint {step} in {self.directory}; there are: {there}")
        document, reason = self._load(step, _DIGESTS, None)
        if document is None:
            if holds_only(self.directory / str(step), _TREE):
                raise UserError(
                    f"checkpoint {self.directory / str(step)} was saved by an older version, "
                    "without digests, so that damage to it would not be seen; go on with the "
                    "version that saved it, or choose another --workdir"
                )
            raise self._damaged(step, reason)
        if document.get("sha256") != digests.json_digest(document.get("record")):
            raise self._damaged(step, "its digests are not as they were written")
        return document["record"]

    def restore(self, step: int, like: PyTree) -> PyTree:
        """Reads checkpoint `step` into the structure, dtypes and shardings of `like`.

        Args:
          step: one of `steps`.
          like: arrays or `jax.ShapeDtypeStruct`s with shardings; of any mesh.

        Raises:
          DamagedCheckpoint: if it cannot be read, or is not bit for bit what was saved.
          UserError: if there is no such checkpoint, or it holds another structure.
        """
        tree = problem = None
        try:
            tree = self._restore(step, like)
        except DamagedCheckpoint as error:
            problem = error
        if jax.process_count() > 1 and anywhere(problem is not None):
            problem = problem or self._damaged(step, "another process could not read it")
        if problem is not None:
            raise problem
        return tree

    def restore_newest(self, like: PyTree, at_most: int | None = None) -> tuple[int, PyTree] | None:
        """Restores the newest checkpoint that is whole; sets those that are damaged aside.

        Args:
          like: as for `restore`.
          at_most: the newest step to look at; None looks at all.

        Returns:
          (step, tree), or None where nothing was saved up to `at_most`.

        Raises:
          UserError: if there were checkpoints and none is whole, or one holds another structure.
        """
        newest = math.inf if at_most is None else at_most
        for step in sorted((step for step in self.steps if step <= newest), reverse=True):
            try:
                return step, self.restore(step, like)
            except DamagedCheckpoint as error:
                self.set_aside(step, error)
        if any(step <= newest for step in damaged_steps(self.directory)):
            raise UserError(
                f"no checkpoint in {self.directory} is whole; put back a copy of one, or remove "
                f"{self.directory.parent} to train from the start"
            )
        return None

    def set_aside(self, step: int, why: Exception) -> None:
        """Renames a damaged checkpoint, so that it is never read again, and says so."""
        if is_main():
            place = put_aside(self.directory / str(step))
            print(f"{why}; set aside as {place.name}", flush=True)
        barrier("set aside")  # No process looks before it is renamed.
        self._checkpointer.reload()

    def close(self) -> None:
        """Waits for the last save and ends Orbax's threads."""
        self.wait()
        self._checkpointer.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            return self.close()
        with contextlib.suppress(OSError, ValueError):  # A save that failed, as was told already.
            self._checkpointer.close()

    def _restore(self, step: int, like: PyTree) -> PyTree:
        record = self.record(step)
        saved = record["leaves"]
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        leaves = digests.named_leaves(abstract).items()
        asked = {name: [x.dtype.name, list(x.shape)] for name, x in leaves}
        other = [n for n in sorted(asked.keys() | saved) if asked.get(n) != saved.get(n, [])[:2]]
        if other:
            raise UserError(
                f"checkpoint {self.directory / str(step)} is of another structure, from {other[0]}"
                " on; give the options that it was saved with, or choose another --workdir"
            )
        packs = record.get("packs")  # Of older checkpoints, None: each array by itself.
        packs = packs and {name: packing.Pack(*one) for name, one in packs.items()}
        loaded, reason = self._load(step, _TREE, packing.abstract(abstract, packs))
        if loaded is None:
            raise self._damaged(step, reason)
        tree = packing.unpack(loaded, abstract, packs)
        changed = [n for n, digest in digests.tree_digest(tree).items() if digest != saved[n][2]]
        if changed:
            raise self._damaged(step, f"{changed[0]} is not as it was saved")
        return tree

    def _load(self, step: int, part: str, like: Any) -> tuple[Any, str]:
        """A part of a checkpoint; or None, and the reason in one line."""
        with quiet():
            try:
                return self._checkpointer.load_checkpointables(step, {part: like})[part], ""
            except Exception as error:  # Orbax, TensorStore and asyncio each raise their own kinds.
                reason = one_line(error)
            end_given_up_reads()
        return None, reason

    def _damaged(self, step: int, reason: str) -> DamagedCheckpoint:
        return DamagedCheckpoint(f"checkpoint {self.directory / str(step)} is damaged ({reason})")
