"""JAX's persistent compilation cache: the directory of programs compiled by earlier runs."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import stat
import sys
import tempfile
import zlib
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from modelstock_jax.data.caches import cache_directory
from modelstock_jax.errors import UserError
from modelstock_jax.fileio import FileLock

AUTO, OFF = "auto", "off"
_DIRECTORY, _ENABLED = "jax_compilation_cache_dir", "jax_enable_compilation_cache"
# Of the directory of AUTO, unless the environment variable of this name in capitals is set. JAX's
# own limit is infinite, its own minimum 1 s: a run of configs/glyphs.py then compiles twice as long
# with a warm cache. 1 GiB is about 700 times the programs of that run.
_SETTINGS = {
    "jax_compilation_cache_max_size": 2**30,
    "jax_persistent_cache_min_compile_time_secs": 0.1,
}
_CPU_FIELDS = (
    "vendor_id", "cpu family", "model", "model name", "flags",
    "CPU implementer", "CPU variant", "CPU part", "Features",
)  # fmt: skip


def use_compilation_cache(option: str) -> None:
    """Select the persistent compilation cache; call this before the first compilation.

    JAX executes the files in the directory: nobody else may have write access to it.

    Args:
      option: value of `compute.compilation_cache`. "auto": JAX's own settings if they name a
        directory (JAX_COMPILATION_CACHE_DIR), else `default_directory`. A run of several processes
        uses only JAX's own settings, because on GPUs one process must not find a program that
        another has to compile. "off": no cache. "": JAX's own settings. Else a directory

    Raises:
      UserError: if a directory that is not "auto" cannot be created or written
    """
    if option == OFF:
        jax.config.update(_ENABLED, False)
        compilation_cache.reset_cache()
    elif option == AUTO:
        _use_default_directory()
    elif option:
        _use(_writable_directory(option))


def default_directory() -> Path:
    """Return the directory of "auto", in the user's cache directory; it may not exist yet.

    Its name depends on the processor, because a program compiled for a CPU uses the instructions of
    the CPU that compiled it: machines that share a home directory may lack them.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
        text = "\n".join(line for line in lines if line.partition(":")[0].strip() in _CPU_FIELDS)
    except OSError:  # Only Linux has this file.
        text = platform.processor()
    name = f"{platform.machine()}-{zlib.crc32(text.encode()):08x}"
    return cache_directory() / "compiled" / name


def _use_default_directory() -> None:
    is_set = getattr(jax.config, _DIRECTORY)
    is_disabled = not getattr(jax.config, _ENABLED)
    if is_set or is_disabled or jax.distributed.is_initialized():
        return
    try:
        path = default_directory()
        _prepare(path)
    except (OSError, RuntimeError, UserError) as error:  # RuntimeError: there is no home directory.
        _warn(
            f"compiled programs are not cached: {error}; or pass --config.compute."
            f"compilation_cache=DIR ({OFF} hides this warning)"
        )
        return
    for name, value in _SETTINGS.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    _use(path)


def _prepare(path: Path) -> None:
    """Create the directory, and remove what a killed process left.

    Raises:
      OSError, UserError: it is not private, not writable, or its disk is full or has no locks
    """
    for directory in (*reversed(path.parents), path):
        directory.mkdir(mode=0o700, exist_ok=True)
    check_private(path)
    limit = _SETTINGS["jax_compilation_cache_max_size"]
    if shutil.disk_usage(path).free < limit:
        raise UserError(f"less than {limit / 1e9:.1f} GB are free in {path}; free disk space")
    with tempfile.NamedTemporaryFile(dir=path) as file:  # Finds quotas and read-only disks.
        file.write(bytes(2**20))
        file.flush()
        os.fsync(file.fileno())
    # JAX's lock. While another process reads or writes a program, nothing is removed.
    with FileLock(path / ".lockfile") as lock:
        if lock.unsupported:
            raise UserError(f"{path} does not support file locks ({lock.unsupported})")
        if lock.held and "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ:
            _remove_incomplete(path)


def check_private(path: Path) -> None:
    """Check that no other user can write to a directory, or replace it; root may.

    Raises:
      UserError: if one can, with how to fix it
    """
    user, real = os.geteuid(), path.resolve()
    for place in (real, *real.parents):
        info = place.stat()
        if info.st_uid not in ({user} if place == real else {user, 0}):
            raise UserError(f"{place} belongs to another user; set XDG_CACHE_HOME")
        # In a sticky directory (/tmp), only the owner of an entry can replace it.
        if info.st_mode & 0o022 and (place == real or not info.st_mode & stat.S_ISVTX):
            fix = "rm -r" if place == real else "chmod go-w"
            raise UserError(f"other users can write to {place}; run `{fix} {place}`")


def _remove_incomplete(path: Path) -> None:
    """Remove programs without an access time, which JAX writes last.

    JAX would neither read nor replace such a program, nor add another one.
    """
    for program in path.glob("*-cache"):
        if not program.with_name(program.name.removesuffix("-cache") + "-atime").exists():
            program.unlink(missing_ok=True)


def _writable_directory(option: str) -> Path:
    path = Path(option).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot create compute.compilation_cache={option} ({error.strerror}); choose "
            "another directory"
        ) from None
    if not os.access(path, os.W_OK):
        raise UserError(
            f"compute.compilation_cache={option} is not writable; choose another directory"
        )
    return path


def _use(path: Path) -> None:
    jax.config.update(_DIRECTORY, str(path))
    compilation_cache.reset_cache()  # JAX otherwise keeps what it decided at its first compilation.


@functools.cache
def _warn(line: str) -> None:
    """Print a warning, once per process."""
    print(f"warning: {line}", file=sys.stderr, flush=True)
