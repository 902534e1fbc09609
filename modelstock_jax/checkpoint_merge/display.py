"""Printed output: the plan, the result and the comparison, on a terminal or in a pipe.

`python -m modelstock_jax.checkpoint_merge.display` draws the figure of a merge: see `PlotProcess`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from modelstock_jax.checkpoint_merge.executor import MergeResult
from modelstock_jax.checkpoint_merge.plan import Plan
from modelstock_jax.checkpoint_merge.report import (
    adapter_texts,
    merged_models,
    outcome_counts,
    outcome_label,
)
from modelstock_jax.checkpoint_merge.tensor_plan import TensorPlan
from modelstock_jax.fileio import to_json_types
from modelstock_jax.merging.tensor_roles import block_position
from modelstock_jax.registry import COMMANDS
from modelstock_jax.reporting.progress import duration

MAX_LISTED = 20
# matplotlib takes a second to import: for a shorter merge a second process is slower.
MIN_PROCESS_BYTES = 2**30


def show_plan(plan: Plan, out: str | None, console: Console) -> None:
    """Print what a merge would do, and why.

    Args:
      plan: plan of the merge
      out: directory that would be written; None if it was not given
      console: console to print to
    """
    table = _two_columns()
    if plan.anchored:
        table.add_row("base", escape(plan.base.label))
    for number, source in enumerate(plan.finetuned, 1):
        kind = "fine-tune" if plan.anchored else "model"
        kind = "adapter" if plan.options.as_adapter else kind
        table.add_row(f"{kind} {number}", escape(source.label))
    method = COMMANDS[plan.options.method].command
    table.add_row("method", f"{method}, merge unit {plan.options.unit}")
    actions = Counter(tensor.action for tensor in plan.tensors.values())
    counts = (f"{count} {_source(action, 'from ')}" for action, count in actions.items())
    table.add_row("tensors", ", ".join(counts))
    table.add_row("to read", f"{decimal(plan.bytes_read)} in {_passes(plan)}")
    table.add_row(
        "to write",
        f"{decimal(plan.bytes_written)} in {_count(len(plan.files), 'file')}"
        + (f" in {escape(out)}" if out else " (no --out)"),
    )
    table.add_row("memory", f"at most {decimal(plan.memory)}")
    _print(table, console)
    exceptions = {n: t for n, t in plan.tensors.items() if t.action != "merge" or t.reason}
    if exceptions:
        _show_exceptions(exceptions, console)


def _show_exceptions(tensors: Mapping[str, TensorPlan], console: Console) -> None:
    """Print the tensors that are not merged, or not completely, and why."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("not merged, or not completely", "source", "reason"):
        table.add_column(heading)
    for name, tensor in list(tensors.items())[:MAX_LISTED]:
        table.add_row(escape(name), _source(tensor.action), escape(tensor.reason))
    _print(table, console)
    if len(tensors) > MAX_LISTED:
        console.print(
            f"and {len(tensors) - MAX_LISTED} more; number of all these tensors by reason:",
            highlight=False,
        )
        reasons = Counter((_source(t.action), t.reason) for t in tensors.values())
        for (source, reason), count in reasons.most_common():
            console.print(f"  {count} {source}: {reason}", highlight=False, markup=False)


