"""Output of a merge: the staging directory, from which an interrupted merge resumes, and the files.

The staging directory is next to the output directory and is renamed to it at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from modelstock_jax.checkpoint_merge.kernels import escaped
from modelstock_jax.checkpoint_merge.methods import Row
from modelstock_jax.checkpoint_merge.plan import Plan
from modelstock_jax.checkpoint_merge.sources import Source, stored_name
from modelstock_jax.errors import UserError
from modelstock_jax.fileio import (
    PYTHON_HINT,
    ExistsError,
    FileLock,
    check_not_existing,
    move_into_place,
    write_json,
)
from modelstock_jax.tensor_files.checksums import checksum_file
from modelstock_jax.tensor_files.formats import shown
from modelstock_jax.tensor_files.writer import ShardWriter, write_indented_json

_STATE = "merge_state.json"
_LOCK = "merge.lock"
_RESERVE_BYTES = 16 * 2**20  # For headers, config, tokenizer, report and figures.


class OccupiedError(UserError):
    """Another process created the output directory first; the message says how to continue."""


class StagingDir:
    """Directory that contains the files of a merge until all of them are complete.

    Its name contains the checksum of the plan, so the same command finds it again.

    Args:
      plan: plan of the merge
      out: output directory; if it is a link, the directory that it points to is created or replaced
      overwrite: whether the output directory may be replaced

    Attributes:
      out: output directory, with links resolved
      path: the staging directory
      checksums: complete files -> checksum
      rows: report rows of the units solved so far, by tensor
      resumed: files that were complete at the start

    Raises:
      UserError: `out` is an input, contains one, is inside one, exists, or cannot be created;
        another process runs this merge; the disk is too full
    """

    def __init__(self, plan: Plan, out: str | os.PathLike[str], *, overwrite: bool = False):
        self._plan, self._overwrite = plan, overwrite
        self.out, self.path = _paths(plan, out, overwrite)
        self._state_lock = threading.Lock()
        try:
            self._lock = FileLock(self.path / _LOCK)
        except OSError as error:
            raise UserError(_not_writable(self.out, error.strerror)) from None
        if not self._lock.held:
            raise UserError(
                f"{shown(self.out)}: another process runs this merge; wait until it ends"
            )
        if self._lock.unsupported and sys.stderr is not None:
            print(
                f"note: the file system of {shown(self.out)} does not support locks; do not run "
                "another merge with this --out at the same time",
                file=sys.stderr,
            )
        self.rows: dict[str, Row] = {}
        try:
            self.checksums = self._restore()
        except BaseException:  # For example Ctrl-C: checksums of large files take minutes.
            self._lock.release()
            raise
        self.resumed = tuple(sorted(self.checksums))
        try:
            self._check_free_space()
        except UserError:
            self.leave()
            raise

    def save(self, file: str, checksum: str) -> None:
        """Record that a file of tensors is complete, with the rows of all units solved so far.

        Args:
          file: name of the file
          checksum: its checksum
        """
        with self._state_lock:
            self.checksums[file] = checksum
            self._write_state()

    def commit(self) -> None:
        """Rename the directory, which must be complete, to the output directory.

        Raises:
          OccupiedError: another process has created the output directory since this merge started
          UserError: the directory cannot be flushed or renamed
        """
        try:
            check_not_existing(self.out, overwrite=self._overwrite)
            for name in (_STATE, _LOCK):
                (self.path / name).unlink(missing_ok=True)
            move_into_place(self.path, self.out, self._overwrite)
        except ExistsError:
            how = f"run the same command with --overwrite{PYTHON_HINT} to replace it"
            if not self.out.is_dir():
                how = "move it away and run the same command again"
            raise OccupiedError(
                f"{shown(self.out)}: another process created it during this merge; {how} (the "
                "merged files are reused, nothing is computed again)"
            ) from None
        self._lock.release()
        self._remove_stale()

    def leave(self, *, keep: bool = True) -> None:
        """Stop without renaming the directory.

        Args:
          keep: keep the complete files, if there are any; otherwise remove the directory
        """
        if keep and self.checksums:
            for file in self._other_files(self.checksums):
                file.unlink(missing_ok=True)
            if not (self.path / _STATE).exists():  # `commit` failed after removing it.
                with contextlib.suppress(UserError):
                    self._write_state()
        else:
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.release()

    def _write_state(self) -> None:
        state = {
            "checksum": self._plan.checksum,
            "checksums": self.checksums,
            "rows": dict(self.rows),
        }
        write_json(self.path / _STATE, state)

    def _restore(self) -> dict[str, str]:
        """Read the rows, and return the files of an earlier run that are complete and unchanged."""
        try:
            state = json.loads((self.path / _STATE).read_text(encoding="utf-8"))
            is_same_plan = state["checksum"] == self._plan.checksum
            checksums = {
                name: state["checksums"][name]
                for name in self._plan.files
                if is_same_plan and name in state["checksums"]
            }
            rows = dict(state["rows"])
        except (OSError, ValueError, KeyError, TypeError):
            checksums, rows = {}, {}
        complete = {
            name: checksum
            for name, checksum in checksums.items()
            if (self.path / name).is_file() and _checksum(self.path / name, checksum) == checksum
        }
        tensors = {
            tensor
            for file, names in zip(self._plan.files, self._plan.shards, strict=True)
            if file in complete
            for tensor in names
        }
        self.rows = {name: row for name, row in rows.items() if name in tensors}
        for file in self._other_files(complete):
            file.unlink(missing_ok=True)
        return complete

    def _other_files(self, complete: Mapping[str, str]) -> Iterable[Path]:
        """Return the files of the directory that are not known to be complete."""
        known = {self.path / name for name in (*complete, _STATE, _LOCK)}
        return [path for path in self.path.rglob("*") if path.is_file() and path not in known]

    def _check_free_space(self) -> None:
        done = sum((self.path / name).stat().st_size for name in self.checksums)
        _check_free_space(self.out, self._plan.bytes_written - done + _RESERVE_BYTES, self.path)

    def _remove_stale(self) -> None:
        """Remove the staging directories of other merges to this output that are not running."""
        for path in self.out.parent.glob(f".{escaped(self.out.name)}.*.merge"):
            try:
                with FileLock(path / _LOCK) as lock:
                    if lock.held and not lock.unsupported:
                        shutil.rmtree(path, ignore_errors=True)
            except OSError:
                continue


def check_out(plan: Plan, out: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Raise the errors of `StagingDir` for a plan that is only printed; create nothing.

    Args:
      plan: plan of the merge
      out: directory that would be written
      overwrite: whether it may be replaced

    Raises:
      UserError: `out` is an input, exists or cannot be created; the disk is too full
    """
    out, path = _paths(plan, out, overwrite)
    ancestor = next(parent for parent in path.parents if parent.exists())
    if not os.access(ancestor, os.W_OK | os.X_OK):
        raise UserError(_not_writable(out, "Permission denied"))
    done = sum((path / name).stat().st_size for name in plan.files if (path / name).is_file())
    _check_free_space(out, plan.bytes_written - done + _RESERVE_BYTES, ancestor)


