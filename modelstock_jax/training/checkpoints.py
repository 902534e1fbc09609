"""Orbax behind one thin module: checkpoints with digests, and where a run goes on from them."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import logging
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import CoroutineType
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint.experimental import v1 as ocp

from modelstock_jax.errors import UserError
from modelstock_jax.merging.gram import PyTree
from modelstock_jax.training import array_checksums
from modelstock_jax.training.array_checksums import describe_leaves, named_leaves
from modelstock_jax.training.multihost import any_process, barrier, is_main

# The parts of a checkpoint: Orbax renames their folder into place, so both are there or neither.
_TREE, _DIGESTS = "tree", "digests"


class Checkpoints:
    """Numbered checkpoints of one pytree under `directory`, saved while training goes on.

    A save is written beside and renamed by Orbax, so a kill at any instant leaves the one
    before it whole. The digests of every leaf (`array_checksums.tree_checksum`) are saved with it, and
    what is restored is checked against them: TensorStore alone returns most flipped bits as data.

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
        packs = array_checksums.plan_packs(tree)
        leaves = array_checksums.describe_leaves(tree)
        record = {"leaves": leaves, "packs": packs, "details": dict(details or {})}
        saved = array_checksums.pack(tree, packs)
        document = {"record": record, "sha256": array_checksums.json_checksum(record)}
        try:
            saving = self._checkpointer.save_checkpointables_async(
                step, {_TREE: saved, _DIGESTS: document}, force=True, overwrite=step in self.steps
            )
        except (OSError, ValueError) as error:
            raise write_error(self.directory, error) from error
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
            raise write_error(self.directory, error) from error

    def metadata(self, step: int) -> dict[str, Any]:
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
            if has_only_item(self.directory / str(step), _TREE):
                raise UserError(
                    f"checkpoint {self.directory / str(step)} was saved by an older version, "
                    "without digests, so that damage to it would not be seen; go on with the "
                    "version that saved it, or choose another --workdir"
                )
            raise self._damaged(step, reason)
        if document.get("sha256") != array_checksums.json_checksum(document.get("record")):
            raise self._damaged(step, "its digests are not as they were written")
        return document["record"]

    def restore(self, step: int, abstract_tree: PyTree) -> PyTree:
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
            tree = self._restore(step, abstract_tree)
        except CorruptCheckpoint as error:
            problem = error
        if jax.process_count() > 1 and any_process(problem is not None):
            problem = problem or self._damaged(step, "another process could not read it")
        if problem is not None:
            raise problem
        return tree

    def restore_newest(self, abstract_tree: PyTree, max_step: int | None = None) -> tuple[int, PyTree] | None:
        """Restores the newest checkpoint that is whole; sets those that are damaged aside.

        Args:
          like: as for `restore`.
          at_most: the newest step to look at; None looks at all.

        Returns:
          (step, tree), or None where nothing was saved up to `at_most`.

        Raises:
          UserError: if there were checkpoints and none is whole, or one holds another structure.
        """
        newest = math.inf if max_step is None else max_step
        for step in sorted((step for step in self.steps if step <= newest), reverse=True):
            try:
                return step, self.restore(step, abstract_tree)
            except CorruptCheckpoint as error:
                self.quarantine(step, error)
        if any(step <= newest for step in quarantined_steps(self.directory)):
            raise UserError(
                f"no checkpoint in {self.directory} is whole; put back a copy of one, or remove "
                f"{self.directory.parent} to train from the start"
            )
        return None

    def quarantine(self, step: int, why: Exception) -> None:
        """Renames a damaged checkpoint, so that it is never read again, and says so."""
        if is_main():
            place = quarantine(self.directory / str(step))
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
        record = self.metadata(step)
        saved = record["leaves"]
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        leaves = array_checksums.named_leaves(abstract).items()
        asked = {name: [x.dtype.name, list(x.shape)] for name, x in leaves}
        other = [n for n in sorted(asked.keys() | saved) if asked.get(n) != saved.get(n, [])[:2]]
        if other:
            raise UserError(
                f"checkpoint {self.directory / str(step)} is of another structure, from {other[0]}"
                " on; give the options that it was saved with, or choose another --workdir"
            )
        packs = record.get("packs")  # Of older checkpoints, None: each array by itself.
        packs = packs and {name: array_checksums.Pack(*one) for name, one in packs.items()}
        loaded, reason = self._load(step, _TREE, array_checksums.abstract_packed(abstract, packs))
        if loaded is None:
            raise self._damaged(step, reason)
        tree = array_checksums.unpack(loaded, abstract, packs)
        digests = array_checksums.tree_checksum(tree)
        changed = [n for n, digest in digests.items() if digest != saved[n][2]]
        if changed:
            raise self._damaged(step, f"{changed[0]} is not as it was saved")
        return tree

    def _load(self, step: int, part: str, like: Any) -> tuple[Any, str]:
        """A part of a checkpoint; or None, and the reason in one line."""
        with suppress_orbax_output():
            try:
                return self._checkpointer.load_checkpointables(step, {part: like})[part], ""
            except Exception as error:  # Orbax, TensorStore and asyncio each raise their own kinds.
                reason = first_line(error)
            wait_for_abandoned_reads()
        return None, reason

    def _damaged(self, step: int, reason: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(f"checkpoint {self.directory / str(step)} is damaged ({reason})")


# Where a run goes on: the anchor that it began with, and the newest state that is whole.

# Of a tensor's largest element: bfloat16 rounds by 2^-8 = 4e-3. Other weights differ far more.
_ROUNDING = 1e-2


def save_or_check_anchor(directory: Path, anchor: PyTree, fingerprint: str = "") -> PyTree:
    """Saves the anchor when a run begins; later, makes sure that it is still the same.

    What is computed of it (a zero-shot head) may come out rounded otherwise on another machine:
    where the fingerprints are the same, the run goes on with the anchor that it began with.

    Args:
      directory: where it is kept, with its digests and fingerprint.
      anchor: the weights that the config gives now, on their devices.
      fingerprint: of the pretrained checkpoint that they come from; "" where there is none.

    Returns:
      The anchor of the run: `anchor`, or the saved one where they differ by rounding.

    Raises:
      UserError: if other weights, or another head, are now where the run's anchor was.
    """
    with Checkpoints(directory, keep=1) as kept:
        if kept.steps:
            try:
                return _same(kept, anchor, fingerprint)
            except CorruptCheckpoint as error:
                kept.quarantine(0, error)
        kept.save(0, anchor, details={"fingerprint": fingerprint})
    return anchor


def _same(kept: Checkpoints, anchor: PyTree, fingerprint: str) -> PyTree:
    record, now = kept.metadata(0), describe_leaves(anchor)
    before, same_files = record["leaves"], record["details"]["fingerprint"] == fingerprint
    changed = [n for n in sorted(before.keys() | now) if before.get(n) != now.get(n)]
    if not changed and same_files:
        return anchor
    alike = [n for n in changed if before.get(n, [])[:2] == now.get(n, [])[:2]]
    if fingerprint and same_files and alike == changed:
        saved = kept.restore(0, anchor)
        ours, theirs = named_leaves(anchor), named_leaves(saved)
        if all(_close(ours[n], theirs[n]) for n in changed):
            return saved
    what = f"{len(changed)} tensors, from {changed[0]} on" if changed else "the text tower"
    raise UserError(
        f"the pretrained weights or their head are not those that this run began with: {what}, "
        f"changed; give the same ones (see {kept.directory}), or choose another --workdir"
    )


def _close(a: jax.Array, b: jax.Array) -> bool:
    """Whether the two differ by rounding alone."""
    return bool(jnp.max(jnp.abs(a - b)) <= _ROUNDING * jnp.max(jnp.abs(b)))


def resume(
    states: Checkpoints,
    merges: Checkpoints,
    state_like: PyTree,
    merged_like: PyTree,
    last_merge: Callable[[int], int],
    needs_merged: Callable[[int], bool],
) -> tuple[PyTree, PyTree]:
    """The newest training state that is whole, and the last merged model before it.

    Where that merged model is damaged or missing, and needed, an older state makes it again.

    Args:
      states: the run's training states.
      merges: its merged models.
      state_like: shapes, dtypes and places of a state.
      merged_like: those of a merged model.
      last_merge: step -> the step of the last merge up to it; 0 where there is none.
      needs_merged: step -> whether a run that goes on from there reads its last merged model.

    Returns:
      (state, merged); None each where there is none.

    Raises:
      UserError: if there were states and none can be gone on from.
    """
    at_most = None
    while (found := states.restore_newest(state_like, at_most)) is not None:
        step, state = found
        merge = last_merge(step)
        if merge in merges.steps:
            try:
                return state, merges.restore(merge, merged_like)
            except CorruptCheckpoint as error:
                merges.quarantine(merge, error)
        if not merge or not needs_merged(step):
            return state, None
        del found, state  # An older one takes its place in memory.
        at_most = merge - 1
        if is_main():
            print(f"the merge of step {merge} is made again, from the state before it", flush=True)
    if at_most is not None:
        raise UserError(
            f"the merged model {at_most + 1} in {merges.directory} is not whole, and no training "
            "state from before it is kept; put back a copy of it, or remove "
            f"{merges.directory.parent} to train from the start"
        )
    return None, None


# Damaged checkpoints and full disks: their errors; names that are never read again.

_SUFFIX = ".damaged"  # Not a number, so Orbax takes no such folder for a step.


class CorruptCheckpoint(UserError):
    """A checkpoint that is not, bit for bit, what was saved."""


def quarantine(folder: Path) -> Path:
    """Renames the folder of a step; returns its new name.

    Raises:
      UserError: if it cannot be renamed.

    Example:
      >>> import tempfile
      >>> step = Path(tempfile.mkdtemp()) / "12"
      >>> step.mkdir()
      >>> quarantine(step).name, list(quarantined_steps(step.parent))
      ('12.damaged', [12])
    """
    place, number = folder.with_name(f"{folder.name}{_SUFFIX}"), 1
    while place.exists():
        number += 1
        place = folder.with_name(f"{folder.name}{_SUFFIX}.{number}")
    try:
        return folder.rename(place)
    except OSError as error:
        raise UserError(f"cannot rename {folder} to {place.name}: {error.strerror}") from error


def quarantined_steps(directory: Path) -> list[int]:
    """The steps whose folders were put aside, ascending."""
    names = [path.name.partition(_SUFFIX)[0] for path in directory.glob(f"*{_SUFFIX}*")]
    return sorted(int(name) for name in names if name.isdigit())


def write_error(directory: Path, error: Exception) -> UserError:
    """The error of a checkpoint that could not be written: the disk, mostly."""
    free = shutil.disk_usage(directory).free / 1e6
    return UserError(
        f"cannot write a checkpoint under {directory} ({free:.0f} MB free): {first_line(error)}; "
        "make room or choose another --workdir, and the same command goes on"
    )


def first_line(error: Exception) -> str:
    """What an error says first."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


@contextlib.contextmanager
def suppress_orbax_output() -> Iterator[None]:
    """Keeps the traces of reads that Orbax gives up, when another one fails, from the screen."""
    log, hook = logging.getLogger("asyncio"), sys.unraisablehook
    log.disabled, sys.unraisablehook = True, lambda _: None
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        log.disabled, sys.unraisablehook = False, hook


def wait_for_abandoned_reads(timeout: float = 10.0) -> None:
    """Collects the reads that Orbax gave up, as each of them ends; `quiet` is to be around it.

    TensorStore goes on with a read that nobody awaits any more, and holds it. What it lets go of
    later would leave its trace in the midst of something else.

    Args:
      timeout: seconds after which what is still held is left to itself.
    """
    until = time.monotonic() + timeout
    gc.collect()
    while any(map(_is_read, gc.get_objects())) and time.monotonic() < until:
        time.sleep(0.02)
        gc.collect()


def _is_read(one: Any) -> bool:
    # Not isinstance: it asks a proxy for its class, which fails where what it stood for is gone.
    return (
        type(one) is CoroutineType
        and one.__name__.startswith("_read_")
        and "orbax" in one.cr_code.co_filename
    )


def has_only_item(folder: Path, part: str) -> bool:
    """Whether a checkpoint was saved with this part and no other; False where that is unknown."""
    try:
        said = json.loads((folder / "_CHECKPOINT_METADATA").read_text())["item_handlers"]
    except (OSError, ValueError, KeyError):
        return False
    return set(said) == {part} and {one.name for one in folder.iterdir() if one.is_dir()} <= {part}
