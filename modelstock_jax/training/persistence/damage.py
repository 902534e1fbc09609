"""Damaged checkpoints and full disks: their errors; names that are never read again."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import logging
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import CoroutineType
from typing import Any

from modelstock_jax.errors import UserError

_SUFFIX = ".damaged"  # Not a number, so Orbax takes no such folder for a step.


class DamagedCheckpoint(UserError):
    """A checkpoint that is not, bit for bit, what was saved."""


def put_aside(folder: Path) -> Path:
    """Renames the folder of a step; returns its new name.

    Raises:
      UserError: if it cannot be renamed.

    Example:
      >>> import tempfile
      >>> step = Path(tempfile.mkdtemp()) / "12"
      >>> step.mkdir()
      >>> put_aside(step).name, list(damaged_steps(step.parent))
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


def damaged_steps(directory: Path) -> list[int]:
    """The steps whose folders were put aside, ascending."""
    names = [path.name.partition(_SUFFIX)[0] for path in directory.glob(f"*{_SUFFIX}*")]
    return sorted(int(name) for name in names if name.isdigit())


def unwritable(directory: Path, error: Exception) -> UserError:
    """The error of a checkpoint that could not be written: the disk, mostly."""
    free = shutil.disk_usage(directory).free / 1e6
    return UserError(
        f"cannot write a checkpoint under {directory} ({free:.0f} MB free): {one_line(error)}; "
        "make room or choose another --workdir, and the same command goes on"
    )


def one_line(error: Exception) -> str:
    """What an error says first."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the traces of reads that Orbax gives up, when another one fails, from the screen."""
    log, hook = logging.getLogger("asyncio"), sys.unraisablehook
    log.disabled, sys.unraisablehook = True, lambda _: None
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        log.disabled, sys.unraisablehook = False, hook


def end_given_up_reads(most: float = 10.0) -> None:
    """Collects the reads that Orbax gave up, as each of them ends; `quiet` is to be around it.

    TensorStore goes on with a read that nobody awaits any more, and holds it. What it lets go of
    later would leave its trace in the midst of something else.

    Args:
      most: seconds after which what is still held is left to itself.
    """
    until = time.monotonic() + most
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


def holds_only(folder: Path, part: str) -> bool:
    """Whether a checkpoint was saved with this part and no other; False where that is unknown."""
    try:
        said = json.loads((folder / "_CHECKPOINT_METADATA").read_text())["item_handlers"]
    except (OSError, ValueError, KeyError):
        return False
    return set(said) == {part} and {one.name for one in folder.iterdir() if one.is_dir()} <= {part}
