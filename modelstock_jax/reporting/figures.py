"""Figures of a run and of a merge, and the values by layer that they show.

In-distribution accuracy versus accuracy on the shifts, angle and norm by layer or by block, ratio
over merges.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from modelstock_jax.merging.tensor_roles import ROLES, block_position, role
from modelstock_jax.registry import OPENED_ROWS, ROWS
from modelstock_jax.reporting import style
from modelstock_jax.reporting.style import (
    BLACK,
    BLUE,
    COLORS,
    GRAY,
    GREEN,
    ID_AXIS,
    KINDS,
    LIGHT_GREEN,
    ORANGE,
    OTHER_STYLE,
    PURPLE,
    SHIFTS_AXIS,
    SKY,
    VERMILION,
    draw,
    ink,
)
from modelstock_jax.reporting.tables import MeanAndError, Row, Summary, summarize

UnitRows = Sequence[Mapping[str, Any]]


def kind(name: str) -> str:
    """Classify a tensor by its name as `kernels`, `biases`, `norms` or `head`.

    Example:
      >>> kind("image_tower.blocks.block_00.layer_norm1.scale")
      'norms'
      >>> kind("head.bias"), kind("image_tower.patch_embedding.kernel")
      ('head', 'kernels')
    """
    if name.startswith("head."):
        return "head"
    tensor_role = role(name)
    return tensor_role if tensor_role in ("norms", "biases") else "kernels"


def ratio_summary(report: UnitRows) -> dict[str, dict[str, float]]:
    """Return the median and quartiles of the ratio t for each kind of tensor.

    Units without an angle (frozen or with one element) are left out.

    Args:
      report: rows of `merging.report`, with at least `name`, `ratio` and `cosine`

    Returns:
      kind -> {median, low, high, count}; a kind without units is absent

    Example:
      >>> rows = [{"name": "a.kernel", "cosine": 0.5, "ratio": r} for r in (0.6, 0.7, 0.8)]
      >>> ratio_summary(rows)["kernels"]["median"]
      0.7
    """
    ratios: dict[str, list[float]] = {}
    for row in report:
        if row.get("cosine") is not None and row.get("ratio") is not None:
            ratios.setdefault(kind(row["name"]), []).extend(_numbers(row["ratio"]))
    result = {}
    for name, values in ratios.items():
        low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
        result[name] = {"median": median, "low": low, "high": high, "count": len(values)}
    return result


def layer_rows(reports: Iterable[UnitRows]) -> list[dict[str, Any]]:
    """Collect the angles and norms of several runs (seeds, or pairs of replicas) by tensor.

    Args:
      reports: one `merging.report` per pair or seed: rows of `name`, `angle` (degrees or None),
        `norms` ([N], L2 norm of each task vector) and `size` (n, number of elements)

    Returns:
      rows {name, angles: degrees, one per report, rms: norm / sqrt(n), one per replica}

    Example:
      >>> report = [{"name": "w", "angle": 45.0, "norms": [2.0, 4.0], "size": 4}]
      >>> layer_rows([report, report])
      [{'name': 'w', 'angles': [45.0, 45.0], 'rms': [1.0, 2.0, 1.0, 2.0]}]
    """
    collected: dict[str, dict[str, Any]] = {}
    for report in reports:
        for row in report:
            name = row["name"]
            entry = collected.setdefault(name, {"name": name, "angles": [], "rms": []})
            entry["angles"] += _numbers(row.get("angle"))
            root = math.sqrt(max(1, row["size"]))
            entry["rms"] += [norm / root for norm in _numbers(row.get("norms"))]
    return list(collected.values())


def _numbers(value: Any) -> list[float]:
    if value is None:
        return []
    return [float(number) for number in np.ravel(np.asarray(value, dtype=np.float64))]


# A run has few tensors with many measurements each: `angle_by_layer` draws one mean per tensor.
# A merge of files has thousands of tensors with one measurement each: `angle_by_block` draws dots.
ROLE_COLORS = dict(zip(ROLES, (VERMILION, ORANGE, GREEN, BLUE, PURPLE, SKY, GRAY), strict=True))
# Two columns: weights and biases, as in the paper.
LEFT = {
    "attention": ROLE_COLORS["attention"],
    "MLP": ROLE_COLORS["MLP"],
    "convolutions": ROLE_COLORS["convolutions"],
    "head": ROLE_COLORS["embeddings and head"],
    "other kernels": ROLE_COLORS["other"],
}
RIGHT = {
    "biases": ROLE_COLORS["biases"],
    "norm biases": LIGHT_GREEN,
    "norm scales": ROLE_COLORS["norms"],
    "head": ROLE_COLORS["embeddings and head"],
}
MAX_TOWERS = 3


def angle_by_layer(
    layers: Sequence[Mapping[str, Any]], path: str | Path | None = None, *, title: str | None = None
) -> Figure:
    """Plot the angle between task vectors and their norms by layer (the paper's Fig. 2).

    Kernels are on the left, biases and norms on the right. Bars and dots are means over pairs
    (angle) or replicas (norm); black lines are their standard deviation.

    Args:
      layers: rows of `layer_rows` in the order of the network: name, angles in degrees, rms
      path: .png file; None only draws
      title: title of the figure

    Returns:
      the figure
    """
    positions = block_position([row["name"] for row in layers])
    # Embeddings, blocks by number, tensors after the blocks, head; the input order within each.
    keys = [
        (p.depth, kind(row["name"]) == "head") for p, row in zip(positions, layers, strict=True)
    ]
    ordered = sorted(zip(keys, layers, strict=True), key=lambda pair: pair[0])
    sides: tuple[list, list] = ([], [])
    for (depth, _), row in ordered:
        right = kind(row["name"]) in ("norms", "biases") or row["name"].endswith(".bias")
        sides[right].append((depth, row))

    def fill(figure: Figure) -> None:
        panels = figure.subplots(
            2,
            2,
            sharex="col",
            sharey="row",
            height_ratios=[1.35, 1],
            width_ratios=[max(6, len(side)) for side in sides],
        )
        shown: dict[str, str] = {}
        for column, (side, colors, name) in enumerate(
            zip(sides, (LEFT, RIGHT), ("kernels", "biases and norms"), strict=True)
        ):
            shown |= _tensors_of_side(panels[:, column], side, colors)
            panels[0, column].set_title(name)
        _scale_angles(panels[0], bars=True)
        _scale_norms(panels[1])
        handles = [Patch(color=color, label=name) for name, color in shown.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=8, handlelength=1)
        if any(np.mean(row["angles"]) > 90 for row in layers if row["angles"]):
            panels[0, 1].set_title(
                "key biases receive no gradient: arbitrary angles",
                loc="right", fontsize=8.5, fontweight="normal", color="#555555",
            )  # fmt: skip
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)

    return draw(fill, (9.6, 4.8), path)


def angle_by_block(rows: UnitRows, path: str | Path | None = None) -> Figure:
    """Plot angles (above) and norms (below) by block of a merge of files, one column per tower.

    A single fine-tune has no angle; only norms are plotted then. A dot is a merge unit, a line is
    the median of a role in each block.

    Args:
      rows: rows of a merge's report: name, shape, angle (degrees or None), norms ([N])
      path: .png file; None only draws

    Returns:
      the figure
    """
    positions = block_position([row["name"] for row in rows])
    towers = [tower for tower, _ in Counter(p.tower for p in positions).most_common(MAX_TOWERS)]
    shown = [tower for tower in dict.fromkeys(p.tower for p in positions) if tower in towers]
    groups = {
        tower: [(p.depth, row) for p, row in zip(positions, rows, strict=True) if p.tower == tower]
        for tower in shown
    }
    if list(groups) == [""]:  # Without blocks: tensors in their order.
        groups[""] = [(float(number), row) for number, row in enumerate(rows)]
    depths = [len({depth for depth, _ in group}) for group in groups.values()]
    angles = any(row.get("angle") is not None for row in rows)

    def fill(figure: Figure) -> None:
        panels = figure.subplots(
            1 + angles, max(1, len(groups)), squeeze=False, sharex="col", sharey="row",
            width_ratios=[math.sqrt(number) for number in depths] or None,
            height_ratios=[1.35, 1] if angles else [1],
        )  # fmt: skip
        for column, (tower, group) in enumerate(groups.items()):
            _dots_of_tower(panels[0, column] if angles else None, panels[-1, column], group)
            panels[0, column].set_title(tower or "all tensors")
            panels[-1, column].set_xlabel("block" if tower else "tensor, by name")
        if angles:
            _scale_angles(panels[0])
        _scale_norms(panels[-1])
        roles = {role(row["name"]) for group in groups.values() for _, row in group}
        figure.legend(handles=[
            Line2D([], [], color=color, marker="o", markersize=5, label=role)
            for role, color in ROLE_COLORS.items() if role in roles
        ], loc="outside lower center", ncols=6)  # fmt: skip

    size = (min(13.0, max(7.0, 3 + 0.22 * sum(depths))), 5.6 if angles else 3.2)
    return draw(fill, size, path)


def _tensors_of_side(
    panels: Sequence[Axes],
    side: Sequence[tuple[float, Mapping[str, Any]]],
    colors: Mapping[str, str],
) -> dict[str, str]:
    """Draw one column of `angle_by_layer`; return the drawn entries of `colors`.

    Args:
      panels: of the angles, of the norms
      side: (depth, row) of each tensor
      colors: `LEFT` or `RIGHT`
    """
    names = [_color_name(row["name"]) for _, row in side]
    bar_colors = [colors[name] for name in names]
    x = np.arange(len(side))
    for axes, key in zip(panels, ("angles", "rms"), strict=True):
        values = [row[key] for _, row in side]
        mean = [np.mean(value) if len(value) else np.nan for value in values]
        if key == "angles":
            axes.bar(x, mean, width=0.8, color=bar_colors, linewidth=0)
        else:  # Bars have no length on a logarithmic scale.
            axes.scatter(x, mean, s=26, color=bar_colors, zorder=3)
        _deviations(axes, mean, values)
    # Every other block is shaded.
    start, centers = 0, {}
    for number, (depth, group) in enumerate(groupby(side, key=lambda pair: pair[0])):
        stop = start + len(list(group))
        centers[depth] = (start + stop - 1) / 2
        for axes in panels:
            if number % 2:
                axes.axvspan(start - 0.5, stop - 0.5, color="#F3F3F3", zorder=0, lw=0)
        start = stop
    _name_blocks(panels, centers, max_ticks=9)
    panels[-1].set_xlabel("block of the image tower")
    return {name: color for name, color in colors.items() if name in names}


def _color_name(name: str) -> str:
    """Return the key of `LEFT` or `RIGHT` for a tensor."""
    tensor_kind = kind(name)
    if tensor_kind == "norms":
        return "norm biases" if name.endswith((".bias", ".beta")) else "norm scales"
    if tensor_kind == "kernels":
        return role(name) if role(name) in LEFT else "other kernels"
    return tensor_kind


def _deviations(axes: Axes, mean: Sequence[float], values: Sequence[Sequence[float]]) -> None:
    """Draw the standard deviation of each tensor's values around their mean."""
    deviation = np.array([np.std(value, ddof=1) if len(value) > 1 else 0.0 for value in values])
    shown = deviation > 0
    if shown.any():
        axes.errorbar(
            np.arange(len(values))[shown],
            np.array(mean)[shown],
            deviation[shown],
            fmt="none",
            ecolor=BLACK,
            elinewidth=1.1,
            capsize=min(2.0, 60 / len(values)),
            zorder=4,
        )
    axes.set_xlim(-0.8, len(values) - 0.2)


def _dots_of_tower(
    top: Axes | None, bottom: Axes, group: Sequence[tuple[float, Mapping[str, Any]]]
) -> None:
    """Draw one column of `angle_by_block` from the (depth, row) pairs of a tower."""
    depths = sorted({depth for depth, _ in group})
    position = {depth: float(x) for x, depth in enumerate(depths)}
    points = defaultdict(lambda: defaultdict(list))
    for depth, row in group:
        points[role(row["name"])][position[depth]].append(row)
    for number, (name, color) in enumerate((n, c) for n, c in ROLE_COLORS.items() if n in points):
        shift = (number - 2) * 0.07  # So that roles do not overlap.
        if top is not None:
            _series(top, points[name], lambda row: _numbers(row.get("angle")), color, shift)
        _series(bottom, points[name], _rms, color, shift)
    _name_blocks([axes for axes in (top, bottom) if axes is not None], position, max_ticks=12)
    bottom.set_xlim(-0.6, len(depths) - 0.4)


def _series(
    axes: Axes,
    points: Mapping[float, UnitRows],
    values: Callable[[Mapping[str, Any]], list[float]],
    color: str,
    shift: float,
) -> None:
    dots, line, last = [], [], None
    for x in sorted(points):
        if block_values := [value for row in points[x] for value in values(row)]:
            dots += [(x + shift, value) for value in block_values]
            if last is not None and last < x - 1:  # No line over missing blocks.
                line.append((x, math.nan))
            line.append((x + shift, float(np.median(block_values))))
            last = x
    if not dots:
        return
    axes.plot(*zip(*dots, strict=True), "o", ms=3.2, mew=0, color=color, alpha=0.55)
    axes.plot(*zip(*line, strict=True), "-", color=color, lw=1.3)


def _rms(row: Mapping[str, Any]) -> list[float]:
    size = max(1, math.prod(row["shape"]))
    return [norm / math.sqrt(size) for norm in row["norms"] if norm]


def _name_blocks(panels: Sequence[Axes], position: Mapping[float, float], max_ticks: int) -> None:
    """Label depths at their positions below the last panel, with at most `max_ticks` blocks."""
    names = {-1.0: "in", math.inf: "out"}
    inner = [depth for depth in position if depth not in names]
    every = max(1, math.ceil(len(inner) / max_ticks))
    ticks = [depth for depth in position if depth in names or inner.index(depth) % every == 0]
    panels[-1].set_xticks(
        [position[depth] for depth in ticks], [names.get(d) or str(int(d)) for d in ticks]
    )
    for axes in panels:
        axes.grid(axis="x", visible=False)
        axes.tick_params(axis="x", length=0)


def _scale_angles(panels: Sequence[Axes], *, bars: bool = False) -> None:
    """Scale from 0; dots use one of three scales, so that figures of similar models compare."""
    panels[0].set_ylabel("angle (degrees)")
    highest = max(axes.dataLim.y1 for axes in panels)
    limit = max(95.0, highest + 3.0)
    if not bars:
        limit = 180.0 if highest > 120 else 125.0 if highest > 92 else 95.0
    panels[0].set_ylim(0, limit)
    panels[0].set_yticks(range(0, int(limit) + 1, 30 if limit > 125 else 15))
    for axes in panels:
        axes.axhline(90, color="#AAAAAA", lw=0.8, ls="--", zorder=1)


def _scale_norms(panels: Sequence[Axes]) -> None:
    """Scale from 0, or logarithmically if norms differ by a factor above 5.

    The head of a classifier may change ten times as much as the tensors below it, which a linear
    scale would flatten.
    """
    first = panels[0]
    first.set_ylabel(r"update norm $\|d_i\| / \sqrt{n}$")
    lowest, highest = (
        f(getattr(axes.dataLim, side) for axes in panels) for f, side in ((min, "y0"), (max, "y1"))
    )
    if 0 < 5 * lowest < highest < math.inf:
        scale_log(first)
    else:
        first.set_ylim(0, 1.06 * highest if highest > 0 else None)
        first.ticklabel_format(axis="y", scilimits=(-2, 3), useMathText=True)


def scale_log(axes: Axes) -> None:
    """Scale the y axis logarithmically, with plain numbers, also between powers of ten."""
    axes.set_yscale("log")
    low, high = axes.dataLim.intervaly
    subs = (1.0, 2.0, 5.0) if high < 100 * low else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


class Point(NamedTuple):
    """A method with both of its accuracies."""

    summary: Summary
    id: MeanAndError
    shifts: MeanAndError


def id_against_shifts(
    rows: Iterable[Row], path: str | Path | None = None, *, title: str | None = None
) -> Figure:
    """Plot in-distribution accuracy versus the average over the shifts (the paper's Fig. 1).

    Each method has the marker and color of `registry.ROWS`, with error bars (standard error over
    seeds). Small dots are the single models. The WiSE-FT curves of a single model and of the
    uniform mean are labeled with alpha.

    Args:
      rows: rows of `tables.make_row`; WiSE-FT rows have `alpha` and `of`
      path: .png file; None only draws
      title: title of the figure

    Returns:
      the figure
    """
    rows = [row for row in rows if row.get("avg_shifts") is not None]
    all_points = [Point(s, s.id, s.avg_shifts) for s in summarize(rows) if s.avg_shifts is not None]
    # Other merge units would crowd around the run's own; only the table shows them.
    points = [p for p in all_points if p.summary.method != "wise_ft" and p.summary.unit is None]

    def fill(figure: Figure) -> None:
        axes = figure.subplots()
        single = [(r["id"], r["avg_shifts"]) for r in rows if r["method"] == "single_model"]
        if len(single) > 1:
            axes.plot(
                *zip(*single, strict=True), ".", color=GRAY, ms=5, alpha=0.7, zorder=2,
                label="single models",
            )  # fmt: skip
        curves = [
            curve
            for of, color in [("single_model", GRAY), ("uniform_mean", SKY)]
            if (curve := _wise_ft(axes, all_points, of, color))
        ]
        for point in points:
            _mark(axes, point)
        axes.set_xlabel(ID_AXIS)
        axes.set_ylabel(SHIFTS_AXIS)
        axes.set_title(title or "")
        axes.margins(0.1)
        if curves or len(single) > 1:
            figure.legend(loc="outside lower center", ncols=3, handlelength=1.6)
        figure.canvas.draw()  # Fixes limits and layout, which `style.place` reads.
        figure.set_layout_engine("none")
        axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())
        occupied = [point for curve in curves for point in curve.dense()]
        occupied += single
        occupied += [tip for point in points for tip in _tips(point)]
        style.place(axes, _labels(points), occupied)
        style.number_curves(axes, curves)

    return draw(fill, (7.2, 4.9), path)


