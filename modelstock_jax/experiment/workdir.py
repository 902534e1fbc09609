"""Lock a run's directory, and check that it belongs to the same config."""

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
from modelstock_jax.fileio import FileLock, flatten, to_json_types, write_json
from modelstock_jax.flags import current_names

# What belongs to a config. Of a finished run, a user may have removed `runs`, the largest.
_RESULTS = ("runs", "results.json", "model")
# The kernel releases these locks when the process ends for any reason.
_locks: dict[Path, FileLock] = {}


def lock_workdir(workdir: Path, config: ConfigDict, *, allow_change: bool = False) -> None:
    """Create and lock the directory; check that its contents belong to the same config.

    If nothing has been trained or evaluated yet, the new config replaces the old one: a mistake
    that ended the run at its start can be fixed in the same directory.

    Args:
      workdir: directory of the run
      config: options of the run, stored in `workdir`/config.json
      allow_change: accept changes of the options that are "numerical" or "path" in
        `options.OPTIONS`

    Raises:
      UserError: the directory cannot be written, another process uses it, or it contains a run
        with another config; the last one lists every option that differs. Nothing is changed then
    """
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot create --workdir={workdir}: {error.strerror}; choose another --workdir"
        ) from error
    _lock(workdir)
    old, new = None, to_json_types(config.to_dict())
    if path.exists():
        try:
            old = dict(json.loads(path.read_text()))
        except (OSError, TypeError, ValueError) as error:
            raise UserError(f"cannot read {path}: {error}; choose another --workdir") from error
        if old != new and any((workdir / name).exists() for name in _RESULTS):
            _compare(workdir, old, new, allow_change)
    # Left by a killed process: a partial model, and one that was being replaced.
    for partial in (*workdir.glob(".model*.tmp"), *workdir.glob(".model*.old")):
        shutil.rmtree(partial, ignore_errors=True)
    if old != new:
        write_json(path, new)


def unlock_workdir(workdir: Path) -> None:
    """Release the lock before the process ends."""
    lock = _locks.pop(_lock_file(workdir), None)
    if lock is not None:
        lock.release()


def changed_options(old: Mapping, new: Mapping) -> list[str]:
    """Return the names of the options that differ, except those with `resume="ignored"`.

    Args:
      old: nested options, as in config.json; an option that it lacks has its value `absent`
      new: the same of the other config
    """
    old, new = current_names(flatten(old)), flatten(new)
    return [
        key
        for key in sorted(old.keys() | new.keys())
        if _value(old, key) != _value(new, key) and option(key).resume != "ignored"
    ]


def _compare(workdir: Path, old: Mapping, new: Mapping, allow_change: bool) -> None:
    changed = [key for key in changed_options(old, new) if option(key).resume != "extends"]
    if not changed:
        return
    old, new = current_names(flatten(old)), flatten(new)
    marks = {"numerical": " (numerical)", "path": " (path)"}
    allowed = [key for key in changed if option(key).resume in marks]
    lines = [
        f"  {key} was {_as_text(old, key)}, is {_as_text(new, key)}"
        + marks.get(option(key).resume or "", "")
        for key in changed
    ]
    if allowed == changed and allow_change:
        print("\n".join(["resuming with a changed config:", *lines]), flush=True)
        return
    fix = "pass the old values to resume, or choose another --workdir"
    if allowed:
        fix += "; with --allow_config_change the marked options may differ"
    raise UserError("\n".join([f"{workdir} contains a run with another config:", *lines, fix]))


def _value(options: Mapping, key: str) -> Any:
    """Return the value of an option; a file that lacks it was written before it was added."""
    return options[key] if key in options else to_json_types(option(key).absent)


def _as_text(options: Mapping, key: str) -> str:
    return repr(options[key]) if key in options else "absent"


def _lock(workdir: Path) -> None:
    path = _lock_file(workdir)
    if path in _locks:
        return
    try:
        lock = FileLock(path, note=f"process {os.getpid()} on {socket.gethostname()}")
    except OSError as error:
        raise UserError(
            f"cannot write in --workdir={workdir}: {error.strerror}; free some space there, or "
            "choose another --workdir"
        ) from error
    if not lock.held:
        raise UserError(
            f"--workdir={workdir} is in use by {lock.holder or 'another process'}; wait until it "
            "ends, or choose another --workdir"
        )
    if lock.unsupported:
        print(f"cannot lock {path} ({lock.unsupported}); start no other run in this directory")
    _locks[path] = lock


def _lock_file(workdir: Path) -> Path:
    return workdir.absolute() / ".lock"
