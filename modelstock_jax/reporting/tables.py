"""Rows of results, their means over seeds, and the results table: screen, Markdown and JSON."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from modelstock_jax.errors import UserError
from modelstock_jax.fileio import write_json, write_text
from modelstock_jax.registry import RENAMED_ROWS, ROWS

Row = Mapping[str, Any]

# Measures that a row may lack; `id` is always present.
MEASURES = ("avg_shifts", "distance_to_anchor", "predicted_distance", "cost", "validation")
# Names of ImageNet's shifts in tables, in the order of the paper's tables. results.json has the
# keys; other shifts keep their names and follow in alphabetical order.
SHIFT_NAMES = {
    "v2": "IN-V2",
    "r": "IN-R",
    "a": "IN-A",
    "sketch": "IN-Sketch",
    "objectnet": "ObjectNet",
}
AVG_SHIFTS = "avg. shifts"
TO_ANCHOR = "L2 distance to anchor"
TO_CENTER = "predicted distance to center"
RUNS = "fine-tuning runs"
VALIDATION = "validation"
EXPORTED = "exported"
WISE_FT_SHOWN = (0.5,)
# Columns on terminals that are too narrow for all, from more to fewer.
NARROW = (
    ("ID", AVG_SHIFTS, TO_ANCHOR, TO_CENTER, RUNS),
    ("ID", AVG_SHIFTS, TO_ANCHOR, RUNS),
    ("ID", AVG_SHIFTS, RUNS),
)
LABEL_WIDTH = 20  # Minimum width of the labels on such a terminal.
HEADING_WIDTH = 12  # Characters per line of a heading on the screen.


class MeanAndError(NamedTuple):
    """Mean over seeds and its standard error (None with one seed)."""

    mean: float
    error: float | None = None


@dataclass(frozen=True)
class Summary:
    """One method over all its seeds.

    Attributes:
      method: key of `registry.ROWS`, or another name
      label: label of its table row
      alpha: position on a WiSE-FT curve; None for other methods
      of: "single_model" or "uniform_mean", the end of a WiSE-FT curve; None for other methods
      unit: merge unit if it differs from the run's
      num_seeds: number of seeds
      id: in-distribution accuracy in percent
      avg_shifts: mean accuracy over the shifts; None if no row has it, as for all measures below
      distance_to_anchor: L2 distance to the anchor
      predicted_distance: predicted distance to the center
      cost: training cost in fine-tuning runs of one model
      validation: accuracy on the in-distribution validation images
      shifts: accuracy on each shift, in the order of the table
      exported: whether one of its models is the exported model
    """

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
    validation: MeanAndError | None = None
    shifts: dict[str, MeanAndError] = field(default_factory=dict)
    exported: bool = False


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
    """Return a row of `results.json`; `avg_shifts` is the unweighted mean over the shifts.

    Args:
      method: key of `registry.ROWS`, or another name
      id: top-1 accuracy on the in-distribution test set, in percent
      shifts: name of a shift -> top-1 accuracy in percent
      seed: seed of the run; None if the model depends on no seed (the anchor)
      cost: training cost in fine-tuning runs of one model
      distance_to_anchor: L2 distance over all merged weights
      predicted_distance: distance to the center, root of the sum of squares over units; None if
        undefined
      **more: `alpha` and `of` ("single_model" or "uniform_mean") of a WiSE-FT row, `num_replicas`,
        `unit` if it differs from the run's, `validation`, `exported`, and any other entries to
        store

    Example:
      >>> make_row("uniform_mean", id=70.0, shifts={"v2": 60.0, "r": 40.0}, seed=0)["avg_shifts"]
      50.0
    """
    shifts = {name: float(accuracy) for name, accuracy in shifts.items()}
    return {
        "method": method,
        "id": float(id),
        "avg_shifts": sum(shifts.values()) / len(shifts) if shifts else None,
        "shifts": in_table_order(shifts),
        "seed": seed,
        "cost": cost,
        "distance_to_anchor": distance_to_anchor,
        "predicted_distance": predicted_distance,
        **more,
    }


def in_table_order(shifts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values by shift in the order of the table's columns.

    Example:
      >>> in_table_order({"digits": 1, "objectnet": 2, "v2": 3})
      {'v2': 3, 'objectnet': 2, 'digits': 1}
    """
    names = [name for name in SHIFT_NAMES if name in shifts]
    return {name: shifts[name] for name in (*names, *sorted(shifts.keys() - SHIFT_NAMES))}