def _wise_ft(axes: Axes, points: Sequence[Point], of: str, color: str) -> style.Curve | None:
    # A curve starts at the anchor of the replicas.
    probed = any(point.summary.method == "probed" for point in points)
    ends = dict.fromkeys(("probed",) if probed else OPENED_ROWS, 0.0) | {of: 1.0}
    by_alpha: dict[float, Point] = {}
    for point in points:
        method, alpha, source = point.summary.method, point.summary.alpha, point.summary.of
        if method in ends:
            by_alpha[ends[method]] = point
        elif method == "wise_ft" and alpha is not None and (source or "single_model") == of:
            by_alpha[alpha] = point
    if not any(point.summary.method == "wise_ft" for point in by_alpha.values()):
        return None
    alphas = sorted(by_alpha)
    x = [by_alpha[alpha].id.mean for alpha in alphas]
    y = [by_alpha[alpha].shifts.mean for alpha in alphas]
    name = {
        "single_model": "WiSE-FT of a single model (α)",
        "uniform_mean": "WiSE-FT of the uniform mean (α)",
    }[of]
    axes.plot(x, y, "-", color=color, lw=1.6, marker="o", ms=3.2, label=name, zorder=1)
    return style.Curve(alphas, x, y, ink(color))


def _mark(axes: Axes, point: Point) -> None:
    axes.errorbar(
        point.id.mean,
        point.shifts.mean,
        xerr=point.id.error,
        yerr=point.shifts.error,
        elinewidth=1.2,
        capsize=2.5,
        **style.mark(point.summary.method),
    )


