"""A run's directory: who works in it, and what it was made with."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from modelstock_jax.errors import UserError
from modelstock_jax.experiment.options import option
from modelstock_jax.fileio import FileLock, flat, plain, write_json
from modelstock_jax.flags import current_names

# The kernel frees these locks when the process ends, whatever ends it.
_held: dict[Path, FileLock] = {}


def lock_workdir(workdir: Path, config: ConfigDict, *, allow_change: bool = False) -> None:
    """Makes the directory and locks it; checks that what is in it was made with the same config.

    Where nothing has been trained or measured yet, another config takes the place of the old one:
    a mistake that ended the run at its beginning is mended in the same directory.

    Args:
      workdir: where the run is, or is to be.
      config: the run's options, kept in `workdir`/config.json.
      allow_change: let options that `options.OPTIONS` calls "numerical" or "path" differ from what
        they were.

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
            _compare(workdir, current_names(flat(before)), flat(now), allow_change)
    write_json(path, now)


def unlock_workdir(workdir: Path) -> None:
    """Frees a directory before the process ends."""
    lock = _held.pop(_lock_file(workdir), None)
    if lock is not None:
        lock.release()


def _compare(workdir: Path, before: Mapping, now: Mapping, allow_change: bool) -> None:
    changed = [
        key
        for key in sorted(before.keys() | now.keys())
        if _value(before, key) != _value(now, key) and option(key).resume != "ignored"
    ]
    if not changed:
        return
    marks = {"numerical": " (numerical)", "path": " (path)"}
    mild = [key for key in changed if option(key).resume in marks]
    lines = [
        f"  {key} was {_shown(before, key)}, is {_shown(now, key)}"
        + marks.get(option(key).resume or "", "")
        for key in changed
    ]
    if mild == changed and allow_change:
        print("\n".join(["goes on with another config:", *lines]), flush=True)
        return
    ways = "give the old values to go on with it, or choose another --workdir"
    if mild:
        ways += "; --allow_config_change lets those marked differ"
    raise UserError("\n".join([f"{workdir} holds a run of another config:", *lines, ways]))


def _value(options: Mapping, key: str) -> Any:
    """A file that lacks an option was written before there was one, and means what it came with."""
    return options[key] if key in options else plain(option(key).absent)


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
