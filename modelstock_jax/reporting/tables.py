"""Rows of results and their means over seeds, and the table of them: on screen, markdown, JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from modelstock_jax.errors import UserError
from modelstock_jax.fileio import write_json, write_text
from modelstock_jax.registry import ROWS

# Rows of results: one evaluated model each; and their mean over seeds.


Row = Mapping[str, Any]

# What a row may lack; it has always an `id`.
MEASURES = ("avg_shifts", "distance_to_anchor", "predicted_distance", "cost")


class MeanAndError(NamedTuple):
    """A mean over seeds and its standard error (None with one seed)."""

    mean: float
    error: float | None = None


@dataclass(frozen=True)
class Summary:
    """One method over all its seeds; a measure that no row has is None."""

    method: str
    label: str
    alpha: float | None
    of: str | None
    unit: str | None
    num_seeds: int
    id: MeanAndError
    avg_shifts: MeanAndError | None
    distance_to_anchor: MeanAndError | None
    predicted_distance: MeanAndError | None
    cost: MeanAndError | None
    shifts: dict[str, MeanAndError] = field(default_factory=dict)


def make_row(
    method: str,
    *,
    id: float,
    shifts: Mapping[str, float],
    seed: int | None = None,
    cost: float = 0,
    distance_to_anchor: float | None = None,
    predicted_distance: float | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A row of `results.json`; the average of the shifts is their plain mean.

    Args:
      method: a key of `registry.ROWS`, or a name of your own.
      id: top-1 accuracy on the in-distribution test set, in percent.
      shifts: name of a shift -> top-1 accuracy in percent.
      seed: the run's seed; None for what no seed enters (the anchor).
      cost: training spent, in fine-tunings of one model.
      distance_to_anchor: Euclidean, over all weights that are merged.
      predicted_distance: to the center (root-sum-squares over units); None where not defined.
      **more: `alpha` and `of` ("single_model" or "uniform_mean") of a WiSE-FT row, `num_replicas`; `unit` where
        it is not the run's own; anything else to keep.

    Returns:
      A plain dict.

    Example:
      >>> make_row("uniform_mean", id=70.0, shifts={"V2": 60.0, "R": 40.0}, seed=0)["avg_shifts"]
      50.0
    """
    shifts = {name: float(accuracy) for name, accuracy in shifts.items()}
    return {
        "method": method,
        "id": float(id),
        "shifts": shifts,
        "avg_shifts": sum(shifts.values()) / len(shifts) if shifts else None,
        "seed": seed,
        "cost": cost,
        "distance_to_anchor": distance_to_anchor,
        "predicted_distance": predicted_distance,
        **more,
    }