def _paths(plan: Plan, out: str | os.PathLike[str], overwrite: bool) -> tuple[Path, Path]:
    """Return the output directory and the staging directory next to it."""
    path = Path(os.path.realpath(out))
    check_not_input(path, plan.sources)
    _check_can_be_created(path)
    check_not_existing(path, overwrite=overwrite)
    return path, path.parent / f".{path.name}.{plan.checksum[:16]}.merge"


def _not_writable(out: Path, reason: str | None) -> str:
    return f"{shown(out)}: cannot be written ({reason}); choose another directory"


def _check_free_space(out: Path, needed: int, disk: Path) -> None:
    free = shutil.disk_usage(disk).free
    if needed > free:
        raise UserError(
            f"{out}: the merge needs {needed / 1e9:.2f} GB, but the disk has {free / 1e9:.2f} GB "
            "free; free some space or choose another disk"
        )


def _check_can_be_created(out: Path) -> None:
    """Raise an error if no directory can be renamed to `out` at the end of the merge."""
    if os.path.islink(out):
        raise UserError(f"{shown(out)}: a link that points to itself; choose a directory")
    if _is_mounted(out):
        raise UserError(
            f"{shown(out)}: a mount point cannot be replaced by the merged directory; choose a "
            f"directory inside it: {shown(out / 'merged')}"
        )
    for parent in out.parents:
        if os.path.exists(parent) and not os.path.isdir(parent):
            raise UserError(
                f"{shown(out)}: {shown(parent)} is a file, so no directory can be created in it; "
                "choose another directory"
            )


def _is_mounted(path: Path) -> bool:
    if os.path.ismount(path):
        return True
    # A bind mount within one file system appears only in mountinfo.
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return False
    name = str(path)
    for character in "\\ \t\n":
        name = name.replace(character, f"\\{ord(character):03o}")
    return any(line.split(" ")[4:5] == [name] for line in lines)


def check_not_input(out: Path, sources: Iterable[Source]) -> None:
    """Raise an error if `out` is an input, contains one or is inside one.

    Args:
      out: directory to write
      sources: inputs

    Raises:
      UserError: see above
    """
    path = Path(os.path.realpath(out))
    for source in sources:
        inputs = {Path(os.path.realpath(file)) for file in source.files}
        if source.directory is not None:
            # The hub's cache contains links, so the directories of the links are inputs too.
            inputs |= {file.parent for file in inputs} | {Path(os.path.realpath(source.directory))}
        if path in inputs:
            relation = "is"
        elif any(path in file.parents for file in inputs):
            relation = "contains"
        elif source.directory is not None and any(file in path.parents for file in inputs):
            relation = "is inside"
        else:
            continue
        raise UserError(
            f"{out}: the output directory {relation} the input {source.label}; choose another "
            "directory"
        )


