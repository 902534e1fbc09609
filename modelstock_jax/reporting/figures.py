"""The figures of a run: accuracy against robustness, angle by layer, ratio over merges."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from modelstock_jax.registry import ROWS, Style
from modelstock_jax.reporting import style
from modelstock_jax.reporting.style import (
    BLACK,
    COLOURS,
    GREEN,
    GREY,
    KINDS,
    ORANGE,
    PURPLE,
    SKY,
    draw,
    ink,
)
from modelstock_jax.reporting.tables import Measured, Row, Summary, summarise

# Angles, norms and ratios by layer: what the figures draw, from the merge's own report.


Report = Sequence[Mapping[str, Any]]


def kind(name: str) -> str:
    """Which of `kernels`, `biases`, `norms`, `head` a tensor is, by its name.

    Example:
      >>> kind("image_tower.blocks.block_00.layer_norm1.scale")
      'norms'
      >>> kind("head.bias"), kind("image_tower.patch_embedding.kernel")
      ('head', 'kernels')
    """
    parts = name.split(".")
    if parts[0] == "head":
        return "head"
    if len(parts) > 1 and "norm" in parts[-2]:
        return "norms"
    return "biases" if parts[-1] == "bias" else "kernels"


def ratio_summary(report: Report) -> dict[str, dict[str, float]]:
    """The median ratio t by kind of tensor, with the quartiles.

    Units without an angle (frozen, or of one number) are left out.

    Args:
      report: rows of `merging.report`: at least `name`, `ratio`, `cosine`.

    Returns:
      kind -> {median, low, high, count}; a kind with no unit is absent.

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


def layer_rows(reports: Iterable[Report]) -> list[dict[str, Any]]:
    """Collects the angles and norms of several runs (seeds, or pairs of replicas) by tensor.

    Args:
      reports: one `merging.report` a pair or seed: rows of `name`, `angle` (degrees, or None),
        `norms` ([N], Euclidean, of each replica's task vector), `size` (n, its numbers).

    Returns:
      Rows {name, angles: degrees, one a report, rms: norm / sqrt(n), one a replica}.

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


# The panels of angle and norm by layer.


# Colour by what a tensor does; two columns, as in the paper's weights and biases.
LEFT = {"attention": KINDS["kernels"], "MLP": ORANGE, "head": PURPLE, "other kernels": "#9A9A9A"}
RIGHT = {"biases": KINDS["biases"], "norm biases": SKY, "norm scales": GREEN, "head": PURPLE}


def fill(figure: Figure, layers: Sequence[Mapping[str, Any]], title: str | None) -> None:
    """Draws four panels: angles above, norms below; kernels left, biases and norms right."""
    sides = ([], [])
    for row in layers:
        sides[_is_right(row["name"])].append(row)
    sides = [_in_depth_order(side) for side in sides]
    panels = figure.subplots(
        2,
        2,
        sharex="col",
        sharey="row",
        height_ratios=[1.35, 1],
        width_ratios=[max(6, len(side)) for side in sides],
    )
    for column, (side, colours, name) in enumerate(
        zip(sides, (LEFT, RIGHT), ("kernels", "biases and norms"), strict=True)
    ):
        top, bottom = panels[:, column]
        shades = [colours[_role(row["name"])] for row in side]
        _bars(top, [row["angles"] for row in side], shades)
        _bars(bottom, [row["rms"] for row in side], shades)
        _mark_blocks([top, bottom], [_block(row["name"]) for row in side])
        top.set_title(name)
        bottom.set_xlabel("block of the image tower")
        used = [role for role in colours if role in {_role(row["name"]) for row in side}]
        bottom.legend(
            handles=[Patch(color=colours[role], label=role) for role in used],
            loc="upper center",
            bbox_to_anchor=(0.5, -0.32),
            ncols=max(1, len(used)),
            columnspacing=1.2,
            handlelength=1,
        )
    panels[0, 0].set_ylabel("angle (degrees)")
    highest = max((np.mean(row["angles"]) for row in layers if row["angles"]), default=0.0)
    panels[0, 0].set_ylim(0, max(95.0, highest + 5.0))
    if highest > 90:
        panels[0, 1].set_title(
            "key biases get no gradient through softmax: any angle",
            loc="right", fontsize=8.5, fontweight="normal", color="#555555",
        )  # fmt: skip
    panels[0, 0].set_yticks(range(0, int(max(95.0, highest + 5.0)), 30 if highest > 95 else 15))
    panels[1, 0].set_ylabel(r"norm / $\sqrt{n}$")
    panels[1, 0].set_ylim(bottom=0)
    panels[1, 0].ticklabel_format(axis="y", scilimits=(-2, 3), useMathText=True)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)


def _bars(axes: Axes, values: Sequence[Sequence[float]], colours: Sequence[str]) -> None:
    x = np.arange(len(values))
    mean = np.array([np.mean(value) if len(value) else np.nan for value in values])
    spread = np.array([np.std(value, ddof=1) if len(value) > 1 else 0.0 for value in values])
    axes.bar(x, mean, width=0.8, color=colours, linewidth=0)
    shown = spread > 0
    if shown.any():
        axes.errorbar(
            x[shown], mean[shown], spread[shown], fmt="none", ecolor=BLACK, elinewidth=1.1,
            capsize=min(2.0, 60 / len(values)),
        )
    axes.grid(axis="x", visible=False)
    axes.set_xlim(-0.8, len(values) - 0.2)


def _mark_blocks(panels: Sequence[Axes], names: Sequence[str]) -> None:
    """Shades every other block and names the blocks below; many blocks are named sparsely."""
    start, spans = 0, []
    for name, group in groupby(names):
        length = len(list(group))
        spans.append((name, start - 0.5, start + length - 0.5))
        start += length
    for axes in panels:
        for number, (_, begin, end) in enumerate(spans):
            if number % 2:
                axes.axvspan(begin, end, color="#F3F3F3", zorder=0, lw=0)
    every = 1 if len(spans) <= 9 else 2 if len(spans) <= 16 else 4
    ticks = [
        ((begin + end) / 2, name)
        for name, begin, end in spans
        if not name.isdigit() or int(name) % every == 0
    ]
    panels[-1].set_xticks([x for x, _ in ticks], [name for _, name in ticks])
    for axes in panels:
        axes.tick_params(axis="x", length=0)


def _in_depth_order(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Embeddings, blocks by number, what follows them, head; within each the given order."""

    def depth(row: Mapping[str, Any]) -> tuple[float, bool]:
        block = _block(row["name"])
        number = {"in": -1.0, "out": math.inf}.get(block)
        return (int(block) if number is None else number), kind(row["name"]) == "head"

    return sorted(rows, key=depth)