def mean_and_error(values: Sequence[float]) -> MeanAndError:
    """The mean, and the standard error of the mean: sqrt(sum (x - mean)^2 / (S - 1) / S).

    Args:
      values: one number a seed; at least one.

    Returns:
      `Measured(mean, error)`; the error of a single value is None.

    Example:
      >>> mean_and_error([1.0, 3.0])
      Measured(mean=2.0, error=1.0)
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return MeanAndError(mean)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return MeanAndError(mean, math.sqrt(variance / count))


def summarize(rows: Iterable[Row]) -> list[Summary]:
    """Groups rows by method (and alpha, unit) in order of appearance; means and errors over seeds.

    Several rows of one seed (the replicas of a run) are averaged first: the error is over seeds.

    Args:
      rows: as `make_row` gives them.

    Returns:
      One `Summary` a method.
    """
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        key = tuple(row.get(name) for name in ("method", "of", "alpha", "unit", "num_replicas"))
        groups.setdefault(key, []).append(row)
    labels = [label(group[0]) for group in groups.values()]
    summaries = []
    for name, group in zip(labels, groups.values(), strict=True):
        first = group[0]
        if labels.count(name) > 1 and first.get("num_replicas"):
            name = f"{name}, N = {first['num_replicas']}"
        shifts = dict.fromkeys(shift for row in group for shift in row["shifts"])
        summaries.append(
            Summary(
                method=first["method"],
                label=name,
                alpha=first.get("alpha"),
                of=first.get("of"),
                unit=first.get("unit"),
                num_seeds=len({row.get("seed") for row in group}),
                id=over_seeds((row, row["id"]) for row in group),
                shifts={
                    shift: over_seeds(
                        (row, row["shifts"][shift]) for row in group if shift in row["shifts"]
                    )
                    for shift in shifts
                },
                **{measure: _known(group, measure) for measure in MEASURES},
            )
        )
    return summaries


def over_seeds(measured: Iterable[tuple[Row, float]]) -> MeanAndError:
    """The mean over seeds of the means within a seed, of rows each with its value.

    Example:
      >>> over_seeds([({"seed": 0}, 1.0), ({"seed": 0}, 3.0), ({"seed": 1}, 4.0)])
      Measured(mean=3.0, error=1.0)
    """
    seeds: dict[Any, list[float]] = {}
    for row, value in measured:
        seeds.setdefault(row.get("seed"), []).append(float(value))
    return mean_and_error([math.fsum(group) / len(group) for group in seeds.values()])


def _known(rows: Sequence[Row], measure: str) -> MeanAndError | None:
    known = [(row, row[measure]) for row in rows if row.get(measure) is not None]
    return over_seeds(known) if known else None


def label(row: Row) -> str:
    """What a reader calls the row's method.

    Example:
      >>> label({"method": "wise_ft", "alpha": 0.5, "of": "uniform_mean"})
      'WiSE-FT of the uniform mean, α = 0.5'
    """
    style = ROWS.get(row["method"])
    if style is None:
        return str(row["method"])
    source = "the uniform mean" if row.get("of") == "uniform_mean" else "a single model"
    text = style.label.format(
        n=row.get("num_replicas", "the"), of=source, alpha=row.get("alpha", 0.5)
    )
    return f"{text}, unit {row['unit']}" if row.get("unit") else text


WISE_FT_SHOWN = (0.5,)


class Column(NamedTuple):
    """A column of numbers.

    Attributes:
      heading: above it.
      values: one a row, None where it has none.
      digits: after the point; None shows three that count, wherever the point is.
      with_error: whether the standard error is shown.
      highlighted: whether its highest number stands out.
    """

    heading: str
    values: list[MeanAndError | None]
    digits: int | None
    with_error: bool
    highlighted: bool


def columns(summaries: Sequence[Summary]) -> list[Column]:
    """The table's columns after the method's name, in reading order."""
    shifts = list(dict.fromkeys(name for summary in summaries for name in summary.shifts))
    of = [Column("ID", [summary.id for summary in summaries], 2, True, True)]
    of += [
        Column(name, [summary.shifts.get(name) for summary in summaries], 1, False, True)
        for name in shifts
    ]
    measured = [summary.avg_shifts for summary in summaries]
    of += [Column("avg shifts", measured, 2, True, True)]
    for heading, measure, digits in [
        ("to anchor", "distance_to_anchor", 2),
        ("to center", "predicted_distance", 2),
        ("cost", "cost", None),
    ]:
        values = [getattr(summary, measure) for summary in summaries]
        if any(value is not None for value in values):
            of.append(Column(heading, values, digits, False, False))
    return of


def cells(column: Column) -> list[tuple[str, bool]]:
    """The column's texts, each with whether it is the best (as printed: equal texts tie)."""
    texts = [_number(value, column) for value in column.values]
    known = [value.mean for value in column.values if value is not None]
    if not column.highlighted or len(known) < 2:
        return [(text, False) for text in texts]
    best = round(max(known), column.digits)
    return [
        (text, value is not None and round(value.mean, column.digits) == best)
        for text, value in zip(texts, column.values, strict=True)
    ]


def shown(
    rows: Iterable[Row], wise_ft_alphas: Sequence[float] | None = WISE_FT_SHOWN
) -> list[Summary]:
    """The summaries that a table shows; of a WiSE-FT curve these alphas only (None: all)."""
    return [
        summary
        for summary in summarize(rows)
        if summary.alpha is None
        or wise_ft_alphas is None
        or any(abs(summary.alpha - alpha) < 1e-9 for alpha in wise_ft_alphas)
    ]


