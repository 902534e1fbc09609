"""Orbax behind one thin module: a sequence of checkpoints in one directory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint.experimental import v1 as ocp

from modelstock_jax.errors import UserError

PyTree = Any
_ITEM = "tree"


class Checkpoints:
    """Numbered checkpoints of one pytree under `directory`, saved while training goes on.

    A save is written beside and renamed by Orbax, so a kill at any instant leaves the one
    before it whole.

    Args:
      directory: made if missing.
      keep: how many of the newest to keep; 0 keeps all.
    """

    def __init__(self, directory: str | Path, keep: int = 2) -> None:
        self.directory = Path(directory).absolute()
        policies = ocp.training.preservation_policies
        try:
            self._checkpointer = ocp.training.Checkpointer(
                self.directory,
                preservation_policy=policies.LatestN(keep) if keep else policies.PreserveAll(),
                cleanup_tmp_directories=True,
            )
        except OSError as error:
            raise UserError(f"cannot keep checkpoints in {self.directory}: {error}") from error

    @property
    def steps(self) -> list[int]:
        """The steps that can be restored, ascending."""
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    def save(self, step: int, tree: PyTree) -> None:
        """Starts saving `tree` as `step`; returns once the arrays may be donated.

        Raises:
          UserError: if this save or the one before it could not be written (a full disk).
        """
        self.wait()  # A step still being written is neither among `steps` nor safe to overwrite.
        try:
            self._checkpointer.save_checkpointables_async(
                step, {_ITEM: tree}, force=True, overwrite=step in self.steps
            )
        except (OSError, ValueError) as error:
            raise self._unwritable(error) from error

    def wait(self) -> None:
        """Waits until every save is on disk.

        Raises:
          UserError: if one could not be written.
        """
        try:
            self._checkpointer.wait()
        except (OSError, ValueError) as error:
            raise self._unwritable(error) from error

    def restore(self, step: int, like: PyTree) -> PyTree:
        """Reads checkpoint `step` into the structure, dtypes and shardings of `like`.

        Args:
          step: one of `steps`.
          like: arrays or `jax.ShapeDtypeStruct`s with shardings.

        Raises:
          UserError: if the checkpoint is missing, unreadable or of another structure.
        """
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        try:
            return self._checkpointer.load_checkpointables(step, {_ITEM: abstract})[_ITEM]
        except Exception as error:  # Orbax, TensorStore and asyncio each raise their own kinds.
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(
                f"cannot restore checkpoint {self.directory / str(step)}: {lines[0][:300]}; "
                "remove that folder to go on from the one before it"
            ) from error

    def close(self) -> None:
        """Waits for the last save and ends Orbax's threads."""
        self.wait()
        self._checkpointer.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.close()
        else:
            self._checkpointer.close()

    def _unwritable(self, error: Exception) -> UserError:
        free = shutil.disk_usage(self.directory).free / 1e6
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        return UserError(
            f"cannot write a checkpoint under {self.directory} ({free:.0f} MB free): {reason}; "
            "make room or choose another --workdir, and the same command goes on"
        )