def _block(name: str) -> str:
    found = re.search(r"\bblock_(\d+)\b", name)
    if found:
        return str(int(found[1]))
    return "in" if "embedding" in name or "pre_layernorm" in name else "out"


def _is_right(name: str) -> bool:
    return kind(name) == "norms" or name.endswith(".bias")


def _role(name: str) -> str:
    if kind(name) == "head":
        return "head"
    if kind(name) == "norms":
        return "norm biases" if name.endswith(".bias") else "norm scales"
    if name.endswith(".bias"):
        return "biases"
    return "attention" if ".self_attn." in name else "MLP" if ".mlp." in name else "other kernels"


OWN_STYLE = Style("", "", "purple", "h")
MARKER_SIZE = {"*": 17, "o": 7, "s": 7, "D": 7, "P": 9, "^": 9, "v": 9}


class Point(NamedTuple):
    """A method in the plane of both accuracies."""

    summary: Summary
    id: Measured
    shifts: Measured


def id_against_shifts(
    rows: Iterable[Row], path: str | Path | None = None, *, title: str | None = None
) -> Figure:
    """In-distribution accuracy against the average over the shifts (the paper's Fig. 1).

    A marker a method (bars: standard error over seeds), single replicas as small dots, and the
    WiSE-FT curves of one replica and of the mean, labelled by alpha.

    Args:
      rows: as `rows.make_row` gives them; WiSE-FT rows have `alpha` and `of`.
      path: a .png file; None only draws.
      title: above the plot.

    Returns:
      The figure.
    """
    rows = [row for row in rows if row.get("avg_shifts") is not None]
    every = [Point(s, s.id, s.avg_shifts) for s in summarise(rows) if s.avg_shifts is not None]
    # Other merge units crowd around the run's own: they are for the table.
    points = [
        one for one in every if one.summary.method != "wise_ft" and one.summary.unit is None
    ]

    def fill(figure: Figure) -> None:
        axes = figure.subplots()
        for row in rows:
            if row["method"] == "replica":
                axes.plot(row["id"], row["avg_shifts"], ".", color=GREY, ms=5, alpha=0.7, zorder=2)
        curves = [
            curve
            for of, colour in [("replica", GREY), ("mean", SKY)]
            if (curve := _wise_ft(axes, every, of, colour))
        ]
        for point in points:
            _mark(axes, point)
        axes.set_xlabel("in-distribution accuracy (%)")
        axes.set_ylabel("average accuracy over the shifts (%)")
        axes.set_title(title or "")
        axes.margins(0.1)
        avoid = [axes.legend(loc="best", handlelength=1.6)] if curves else []
        figure.canvas.draw()  # Fixes limits and layout, which the placing of labels reads.
        figure.set_layout_engine("none")
        axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())
        along = [point for curve in curves for point in curve.dense()]
        along += [(row["id"], row["avg_shifts"]) for row in rows if row["method"] == "replica"]
        along += [tip for point in points for tip in _tips(point)]
        boxes = [legend.get_window_extent() for legend in avoid]
        style.place(axes, _names(points), along, avoid=boxes)
        style.number_curves(axes, curves)

    return draw(fill, (7.2, 4.9), path)


