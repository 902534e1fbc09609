"""Figures of the studies: those of the paper, WiSE-FT curves, accuracy against training cost."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from modelstock_jax.reporting.style import (
    BLACK,
    BLUE,
    GRAY,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    draw,
)
from modelstock_jax.reporting.tables import mean_and_error
from studies.curves import Curve, id_and_shifts, mean_curve

Point = tuple[float, float]


class Triangle(NamedTuple):
    """The plane of two task vectors: w0 at the origin, their mean on the first axis."""

    first: Point
    second: Point
    mean: float
    merged: float
    angle: float
    ratio: float


class Period(NamedTuple):
    """Two replicas between two merges, on a plane through w0; see `series`."""

    start: Point
    first: Sequence[Point]
    second: Sequence[Point]
    mean: Point
    merged: Point


def near_the_center(
    models: Mapping[int, Sequence[Point]],
    noise: Mapping[float, Sequence[Point]],
    center: float,
    path: str | Path | None = None,
) -> Figure:
    """Draw accuracy against distance to the center (the paper's Figure 4).

    Args:
      models: N -> (distance, accuracy) of means of N models.
      noise: scale -> (distance, accuracy) of random weights.
      center: accuracy of the center.
      path: a .png file; None draws without saving.
    """

    def fill(figure: Figure) -> None:
        axes = figure.subplots()
        noisy = np.array([point for points in noise.values() for point in points])
        axes.plot(*noisy.T, "o", color=GRAY, ms=6, mfc="white", label="center + noise")
        for (n, points), marker in zip(models.items(), "^Dsvph", strict=False):
            name = "single fine-tuned model" if n == 1 else f"uniform mean of {n}"
            color = VERMILION if n == 1 else BLUE
            axes.plot(
                *np.array(points).T,
                marker,
                ls="",
                color=color,
                alpha=0.45 + 0.5 / n if n > 1 else 1,
                ms=6,
                label=name,
            )
        axes.plot(0, center, "*", color=BLACK, ms=14, label="center")
        axes.set_xlabel("L2 distance to center")
        axes.set_ylabel("in-distribution accuracy (%)")
        axes.legend()

    return draw(fill, (6.4, 4.2), path)


def landscape(
    points: Sequence[tuple[float, float, float]],
    marks: Mapping[str, Point],
    path: str | Path | None = None,
) -> Figure:
    """Draw the test error on a plane (the paper's Figure 3).

    Args:
      points: (x, y, error in percent), x and y in units of the weights.
      marks: name -> position of a model.
      path: a .png file; None draws without saving.
    """

    def fill(figure: Figure) -> None:
        axes = figure.subplots()
        x, y, error = np.array(points).T
        # Far from the basin, the error is that of guessing. Increasing steps, with one color per
        # step, make the basin visible.
        levels = error.min() + np.array([0, 0.5, 1, 2, 3, 5, 8, 12, 20, 40])
        norm = BoundaryNorm(levels, 256, extend="max")
        filled = axes.tricontourf(
            x, y, error, levels=levels, cmap="Blues_r", norm=norm, extend="max"
        )
        axes.tricontour(x, y, error, levels=levels, colors="white", linewidths=0.5)
        figure.colorbar(filled, ax=axes, label="test error (%)", ticks=levels, format="%.1f")
        for name, (left, up) in marks.items():
            color = VERMILION if name == "center" else BLACK
            axes.plot(left, up, "*" if name == "center" else "o", color=color, ms=9, mec="white")
            axes.annotate(
                name, (left, up), (6, 6), textcoords="offset points", fontweight="bold",
                path_effects=[withStroke(linewidth=2.5, foreground="white")],
            )  # fmt: skip
        start, end = marks["w0"], marks["w1"]
        axes.plot([start[0], end[0]], [start[1], end[1]], "--", color=BLACK, lw=1)
        axes.set_aspect("equal")
        axes.grid(False)
        axes.set_xlabel("along w1 − w0")
        axes.set_ylabel("across, toward the center")

    return draw(fill, (6.4, 4.6), path)


def dynamics(history: Sequence[Mapping[str, Any]], path: str | Path | None = None) -> Figure:
    """Draw angle and norm over the epochs (the geometry of the paper's Figure 5).

    Args:
      history: entries {"epoch", "kernels" and "biases": {"angle": of pairs, "norm": of models}}.
      path: a .png file; None draws without saving.
    """

    def fill(figure: Figure) -> None:
        panels = figure.subplots(1, 2)
        epochs = [entry["epoch"] for entry in history]
        labels = {"angle": "angle (degrees)", "norm": "L2 distance to anchor"}
        for axes, (key, label) in zip(panels, labels.items(), strict=True):
            for what, color, marker in (("kernels", VERMILION, "o"), ("biases", SKY, "s")):
                values = np.array([entry[what][key] for entry in history])
                axes.errorbar(
                    epochs,
                    values.mean(1),
                    values.std(1, ddof=1),
                    fmt=f"-{marker}",
                    color=color,
                    capsize=3,
                    label=what,
                )
            axes.set_xlabel("epoch")
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
        panels[0].legend()

    return draw(fill, (8.6, 3.6), path)


def triangles(chosen: Mapping[str, Triangle], path: str | Path | None = None) -> Figure:
    """Draw the merge of two models on their plane (the paper's Figure 6).

    Args:
      chosen: name of a tensor -> its triangle; one panel per tensor.
      path: a .png file; None draws without saving.
    """

    def fill(figure: Figure) -> None:
        panels = figure.subplots(1, len(chosen), squeeze=False)[0]
        for axes, (name, triangle) in zip(panels, chosen.items(), strict=True):
            corners = np.array([(0.0, 0.0), triangle.first, triangle.second])
            axes.fill(*corners.T, color=GRAY, alpha=0.2, lw=0)
            axes.plot([0, triangle.mean], [0, 0], "--", color=BLACK, lw=1)
            axes.plot(*np.array([triangle.first, triangle.second]).T, "--", color=BLACK, lw=1)
            points = {
                "$w_0$": ((0.0, 0.0), "s", BLACK, (-8, 9)),
                "$w_1$": (triangle.first, "o", BLUE, (8, 4)),
                "$w_2$": (triangle.second, "o", BLUE, (8, -12)),
                "$w_{12}$": ((triangle.mean, 0.0), "D", SKY, (10, -4)),
                "$w_H$": ((triangle.merged, 0.0), "*", VERMILION, (-27, 7)),
            }
            for label, (point, marker, color, offset) in points.items():
                axes.plot(*point, marker, color=color, ms=14 if marker == "*" else 8, mec="white")
                axes.annotate(label, point, offset, textcoords="offset points", fontsize=12)
            axes.set_aspect("equal", adjustable="datalim")  # Panels of equal height.
            axes.margins(0.18)
            axes.grid(False)
            axes.set_axis_off()
            lines = textwrap.fill(name.replace(".", ". "), 40).replace(". ", ".")
            axes.set_title(
                f"{lines}\nθ = {triangle.angle:.0f}°, t = {triangle.ratio:.3f}", fontsize=9
            )

    return draw(fill, (8.6, 4.2), path)


def series(periods: Sequence[Period], path: str | Path | None = None) -> Figure:
    """Draw replicas and their merges over the epochs (the paper's Figure 7).

    Args:
      periods: in order; w0 is the origin, and the last merged model is on the first axis.
      path: a .png file; None draws without saving.
    """

    def fill(figure: Figure) -> None:
        axes = figure.subplots()
        for number, period in enumerate(periods, 1):
            opacity = 0.35 + 0.65 * number / len(periods)
            for replica, color, marker in ((period.first, BLUE, "o"), (period.second, SKY, "^")):
                axes.plot(
                    *np.array([period.start, *replica]).T,
                    "-",
                    marker=marker,
                    ms=4,
                    color=color,
                    alpha=opacity,
                    label=f"$w_{1 + (replica is period.second)}$" if number == 1 else None,
                )
            ends = np.array([period.first[-1], period.second[-1]])
            axes.plot(*ends.T, ":", color=GRAY, lw=1)
            # From the mean of the replicas toward w0, by the ratio.
            axes.annotate(
                "",
                period.merged,
                period.mean,
                arrowprops={"arrowstyle": "->", "color": VERMILION, "lw": 1.4},
            )
            axes.plot(*period.mean, "D", color="white", mec=BLACK, ms=6)
            axes.plot(*period.merged, "*", color=VERMILION, mec="white", ms=14, zorder=4)
            axes.annotate(
                f"$w_H^{{({number})}}$",
                period.merged,
                (0, -18 if number % 2 else 12),
                textcoords="offset points",
                ha="center",
            )
        axes.plot([], [], "D", color="white", mec=BLACK, ms=6, label="$w_{12}$, mean")
        axes.plot([], [], "*", color=VERMILION, ms=12, label="$w_H$, merged")
        axes.plot(0, 0, "s", color=BLACK, ms=8, label="$w_0$, the anchor")
        axes.axhline(0, color=GRAY, lw=0.8, ls="--", zorder=1)
        axes.set_xlabel("along, from the anchor to the last merged model")
        axes.set_ylabel("across, as the replicas diverge")
        axes.legend()

    return draw(fill, (8.6, 4.2), path)


# Each line has a different marker, so that the figure is readable without colors.
_COLORS = (GRAY, SKY, ORANGE, BLUE, PURPLE, VERMILION, GREEN)
_MARKERS = "oDsP^v<>XhpdH8"


def wise_ft_curves(
    curves: Mapping[str, Sequence[Curve]],
    path: str | Path | None = None,
    *,
    strong: Collection[str] = (),
) -> Figure:
    """Draw in-distribution accuracy against avg. shifts along w0 + alpha (w - w0).

    Args:
      curves: label of a method -> its curves, one per seed. Means are drawn, with the standard
        error over seeds at alpha = 1.
      path: a .png file; None draws without saving.
      strong: labels of highlighted lines.
    """

    def fill(figure: Figure) -> None:
        axes = figure.subplots()
        for number, (label, seeds) in enumerate(curves.items()):
            mean = Curve(np.mean([curve.points for curve in seeds], axis=0).tolist())
            bold = label in strong
            color = _COLORS[number % len(_COLORS)]
            (x, dx), (y, dy) = (
                mean_and_error(ends)
                for ends in zip(*(curve.endpoint for curve in seeds), strict=True)
            )
            style = {"color": color, "zorder": 3 if bold else 2}
            axes.plot(*mean.samples, "-" if bold else "--", lw=2.4 if bold else 1.1, **style)
            axes.plot(*np.array(mean.points)[:, 1:].T, ".", **style)
            axes.errorbar(
                x,
                y,
                yerr=dy,
                xerr=dx,
                fmt=_MARKERS[number % len(_MARKERS)],
                color=color,
                mec=BLACK,
                mew=0.6,
                ms=11 if bold else 7,
                capsize=2,
                label=label,
                zorder=4,
            )
        start = next(iter(curves.values()))[0].points[0]
        axes.plot(*start[1:], "*", color=BLACK, ms=14, label="Zero-shot", zorder=5)
        axes.set_xlabel("in-distribution accuracy (%)")
        axes.set_ylabel("avg. shifts (%)")
        figure.legend(loc="outside right upper", title="marker: α = 1, line: α from 0")

    return draw(fill, (9.6, 5.2), path)


def curves_and_points(
    curves: Mapping[str, Sequence[Curve]],
    points: Mapping[str, Sequence[Mapping[str, Any]]],
    path: str | Path | None = None,
) -> Figure:
    """Draw WiSE-FT curves, and models as points with their standard errors.

    Args:
      curves: label -> curves, one per pair of models. Means are drawn.
      points: label -> values of `Score`.
      path: a .png file; None draws without saving.
    """

    def fill(figure: Figure) -> None:
        axes = figure.subplots()
        for label, pairs in curves.items():
            mean = mean_curve(pairs)
            axes.plot(*mean.samples, "-", color=GRAY, lw=1.6, label=f"WiSE-FT: {label}")
            axes.plot(*np.array(mean.points)[:, 1:].T, ".", color=GRAY)
            axes.plot(*mean.points[0][1:], "*", color=BLACK, ms=14, label="Zero-shot")
        for number, (label, scores) in enumerate(points.items()):
            (x, dx), (y, dy) = map(mean_and_error, zip(*map(id_and_shifts, scores), strict=True))
            axes.errorbar(
                x,
                y,
                yerr=dy,
                xerr=dx,
                fmt=_MARKERS[number % len(_MARKERS)],
                color=_COLORS[1 + number % (len(_COLORS) - 1)],
                mec=BLACK,
                mew=0.6,
                ms=8,
                capsize=2,
                label=label,
            )
        axes.set_xlabel("in-distribution accuracy (%)")
        axes.set_ylabel("avg. shifts (%)")
        figure.legend(loc="outside right upper")

    return draw(fill, (9.6, 5.2), path)


def costs(
    methods: Mapping[str, tuple[float, Sequence[float], Sequence[float]]],
    path: str | Path | None = None,
) -> Figure:
    """Draw accuracy against the number of fine-tuning runs.

    Args:
      methods: label -> (fine-tuning runs, in-distribution accuracies, averages over the shifts);
        one accuracy per seed.
      path: a .png file; None draws without saving.
    """

    def fill(figure: Figure) -> None:
        panels = figure.subplots(1, 2)
        names = ("in-distribution accuracy (%)", "avg. shifts (%)")
        for index, (axes, name) in enumerate(zip(panels, names, strict=True)):
            for number, (label, (cost, *accuracies)) in enumerate(methods.items()):
                mean, error = mean_and_error(accuracies[index])
                axes.errorbar(
                    cost,
                    mean,
                    error,
                    fmt=_MARKERS[number % len(_MARKERS)],
                    color=_COLORS[number % len(_COLORS)],
                    mec=BLACK,
                    mew=0.6,
                    ms=9,
                    capsize=3,
                    label=label,
                )
            axes.set_xscale("log", base=2)
            ticks = sorted({cost for cost, *_ in methods.values()})
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
            axes.margins(0.12)
            axes.set_xlabel("fine-tuning runs")
            axes.set_ylabel(name)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)

    return draw(fill, (8.6, 4.4), path)
