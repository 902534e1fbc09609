"""What a person reads: the plan, the result and the comparison, on a terminal or in a pipe."""

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
from modelstock_jax.checkpoint_merge.report import merged
from modelstock_jax.fileio import plain
from modelstock_jax.merging.units import block_position
from modelstock_jax.reporting.progress import duration

MOST_LISTED = 20


def show_plan(plan: Plan, out: str, console: Console) -> None:
    """What a merge would do, and why."""
    table = _facts()
    if plan.anchored:
        table.add_row("base", escape(plan.base.label))
    for number, source in enumerate(plan.finetuned, 1):
        what = "fine-tune" if plan.anchored else "model"
        table.add_row(f"{what} {number}", escape(source.label))
    table.add_row("method", f"{plan.options.method}, unit {plan.options.unit}")
    actions = Counter(tensor.action for tensor in plan.tensors.values())
    table.add_row("tensors", ", ".join(f"{n} {_took(action)}" for action, n in actions.items()))
    table.add_row("to read", f"{decimal(plan.bytes_read)} in {plan.passes} passes")
    table.add_row(
        "to write",
        f"{decimal(plan.bytes_written)} in {len(plan.files)} file"
        f"{'s' if len(plan.files) > 1 else ''} under {escape(out)}",
    )
    table.add_row("memory", f"at most {decimal(plan.memory)}")
    _print(table, console)
    left = {n: t for n, t in plan.tensors.items() if t.action != "merge" or t.reason}
    reasons = Counter((_took(t.action), t.reason) for t in left.values())
    if left:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in ("not merged by the rule", "takes", "why"):
            table.add_column(heading)
        for name, tensor in list(left.items())[:MOST_LISTED]:
            table.add_row(escape(name), _took(tensor.action), escape(tensor.reason))
        _print(table, console)
        if len(left) > MOST_LISTED:
            console.print(f"and {len(left) - MOST_LISTED} more; in all:", highlight=False)
            for (takes, why), number in reasons.most_common():
                console.print(f"  {number} {takes}: {why}", highlight=False, markup=False)


def show_merge(
    document: Mapping[str, Any], report: MergeResult, out: str | Path, console: Console
) -> None:
    """What was merged, at which ratios, where it lies, and how long it took."""
    table = _facts()
    table.add_row("merged", f"{escape(merged(document))}, {document['options']['method']}")
    if found := document["ratios"].get("all"):
        table.add_row(
            "ratios",
            f"{found['min']:.3f} to {found['max']:.3f}, median "
            f"{found['median']:.3f} over {found['tensors']} tensors",
        )
    policies = sorted(document["outcomes"].items(), key=lambda item: -item[1])
    table.add_row("units", ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in policies))
    if document["not_merged"]:
        table.add_row(
            "not merged", f"{len(document['not_merged'])} tensors; merge_report.json says why"
        )
    distance = document["predicted_distance"]
    if distance and all(distance.get(key) is not None for key in ("replica", "mean", "merged")):
        table.add_row(
            "to the center",
            "one fine-tune {replica:.4g}, their mean {mean:.4g}, "
            "merged {merged:.4g} (predicted)".format(**distance),
        )
    table.add_row("written to", escape(str(out)))
    moved = report.bytes_read + report.bytes_written
    rate = f", {decimal(int(moved / report.seconds))}/s" if report.seconds > 0 else ""
    time = f"{report.seconds:.1f} s" if report.seconds < 60 else duration(report.seconds)
    table.add_row(
        "time",
        f"{time} for {decimal(report.bytes_read)} read, "
        f"{decimal(report.bytes_written)} written{rate}",
    )
    if report.resumed:
        table.add_row("resumed", f"{len(report.resumed)} files were complete from an earlier run")
    _print(table, console)


def show_comparison(
    rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], console: Console
) -> None:
    """A line a tensor: size, norms, cosines, angle, ratio, predicted distances, policy.

    A terminal too narrow for all of it shows names, angles and ratios, and what else fits.
    """
    places = block_position([row["name"] for row in rows])
    towers = list(dict.fromkeys(p.tower for p in places))
    keys = [(towers.index(p.tower), p.depth) for p in places]
    ordered = [row for _, row in sorted(zip(keys, rows, strict=True), key=lambda pair: pair[0])]
    cells = {heading: [text(row) for row in ordered] for heading, text in _COLUMNS.items()}
    left_out = _fit(cells, console.width) if console.is_terminal else []
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in cells:
        table.add_column(heading, justify="left" if heading == "tensor" else "right", no_wrap=True)
    for line in zip(*cells.values(), strict=True):
        table.add_row(*map(escape, line))
    _print(table, console)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("ratios", "tensors", "least", "median", "largest"):
        table.add_column(heading, justify="left" if heading == "ratios" else "right")
    for kind, value in summary.items():
        table.add_row(
            kind, str(value["tensors"]), *(f"{value[key]:.3f}" for key in ("min", "median", "max"))
        )
    _print(table, console)
    if left_out:
        console.print(
            f"In a wider window, in a pipe and in --json: {'; '.join(left_out)}.", highlight=False
        )