def show_merge(
    document: Mapping[str, Any], result: MergeResult, out: str | Path, console: Console
) -> None:
    """Print the summary of a merge: models, ratios, outcomes, output directory and time.

    Args:
      document: content of the report
      result: result of the merge
      out: directory that was written
      console: console to print to
    """
    table = _two_columns()
    method = COMMANDS[document["options"]["method"]].command
    table.add_row("merged", f"{escape(merged_models(document))}, {method}")
    if ratios := document["ratios"].get("all"):
        table.add_row(
            "ratios",
            f"{ratios['min']:.3f} to {ratios['max']:.3f}, median {ratios['median']:.3f} over "
            f"{_count(ratios['tensors'], 'tensor')}",
        )
    table.add_row("units", outcome_counts(document["outcomes"]))
    for heading, text in adapter_texts(document.get("adapter") or {}):
        table.add_row(heading, escape(text))
    if count := len(document["not_merged"]):
        table.add_row("not merged", f"{_count(count, 'tensor')} (reasons: merge_report.json)")
    distance = document["predicted_distance"]
    if distance and all(distance.get(key) is not None for key in ("replica", "mean", "merged")):
        table.add_row(
            "distances",
            "to the center (predicted): single fine-tune {replica:.4g}, mean {mean:.4g}, "
            "merged {merged:.4g}".format(**distance),
        )
    table.add_row("written to", escape(str(out)))
    num_bytes = result.bytes_read + result.bytes_written
    rate = f", {decimal(int(num_bytes / result.seconds))}/s" if result.seconds > 0 else ""
    time = f"{result.seconds:.1f} s" if result.seconds < 60 else duration(result.seconds)
    table.add_row(
        "time",
        f"{time} for {decimal(result.bytes_read)} read, "
        f"{decimal(result.bytes_written)} written{rate}",
    )
    if result.resumed:
        count = _count(len(result.resumed), "complete file")
        table.add_row("resumed", f"reused {count} of an earlier run")
    _print(table, console)


def show_comparison(
    rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], console: Console
) -> None:
    """Print a line per tensor: size, norms, cosines, angle, ratio, predicted distances, outcome.

    A terminal that is too narrow shows names, angles and ratios, and other columns that fit.

    Args:
      rows: rows of the tensors
      summary: summary of the ratios by role
      console: console to print to
    """
    positions = block_position([row["name"] for row in rows])
    towers = list(dict.fromkeys(p.tower for p in positions))
    keys = [(towers.index(p.tower), p.depth) for p in positions]
    ordered = [row for _, row in sorted(zip(keys, rows, strict=True), key=lambda pair: pair[0])]
    cells = {heading: [text(row) for row in ordered] for heading, text in _COLUMNS.items()}
    omitted = _fit(cells, console.width) if console.is_terminal else []
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in cells:
        table.add_column(heading, justify="left" if heading == "tensor" else "right", no_wrap=True)
    for line in zip(*cells.values(), strict=True):
        table.add_row(*map(escape, line))
    _print(table, console)
    if summary:
        _print(_ratio_table(summary), console)
    if omitted:
        console.print(
            f"Columns that do not fit this terminal: {'; '.join(omitted)}. A pipe and --json show "
            "all columns.",
            highlight=False,
        )


def _ratio_table(summary: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("ratios", "tensors", "min", "median", "max"):
        table.add_column(heading, justify="left" if heading == "ratios" else "right")
    for kind, value in summary.items():
        table.add_row(
            kind, str(value["tensors"]), *(f"{value[key]:.3f}" for key in ("min", "median", "max"))
        )
    return table


def _fit(cells: dict[str, list[str]], width: int) -> list[str]:
    """Remove columns, then shorten names at the front, until a table is `width` wide.

    Returns:
      The headings of the removed columns.
    """

    def free_width() -> int:
        widths = (
            max(len(text) for text in (*heading.split("\n"), *texts))
            for heading, texts in cells.items()
        )
        return width - sum(widths) - 3 * len(cells) + 1  # Spaces between columns, and at the ends.

    omitted: list[str] = []
    for heading in _OMITTED_FIRST:
        if free_width() < 0:
            del cells[heading]
            omitted.append(heading.replace("\n", " "))
    names = cells["tensor"]
    max_length = max(12, max(map(len, names), default=0) + min(0, free_width()))
    cells["tensor"] = [
        n if len(n) <= max_length else "…" + n[len(n) - max_length + 1 :] for n in names
    ]
    return omitted


def _pairs(matrix: Sequence[Sequence[Any]]) -> list[Any]:
    return [matrix[i][j] for i in range(len(matrix)) for j in range(i + 1, len(matrix))]


def _number(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)


_DISTANCE = "predicted distance\nto center: "
_COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "tensor": lambda row: row["name"],
    "shape": lambda row: "x".join(map(str, row["shape"])) or "1",
    "update\nnorms": lambda row: " ".join(f"{norm:.3g}" for norm in row["norms"]),
    "cosines": lambda row: " ".join(_number(c, ".3f") for c in _pairs(row["cosines"])),
    "angle\n(deg)": lambda row: _number(row["angle"], ".1f"),
    "ratio": lambda row: _number(row["ratio"], ".3f"),
    f"{_DISTANCE}single": lambda row: _number(row["predicted_distance"]["replica"], ".3g"),
    f"{_DISTANCE}mean": lambda row: _number(row["predicted_distance"]["mean"], ".3g"),
    f"{_DISTANCE}merged": lambda row: _number(row["predicted_distance"]["merged"], ".3g"),
    "outcome": lambda row: outcome_label(row["outcome"]),
}
_OMITTED_FIRST = (
    f"{_DISTANCE}single",
    f"{_DISTANCE}mean",
    f"{_DISTANCE}merged",
    "cosines",
    "shape",
    "update\nnorms",
    "outcome",
)


