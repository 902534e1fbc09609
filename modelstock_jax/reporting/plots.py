"""The figures of a run: accuracy against robustness, angle by layer, ratio over merges."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from modelstock_jax.reporting import labels
from modelstock_jax.reporting.rows import Measured, Row, Summary, summarise
from modelstock_jax.reporting.style import (
    BLACK,
    GREY,
    KINDS,
    METHODS,
    PURPLE,
    SKY,
    Method,
    draw,
    ink,
)

OWN_STYLE = Method("", "", PURPLE, "h")
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
        labels.place(axes, _names(points), along, avoid=boxes)
        labels.number_curves(axes, curves)

    return draw(fill, (7.2, 4.9), path)


def _wise_ft(axes: Axes, points: Sequence[Point], of: str, colour: str) -> labels.Curve | None:
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
    return labels.Curve(alphas, x, y, ink(colour))


def _mark(axes: Axes, point: Point) -> None:
    method = METHODS.get(point.summary.method, OWN_STYLE)
    axes.errorbar(
        point.id.mean,
        point.shifts.mean,
        xerr=point.id.error,
        yerr=point.shifts.error,
        fmt=method.marker,
        ms=MARKER_SIZE.get(method.marker, 8),
        color=method.colour,
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


def _names(points: Sequence[Point]) -> list[labels.Label]:
    """What stands beside the markers, the most important first."""
    names = []
    for summary, (x, _), (y, _) in points:
        method = METHODS.get(summary.method)
        # "Mean of 2 replicas" -> 2: the label has been filled in already.
        number = next((word for word in summary.label.split() if word.isdigit()), "replicas")
        text = summary.label if method is None else method.short.format(n=number)
        bold = summary.method == "model_stock"
        names.append(labels.Label(x, y, text, ink((method or OWN_STYLE).colour), bold))
    return sorted(names, key=lambda label: not label.bold)


def angle_by_layer(
    layers: Sequence[Mapping[str, Any]], path: str | Path | None = None, *, title: str | None = None
) -> Figure:
    """Angle between task vectors and their norm by layer (the paper's Fig. 2).

    Kernels on the left, biases and norms on the right; bars are means over pairs (angle) or
    replicas (norm), black lines their standard deviation.

    Args:
      layers: rows of `layers.layer_rows`, in the network's order: name, angles in degrees, rms.
      path: a .png file; None only draws.
      title: above the plot.

    Returns:
      The figure.
    """
    from modelstock_jax.reporting.angles import fill

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
        `layers.ratio_summary` gives them}.
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
