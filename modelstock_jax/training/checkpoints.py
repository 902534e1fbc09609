"""Checkpoints with checksums on top of Orbax, and where a run resumes from them."""

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
from modelstock_jax.merging.trees import PyTree
from modelstock_jax.training import array_checksums
from modelstock_jax.training.array_checksums import describe_leaves, named_leaves
from modelstock_jax.training.multihost import any_process, barrier, is_main

# The items of a checkpoint. Orbax renames their directory into place: either both exist or none.
_TREE, _CHECKSUMS = "tree", "digests"
# Suffix of a corrupt checkpoint's directory. Orbax lists only numbers as steps.
_SUFFIX = ".damaged"
# Relative to the largest element of a tensor. bfloat16 rounds by 2^-8 = 4e-3; the weights of a
# different model differ by far more.
_ROUNDING = 1e-2


class CorruptCheckpoint(UserError):
    """A checkpoint whose arrays are not bitwise identical to those that were saved."""


class Checkpoints:
    """Numbered checkpoints of one pytree in a directory, saved asynchronously.

    Orbax writes to a temporary directory and renames it, so that a kill at any time leaves the
    previous checkpoint intact. A checksum of every leaf (`array_checksums.tree_checksum`) is saved
    with it and checked on restore: TensorStore alone returns most flipped bits as data.

    Args:
      directory: created if missing
      keep: number of newest checkpoints to keep; 0 keeps all
      read_only: write and delete nothing, because another process may be saving there
    """

    def __init__(self, directory: str | Path, keep: int = 2, *, read_only: bool = False) -> None:
        self.directory = Path(directory).absolute()
        self._saving: ocp.AsyncResponse | None = None
        registry = ocp.handlers.local_registry()
        registry.add(ocp.handlers.JsonHandler, checkpointable_name=_CHECKSUMS)
        # LatestN(None) keeps all. Typed Any because Orbax's annotations of policies disagree.
        preservation_policy: Any = ocp.training.preservation_policies.LatestN(keep or None)
        context = ocp.Context()
        context.checkpointables.registry = registry
        # `restore` is given the shardings.
        context.array.saving.enable_write_sharding_file = False
        # Two directories may be saved at the same time: barriers of the same name would mix.
        context.multiprocessing.barrier_sync_key_prefix = "-".join(self.directory.parts[-3:])
        try:
            self._checkpointer = ocp.training.Checkpointer(
                str(self.directory),
                context=context,
                preservation_policy=preservation_policy,
                cleanup_tmp_directories=not read_only,
            )
        except OSError as error:
            raise UserError(
                f"cannot store checkpoints in {self.directory} ({error}); choose another --workdir"
            ) from error

    @property
    def steps(self) -> list[int]:
        """The saved steps, ascending."""
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    def save(
        self,
        step: int,
        tree: PyTree,
        *,
        details: Mapping[str, Any] | None = None,
        on_saved: Callable[[], None] | None = None,
    ) -> None:
        """Start saving `tree` as `step`. Return as soon as the arrays may be donated.

        Args:
          step: step number; an existing checkpoint of this step is replaced
          tree: arrays on devices
          details: JSON values that `metadata` returns
          on_saved: called in another thread when the checkpoint is on disk

        Raises:
          UserError: if this save or the previous one could not be written (full disk)
        """
        self.wait()  # A step that is still being written is not in `steps` and cannot be replaced.
        packs = array_checksums.plan_packs(tree)
        leaves = array_checksums.describe_leaves(tree)
        record = {"leaves": leaves, "packs": packs, "details": dict(details or {})}
        arrays = array_checksums.pack(tree, packs)
        document = {"record": record, "sha256": array_checksums.json_checksum(record)}
        try:
            saving = self._checkpointer.save_checkpointables_async(
                step,
                {_TREE: arrays, _CHECKSUMS: document},
                force=True,
                overwrite=step in self.steps,
            )
        except (OSError, ValueError) as error:
            raise write_error(self.directory, error) from error
        self._saving = saving
        if saving is not None and on_saved is not None:
            saving.on_complete(lambda _: on_saved())

    def wait(self) -> None:
        """Wait until every save is on disk.

        Raises:
          UserError: if a save could not be written
        """
        saving, self._saving = self._saving, None
        try:
            if saving is not None:
                saving.result()  # Otherwise its thread and its three files stay open.
            self._checkpointer.wait()
        except (OSError, ValueError) as error:
            raise write_error(self.directory, error) from error

    def metadata(self, step: int) -> dict[str, Any]:
        """Return what was saved.

        Returns:
          "leaves": {name: [dtype, shape, checksum]}; "packs": see `array_checksums.plan_packs`;
          "details": see `save`

        Raises:
          CorruptCheckpoint: if the metadata is unreadable or was changed
          UserError: if the checkpoint does not exist, or has no checksums
        """
        if step not in self.steps:
            available = ", ".join(map(str, self.steps)) or "none"
            raise UserError(f"no checkpoint {step} in {self.directory}; available: {available}")
        document, reason = self._load(step, _CHECKSUMS, None)
        if document is None:
            if has_only_item(self.directory / str(step), _TREE):
                raise UserError(
                    f"checkpoint {self.directory / str(step)} was saved by an older version, "
                    "without checksums (digests), so damage cannot be detected; resume with that "
                    "version, or choose another --workdir"
                )
            raise self._corrupt(step, reason)
        if document.get("sha256") != array_checksums.json_checksum(document.get("record")):
            raise self._corrupt(step, "its checksums are not those that were saved")
        return document["record"]

    def restore(self, step: int, abstract_tree: PyTree) -> PyTree:
        """Restore checkpoint `step` with the structure, dtypes and shardings of `abstract_tree`.

        Args:
          step: one of `steps`
          abstract_tree: arrays or `jax.ShapeDtypeStruct`s with shardings, on any mesh

        Raises:
          CorruptCheckpoint: if the checkpoint is unreadable, or not bitwise what was saved
          UserError: if the checkpoint does not exist, or has another structure
        """
        tree = error = None
        try:
            tree = self._restore(step, abstract_tree)
        except CorruptCheckpoint as corrupt:
            error = corrupt
        if jax.process_count() > 1 and any_process(error is not None):
            error = error or self._corrupt(step, "another process could not read it")
        if error is not None:
            raise error
        return tree

    def restore_newest(
        self, abstract_tree: PyTree, max_step: int | None = None
    ) -> tuple[int, PyTree] | None:
        """Restore the newest intact checkpoint; quarantine corrupt ones.

        Args:
          abstract_tree: see `restore`
          max_step: newest step to consider; None considers all

        Returns:
          (step, tree), or None if nothing was saved up to `max_step`

        Raises:
          UserError: if checkpoints exist but none is intact, or one has another structure
        """
        limit = math.inf if max_step is None else max_step
        for step in sorted((step for step in self.steps if step <= limit), reverse=True):
            try:
                return step, self.restore(step, abstract_tree)
            except CorruptCheckpoint as error:
                self.quarantine(step, error)
        if any(step <= limit for step in quarantined_steps(self.directory)):
            raise UserError(
                f"no checkpoint in {self.directory} is intact; restore a backup of one, or delete "
                f"{self.directory.parent} to train from the start"
            )
        return None

    def quarantine(self, step: int, reason: Exception) -> None:
        """Rename a corrupt checkpoint, so that it is never read again, and print a warning."""
        if is_main():
            path = quarantine(self.directory / str(step))
            print(f"{reason}; renamed to {path.name}", flush=True)
        barrier("quarantined")  # No process lists the directory before the rename.
        self._checkpointer.reload()

    def close(self) -> None:
        """Wait for the last save and stop Orbax's threads."""
        self.wait()
        self._checkpointer.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            return self.close()
        with contextlib.suppress(OSError, ValueError):  # A failed save, already reported.
            self._checkpointer.close()

    def _restore(self, step: int, abstract_tree: PyTree) -> PyTree:
        metadata = self.metadata(step)
        saved = metadata["leaves"]
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), abstract_tree
        )
        leaves = array_checksums.named_leaves(abstract).items()
        expected = {name: [x.dtype.name, list(x.shape)] for name, x in leaves}
        different = [
            name
            for name in sorted(expected.keys() | saved)
            if expected.get(name) != saved.get(name, [])[:2]
        ]
        if different:
            name = different[0]
            raise UserError(
                f"checkpoint {self.directory / str(step)} has another structure: {name} is "
                f"{_dtype_shape(saved.get(name))} in the checkpoint and "
                f"{_dtype_shape(expected.get(name))} in this run; use the options that it was "
                "saved with, or choose another --workdir"
            )
        packs = metadata.get("packs")  # None in older checkpoints, which saved every array alone.
        packs = packs and {name: array_checksums.Pack(*fields) for name, fields in packs.items()}
        arrays, reason = self._load(step, _TREE, array_checksums.abstract_packed(abstract, packs))
        if arrays is None:
            raise self._corrupt(step, reason)
        tree = array_checksums.unpack(arrays, abstract, packs)
        checksums = array_checksums.tree_checksum(tree)
        changed = [name for name, checksum in checksums.items() if checksum != saved[name][2]]
        if changed:
            raise self._corrupt(step, f"checksum mismatch in tensor {changed[0]}")
        return tree

    def _load(self, step: int, item: str, abstract: Any) -> tuple[Any, str]:
        """Return (item of a checkpoint, ""), or (None, the reason of the failure in one line)."""
        with suppress_orbax_output():
            try:
                return self._checkpointer.load_checkpointables(step, {item: abstract})[item], ""
            except Exception as error:  # Orbax, TensorStore and asyncio raise many types.
                reason = first_line(error)
            wait_for_abandoned_reads()
        return None, reason

    def _corrupt(self, step: int, reason: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(f"checkpoint {self.directory / str(step)} is damaged ({reason})")


def _dtype_shape(description: list | None) -> str:
    return f"{description[0]}{description[1]}" if description else "missing"


def save_or_check_anchor(directory: Path, anchor: PyTree, checksum: str = "") -> PyTree:
    """Save the anchor when a run starts; when it resumes, check that the anchor is unchanged.

    Values computed from the checkpoint (a zero-shot head) may round differently on another machine.
    If the checkpoint's checksum is the same, the run then continues with the saved anchor.

    Args:
      directory: where the anchor is saved, with its checksums
      anchor: the parameters from the current config, on their devices
      checksum: checksum of the pretrained checkpoint; "" if there is none

    Returns:
      the anchor of the run: `anchor`, or the saved one if they differ only by rounding

    Raises:
      UserError: if the pretrained parameters or the head differ from those of the run
    """
    with Checkpoints(directory, keep=1) as checkpoints:
        if checkpoints.steps:
            try:
                return _check_anchor(checkpoints, anchor, checksum)
            except CorruptCheckpoint as error:
                checkpoints.quarantine(0, error)
        checkpoints.save(0, anchor, details={"fingerprint": checksum})
    return anchor


def _check_anchor(checkpoints: Checkpoints, anchor: PyTree, checksum: str) -> PyTree:
    metadata, current = checkpoints.metadata(0), describe_leaves(anchor)
    saved, same_checkpoint = metadata["leaves"], metadata["details"]["fingerprint"] == checksum
    changed = [
        name for name in sorted(saved.keys() | current) if saved.get(name) != current.get(name)
    ]
    if not changed and same_checkpoint:
        return anchor
    same_shapes = all(saved.get(n, [])[:2] == current.get(n, [])[:2] for n in changed)
    if checksum and same_checkpoint and same_shapes:
        saved_anchor = checkpoints.restore(0, anchor)
        new, old = named_leaves(anchor), named_leaves(saved_anchor)
        if all(_within_rounding(new[name], old[name]) for name in changed):
            return saved_anchor
    what = (
        f"{len(changed)} tensors changed, the first is {changed[0]}"
        if changed
        else ("the text tower changed")
    )
    raise UserError(
        f"the pretrained weights or their head are not those that this run started with ({what}); "
        f"pass the original ones (saved in {checkpoints.directory}), or choose another --workdir"
    )


def _within_rounding(a: jax.Array, b: jax.Array) -> bool:
    return bool(jnp.max(jnp.abs(a - b)) <= _ROUNDING * jnp.max(jnp.abs(b)))


def resume(
    states: Checkpoints,
    merges: Checkpoints,
    abstract_state: PyTree,
    abstract_merged: PyTree,
    last_merge: Callable[[int], int],
    needs_merged: Callable[[int], bool],
) -> tuple[PyTree, PyTree]:
    """Restore the newest intact training state and the last merged model before it.

    If that merged model is corrupt or missing but needed, restore an older state, from which the
    run repeats the merge.

    Args:
      states: training states of the run
      merges: merged models of the run
      abstract_state: shapes, dtypes and shardings of a state
      abstract_merged: shapes, dtypes and shardings of a merged model
      last_merge: step -> step of the last merge up to it; 0 if there is none
      needs_merged: step -> whether a run that resumes from it reads its last merged model

    Returns:
      (state, merged); each None if there is none

    Raises:
      UserError: if states exist but the run can resume from none of them
    """
    max_step = None
    while (newest := states.restore_newest(abstract_state, max_step)) is not None:
        step, state = newest
        merge = last_merge(step)
        if merge in merges.steps:
            try:
                return state, merges.restore(merge, abstract_merged)
            except CorruptCheckpoint as error:
                merges.quarantine(merge, error)
        if not merge or not needs_merged(step):
            return state, None
        del newest, state  # Free the memory before restoring an older state.
        max_step = merge - 1
        if is_main():
            print(f"repeating the merge of step {merge} from an earlier state", flush=True)
    if max_step is not None:
        raise UserError(
            f"the merged model {max_step + 1} in {merges.directory} is missing or damaged, and "
            "there is no training state before it; restore a backup of it, or delete "
            f"{merges.directory.parent} to train from the start"
        )
    return None, None


def quarantine(directory: Path) -> Path:
    """Rename the directory of a corrupt step and return its new path.

    Raises:
      UserError: if it cannot be renamed

    Example:
      >>> import tempfile
      >>> step = Path(tempfile.mkdtemp()) / "12"
      >>> step.mkdir()
      >>> quarantine(step).name, list(quarantined_steps(step.parent))
      ('12.damaged', [12])
    """
    path, number = directory.with_name(f"{directory.name}{_SUFFIX}"), 1
    while path.exists():
        number += 1
        path = directory.with_name(f"{directory.name}{_SUFFIX}.{number}")
    try:
        return directory.rename(path)
    except OSError as error:
        raise UserError(
            f"cannot rename the damaged checkpoint {directory} to {path.name} ({error.strerror}); "
            "check the permissions of the directory"
        ) from error


def quarantined_steps(directory: Path) -> list[int]:
    """Return the steps that were quarantined, ascending."""
    names = [path.name.partition(_SUFFIX)[0] for path in directory.glob(f"*{_SUFFIX}*")]
    return sorted(int(name) for name in names if name.isdigit())


def write_error(directory: Path, error: Exception) -> UserError:
    """Return the error for a checkpoint that could not be written, mostly due to a full disk."""
    free = shutil.disk_usage(directory).free / 1e6
    return UserError(
        f"cannot write a checkpoint to {directory} ({free:.0f} MB free): {first_line(error)}; free "
        "disk space and run the same command again to resume, or choose another --workdir"
    )


def first_line(error: Exception) -> str:
    """Return the first line of an error message, at most 300 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


@contextlib.contextmanager
def suppress_orbax_output() -> Iterator[None]:
    """Hide the tracebacks of reads that Orbax abandons when another read fails."""
    log, hook = logging.getLogger("asyncio"), sys.unraisablehook
    log.disabled, sys.unraisablehook = True, lambda _: None
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        log.disabled, sys.unraisablehook = False, hook


def wait_for_abandoned_reads(timeout: float = 10.0) -> None:
    """Wait until the reads that Orbax abandoned have ended; call it in `suppress_orbax_output`.

    TensorStore continues reads that nothing awaits. A read that ends later would print its
    traceback in the middle of other output.

    Args:
      timeout: seconds after which the remaining reads are ignored
    """
    deadline = time.monotonic() + timeout
    gc.collect()
    while any(map(_is_read, gc.get_objects())) and time.monotonic() < deadline:
        time.sleep(0.02)
        gc.collect()


def _is_read(value: Any) -> bool:
    # Not isinstance: it reads a proxy's __class__, which fails if the object behind it is gone.
    return (
        type(value) is CoroutineType
        and value.__name__.startswith("_read_")
        and "orbax" in value.cr_code.co_filename
    )


def has_only_item(directory: Path, item: str) -> bool:
    """Return whether a checkpoint was saved with only this item; False if that is unknown."""
    try:
        handlers = json.loads((directory / "_CHECKPOINT_METADATA").read_text())["item_handlers"]
    except (OSError, ValueError, KeyError):
        return False
    subdirectories = {path.name for path in directory.iterdir() if path.is_dir()}
    return set(handlers) == {item} and subdirectories <= {item}