def _checksum(path: Path, example: str) -> str:
    """Return the checksum of a file, of the same kind as an example of a checksum."""
    kind = example.partition(":")[0]
    return f"{kind}:{checksum_file(path, kind)}"


class MergeStopped(Exception):
    """Another worker has failed, so this worker's result is not needed."""


class ByteCounter:
    """Counts bytes, reports them, and stops the workers after one has failed.

    Args:
      total: bytes that will be read and written
      progress: called with bytes done and total bytes
    """

    def __init__(self, total: int, progress: Callable[[int, int], None] | None = None):
        self.total, self.read, self.written = total, 0, 0
        self._skipped = 0
        self._progress, self._lock = progress, threading.Lock()
        self.stopped = threading.Event()

    def add(self, *, read: int = 0, written: int = 0) -> None:
        """Count bytes.

        Args:
          read: bytes that were read
          written: bytes that were written

        Raises:
          MergeStopped: the merge was stopped
        """
        if self.stopped.is_set():
            raise MergeStopped
        with self._lock:
            self.read += read
            self.written += written
            self._report()

    def skip(self, count: int) -> None:
        """Count bytes that an earlier run has read and written."""
        with self._lock:
            self._skipped += count
            self._report()

    def _report(self) -> None:
        if self._progress is not None:
            done = self.read + self.written + self._skipped
            self._progress(min(done, self.total), self.total)


class Output:
    """Writes tensors from any thread to their files.

    Args:
      plan: plan of the merge
      staging: directory of the files; files that are complete there are not written again
      counter: counts the bytes that are written
    """

    def __init__(self, plan: Plan, staging: StagingDir, counter: ByteCounter):
        self._plan, self._staging, self._counter = plan, staging, counter
        self._file = {
            name: file
            for file, names in zip(plan.files, plan.shards, strict=True)
            for name in names
            if file not in staging.checksums
        }
        self._missing = {
            file: {n for n, f in self._file.items() if f == file}
            for file in set(self._file.values())
        }
        self._stored = {name: stored_name(name, plan.components) for name in self._file}
        self._writers: dict[str, ShardWriter] = {}
        self._lock = threading.Lock()
        self._finisher = ThreadPoolExecutor(1, "finish")
        self._finishing: list[Future] = []

    def missing(self, name: str) -> bool:
        """Return whether a tensor must still be written."""
        return name in self._file

    def write(self, name: str, start: int, values: np.ndarray) -> None:
        """Write elements of a tensor.

        Args:
          name: name of the tensor
          start: index of the first element
          values: stored values
        """
        self._writer(name).write(self._stored[name], start, values)
        self._counter.add(written=values.nbytes)

    def complete(self, name: str) -> None:
        """Mark a tensor as complete; after its last tensor a file is flushed and recorded."""
        writer, file = self._writer(name), self._file[name]
        with self._lock:
            self._missing[file].discard(name)
            if not self._missing[file]:
                del self._writers[file]
                self._finishing.append(self._finisher.submit(self._finish, file, writer))

    def close(self) -> None:
        """Wait until every file is on the disk, then write the index files."""
        self._finisher.shutdown()
        for future in self._finishing:
            future.result()
        for index, files in self._plan.indexes.items():
            size = sum(self._plan.tensors[name].num_bytes for name in files)
            stored = {
                stored_name(name, self._plan.components): Path(file).name
                for name, file in files.items()
            }
            write_indented_json(
                self._staging.path / index,
                {
                    "metadata": {"total_size": size},
                    "weight_map": dict(sorted(stored.items())),
                },
            )

    def abandon(self) -> None:
        """Close the files that are not complete."""
        self._finisher.shutdown()
        for writer in self._writers.values():
            writer.abandon()

    def _writer(self, name: str) -> ShardWriter:
        file = self._file[name]
        with self._lock:
            if file not in self._writers:
                path = self._staging.path / f"{file}.part"
                path.parent.mkdir(parents=True, exist_ok=True)
                self._writers[file] = ShardWriter(
                    path,
                    {
                        self._stored[n]: (self._plan.tensors[n].code, self._plan.tensors[n].shape)
                        for n in self._missing[file]
                    },
                    metadata=self._aliases(self._missing[file]),
                    checksum=self._plan.options.checksum,
                )
            return self._writers[file]

    def _aliases(self, names: Collection[str]) -> dict[str, str]:
        """Return other names of tensors that are stored once, as in the base's `__metadata__`."""
        components = self._plan.components
        return {
            stored_name(alias, components): self._stored[name]
            for alias, name in self._plan.base.aliases.items()
            if name in names
        }

    def _finish(self, file: str, writer: ShardWriter) -> None:
        checksum = writer.finish()
        os.replace(writer.path, self._staging.path / file)
        self._staging.save(file, f"{self._plan.options.checksum}:{checksum}")