def current_rows(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Return rows with the method names of this version.

    Args:
      rows: rows that this or an earlier version wrote

    Example:
      >>> current_rows([{"method": "wise_ft", "of": "replica"}, {"method": "periodic"}])
      [{'method': 'wise_ft', 'of': 'single_model'}, {'method': 'periodic_model_stock'}]
    """
    return [
        {**row}
        | {name: RENAMED_ROWS.get(row[name], row[name]) for name in ("method", "of") if name in row}
        for row in rows
    ]


def mean_and_error(values: Sequence[float]) -> MeanAndError:
    """Return the mean and its standard error sqrt(sum (x - mean)^2 / (S - 1) / S).

    Args:
      values: one value per seed, S >= 1

    Returns:
      mean and error; the error of a single value is None

    Example:
      >>> mean_and_error([1.0, 3.0])
      MeanAndError(mean=2.0, error=1.0)
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return MeanAndError(mean)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return MeanAndError(mean, math.sqrt(variance / count))


def summarize(rows: Iterable[Row]) -> list[Summary]:
    """Group rows by method, alpha, unit and number of replicas, in order of appearance.

    Rows of the same seed (the replicas of a run) are averaged first: errors are over seeds.

    Args:
      rows: rows of `make_row`

    Returns:
      one `Summary` per method
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
                    for shift in in_table_order(shifts)
                },
                exported=any(row.get("exported") for row in group),
                **{measure: _over_seeds_if_known(group, measure) for measure in MEASURES},
            )
        )
    return summaries


def over_seeds(measured: Iterable[tuple[Row, float]]) -> MeanAndError:
    """Average the values within each seed, then over seeds.

    Args:
      measured: rows, each with its value

    Example:
      >>> over_seeds([({"seed": 0}, 1.0), ({"seed": 0}, 3.0), ({"seed": 1}, 4.0)])
      MeanAndError(mean=3.0, error=1.0)
    """
    seeds: dict[Any, list[float]] = {}
    for row, value in measured:
        seeds.setdefault(row.get("seed"), []).append(float(value))
    return mean_and_error([math.fsum(group) / len(group) for group in seeds.values()])


def _over_seeds_if_known(rows: Sequence[Row], measure: str) -> MeanAndError | None:
    measured = [(row, row[measure]) for row in rows if row.get(measure) is not None]
    return over_seeds(measured) if measured else None


def label(row: Row) -> str:
    """Return the label of a row in tables.

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


class Column(NamedTuple):
    """A numeric column.

    Attributes:
      heading: column heading
      values: one value per row; None for a missing value
      digits: decimal places; None shows three significant digits
      with_error: whether to show the standard error
      highlighted: whether to highlight the highest value
    """

    heading: str
    values: list[MeanAndError | None]
    digits: int | None
    with_error: bool
    highlighted: bool


def columns(summaries: Sequence[Summary]) -> list[Column]:
    """Return the table's columns after the method, in reading order."""
    shifts = dict.fromkeys(name for summary in summaries for name in summary.shifts)
    averages = [summary.avg_shifts for summary in summaries]
    result = [
        Column("ID", [summary.id for summary in summaries], 2, True, True),
        Column(AVG_SHIFTS, averages, 2, True, True),
    ]
    for name in in_table_order(shifts):
        values = [summary.shifts.get(name) for summary in summaries]
        result.append(Column(SHIFT_NAMES.get(name, name), values, 1, False, True))
    for heading, measure, digits in [
        (TO_ANCHOR, "distance_to_anchor", 2),
        (TO_CENTER, "predicted_distance", 2),
        (RUNS, "cost", None),
        (VALIDATION, "validation", 2),
    ]:
        values = [getattr(summary, measure) for summary in summaries]
        if any(value is not None for value in values):
            result.append(Column(heading, values, digits, False, False))
    return result


def cells(column: Column) -> list[tuple[str, bool]]:
    """Return each cell's text and whether it is the best (equal printed values tie)."""
    texts = [_cell_text(value, column) for value in column.values]
    means = [value.mean for value in column.values if value is not None]
    if not column.highlighted or len(means) < 2:
        return [(text, False) for text in texts]
    best = round(max(means), column.digits)
    return [
        (text, value is not None and round(value.mean, column.digits) == best)
        for text, value in zip(texts, column.values, strict=True)
    ]


def shown(
    rows: Iterable[Row], wise_ft_alphas: Sequence[float] | None = WISE_FT_SHOWN
) -> list[Summary]:
    """Return the summaries to show, with only these alphas of a WiSE-FT curve (None: all)."""
    return [
        summary
        for summary in summarize(rows)
        if summary.alpha is None
        or wise_ft_alphas is None
        or any(abs(summary.alpha - alpha) < 1e-9 for alpha in wise_ft_alphas)
    ]


def markdown_table(
    rows: Iterable[Row],
    *,
    wise_ft_alphas: Sequence[float] | None = WISE_FT_SHOWN,
    synthetic: bool = False,
) -> str:
    """Return the table in GitHub's Markdown with a caption; the best accuracies are bold.

    Args:
      rows: rows of `make_row`
      wise_ft_alphas: points of the WiSE-FT curves to show; None shows all
      synthetic: whether the rows are results of the synthetic benchmark

    Returns:
      text that ends with a newline
    """
    summaries = shown(rows, wise_ft_alphas)
    table = columns(summaries)
    lines = [
        "| " + " | ".join(["method", *(column.heading for column in table)]) + " |",
        "|" + "---|" + "---:|" * len(table),
    ]
    texts = [[f"**{text}**" if best else text for text, best in cells(column)] for column in table]
    for summary, *row in zip(summaries, *texts, strict=True):
        lines.append("| " + " | ".join([_marked_label(summary), *row]) + " |")
    return "\n".join(lines) + "\n\n" + caption(summaries, table, synthetic=synthetic) + "\n"


def screen_table(
    rows: Iterable[Row], *, console: Console | None = None, synthetic: bool = False
) -> None:
    """Print the table; a narrow terminal shows no single shift, a very narrow one no distances.

    Args:
      rows: rows of `make_row`
      console: output; standard output by default
      synthetic: whether the rows are results of the synthetic benchmark
    """
    console = console or Console()
    summaries = shown(rows)
    table = columns(summaries)
    rich_table = _rich_table(summaries, table)
    needed = _width(console, rich_table)
    note = ""
    if not console.is_terminal:
        console.width = max(console.width, needed)  # A file or a pipe has no fixed width.
    elif needed > console.width:
        note = " For the other columns, see results.md."
        for headings in NARROW:
            table = [column for column in table if column.heading in headings]
            rich_table = _rich_table(summaries, table, label_width=LABEL_WIDTH)
            free = console.width - _width(console, rich_table)
            if free >= 0:
                rich_table = _rich_table(summaries, table, label_width=LABEL_WIDTH + free)
                break
    console.print(rich_table)
    text = caption(summaries, table, synthetic=synthetic) + note
    console.print(text, style="dim", highlight=False)


def caption(
    summaries: Sequence[Summary], table: Sequence[Column], *, synthetic: bool = False
) -> str:
    """Explain the columns that are shown.

    Args:
      summaries: the rows
      table: the columns
      synthetic: whether the shifts of ImageNet are their counterparts on the synthetic benchmark
    """
    headings = [column.heading for column in table]
    seeds = max((summary.num_seeds for summary in summaries), default=1)
    text = "Top-1 accuracy in %"
    if seeds > 1:
        text += f", mean ± standard error over {seeds} seeds"
    sentences = [text]
    if any(summary.shifts for summary in summaries):
        sentences.append(f'"{AVG_SHIFTS}" is the mean over the out-of-distribution (OOD) sets')
    imagenet = [heading for heading in headings if heading in SHIFT_NAMES.values()]
    if synthetic and imagenet:
        verb = "are synthetic counterparts" if len(imagenet) > 1 else "is a synthetic counterpart"
        sentences.append(f"{_listed(imagenet)} {verb} of the paper's OOD sets")
    if TO_ANCHOR in headings:
        sentences.append("L2 distances are over all merged weights")
    if TO_CENTER in headings:
        sentences.append("The distance to the center is predicted from the angles")
    if RUNS in headings:
        sentences.append(f'"{RUNS}" is the training cost in fine-tunings of one model')
    if VALIDATION in headings:
        sentences.append(f'"{VALIDATION}" is on held-out in-distribution images')
    if any(summary.exported for summary in summaries):
        sentences.append(
            f'"{EXPORTED}" marks the exported model (model/)' + ", of the first seed" * (seeds > 1)
        )
    return ". ".join(sentences) + "."


def _marked_label(summary: Summary) -> str:
    return summary.label + (f" ({EXPORTED})" if summary.exported else "")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + (" and " if names[1:] else "") + names[-1]


def write_results(
    workdir: str | Path, rows: Sequence[Row], *, synthetic: bool = False, **more: Any
) -> tuple[Path, Path]:
    """Write `results.md` and `results.json` (rows, their summary, `more`), without timestamps.

    `results.json` is written last.

    Args:
      workdir: directory of the run
      rows: rows of `make_row`
      synthetic: whether the rows are results of the synthetic benchmark
      **more: further entries of the JSON object (`layers`, `ratios`, `config`, ...)

    Returns:
      paths of `results.json` and `results.md`

    Raises:
      UserError: the directory cannot be written
    """
    document = _ordered({**more, "rows": list(rows), "summary": _summary(rows)})
    table = write_text(Path(workdir) / "results.md", markdown_table(rows, synthetic=synthetic))
    return write_json(Path(workdir) / "results.json", document, sort_keys=False), table


def read_results(path: str | Path) -> dict[str, Any]:
    """Read `results.json`; a file of an earlier version gets the method names of this version.

    Args:
      path: the file, or a run's directory

    Raises:
      UserError: no such file, or it is not a results file
    """
    path = Path(path)
    path = path / "results.json" if path.is_dir() else path
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; run launch.py to create it") from error
    rows = document.get("rows") if isinstance(document, Mapping) else None
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise UserError(f"{path} contains no rows; run launch.py to create it")
    rows = current_rows(document["rows"])
    if rows == document["rows"]:
        return dict(document)
    return {**document, "rows": rows, "summary": _summary(rows)}


def _summary(rows: Iterable[Row]) -> list[dict[str, Any]]:
    return [_as_json(asdict(summary)) for summary in summarize(rows)]


def _ordered(value: Any, name: str = "") -> Any:
    """Sort the keys of a document; those of `shifts` are in the order of the table."""
    if isinstance(value, Mapping):
        keys = in_table_order(value) if name == "shifts" else sorted(value)
        return {key: _ordered(value[key], key) for key in keys}
    return [_ordered(item) for item in value] if isinstance(value, list) else value


def _rich_table(
    summaries: Sequence[Summary], table: Sequence[Column], *, label_width: int | None = None
) -> Table:
    """Return the table for the screen; labels are wrapped at `label_width`, if it is passed."""
    longest = max((len(_marked_label(summary)) for summary in summaries), default=0)
    wrap = label_width is not None and label_width < longest
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    result.add_column("method", no_wrap=not wrap, width=label_width if wrap else None)
    for column in table:
        heading = textwrap.fill(column.heading, HEADING_WIDTH)
        result.add_column(heading, justify="right", no_wrap=True)
    texts = [
        [f"[bold]{text}[/bold]" if best else text for text, best in cells(column)]
        for column in table
    ]
    for summary, *row in zip(summaries, *texts, strict=True):
        result.add_row(_marked_label(summary), *row)
    return result


def _width(console: Console, table: Table) -> int:
    return console.measure(table, options=console.options.update(max_width=10_000)).maximum


def _cell_text(value: MeanAndError | None, column: Column) -> str:
    if value is None:
        return "–"
    if column.digits is None:
        return f"{value.mean:.3g}"
    text = f"{value.mean:.{column.digits}f}"
    if column.with_error and value.error is not None:
        text += f" ± {value.error:.{column.digits}f}"
    return text


def _as_json(value: Any) -> Any:
    """Convert each `MeanAndError` to {mean, error}; asdict leaves named tuples unchanged."""
    if isinstance(value, MeanAndError):
        return value._asdict()
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    return value