def _wise_ft(axes: Axes, points: Sequence[Point], of: str, colour: str) -> style.Curve | None:
    # A curve begins at the anchor of the replicas.
    probed = any(point.summary.method == "probed" for point in points)
    ends = {"probed" if probed else "zero_shot": 0.0, of: 1.0}
    along: dict[float, Point] = {}
    for point in points:
        method, alpha, source = point.summary.method, point.summary.alpha, point.summary.of
        if method in ends:
            along[ends[method]] = point
        elif method == "wise_ft" and alpha is not None and (source or "replica") == of:
            along[alpha] = point
    if not any(point.summary.method == "wise_ft" for point in along.values()):
        return None
    alphas = sorted(along)
    x = [along[alpha].id.mean for alpha in alphas]
    y = [along[alpha].shifts.mean for alpha in alphas]
    name = {"replica": "WiSE-FT of one replica (α)", "mean": "WiSE-FT of the mean (α)"}[of]
    axes.plot(x, y, "-", color=colour, lw=1.6, marker="o", ms=3.2, label=name, zorder=1)
    return style.Curve(alphas, x, y, ink(colour))


def _mark(axes: Axes, point: Point) -> None:
    method = ROWS.get(point.summary.method, OWN_STYLE)
    axes.errorbar(
        point.id.mean,
        point.shifts.mean,
        xerr=point.id.error,
        yerr=point.shifts.error,
        fmt=method.marker,
        ms=MARKER_SIZE.get(method.marker, 8),
        color=COLOURS[method.colour],
        mec="white",
        mew=0.8,
        elinewidth=1.2,
        capsize=2.5,
        zorder=4 if point.summary.method == "model_stock" else 3,
    )


def _tips(point: Point) -> list[tuple[float, float]]:
    """The ends of the error bars."""
    (x, dx), (y, dy) = point.id, point.shifts
    return [(x - (dx or 0), y), (x + (dx or 0), y), (x, y - (dy or 0)), (x, y + (dy or 0))]


def _names(points: Sequence[Point]) -> list[style.Label]:
    """What stands beside the markers, the most important first."""
    names = []
    for summary, (x, _), (y, _) in points:
        method = ROWS.get(summary.method)
        # "Mean of 2 replicas" -> 2: the label has been filled in already.
        number = next((word for word in summary.label.split() if word.isdigit()), "replicas")
        text = summary.label if method is None else method.short.format(n=number)
        bold = summary.method == "model_stock"
        names.append(style.Label(x, y, text, ink(COLOURS[(method or OWN_STYLE).colour]), bold))
    return sorted(names, key=lambda label: not label.bold)


def angle_by_layer(
    layers: Sequence[Mapping[str, Any]], path: str | Path | None = None, *, title: str | None = None
) -> Figure:
    """Angle between task vectors and their norm by layer (the paper's Fig. 2).

    Kernels on the left, biases and norms on the right; bars are means over pairs (angle) or
    replicas (norm), black lines their standard deviation.

    Args:
      layers: rows of `figures.layer_rows`, in the network's order: name, angles in degrees, rms.
      path: a .png file; None only draws.
      title: above the plot.

    Returns:
      The figure.
    """
    pass

    return draw(lambda figure: fill(figure, layers, title), (9.6, 4.8), path)


def ratio_over_merges(
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    path: str | Path | None = None,
    *,
    title: str | None = None,
) -> Figure:
    """The ratio t at each merge: its median over kernels, biases, norms and head.

    Args:
      histories: a name a panel -> one entry a merge: {"epoch": number, "ratios": as
        `figures.ratio_summary` gives them}.
      path: a .png file; None only draws.
      title: above the plot.

    Returns:
      The figure; the bands run from the lower to the upper quartile.
    """

    def fill(figure: Figure) -> None:
        panels = figure.subplots(1, len(histories), sharey=True, squeeze=False)[0]
        for axes, (name, history) in zip(panels, histories.items(), strict=True):
            for kind, colour in KINDS.items():
                entries = [entry for entry in history if kind in entry["ratios"]]
                if not entries:
                    continue
                x = [entry["epoch"] for entry in entries]
                low, median, high = (
                    np.array([entry["ratios"][kind][key] for entry in entries], dtype=float)
                    for key in ("low", "median", "high")
                )
                axes.fill_between(x, low, high, color=colour, alpha=0.13, lw=0)
                axes.plot(x, median, "-o", color=colour, lw=2, ms=4.5, label=kind)
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
