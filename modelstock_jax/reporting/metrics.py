"""Metrics while a run goes: JSON lines and TensorBoard, safe to append to after a restart."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from modelstock_jax.errors import UserError
from modelstock_jax.reporting.files import plain, write_text


class MetricsWriter:
    """Appends scalars to `metrics.jsonl` and to TensorBoard files in `workdir/tensorboard`.

    On a restart, lines past the restored step (and a line torn by a crash) are dropped, so that the
    file is the one of an uninterrupted run.

    Args:
      workdir: the run's directory.
      restored_step: the step that training resumes from; None begins anew.
      enabled: False makes every call do nothing (all processes but the first).

    Raises:
      UserError: the directory cannot be written.

    Example:
      >>> import tempfile
      >>> workdir = tempfile.mkdtemp()
      >>> with MetricsWriter(workdir) as metrics:
      ...     metrics.write(1, {"loss": 2.5})
      >>> read_metrics(workdir)
      [{'loss': 2.5, 'step': 1}]
    """

    def __init__(
        self, workdir: str | Path, restored_step: int | None = None, *, enabled: bool = True
    ):
        self._file = self._board = None
        self._path = Path(workdir) / "metrics.jsonl"
        if not enabled:
            return
        kept = []
        if restored_step is not None and self._path.exists():
            kept = [line for line in _whole_lines(self._path) if line["step"] <= restored_step]
        write_text(self._path, "".join(_line(entry) for entry in kept))
        self._file = self._path.open("a", encoding="utf-8")
        import tensorboardX  # Here, since it costs half a second.

        self._board = tensorboardX.SummaryWriter(
            str(self._path.with_name("tensorboard")),
            purge_step=None if restored_step is None else restored_step + 1,
        )

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one line.

        Args:
          step: the training step that the values belong to.
          values: name -> scalar, of Python, NumPy or jax; a non-finite one is null in the file.

        Raises:
          UserError: the disk is full.
        """
        if self._file is None:
            return
        values = {name: plain(value) for name, value in values.items()}
        with self._errors():
            self._file.write(_line({"step": int(step), **values}))
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(name, value, int(step))

    def flush(self) -> None:
        """Hands everything to the operating system."""
        if self._file is not None:
            with self._errors():
                self._file.flush()
                self._board.flush()

    def close(self) -> None:
        """Flushes and closes; a second call does nothing."""
        file, board, self._file, self._board = self._file, self._board, None, None
        if file is not None:
            with self._errors():
                file.close()
                board.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write {self._path}: {error.strerror}; free some space and run the same "
                "command again to resume"
            ) from error

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`, in order; a torn last line is left out."""
    return _whole_lines(Path(workdir) / "metrics.jsonl")


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, sort_keys=True) + "\n"


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # Torn by a crash; the steps after the restored one are run again.
        if isinstance(entry, dict) and "step" in entry:
            entries.append(entry)
    return entries