def _fit(cells: dict[str, list[str]], width: int) -> list[str]:
    """Takes columns away, and the beginnings of names, until a table is `width` wide."""

    def room() -> int:
        widths = (max(len(text) for text in (heading, *texts)) for heading, texts in cells.items())
        return width - sum(widths) - 3 * len(cells) + 1  # Spaces between columns, and at the ends.

    left_out = []
    for heading in _FIRST_TO_GO:
        if room() < 0:
            del cells[heading]
            left_out.append(heading)
    names = cells["tensor"]
    most = max(12, max(map(len, names), default=0) + min(0, room()))
    cells["tensor"] = [n if len(n) <= most else "…" + n[len(n) - most + 1 :] for n in names]
    return left_out


def _pairs(matrix: Sequence[Sequence[Any]]) -> list[Any]:
    return [matrix[i][j] for i in range(len(matrix)) for j in range(i + 1, len(matrix))]


_COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "tensor": lambda row: row["name"],
    "shape": lambda row: "x".join(map(str, row["shape"])) or "1",
    "norms": lambda row: " ".join(f"{norm:.3g}" for norm in row["norms"]),
    "cosines": lambda row: " ".join(
        "–" if c is None else f"{c:.3f}" for c in _pairs(row["cosines"])
    ),
    "angle": lambda row: "–" if row["angle"] is None else f"{row['angle']:.1f}",
    "ratio": lambda row: "–" if row["ratio"] is None else f"{row['ratio']:.3f}",
    "to center: one, mean, merged": lambda row: " ".join(
        "–" if (far := row["predicted_distance"][key]) is None else f"{far:.3g}"
        for key in ("replica", "mean", "merged")
    ),
    "outcome": lambda row: row["outcome"].replace("_", " "),
}
_FIRST_TO_GO = ("to center: one, mean, merged", "cosines", "shape", "norms", "outcome")


def _took(action: str) -> str:
    kind, _, index = action.partition(":")
    return {"merge": "merged", "base": "from the base", "mean": "the mean"}.get(
        kind, f"from fine-tune {index}"
    )


def _facts() -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _print(table: Table, console: Console) -> None:
    if console.is_terminal:
        console.print(table)
        return
    # A file or a pipe has no width to fit in, and no use for spaces at the ends of lines.
    needed = console.measure(table, options=console.options.update(max_width=10_000)).maximum
    console.width = max(console.width, needed)
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        console.print(line.rstrip(), highlight=False, markup=False)


# The picture of a merge, drawn beside it.


# matplotlib's start takes a second: a merge of less would wait for a second process longer.
WORTH_A_PROCESS = 2**30


class PlotProcess:
    """Draws `figures.angle_by_block` for a merge that reads `num_bytes`.

    A long merge has a process of its own load matplotlib from the start on, and draw while the
    last file is flushed to the disk; a short one draws here.

    Args:
      num_bytes: that the merge reads.

    Example:
      >>> PlotProcess(0).close()
    """

    def __init__(self, num_bytes: int):
        self._rows: Sequence[Mapping[str, Any]] = []
        self._path: Path | None = None
        self._process = _start() if num_bytes >= WORTH_A_PROCESS else None

    def begin(self, path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        """Gives the rows of a merge's report and where the picture will lie; does not wait."""
        self._path, self._rows = path, rows
        if self._process is not None and self._process.stdin is not None:
            try:
                with self._process.stdin as pipe:
                    pipe.write(json.dumps([str(path), plain(rows)]).encode())
            except OSError:  # It ended before its time: `finish` draws.
                pass

    def finish(self) -> None:
        """Waits until the picture is on the disk."""
        if self._process is None or self._process.wait() != 0:
            # matplotlib takes its time: it is imported when there is something to draw.
            from modelstock_jax.reporting.figures import angle_by_block

            angle_by_block(self._rows, self._path)

    def close(self) -> None:
        """Lets go of the process, whatever it does."""
        if self._process is not None:
            if self._process.stdin is not None:
                self._process.stdin.close()
            self._process.kill()
            self._process.wait()


def _start() -> subprocess.Popen | None:
    command = [sys.executable, "-m", "modelstock_jax.checkpoint_merge.display"]
    try:
        # A session of its own: Ctrl-C is for the merge, which ends this process.
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
    """Loads matplotlib, waits for the rows on standard input, draws."""
    from modelstock_jax.reporting.figures import angle_by_block

    if text := sys.stdin.buffer.read():
        path, rows = json.loads(text)
        angle_by_block(rows, path)


if __name__ == "__main__":
    main()
