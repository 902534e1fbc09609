"""Trained replicas, made once and stored by checksum as safetensors."""

from __future__ import annotations

import abc
import functools
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from modelstock_jax.errors import UserError
from modelstock_jax.fileio import new_directory
from modelstock_jax.merging.trees import PyTree
from modelstock_jax.models.param_mapping import flatten, unflatten
from modelstock_jax.tensor_files.reader import TensorFiles
from modelstock_jax.tensor_files.writer import write_tensors
from studies.runs import Run


def write_tree(path: Path, tree: PyTree) -> None:
    """Write nested dicts of arrays to one safetensors file; names are keys joined with dots.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "w.safetensors"
      >>> write_tree(path, {"head": {"bias": np.arange(2.0)}})
      >>> read_tree(path)
      {'head': {'bias': array([0., 1.])}}
    """
    write_tensors(path, {".".join(keys): np.asarray(leaf) for keys, leaf in flatten(tree)})


def read_tree(path: Path) -> PyTree:
    """Read a file of `write_tree` as nested dicts of NumPy arrays."""
    files = TensorFiles(path)
    tree = unflatten({tuple(name.split(".")): files[name] for name in files})
    return jax.tree.map(np.asarray, tree)


class RunStore(abc.ABC):
    """The weights of runs; a run is trained when they are first needed.

    A run is stored in workdir/trained/NAME:

    - `replicas.safetensors`: the replicas at the end, [N, ...] per tensor.
    - `epoch_K.safetensors`: with `every_epoch`, the replicas at epoch K (K may be a fraction such
      as 0.5; at a merge, they are the merged weights).
    - `merged.safetensors`: the last merged model, if the run merges.

    Args:
      config: base config of every run.
      workdir: where runs are stored.
      record: called with (key, value, seconds) after each complete run.
      max_cached_files: files whose weights stay in memory.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        record: Callable[[list[Any], Any, float], None],
        max_cached_files: int,
    ) -> None:
        self._config, self._workdir, self._record = config, workdir, record
        self._read = functools.lru_cache(max_cached_files)(read_tree)

    @abc.abstractmethod
    def checksum(self, config: ConfigDict) -> str:
        """Return the checksum of everything that a run's weights depend on, except its seed."""

    @abc.abstractmethod
    def start(self, run: Run) -> PyTree:
        """Return the initial weights of the run's replicas."""

    @property
    @abc.abstractmethod
    def steps_per_epoch(self) -> int:
        """Steps per epoch of the base config."""

    @abc.abstractmethod
    def num_steps(self, config: ConfigDict) -> int:
        """Return the optimizer steps of one replica."""

    @abc.abstractmethod
    def train_parts(self, run: Run, name: str, title: str) -> dict[str, PyTree]:
        """Train a run; return the trees to store, by file stem.

        Args:
          run: the run.
          name: as returned by `name`.
          title: shown with the progress.
        """

    def name(self, run: Run) -> str:
        """Return the checksum of everything that the run's weights depend on, with its seed."""
        epochs = f"-epochs{run.saves_per_epoch if run.saves_per_epoch > 1 else ''}"
        checksum = self.checksum(run.config(self._config))
        return f"{checksum}-{run.seed}" + epochs * run.every_epoch

    def weights(self, run: Run, part: str) -> PyTree:
        """Return `replicas`, `epoch_K` or `merged` of a run; train it if needed.

        Raises:
          UserError: if the run has no such part.
        """
        directory = self.train(run)
        path = directory / f"{part}.safetensors"
        if not path.is_file():
            raise UserError(f"{directory}: this run has no {part!r}")
        return self._read(path)

    def train(self, run: Run, title: str = "") -> Path:
        """Train a run unless it is stored; return its directory.

        Args:
          run: the run.
          title: shown with the progress; by default the replicas and the seed.
        """
        directory = self._workdir / "trained" / self.name(run)
        if not directory.is_dir():
            self._train(run, directory, title or self.title(run))
        return directory

    def _train(self, run: Run, directory: Path, title: str) -> None:
        begin = time.monotonic()
        parts = self.train_parts(run, directory.name, title)
        seconds = time.monotonic() - begin
        with new_directory(directory) as temporary:
            for name, tree in parts.items():
                write_tree(temporary / f"{name}.safetensors", tree)
        # It may contain the optimizer state, which only resumes the run.
        shutil.rmtree(self._workdir / directory.name, ignore_errors=True)
        config = run.config(self._config)
        self._record(
            ["Trained", directory.name],
            {
                "seed": run.seed,
                "options": dict(run.options),
                "replicas": config.num_replicas,
                "steps": self.num_steps(config),
            },
            seconds,
        )

    def title(self, run: Run) -> str:
        """Return the run's replicas and seed as text."""
        count = run.config(self._config).num_replicas
        return f"{count} replicas, seed {run.seed}" if count > 1 else f"one model, seed {run.seed}"

    def steps(self, run: Run) -> int:
        """Return the optimizer steps of a run, summed over its replicas."""
        config = run.config(self._config)
        return self.num_steps(config) * config.num_replicas

    def is_trained(self, run: Run) -> bool:
        """Return whether the run is stored."""
        return (self._workdir / "trained" / self.name(run)).is_dir()


def epoch_file(epoch: float) -> str:
    """Return the file stem of the replicas at an epoch of their run.

    >>> epoch_file(2 / 1), epoch_file(12 / 32)
    ('epoch_2', 'epoch_0.375')
    """
    return f"epoch_{epoch:g}"