def _passes(plan: Plan) -> str:
    """Return how often tensors are read: '2 passes', or '2 to 6 passes' if they differ."""
    merged = [tensor for tensor in plan.tensors.values() if tensor.unit_view is not None]
    passes = sorted({plan.passes(tensor) for tensor in merged} or {1})
    numbers = " to ".join(str(number) for number in dict.fromkeys((passes[0], passes[-1])))
    return f"{numbers} pass{'es' if passes[-1] > 1 else ''}"


def _source(action: str, prefix: str = "") -> str:
    """Return the source of a tensor's values; `prefix` precedes it, except "merged"."""
    kind, _, index = action.partition(":")
    labels = {"merge": "merged", "base": f"{prefix}the base", "mean": f"{prefix}the mean"}
    return labels.get(kind, f"{prefix}fine-tune {index}")


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _two_columns() -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _print(table: Table, console: Console) -> None:
    if console.is_terminal:
        console.print(table)
        return
    # A file or a pipe has no width limit. Lines end without spaces.
    width = console.measure(table, options=console.options.update(max_width=10_000)).maximum
    console.width = max(console.width, width)
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        console.print(line.rstrip(), highlight=False, markup=False)


class PlotProcess:
    """Draws `figures.angle_by_block` for a merge that reads `num_bytes`.

    For a long merge, a separate process imports matplotlib from the start of the merge, and draws
    while the last file is flushed to disk. For a short merge, this process draws.

    Args:
      num_bytes: bytes that the merge reads

    Example:
      >>> PlotProcess(0).close()
    """

    def __init__(self, num_bytes: int):
        self._rows: Sequence[Mapping[str, Any]] = []
        self._path: Path | None = None
        self._process = _start() if num_bytes >= MIN_PROCESS_BYTES else None

    def begin(self, path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        """Set the rows of the report and the path of the figure; do not wait.

        Args:
          path: path of the figure
          rows: rows of the report
        """
        self._path, self._rows = path, rows
        if self._process is not None and self._process.stdin is not None:
            try:
                with self._process.stdin as pipe:
                    pipe.write(json.dumps([str(path), to_json_types(rows)]).encode())
            except OSError:  # The process has ended; `finish` draws instead.
                pass

    def finish(self) -> None:
        """Wait until the figure is written."""
        if self._process is None or self._process.wait() != 0:
            # matplotlib is slow to import, so it is imported only if there is something to draw.
            from modelstock_jax.reporting.figures import angle_by_block

            angle_by_block(self._rows, self._path)

    def close(self) -> None:
        """Kill the process if it still runs."""
        if self._process is not None:
            if self._process.stdin is not None:
                self._process.stdin.close()
            self._process.kill()
            self._process.wait()


def _start() -> subprocess.Popen | None:
    command = [sys.executable, "-m", "modelstock_jax.checkpoint_merge.display"]
    try:
        # In a separate session Ctrl-C reaches only the merge, which then ends this process.
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError:
        return None


def main() -> None:
    """Import matplotlib, read path and rows from standard input, and draw the figure."""
    from modelstock_jax.reporting.figures import angle_by_block

    if text := sys.stdin.buffer.read():
        path, rows = json.loads(text)
        angle_by_block(rows, path)


if __name__ == "__main__":
    main()