def markdown_table(
    rows: Iterable[Row], *, wise_ft_alphas: Sequence[float] | None = WISE_FT_SHOWN
) -> str:
    """The table as GitHub's markdown, a caption below; the best accuracy of a column is bold.

    Args:
      rows: as `make_row` gives them.
      wise_ft_alphas: which points of the WiSE-FT curves to show; None shows all.

    Returns:
      Text that ends in a newline.
    """
    summaries = shown(rows, wise_ft_alphas)
    of = columns(summaries)
    lines = [
        "| " + " | ".join(["method", *(column.heading for column in of)]) + " |",
        "|" + "---|" + "---:|" * len(of),
    ]
    texts = [[f"**{text}**" if best else text for text, best in cells(column)] for column in of]
    for summary, *row in zip(summaries, *texts, strict=True):
        lines.append("| " + " | ".join([summary.label, *row]) + " |")
    return "\n".join(lines) + "\n\n" + caption(summaries) + "\n"


def screen_table(rows: Iterable[Row], *, console: Console | None = None) -> None:
    """Prints the table; a terminal too narrow for every shift gets their average alone.

    Args:
      rows: as `make_row` gives them.
      console: where to print; standard output by default.
    """
    console = console or Console()
    summaries = shown(rows)
    of = columns(summaries)
    table = _rich_table(summaries, of)
    needed = console.measure(table, options=console.options.update(max_width=10_000)).maximum
    note = ""
    if not console.is_terminal:
        console.width = max(console.width, needed)  # A file or a pipe has no width to fit in.
    elif needed > console.width:
        keep = {"ID", "avg shifts", "to anchor", "to center", "cost"}
        table = _rich_table(summaries, [column for column in of if column.heading in keep])
        note = " Each shift: see results.md."
    console.print(table)
    console.print(caption(summaries) + note, style="dim", highlight=False)


def caption(summaries: Sequence[Summary]) -> str:
    """What the numbers are, in a line or two."""
    seeds = max((summary.num_seeds for summary in summaries), default=1)
    text = "Top-1 accuracy in %"
    if seeds > 1:
        text += f", mean ± standard error over {seeds} seeds"
    there = {column.heading for column in columns(summaries)}
    far = {"to anchor": "to the anchor", "to center": "to the center as the angles predict it"}
    if distances := [said for heading, said in far.items() if heading in there]:
        text += f"; distances of weights: {', and '.join(distances)}"
    return text + ("; cost in fine-tunings of one model." if "cost" in there else ".")


def write_results(workdir: str | Path, rows: Sequence[Row], **more: Any) -> tuple[Path, Path]:
    """Writes `results.json` (rows, their summary, and `more`) and `results.md`; no clock in either.

    Args:
      workdir: the run's directory.
      rows: as `make_row` gives them.
      **more: further entries of the JSON object (`layers`, `ratios`, `config`, ...).

    Returns:
      The paths of the two files.

    Raises:
      UserError: the directory cannot be written.
    """
    summary = [_flat(asdict(summary)) for summary in summarize(rows)]
    document = {**more, "rows": list(rows), "summary": summary}
    return (
        write_json(Path(workdir) / "results.json", document),
        write_text(Path(workdir) / "results.md", markdown_table(rows)),
    )


def read_results(path: str | Path) -> dict[str, Any]:
    """Reads `results.json` (or the one in a run's directory).

    Raises:
      UserError: there is none, or it is not one of ours.
    """
    path = Path(path)
    path = path / "results.json" if path.is_dir() else path
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; run launch.py to make it") from error
    if not isinstance(document, Mapping) or "rows" not in document:
        raise UserError(f"{path} holds no rows; run launch.py to make it")
    return dict(document)


def _rich_table(summaries: Sequence[Summary], of: Sequence[Column]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("method", no_wrap=True)
    for column in of:
        table.add_column(column.heading, justify="right", no_wrap=True)
    texts = [
        [f"[bold]{text}[/bold]" if best else text for text, best in cells(column)] for column in of
    ]
    for summary, *row in zip(summaries, *texts, strict=True):
        table.add_row(summary.label, *row)
    return table


def _number(value: MeanAndError | None, column: Column) -> str:
    if value is None:
        return "–"
    if column.digits is None:
        return f"{value.mean:.3g}"
    text = f"{value.mean:.{column.digits}f}"
    if column.with_error and value.error is not None:
        text += f" ± {value.error:.{column.digits}f}"
    return text


def _flat(value: Any) -> Any:
    """A `GramStats` becomes {mean, error}: asdict leaves named tuples as they are."""
    if isinstance(value, MeanAndError):
        return value._asdict()
    if isinstance(value, dict):
        return {key: _flat(item) for key, item in value.items()}
    return value