def _tips(point: Point) -> list[tuple[float, float]]:
    """Return the ends of the error bars."""
    (x, dx), (y, dy) = point.id, point.shifts
    return [(x - (dx or 0), y), (x + (dx or 0), y), (x, y - (dy or 0)), (x, y + (dy or 0))]


def _labels(points: Sequence[Point]) -> list[style.Label]:
    """Return the labels of the markers, Model Stock first."""
    labels = []
    for summary, (x, _), (y, _) in points:
        method = ROWS.get(summary.method)
        # "Uniform mean of 2 replicas" -> 2: the label is already formatted.
        number = next((word for word in summary.label.split() if word.isdigit()), "replicas")
        text = summary.label if method is None else method.short.format(n=number)
        bold = summary.method == "model_stock"
        labels.append(style.Label(x, y, text, ink(COLORS[(method or OTHER_STYLE).color]), bold))
    return sorted(labels, key=lambda label: not label.bold)


def ratio_over_merges(
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    path: str | Path | None = None,
    *,
    title: str | None = None,
) -> Figure:
    """Plot the median ratio t at each merge, for kernels, biases, norms and head.

    Bands are the interquartile range.

    Args:
      histories: name of a panel -> one entry per merge: {"epoch": number, "ratios": result of
        `ratio_summary`}
      path: .png file; None only draws
      title: title of the figure

    Returns:
      the figure
    """

    def fill(figure: Figure) -> None:
        panels = figure.subplots(1, len(histories), sharey=True, squeeze=False)[0]
        for axes, (name, history) in zip(panels, histories.items(), strict=True):
            for kind, color in KINDS.items():
                entries = [entry for entry in history if kind in entry["ratios"]]
                if not entries:
                    continue
                x = [entry["epoch"] for entry in entries]
                low, median, high = (
                    np.array([entry["ratios"][kind][key] for entry in entries], dtype=float)
                    for key in ("low", "median", "high")
                )
                axes.fill_between(x, low, high, color=color, alpha=0.13, lw=0)
                axes.plot(x, median, "-o", color=color, lw=2, ms=4.5, label=kind)
            axes.set_title(name, fontweight="normal" if title else "bold")
            axes.set_xlabel("epoch")
            axes.set_ylim(min(0.5, axes.get_ylim()[0]), 1.02)
            axes.axhline(1, color=BLACK, lw=0.8, ls=(0, (4, 3)), zorder=1)
            if len({entry["epoch"] for entry in history}) <= 16:
                axes.set_xticks([entry["epoch"] for entry in history])
        panels[0].set_ylabel("ratio t, median")
        panels[-1].legend(loc="lower right")
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)

    return draw(fill, (7.2 if len(histories) == 1 else 9.6, 3.6), path)
