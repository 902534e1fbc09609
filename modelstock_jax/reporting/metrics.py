"""Metrics during a run: JSON lines and TensorBoard, safe to append to after a restart."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from modelstock_jax.errors import UserError
from modelstock_jax.fileio import JsonLines, read_lines, to_json_types

# Series of one value per tensor. TensorBoard has their histograms; cosines as angles in degrees.
_BY_TENSOR = ("merge/cosine", "merge/ratio")
MAX_SERIES = 4  # More replicas than this are one histogram on TensorBoard.


class _Files(NamedTuple):
    metrics: JsonLines
    performance: JsonLines
    board: Any  # tensorboardX.SummaryWriter


class MetricsWriter:
    """Append scalars to JSON lines and to TensorBoard files in `workdir`.

    `metrics.jsonl` contains what training computed, without timestamps. On a restart, lines after
    the restored step (and a line that a crash cut off) are dropped, so that the file equals that
    of an uninterrupted run. `performance.jsonl` contains the timings of the same steps, from every
    start of the run. TensorBoard gets both, with a histogram of the values of all tensors instead
    of one series per tensor.

    Args:
      workdir: directory of the run
      restored_step: step that training resumes from; None starts from scratch
      enabled: False makes every call do nothing (all processes except the first)

    Attributes:
      kept: lines of metrics.jsonl that a restart preserved, in order
      furthest: last step in performance.jsonl of an earlier start; 0 if there is none

    Raises:
      UserError: the directory cannot be written

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
        self._files: _Files | None = None
        self.preserved: list[dict[str, Any]] = []
        self.furthest = 0
        if not enabled:
            return
        workdir = Path(workdir)
        resumes = restored_step is not None

        def is_restored(entry: Mapping[str, Any]) -> bool:
            return "step" in entry and entry["step"] <= restored_step

        metrics = JsonLines(workdir / "metrics.jsonl", is_restored if resumes else None)
        self.preserved = metrics.preserved
        has_step = (lambda entry: "step" in entry) if resumes else None
        performance = JsonLines(workdir / "performance.jsonl", has_step)
        self.furthest = max((entry["step"] for entry in performance.preserved), default=0)
        import tensorboardX  # Takes half a second, so only where it is needed.

        board = tensorboardX.SummaryWriter(
            str(workdir / "tensorboard"),
            purge_step=restored_step + 1 if resumes else None,
        )
        self._files = _Files(metrics, performance, board)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a line of values that training computed.

        Args:
          step: training step of the values
          values: name -> scalar of Python, NumPy or jax; a non-finite one is null in the file

        Raises:
          UserError: the disk is full
        """
        if self._files is not None:
            _write(self._files.metrics, self._files.board, step, values)

    def write_performance(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a line of timings; otherwise like `write`."""
        if self._files is not None:
            _write(self._files.performance, self._files.board, step, values)

    def flush(self) -> None:
        """Pass everything to the operating system."""
        if self._files is None:
            return
        self._files.metrics.flush()
        self._files.performance.flush()
        with _errors(self._files.board):
            self._files.board.flush()

    def close(self) -> None:
        """Flush and close; a second call does nothing."""
        files, self._files = self._files, None
        if files is None:
            return
        with contextlib.ExitStack() as stack:  # Closes all of them even on a full disk.
            stack.enter_context(_errors(files.board))
            stack.callback(files.board.close)
            stack.callback(files.performance.close)
            stack.callback(files.metrics.close)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _write(lines: JsonLines, board: Any, step: int, values: Mapping[str, Any]) -> None:
    values = {name: to_json_types(value) for name, value in values.items()}
    lines.append({"step": int(step), **values})
    groups: dict[str, list[float]] = {}
    for name, value in values.items():
        if not isinstance(value, (int, float)):
            continue
        group, _, member = name.rpartition("/")
        series = next((series for series in _BY_TENSOR if name.startswith(f"{series}/")), None)
        if series is not None:
            groups.setdefault(series, []).append(value)
        elif member.startswith("replica_") and f"{group}/replica_{MAX_SERIES}" in values:
            groups.setdefault(group, []).append(value)
        else:
            board.add_scalar(name, value, int(step))
    for group, numbers in groups.items():
        _write_group(board, step, group, np.asarray(numbers, np.float64))


def _write_group(board: Any, step: int, group: str, numbers: np.ndarray) -> None:
    """Write many values of one step as a histogram, with their mean, minimum and maximum."""
    if group == "merge/cosine":
        group, numbers = "merge/angle", np.degrees(np.arccos(np.clip(numbers, -1, 1)))
    board.add_histogram(group, numbers, int(step))
    for name in ("mean", "min", "max"):
        board.add_scalar(f"{group}/{name}", getattr(numbers, name)(), int(step))


@contextlib.contextmanager
def _errors(board: Any) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {board.logdir}: {error.strerror}; free some space and run the "
            "same command again to resume"
        ) from error


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """Return the lines of a run's `metrics.jsonl` in order, without an incomplete last line."""
    return [entry for entry in read_lines(Path(workdir) / "metrics.jsonl") if "step" in entry]
