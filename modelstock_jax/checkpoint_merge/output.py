"""What a merge writes: its staging directory, which a killed merge resumes from, and the files."""

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
    ExistsError,
    FileLock,
    move_into_place,
    refuse_existing,
    write_json,
)
from modelstock_jax.tensor_files.checksums import checksum_file
from modelstock_jax.tensor_files.formats import shown
from modelstock_jax.tensor_files.writer import ShardWriter, write_indented_json

# The directory in which a merge is made: beside its final place, and found again after a kill.


_STATE = "merge_state.json"
_LOCK = "merge.lock"
_SPARE = 16 * 2**20  # for headers, config, tokenizer, report and pictures


class OccupiedError(UserError):
    """Another process made the output directory first; the message says how to continue."""


class StagingDir:
    """Where a merge's files lie until all of them are there.

    Its name follows from the plan's fingerprint, so that the same command finds it again.

    Args:
        plan: Of the merge.
        out: The final directory. Of a link, what it leads to is made or replaced; the link stays.
        overwrite: Whether it may be replaced.

    Raises:
        UserError: `out` is, holds or lies in an input, exists, or cannot be made; another process
            is making this merge; the disk has too little room.
    """

    def __init__(self, plan: Plan, out: str | os.PathLike[str], *, overwrite: bool = False):
        self._plan, self._overwrite = plan, overwrite
        self.out, self.path = _places(plan, out, overwrite)
        self._saving = threading.Lock()
        try:
            self._lock = FileLock(self.path / _LOCK)
        except OSError as error:
            why = f"cannot be written ({error.strerror})"
            raise UserError(f"{shown(self.out)}: {why}; choose another directory.") from None
        if not self._lock.held:
            raise UserError(f"{shown(self.out)}: another process is making this merge.")
        if self._lock.unsupported and sys.stderr is not None:
            print(
                f"note: the file system of {shown(self.out)} has no locks: give no other merge "
                "this --out meanwhile",
                file=sys.stderr,
            )
        self.rows: dict[str, Row] = {}
        try:
            self.checksums = self._complete()
        except BaseException:  # Ctrl-C, say: to digest large files takes minutes.
            self._lock.release()
            raise
        self.resumed = tuple(sorted(self.checksums))
        try:
            self._check_room()
        except UserError:
            self.leave()
            raise

    def save(self, file: str, digest: str) -> None:
        """Notes that a file of tensors is complete, with the rows of all units solved so far."""
        with self._saving:
            self.checksums[file] = digest
            self._write_state()

    def commit(self) -> None:
        """Gives the directory its final name; it must hold everything.

        Raises:
            OccupiedError: Another process has made `out` since this merge began.
            UserError: It cannot be flushed or renamed.
        """
        try:
            refuse_existing(self.out, overwrite=self._overwrite)
            for name in (_STATE, _LOCK):
                (self.path / name).unlink(missing_ok=True)
            move_into_place(self.path, self.out, self._overwrite)
        except ExistsError:
            how = "give the same command with --overwrite (in a program, overwrite=True) to replace"
            if not self.out.is_dir():
                how = "move it away and give the same command again to replace"
            raise OccupiedError(
                f"{shown(self.out)}: another process made it during this merge; {how} it. The "
                "merged files are kept, so nothing is computed again."
            ) from None
        self._lock.release()
        self._remove_stale()

    def leave(self, *, keep: bool = True) -> None:
        """Leaves without the final name; keeps the files that are complete, if any."""
        if keep and self.checksums:
            for file in self._strangers(self.checksums):
                file.unlink(missing_ok=True)
            if not (self.path / _STATE).exists():  # `commit` did not come to its end.
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

    def _complete(self) -> dict[str, str]:
        """Files that an earlier run finished and that are still what they were."""
        try:
            state = json.loads((self.path / _STATE).read_text(encoding="utf-8"))
            same = state["checksum"] == self._plan.checksum
            digests = {
                name: state["checksums"][name]
                for name in self._plan.files
                if same and name in state["checksums"]
            }
            rows = dict(state["rows"])
        except (OSError, ValueError, KeyError, TypeError):
            digests, rows = {}, {}
        whole = {
            name: digest
            for name, digest in digests.items()
            if (self.path / name).is_file() and _checksum(self.path / name, digest) == digest
        }
        done = {
            tensor
            for file, tensors in zip(self._plan.files, self._plan.shards, strict=True)
            if file in whole
            for tensor in tensors
        }
        self.rows = {name: row for name, row in rows.items() if name in done}
        for file in self._strangers(whole):
            file.unlink(missing_ok=True)
        return whole

    def _strangers(self, whole: Mapping[str, str]) -> Iterable[Path]:
        """Files of tensors here that are not known to be complete."""
        kept = {self.path / name for name in (*whole, _STATE, _LOCK)}
        return [path for path in self.path.rglob("*") if path.is_file() and path not in kept]

    def _check_room(self) -> None:
        done = sum((self.path / name).stat().st_size for name in self.checksums)
        _refuse_full(self.out, self._plan.bytes_written - done + _SPARE, self.path)

    def _remove_stale(self) -> None:
        """Removes what other, unfinished merges to the same place left, where none is at work."""
        for path in self.out.parent.glob(f".{escaped(self.out.name)}.*.merge"):
            try:
                with FileLock(path / _LOCK) as lock:
                    if lock.held and not lock.unsupported:
                        shutil.rmtree(path, ignore_errors=True)
            except OSError:
                continue


