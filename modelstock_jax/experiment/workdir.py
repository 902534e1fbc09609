"""A run's directory: who works in it, and what it was made with."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path

from ml_collections import ConfigDict

from modelstock_jax.errors import UserError
from modelstock_jax.fileio import FileLock, flat, plain, write_json

# No bit of a weight, and no accuracy, depends on these: they may change from start to start.
FREE = (
    "num_seeds",  # Seeds may be added to a finished run.
    "search.learning_rates",  # And so may rates: each is a run of its own.
    "log_every",
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.keep_merged",
    "export.layouts",
    "compute.compilation_cache",
    "data.check_counts",
    "data.loading.threads",
    "data.loading.workers",
    "data.loading.prefetch",
    # Until an image cannot be decoded the two are the same, and then the run has stopped.
    "data.loading.unreadable",
    "watch.max_events",
    "watch.spike_deviations",
    "watch.spike_window",
)
# What is computed is the same but for rounding: the rest of the run would differ from the one of
# the old values in the last bits of its weights, and training carries that on.
ROUNDING = (
    "accumulate_steps",
    "mesh.replica",
    "mesh.data",
    "mesh.fsdp_min_size",
    "compute.execution",
    "compute.remat",
    "compute.attention",
    "evaluation.batch_size",
    # The policies compute the same until something is not finite; where 'stop' has stopped, another
    # one may go on.
    "watch.policy",
)
# The same weights, images and names may lie elsewhere now. Weights and names are compared with the
# anchor's; that the images are the same is the user's word.
PLACES = (
    "pretrained",
    "data.root",
    *(
        f"data.paths.{name}"
        for name in ("train", "validation", "test", "v2", "r", "sketch", "objectnet", "a", "real")
    ),
    "data.class_names",
    "data.templates",
)
_held: dict[Path, FileLock] = {}


def claim(workdir: Path, config: ConfigDict, *, allow_change: bool = False) -> None:
    """Makes the directory and locks it; checks that what is in it was made with the same config.

    Where nothing has been trained or measured yet, another config takes the place of the old one:
    a mistake that ended the run at its beginning is mended in the same directory.

    Args:
      workdir: where the run is, or is to be.
      config: the run's options, kept in `workdir`/config.json.
      allow_change: let `ROUNDING` and `PLACES` differ from what they were.

    Raises:
      UserError: if it cannot be written, another process works in it, or it holds the run of
        another config; that one names every key that differs. Nothing is changed then.
    """
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make --workdir={workdir}: {error.strerror}; choose another"
        ) from error
    _lock(workdir)
    for half in workdir.glob(".model*.tmp"):  # What a killed process was writing.
        shutil.rmtree(half, ignore_errors=True)
    now = plain(config.to_dict())
    if path.exists():
        try:
            before = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path}: {error}; choose another --workdir") from error
        if before == now:
            return
        if (workdir / "runs").exists():
            _compare(workdir, flat(before), flat(now), allow_change)
    write_json(path, now)


def release(workdir: Path) -> None:
    """Frees a directory before the process ends."""
    lock = _held.pop(_lock_file(workdir), None)
    if lock is not None:
        lock.release()


def _compare(workdir: Path, before: Mapping, now: Mapping, allow_change: bool) -> None:
    changed = [
        key
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in FREE
    ]
    if not changed:
        return
    mild = [key for key in changed if key in (*ROUNDING, *PLACES)]
    lines = [
        f"  {key} was {_shown(before, key)}, is {_shown(now, key)}"
        + (" (rounding)" if key in ROUNDING else " (a place)" if key in PLACES else "")
        for key in changed
    ]
    if mild == changed and allow_change:
        print("\n".join(["goes on with another config:", *lines]), flush=True)
        return
    ways = "give the old values to go on with it, or choose another --workdir"
    if mild:
        ways += "; --allow_config_change lets those marked differ"
    raise UserError("\n".join([f"{workdir} holds a run of another config:", *lines, ways]))


def _shown(options: Mapping, key: str) -> str:
    return repr(options[key]) if key in options else "absent"


def _lock(workdir: Path) -> None:
    path = _lock_file(workdir)
    if path in _held:
        return
    try:
        lock = FileLock(path, note=f"process {os.getpid()} on {socket.gethostname()}")
    except OSError as error:
        raise UserError(
            f"cannot write in --workdir={workdir}: {error.strerror}; free some space there, or "
            "choose another"
        ) from error
    if not lock.held:
        raise UserError(
            f"--workdir={workdir} is in use by {lock.holder or 'another process'}; wait until it "
            "ends, or choose another"
        )
    if lock.unsupported:
        print(f"{path} cannot be locked ({lock.unsupported}): start no other run there")
    _held[path] = lock


def _lock_file(workdir: Path) -> Path:
    return workdir.absolute() / ".lock"
