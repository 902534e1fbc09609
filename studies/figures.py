"""Figures of the studies: those of the paper, WiSE-FT curves, accuracy against training cost.

Each method has the marker and color of `modelstock_jax.registry.ROWS`, in all figures.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from modelstock_jax.merging import ratio
from modelstock_jax.registry import ROWS
from modelstock_jax.reporting import style
from modelstock_jax.reporting.figures import scale_log
from modelstock_jax.reporting.style import (
    BLACK,
    COLORS,
    GRAY,
    ID_AXIS,
    KINDS,
    SHIFTS_AXIS,
    draw,
    handle,
    mark,
)
from modelstock_jax.reporting.tables import mean_and_error
from studies.curves import Curve, id_and_shifts, mean_curve

Point = tuple[float, float]
Scores = Sequence[Mapping[str, Any]]


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
        axes.plot(*noisy.T, **mark("noise"))
        for n, points in models.items():
            axes.plot(*np.array(points).T, **mark("single_model" if n == 1 else "uniform_mean"))
            lowest = min(points, key=lambda point: point[1])
            axes.annotate(
                f"N = {n}", lowest, (0, -17), textcoords="offset points", ha="center", fontsize=9
            )
        axes.plot(0, center, **mark("center"))
        axes.margins(0.08, 0.1)
        axes.set_xlabel("L2 distance to the center")
        axes.set_ylabel(ID_AXIS)
        axes.set_title("Accuracy rises toward the center")
        labels = {
            "center": "center μ, the mean of all models",
            "uniform_mean": "uniform mean of N models",
            "single_model": "single fine-tuned model",
            "noise": "center + Gaussian noise",
        }
        handles = [handle(row, label) for row, label in labels.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=2)

    return draw(fill, (6.4, 4.6), path)


# Increasing steps above the lowest error make the basin visible: far from it, the error is that of
# guessing.
_STEPS = (0, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 9, 14, 22, 35)
_NUM_FINE = 200


def interpolate(points: Sequence[tuple[float, float, float]], places: np.ndarray) -> np.ndarray:
    """Return positive values at places [n, 2], from a thin-plate spline of their logarithms.

    Args:
      points: (x, y, value) that the spline goes through; a value of 0 is replaced by 0.01.
      places: (x, y) of each returned value.
    """
    from scipy.interpolate import RBFInterpolator  # Takes half a second.

    measured = np.array(points)
    return np.exp(
        RBFInterpolator(measured[:, :2], np.log(np.maximum(measured[:, 2], 0.01)))(places)
    )


def landscape(
    points: Sequence[tuple[float, float, float]],
    marks: Mapping[str, Point],
    path: str | Path | None = None,
) -> Figure:
    """Draw the test error on a plane (the paper's Figure 3).

    Between the measured points, the logarithm of the error follows a thin-plate spline, which goes
    through every point. The frame has no point outside of the measured ones.

    Args:
      points: (x, y, error in percent) on lines of equal y, x and y in units of the weights.
      marks: row of the registry -> position of a model.
      path: a .png file; None draws without saving.
    """
    measured = np.array(points)
    lines = [measured[measured[:, 1] == y] for y in np.unique(measured[:, 1])]
    left, right = max(line[:, 0].min() for line in lines), min(line[:, 0].max() for line in lines)
    x, y = np.meshgrid(
        np.linspace(left, right, _NUM_FINE),
        np.linspace(measured[:, 1].min(), measured[:, 1].max(), _NUM_FINE),
    )
    error = interpolate(points, np.column_stack([x.ravel(), y.ravel()])).reshape(x.shape)

    def fill(figure: Figure) -> None:
        axes = figure.subplots()
        levels = math.floor(4 * error.min()) / 4 + np.array(_STEPS)
        norm = BoundaryNorm(levels, 256, extend="max")
        filled = axes.contourf(x, y, error, levels=levels, cmap="Blues_r", norm=norm, extend="max")
        axes.contour(x, y, error, levels=levels, colors="white", linewidths=0.5)
        figure.colorbar(filled, ax=axes, label="test error (%)", ticks=levels, format="%g")
        axes.plot(*measured[:, :2].T, ".", color=BLACK, ms=2, alpha=0.6)
        start, end = marks["zero_shot"], marks["single_model"]
        axes.plot([start[0], end[0]], [start[1], end[1]], "--", color=BLACK, lw=1)
        names = {"zero_shot": "$w_0$", "single_model": "$w_1$", "center": "center μ"}
        for row, position in marks.items():
            axes.plot(*position, **mark(row, 1.3))
            axes.annotate(
                names[row], position, (8, 7), textcoords="offset points", fontsize=11,
                path_effects=[withStroke(linewidth=2.5, foreground="white")],
            )  # fmt: skip
        axes.set(xlim=(left, right), ylim=(y.min(), y.max()))
        axes.set_aspect("equal")
        axes.grid(False)
        axes.set_xlabel("along $w_1 - w_0$ (L2 distance)")
        axes.set_ylabel("across, toward the center (L2 distance)")
        axes.set_title("The test error is lowest near the center")
        labels = {"zero_shot": "zero-shot", "single_model": "fine-tuned model", "center": "center"}
        handles = [handle(row, label) for row, label in labels.items()]
        handles.append(Line2D([], [], ls="none", marker=".", ms=4, color=BLACK, label="measured"))
        figure.legend(handles=handles, loc="outside lower center", ncols=4)

    return draw(fill, (6.8, 5.0), path)


def dynamics(history: Sequence[Mapping[str, Any]], path: str | Path | None = None) -> Figure:
    """Draw angle and norm over the epochs (the geometry of the paper's Figure 5).

    Args:
      history: entries {"epoch", "kernels" and "biases": {"angle": of pairs, "norm": of models}}.
      path: a .png file; None draws without saving.
    """

    def fill(figure: Figure) -> None:
        panels = figure.subplots(1, 2)
        epochs = [entry["epoch"] for entry in history]
        for axes, key in zip(panels, ("angle", "norm"), strict=True):
            for what, marker in (("kernels", "o"), ("biases", "s")):
                values = np.array([entry[what][key] for entry in history])
                axes.errorbar(
                    epochs,
                    values.mean(1),
                    values.std(1, ddof=1),
                    fmt=f"-{marker}",
                    color=KINDS[what],
                    ms=5,
                    capsize=3,
                    label=what,
                )
            axes.set_xlabel("epoch")
            axes.set_xticks(epochs)
        panels[0].set_ylim(bottom=0)
        panels[0].set_ylabel("angle (degrees)")
        panels[0].set_title("Angle between two models")
        scale_log(panels[1])
        panels[1].set_ylabel("L2 distance to the anchor")
        panels[1].set_title("Distance to the anchor")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)

    return draw(fill, (8.6, 3.8), path)


def distances(
    models: Mapping[int, Sequence[float]], radius: float, path: str | Path | None = None
) -> Figure:
    """Draw the distance of means of N models to the center, and the law radius / √N.

    Args:
      models: N -> distances of disjoint means of N models.
      radius: predicted distance of a single model.
      path: a .png file; None draws without saving.
    """

    def fill(figure: Figure) -> None:
        axes = figure.subplots()
        fine = np.linspace(1, max(models), 200)
        law = Line2D([], [], color=BLACK, lw=1.2, label="distance of a single model / √N")
        axes.plot(fine, radius / np.sqrt(fine), color=BLACK, lw=1.2, zorder=1)
        for n, values in models.items():
            row = "single_model" if n == 1 else "uniform_mean"
            axes.plot([n] * len(values), values, **mark(row))
        axes.set_xticks([*models])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("N, number of averaged models")
        axes.set_ylabel("L2 distance to the center")
        axes.set_title("A mean of N models is closer to the center")
        labels = {"single_model": "single model", "uniform_mean": "uniform mean of N models"}
        handles = [handle(row, label) for row, label in labels.items()]
        figure.legend(handles=[*handles, law], loc="outside lower center", ncols=3)

    return draw(fill, (6.8, 4.0), path)


def ratios(points: Sequence[Point], path: str | Path | None = None) -> Figure:
    """Draw the ratio t of equation 3 against the angle, for several N.

    Args:
      points: (angle in degrees, t) of the tensors of a merge of two models.
      path: a .png file; None draws without saving.
    """

    def fill(figure: Figure) -> None:
        axes = figure.subplots()
        degrees = np.linspace(0, 110, 221)
        lines = {2: ("vermilion", "-"), 3: ("blue", "--"), 5: ("green", "-."), 50: ("gray", ":")}
        for n, (color, dashes) in lines.items():
            t = ratio(np.cos(np.radians(degrees)), n)
            axes.plot(degrees, t, dashes, color=COLORS[color], lw=2, label=f"N = {n}")
        axes.plot(*np.array(points).T, "o", color=BLACK, ms=3.5, alpha=0.6, label="tensors, N = 2")
        axes.set_xlim(0, 110)
        axes.set_xlabel("angle θ between the updates (degrees)")
        axes.set_ylabel("ratio t")
        axes.set_title("From the mean (t = 1) to the anchor (t = 0)")
        figure.legend(loc="outside lower center", ncols=5, handlelength=2.4)

    return draw(fill, (6.8, 4.0), path)


def triangles(chosen: Mapping[str, Triangle], path: str | Path | None = None) -> Figure:
    """Draw the merge of two models and the center (the paper's Figure 6), true to scale.

    The upper panels show the plane of the models. The lower ones show the plane through w0 and the
    center, which is perpendicular to it: w_H is the foot of the perpendicular from the center.

    Args:
      chosen: name of a tensor -> its triangle; one column per tensor.
      path: a .png file; None draws without saving.
    """

    def fill(figure: Figure) -> None:
        panels = figure.subplots(2, len(chosen), squeeze=False, height_ratios=[1.5, 1])
        for (top, bottom), (name, triangle) in zip(panels.T, chosen.items(), strict=True):
            lines = textwrap.fill(name.replace(".", ". "), 44).replace(". ", ".")
            top.set_title(
                f"{lines}\nθ = {triangle.angle:.0f}°, t = {triangle.ratio:.3f}", fontsize=9
            )
            bottom.set_title("from the side, with the center μ", fontsize=9, fontweight="normal")
            for axes in (top, bottom):
                axes.set_axis_off()
        labels = {
            "zero_shot": "$w_0$, the anchor",
            "single_model": "$w_1, w_2$, fine-tuned",
            "uniform_mean": "$w_{12}$, their mean",
            "model_stock": "$w_H$, Model Stock",
            "center": "μ, the center",
        }
        handles = [handle(row, label) for row, label in labels.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=5, handletextpad=0.2)
        figure.canvas.draw()  # Fixes the layout, which limits and labels depend on.
        figure.set_layout_engine("none")
        for (top, bottom), triangle in zip(panels.T, chosen.values(), strict=True):
            _plane_of_the_models(top, triangle)
            _plane_of_the_center(bottom, triangle)

    return draw(fill, (8.6, 5.4), path)


def _plane_of_the_models(axes: Axes, triangle: Triangle) -> None:
    corners = np.array([(0.0, 0.0), triangle.first, triangle.second])
    _set_scale(axes, triangle, middle=0.5)
    axes.fill(*corners.T, color=GRAY, alpha=0.2, lw=0)
    axes.plot([0, triangle.mean], [0, 0], "--", color=BLACK, lw=1)
    axes.plot(*corners[1:].T, "--", color=BLACK, lw=1)
    points = [
        ("$w_0$", (0.0, 0.0), "zero_shot"),
        ("$w_1$", triangle.first, "single_model"),
        ("$w_2$", triangle.second, "single_model"),
        ("$w_{12}$", (triangle.mean, 0.0), "uniform_mean"),
        ("$w_H$", (triangle.merged, 0.0), "model_stock"),
    ]
    _name_points(axes, points, [((0.0, 0.0), (triangle.mean, 0.0)), corners[1:]])


def _plane_of_the_center(axes: Axes, triangle: Triangle) -> None:
    # The triangle w0, center, w12 has a right angle at the center.
    height = math.sqrt(triangle.merged * max(0.0, triangle.mean - triangle.merged))
    center = (triangle.merged, height)
    _set_scale(axes, triangle, middle=0.2)
    corners = np.array([(0.0, 0.0), center, (triangle.mean, 0.0)])
    axes.fill(*corners.T, color=GRAY, alpha=0.2, lw=0)
    axes.plot(*corners[[0, 2]].T, "--", color=BLACK, lw=1)
    axes.plot([triangle.merged] * 2, [0, height], ":", color=BLACK, lw=1.4)
    points = [
        ("$w_0$", (0.0, 0.0), "zero_shot"),
        ("$w_{12}$", (triangle.mean, 0.0), "uniform_mean"),
        ("$w_H$", (triangle.merged, 0.0), "model_stock"),
        ("μ", center, "center"),
    ]
    _name_points(axes, points, [corners[[0, 2]], ((triangle.merged, 0.0), center)])


def _set_scale(axes: Axes, triangle: Triangle, middle: float) -> None:
    """Set limits of equal scale on both axes; y = 0 is at the fraction `middle` of the height."""
    box = axes.get_window_extent()
    across = 2.4 * max(triangle.first[1], -triangle.second[1])
    # The upper panel has 1.5 times the height of the lower one, for an equal scale in both.
    height = box.height if middle == 0.5 else 1.5 * box.height
    width = max(1.5 * triangle.mean, across * box.width / height)
    axes.set_xlim(triangle.mean / 2 - width / 2, triangle.mean / 2 + width / 2)
    tall = width * box.height / box.width
    axes.set_ylim(-middle * tall, (1 - middle) * tall)


def _name_points(axes: Axes, points: Sequence[tuple[str, Point, str]], lines: Any) -> None:
    """Draw points, each (name, position, row of the registry), with names next to the lines."""
    labels, occupied = [], [point for _, point, _ in points]
    for start, end in lines:
        occupied += np.linspace(start, end, 60).tolist()
    for text, point, row in points:
        axes.plot(*point, **mark(row))
        labels.append(style.Label(*point, text, style.ink(COLORS[ROWS[row].color])))
    style.place(axes, labels, occupied, size=12)


def series(periods: Sequence[Period], path: str | Path | None = None) -> Figure:
    """Draw replicas and their merges over the epochs (the paper's Figure 7).

    Args:
      periods: in order; w0 is the origin, and the last merged model is on the first axis.
      path: a .png file; None draws without saving.
    """

    def fill(figure: Figure) -> None:
        axes = figure.subplots()
        for period in periods:
            for replica in (period.first, period.second):
                ways = np.array([period.start, *replica]).T
                axes.plot(*ways, "-", color=COLORS["gray"], lw=1)
                axes.plot(*ways[:, 1:], **mark("single_model", 0.55))
            ends = np.array([period.first[-1], period.second[-1]])
            axes.plot(*ends.T, ":", color=GRAY, lw=1)
            axes.plot(*np.array([period.mean, period.merged]).T, "-", color=BLACK, lw=1.4)
            axes.plot(*period.mean, **mark("uniform_mean"))
            axes.plot(*period.merged, **mark("periodic_model_stock") | {"zorder": 5})
        axes.plot(0, 0, **mark("zero_shot"))
        axes.axhline(0, color=GRAY, lw=0.8, ls="--", zorder=1)
        axes.set_xlabel("along, from the anchor to the last merged model (L2 distance)")
        axes.set_ylabel("across, as the replicas diverge\n(L2 distance)")
        axes.set_title("Replicas diverge, are merged after every epoch, and resume from there")
        labels = {
            "zero_shot": "$w_0$, the anchor",
            "single_model": "$w_1$ (above), $w_2$ (below)",
            "uniform_mean": "$w_{12}$, their mean",
            "periodic_model_stock": "$w_H$, Model Stock, periodic",
        }
        handles = [handle(row, label) for row, label in labels.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=4)
        figure.canvas.draw()  # Fixes limits and layout, which `style.place` reads.
        figure.set_layout_engine("none")
        color = style.ink(COLORS[ROWS["periodic_model_stock"].color])
        texts = [
            style.Label(*period.merged, f"epoch {number}", color)
            for number, period in enumerate(periods, 1)
        ]
        points = [p for period in periods for p in (*period.first, *period.second, period.mean)]
        style.place(axes, texts, points)

    return draw(fill, (8.6, 4.6), path)


def wise_ft_curves(
    curves: Mapping[str, tuple[str, Sequence[Curve]]],
    path: str | Path | None = None,
    *,
    strong: Collection[str] = (),
    title: str = "",
) -> Figure:
    """Draw in-distribution accuracy against avg. shifts along w0 + alpha (w - w0).

    The right panel enlarges the upper half of the in-distribution accuracies, down to Model Stock
    and the highlighted models.

    Args:
      curves: row of the registry -> (label, curves, one per seed). Means are drawn, with the
        standard error over seeds at alpha = 1.
      path: a .png file; None draws without saving.
      strong: rows of highlighted lines.
      title: title of the figure.
    """
    means = {row: mean_curve(seeds) for row, (_, seeds) in curves.items()}

    def fill(figure: Figure) -> None:
        panels = figure.subplots(1, 2)
        for axes in panels:
            for row, (_, seeds) in curves.items():
                _wise_ft_curve(axes, row, seeds, bold=row in strong)
            first, *_ = means.values()
            axes.plot(*first.points[0][1:], **mark("zero_shot"))
            axes.set_xlabel(ID_AXIS)
        panels[0].set_ylabel(SHIFTS_AXIS)
        panels[0].set_title(title)
        panels[1].set_title("enlarged", fontweight="normal")
        x, y = (np.concatenate([m.samples[i] for m in means.values()]) for i in (0, 1))
        low = min(means[row].endpoint[1] for row in {"model_stock", *strong} & means.keys())
        middle = (x.min() + x.max()) / 2
        _enlarge(panels, (middle, x.max()), (low, y[x > middle].max()))
        handles = [handle("zero_shot", "Zero-shot (α = 0)")]
        handles += [handle(row, label) for row, (label, _) in curves.items()]
        alphas = ", ".join(f"{alpha:g}" for alpha, *_ in first.points[1:-1])
        dot = {"marker": ".", "color": GRAY, "lw": 1.1, "ls": "--"}
        handles.append(Line2D([], [], label=f"WiSE-FT, dots: α = {alphas}", **dot))
        short = max(len(label) for label, _ in curves.values()) < 40
        figure.legend(handles=handles, loc="outside lower center", ncols=3 if short else 2)

    return draw(fill, (9.6, 5.0), path)


def _wise_ft_curve(axes: Axes, row: str, seeds: Sequence[Curve], *, bold: bool) -> None:
    mean, color = mean_curve(seeds), COLORS[ROWS[row].color]
    axes.plot(*mean.samples, "-" if bold else "--", lw=2.2 if bold else 1.1, color=color)
    axes.plot(*np.array(mean.points)[1:-1, 1:].T, ".", color=color)
    _point(axes, row, [curve.endpoint for curve in seeds])


def _point(axes: Axes, row: str, accuracies: Sequence[Point], error_color: Any = None) -> Point:
    """Draw and return the mean of (in distribution, shifts) accuracies, with standard errors."""
    (x, dx), (y, dy) = map(mean_and_error, zip(*accuracies, strict=True))
    bars = {"elinewidth": 1.2, "capsize": 2, "ecolor": error_color}
    axes.errorbar(x, y, yerr=dy, xerr=dx, **bars, **mark(row))
    return x, y


def _enlarge(panels: Sequence[Axes], x: Point, y: Point, margin: float = 0.08) -> None:
    """Limit the right panel to a rectangle with margins, and show it in the left panel."""
    (left, right), (bottom, top) = (
        (low - margin * (high - low), high + margin * (high - low)) for low, high in (x, y)
    )
    panels[1].set(xlim=(left, right), ylim=(bottom, top))
    panels[0].margins(0.08)
    frame = Rectangle((left, bottom), right - left, top - bottom)
    frame.set(fill=False, edgecolor=BLACK, lw=0.8, zorder=1)
    panels[0].add_patch(frame)


def merges_and_curve(
    curves: Sequence[Curve],
    points: Mapping[str, Scores],
    units: Mapping[str, Scores],
    path: str | Path | None = None,
) -> Figure:
    """Draw the WiSE-FT curve of the uniform mean, and models with their standard errors.

    The right panel enlarges the merge units of Model Stock.

    Args:
      curves: of the uniform mean, one per pair of models. Their mean is drawn.
      points: row of the registry -> values of `Score`.
      units: merge unit -> values of `Score` of Model Stock; the first one is in both panels.
      path: a .png file; None draws without saving.
    """
    mean, color = mean_curve(curves), COLORS[ROWS["uniform_mean"].color]
    models = {row: [*map(id_and_shifts, scores)] for row, scores in points.items()}
    models["uniform_mean"] = [curve.endpoint for curve in curves]
    merges = {unit: [*map(id_and_shifts, scores)] for unit, scores in units.items()}

    def fill(figure: Figure) -> None:
        panels = figure.subplots(1, 2)
        for axes in panels:
            axes.plot(*mean.samples, "-", color=color, lw=1.6)
            axes.plot(*np.array(mean.points)[1:-1, 1:].T, ".", color=color)
            axes.plot(*mean.points[0][1:], **mark("zero_shot"))
            for row, accuracies in models.items():
                _point(axes, row, accuracies)
            axes.set_xlabel(ID_AXIS)
        _point(panels[0], "model_stock", next(iter(merges.values())))
        ends = {
            unit: _point(panels[1], "model_stock", accuracies, "#F0C9AE")
            for unit, accuracies in merges.items()
        }
        panels[0].set_ylabel(SHIFTS_AXIS)
        panels[0].set_title("Two models: merges, and WiSE-FT")
        panels[1].set_title("enlarged: Model Stock by merge unit", fontweight="normal")
        rows = ("zero_shot", *models)
        handles = [handle(row, ROWS[row].label.format(n=2)) for row in rows]
        handles.append(handle("model_stock", "Model Stock of 2 replicas"))
        alphas = ", ".join(f"{alpha:g}" for alpha, *_ in mean.points[1:-1])
        curve = {"marker": ".", "color": color, "lw": 1.6}
        handles.append(Line2D([], [], label=f"WiSE-FT of the mean, dots: α = {alphas}", **curve))
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
        x, y = zip(*ends.values(), strict=True)
        _enlarge(panels, (min(x), max(x)), (min(y), max(y)), margin=0.4)
        figure.canvas.draw()  # Fixes limits and layout, which `style.place` reads.
        figure.set_layout_engine("none")
        ink = style.ink(COLORS[ROWS["model_stock"].color])
        texts = [style.Label(*end, unit, ink) for unit, end in ends.items()]
        style.place(panels[1], texts, [*ends.values()])

    return draw(fill, (9.6, 5.0), path)


def costs(
    methods: Mapping[str, tuple[str, float, Sequence[float], Sequence[float]]],
    path: str | Path | None = None,
) -> Figure:
    """Draw accuracy against the number of fine-tuning runs.

    Args:
      methods: row of the registry -> (label, fine-tuning runs, in-distribution accuracies, averages
        over the shifts); one accuracy per seed.
      path: a .png file; None draws without saving.
    """

    def fill(figure: Figure) -> None:
        panels = figure.subplots(1, 2)
        titles = ("In distribution", "Out of distribution")
        names = (ID_AXIS, SHIFTS_AXIS)
        for index, (axes, name) in enumerate(zip(panels, names, strict=True)):
            for row, (_, cost, *accuracies) in methods.items():
                mean, error = mean_and_error(accuracies[index])
                axes.errorbar(cost, mean, error, capsize=3, **mark(row, 1.2))
            axes.set_xscale("log", base=2)
            ticks = sorted({cost for _, cost, *_ in methods.values()})
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
            axes.margins(0.12)
            axes.set_title(titles[index])
            axes.set_xlabel("number of fine-tuning runs")
            axes.set_ylabel(name)
        handles = [handle(row, label) for row, (label, *_) in methods.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=3)

    return draw(fill, (8.6, 4.4), path)