def check_out(plan: Plan, out: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Raises a `StagingDir`'s errors for a plan that is only shown; makes nothing.

    Args:
        plan: Of the merge.
        out: The directory that would be written.
        overwrite: Whether it may be replaced.

    Raises:
        UserError: `out` is an input, exists or cannot be made; the disk has too little room.
    """
    place, path = _places(plan, out, overwrite)
    nearest = next(parent for parent in path.parents if parent.exists())
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(
            f"{shown(place)}: cannot be written (Permission denied); choose another directory."
        )
    done = sum((path / name).stat().st_size for name in plan.files if (path / name).is_file())
    _refuse_full(place, plan.bytes_written - done + _SPARE, nearest)


def _places(plan: Plan, out: str | os.PathLike[str], overwrite: bool) -> tuple[Path, Path]:
    """The final directory, and the one next to it in which the merge is made."""
    place = Path(os.path.realpath(out))
    refuse_inputs(place, plan.sources)
    _refuse_impossible(place)
    refuse_existing(place, overwrite=overwrite)
    return place, place.parent / f".{place.name}.{plan.checksum[:16]}.merge"


def _refuse_full(out: Path, needed: int, disk: Path) -> None:
    free = shutil.disk_usage(disk).free
    if needed > free:
        raise UserError(
            f"{out}: {needed / 1e9:.2f} GB are needed there and {free / 1e9:.2f} GB are "
            "free; free some or choose another disk."
        )


def _refuse_impossible(out: Path) -> None:
    """Raises where no directory could take the name `out` when the merge ends."""
    if os.path.islink(out):
        raise UserError(f"{shown(out)}: a link that leads to itself; choose a directory.")
    if _is_mounted(out):
        raise UserError(
            f"{shown(out)}: a mount point, which a new directory cannot replace; give "
            f"a directory in it: {shown(out / 'merged')}"
        )
    for parent in out.parents:
        if os.path.exists(parent) and not os.path.isdir(parent):
            raise UserError(
                f"{shown(out)}: {shown(parent)} is a file, so no directory can be made "
                "in it; choose another directory."
            )


def _is_mounted(path: Path) -> bool:
    if os.path.ismount(path):
        return True
    # A directory of one file system that is mounted elsewhere on it is found only here.
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return False
    name = str(path)
    for character in "\\ \t\n":
        name = name.replace(character, f"\\{ord(character):03o}")
    return any(line.split(" ")[4:5] == [name] for line in lines)


def refuse_inputs(out: Path, sources: Iterable[Source]) -> None:
    """Raises where `out` is an input, holds one or lies in one."""
    place = Path(os.path.realpath(out))
    for source in sources:
        taken = {Path(os.path.realpath(path)) for path in source.files}
        if source.directory is not None:
            # In the hub's cache the files are links: what holds the links is an input as well.
            taken |= {path.parent for path in taken} | {Path(os.path.realpath(source.directory))}
        if place in taken:
            how = "is"
        elif any(place in path.parents for path in taken):
            how = "holds"
        elif source.directory is not None and any(path in place.parents for path in taken):
            how = "lies in"
        else:
            continue
        raise UserError(f"{out}: {how} the input {source.label}; choose a directory apart from it.")


def _checksum(path: Path, like: str) -> str:
    kind = like.partition(":")[0]
    return f"{kind}:{checksum_file(path, kind)}"


# Bytes that are done, and the word to stop.


class MergeStopped(Exception):
    """Another worker failed: this one's work is not wanted."""


class ByteCounter:
    """Counts bytes, tells them, and stops the workers when one has failed."""

    def __init__(self, total: int, progress: Callable[[int, int], None] | None = None):
        self.total, self.read, self.written = total, 0, 0
        self._skipped = 0
        self._progress, self._lock = progress, threading.Lock()
        self.stopped = threading.Event()

    def add(self, *, read: int = 0, written: int = 0) -> None:
        """Counts; raises `MergeStopped` where the merge was stopped."""
        if self.stopped.is_set():
            raise MergeStopped
        with self._lock:
            self.read += read
            self.written += written
            self._tell()

    def skip(self, count: int) -> None:
        """Counts bytes that an earlier start has read and written."""
        with self._lock:
            self._skipped += count
            self._tell()

    def _tell(self) -> None:
        if self._progress is not None:
            done = self.read + self.written + self._skipped
            self._progress(min(done, self.total), self.total)


class Output:
    """Writes tensors, from any thread, to the files that the plan gives them.

    Args:
        plan: Of the merge.
        staging: Where the files go; those that are complete there are left alone.
        counter: Counts what is written.
    """

    def __init__(self, plan: Plan, staging: StagingDir, counter: ByteCounter):
        self._plan, self._workplace, self._tally = plan, staging, counter
        self._file = {
            name: file
            for file, names in zip(plan.files, plan.shards, strict=True)
            for name in names
            if file not in staging.checksums
        }
        self._left = {
            file: {n for n, f in self._file.items() if f == file}
            for file in set(self._file.values())
        }
        self._stored = {name: stored_name(name, plan.components) for name in self._file}
        self._writers: dict[str, ShardWriter] = {}
        self._lock = threading.Lock()
        self._finisher = ThreadPoolExecutor(1, "finish")
        self._finishing: list[Future] = []

    def missing(self, name: str) -> bool:
        """Whether a tensor is still to be written."""
        return name in self._file

    def write(self, name: str, start: int, values: np.ndarray) -> None:
        """Writes elements from `start` on."""
        self._writer(name).write(self._stored[name], start, values)
        self._tally.add(written=values.nbytes)

    def complete(self, name: str) -> None:
        """Says that a tensor is all written; its file may then be."""
        writer, file = self._writer(name), self._file[name]
        with self._lock:
            self._left[file].discard(name)
            if not self._left[file]:
                del self._writers[file]
                self._finishing.append(self._finisher.submit(self._finish, file, writer))

    def close(self) -> None:
        """Waits until every file is on the disk and writes their index."""
        self._finisher.shutdown()
        for future in self._finishing:
            future.result()
        for index, places in self._plan.indexes.items():
            size = sum(self._plan.tensors[name].num_bytes for name in places)
            stored = {
                stored_name(name, self._plan.components): Path(file).name
                for name, file in places.items()
            }
            write_indented_json(
                self._workplace.path / index,
                {
                    "metadata": {"total_size": size},
                    "weight_map": dict(sorted(stored.items())),
                },
            )

    def abandon(self) -> None:
        """Lets go of files that are not complete."""
        self._finisher.shutdown()
        for writer in self._writers.values():
            writer.abandon()

    def _writer(self, name: str) -> ShardWriter:
        file = self._file[name]
        with self._lock:
            if file not in self._writers:
                part = self._workplace.path / f"{file}.part"
                part.parent.mkdir(parents=True, exist_ok=True)
                self._writers[file] = ShardWriter(
                    part,
                    {
                        self._stored[n]: (self._plan.tensors[n].code, self._plan.tensors[n].shape)
                        for n in self._left[file]
                    },
                    metadata=self._aliases(self._left[file]),
                    checksum=self._plan.options.checksum,
                )
            return self._writers[file]

    def _aliases(self, names: Collection[str]) -> dict[str, str]:
        """Other names of tensors that are stored once, as the base's `__metadata__` holds them."""
        components = self._plan.components
        return {
            stored_name(alias, components): self._stored[kept]
            for alias, kept in self._plan.base.aliases.items()
            if kept in names
        }

    def _finish(self, file: str, writer: ShardWriter) -> None:
        digest = writer.finish()
        os.replace(writer.path, self._workplace.path / file)
        self._workplace.save(file, f"{self._plan.options.checksum}:{digest}")
