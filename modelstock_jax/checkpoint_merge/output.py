"""The files of tensors that a merge writes, each finished as soon as its last tensor is there."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from modelstock_jax.checkpoint_merge.components import stored_name
from modelstock_jax.checkpoint_merge.plan import Plan
from modelstock_jax.checkpoint_merge.tally import Tally
from modelstock_jax.checkpoint_merge.workplace import Workplace
from modelstock_jax.tensor_files.writer import ShardWriter, write_json


class Output:
    """Writes tensors, from any thread, to the files that the plan gives them.

    Args:
        plan: Of the merge.
        workplace: Where the files go; those that are complete there are left alone.
        tally: Counts what is written.
    """

    def __init__(self, plan: Plan, workplace: Workplace, tally: Tally):
        self._plan, self._workplace, self._tally = plan, workplace, tally
        self._file = {
            name: file for file, names in zip(plan.files, plan.shards, strict=True)
            for name in names if file not in workplace.digests
        }
        self._left = {file: {n for n, f in self._file.items() if f == file}
                      for file in set(self._file.values())}
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
            stored = {stored_name(name, self._plan.components): Path(file).name
                      for name, file in places.items()}
            write_json(self._workplace.path / index, {
                "metadata": {"total_size": size}, "weight_map": dict(sorted(stored.items())),
            })

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
                    {self._stored[n]: (self._plan.tensors[n].code, self._plan.tensors[n].shape)
                     for n in self._left[file]},
                    metadata=self._aliases(self._left[file]),
                    digest=self._plan.options.digest,
                )
            return self._writers[file]

    def _aliases(self, names: Collection[str]) -> dict[str, str]:
        """Other names of tensors that are stored once, as the base's `__metadata__` holds them."""
        components = self._plan.components
        return {stored_name(alias, components): self._stored[kept]
                for alias, kept in self._plan.base.aliases.items() if kept in names}

    def _finish(self, file: str, writer: ShardWriter) -> None:
        digest = writer.finish()
        os.replace(writer.path, self._workplace.path / file)
        self._workplace.save(file, f"{self._plan.options.digest}:{digest}")
