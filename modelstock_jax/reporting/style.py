"""Style of all figures: markers of methods, colors for all kinds of color vision, labels."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from modelstock_jax.fileio import write_atomically
from modelstock_jax.registry import ROWS, Style

# Palette of Okabe and Ito: distinguishable in print and on screen by all common kinds of color
# vision.
BLACK, ORANGE, SKY, GREEN = "#222222", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILION, PURPLE, GRAY = "#0072B2", "#D55E00", "#CC79A7", "#8C8C8C"
LIGHT_GREEN = "#8FD3BD"
# The names are used by `registry`.
COLORS = {
    "black": BLACK, "orange": ORANGE, "sky": SKY, "green": GREEN,
    "blue": BLUE, "vermilion": VERMILION, "purple": PURPLE, "gray": GRAY,
}  # fmt: skip

ID_AXIS, SHIFTS_AXIS = "in-distribution accuracy (%)", "average accuracy over the shifts (%)"

# Style of a method that is not in `registry.ROWS`.
OTHER_STYLE = Style("", "", "purple", "h")
MARKER_SIZE = {"*": 17, "o": 7, "s": 7, "D": 7, "P": 9, "^": 9, "v": 9, "X": 6, ".": 10}

KINDS = {"kernels": VERMILION, "biases": BLUE, "norms": GREEN, "head": PURPLE}

RC = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


class PngFigure(Figure):
    """A figure that a notebook shows as the last value of a cell; it needs no display."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        with matplotlib.rc_context(RC):
            self.savefig(file, format="png", dpi=100)
        return file.getvalue()


def ink(color: str) -> tuple[float, float, float]:
    """Darken a color for text, which needs more contrast than a marker.

    Example:
      >>> ink("#FF8000")
      (0.75, 0.376..., 0.0)
    """
    red, green, blue = to_rgb(color)
    return 0.75 * red, 0.75 * green, 0.75 * blue


def mark(row: str, size: float = 1.0) -> dict[str, Any]:
    """Return Matplotlib's options for the marker of a method, the same in all figures.

    Small markers are drawn above large ones, and so remain visible.

    Args:
      row: key of `registry.ROWS`, or another name
      size: factor of the usual size

    Example:
      >>> options = mark("model_stock")
      >>> options["marker"], options["color"] == VERMILION
      ('*', True)
    """
    method = ROWS.get(row, OTHER_STYLE)
    points = size * MARKER_SIZE.get(method.marker, 8)
    return {
        "ls": "none", "marker": method.marker, "color": COLORS[method.color], "ms": points,
        "mec": "white", "mew": 0.8 if points > 6 else 0.4, "zorder": 4 - points / 100,
    }  # fmt: skip


def handle(row: str, label: str) -> Line2D:
    """Return the entry of a method in a legend, without the error bars of its points."""
    return Line2D([], [], label=label, **mark(row))


def draw(
    fill: Callable[[Figure], Any], size: tuple[float, float], path: str | Path | None
) -> PngFigure:
    """Draw a figure in the project's style and write it atomically.

    Args:
      fill: draws on the empty figure
      size: width and height in inches
      path: .png file; None only draws

    Returns:
      the figure; no display is used
    """
    with matplotlib.rc_context(RC):
        figure = PngFigure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        fill(figure)
        if path is not None:
            # No version in the metadata: equal figures are bitwise identical.
            write_atomically(
                path, lambda file: figure.savefig(file, dpi=180, metadata={"Software": None})
            )
    return figure


# Label positions to try: distances from the point in typographic points, and directions in degrees,
# both in order of preference.
RADII = (9, 14, 20, 28, 38, 50, 64)
ANGLES = (0, 180, 90, 270, 45, 315, 135, 225, 20, 340, 160, 200, 65, 295, 115, 245)
FAR = 16  # At this distance or more, a thin line connects the label and its point.


class Label(NamedTuple):
    """A label of the point (x, y), in data coordinates."""

    x: float
    y: float
    text: str
    color: Any
    bold: bool = False


class Curve(NamedTuple):
    """Points along a curve with their alphas, in data coordinates."""

    alphas: Sequence[float]
    x: Sequence[float]
    y: Sequence[float]
    color: Any

    def dense(self, steps: int = 6) -> list[tuple[float, float]]:
        """Return the curve with `steps` interpolated steps between neighboring points."""
        position = np.linspace(0, len(self.x) - 1, steps * (len(self.x) - 1) + 1)
        index = np.arange(len(self.x))
        x, y = np.interp(position, index, self.x), np.interp(position, index, self.y)
        return list(zip(x.tolist(), y.tolist(), strict=True))


def place(
    axes: Axes,
    labels: Sequence[Label],
    occupied: Sequence[tuple[float, float]],
    *,
    avoid: Sequence[Bbox] = (),
    size: float = 9,
) -> list[Annotation]:
    """Put each label at the free position nearest to its point.

    A position that covers a label, a marker or the frame is used only if no other is free; then
    the one that covers least is used.

    Args:
      axes: axes with final limits and layout
      labels: labels in order of importance
      occupied: data coordinates to keep uncovered (markers, points along curves)
      avoid: boxes in display coordinates that no label may cover (the legend)
      size: font size in points

    Returns:
      one annotation per label
    """
    dots = axes.transData.transform(np.asarray([*occupied, *((p.x, p.y) for p in labels)]))
    frame = axes.get_window_extent()
    pixel = axes.figure.dpi / 72
    taken = list(avoid)
    placed = []
    for label in labels:
        text = axes.annotate(
            label.text,
            (label.x, label.y),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=size,
            color=label.color,
            fontweight="bold" if label.bold else "normal",
            linespacing=1.05,
            va="center",
            zorder=6,
        )
        cost = partial(_cost, taken=taken, dots=dots, frame=frame, pixel=pixel)
        radius, box = _move_to_best(text, cost, pixel)
        taken.append(box)
        if radius >= FAR:
            _connect(axes, label, box)
        placed.append(text)
    return placed


def _move_to_best(
    text: Annotation, cost: Callable[[Bbox], float], pixel: float
) -> tuple[float, Bbox]:
    """Move a label to the position of lowest cost; return its radius and its box."""

    def move(radius: float, index: int) -> Bbox:
        angle = math.radians(ANGLES[index])
        dx, dy = round(math.cos(angle), 6), round(math.sin(angle), 6)
        side = "left" if dx > 0.3 else "right" if dx < -0.3 else "center"
        text.set_horizontalalignment(side)
        text.set_verticalalignment("bottom" if dy > 0.6 else "top" if dy < -0.6 else "center")
        text.xyann = (radius * dx, radius * dy)
        return text.get_window_extent().padded(1.5 * pixel)

    positions = product(RADII, range(len(ANGLES)))
    radius, index = min(positions, key=lambda p: cost(move(*p)) + p[0] + 0.3 * p[1])
    return radius, move(radius, index)


def number_curves(axes: Axes, curves: Sequence[Curve], size: float = 7.5) -> None:
    """Write alpha next to the inner points of curves, except where it would cover something.

    Args:
      axes: axes with all other texts
      curves: curves as drawn
      size: font size in points
    """
    if not curves:
        return
    taken = [text.get_window_extent() for text in axes.texts]
    dots = axes.transData.transform(np.concatenate([curve.dense() for curve in curves]))
    owner = np.repeat(np.arange(len(curves)), [len(curve.dense()) for curve in curves])
    for curve in curves:
        for alpha, x, y in zip(curve.alphas, curve.x, curve.y, strict=True):
            if not 0 < alpha < 1:
                continue
            for dx, dy in [(5, 4), (-5, -4), (5, -4), (-5, 4), (0, 7), (0, -7), (7, 0), (-7, 0)]:
                text = axes.annotate(
                    f"{alpha:g}",
                    (x, y),
                    xytext=(dx, dy),
                    textcoords="offset points",
                    fontsize=size,
                    color=curve.color,
                    ha="left" if dx > 0 else "right" if dx < 0 else "center",
                    va="bottom" if dy > 0 else "top" if dy < 0 else "center",
                    zorder=5,
                )
                box = text.get_window_extent()
                center = [(box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2]
                nearest = int(owner[np.argmin(np.sum((dots - center) ** 2, axis=1))])
                free = not box.count_contains(dots) and not box.count_overlaps(taken)
                if free and curves[nearest] is curve:  # It must be nearest to its own curve.
                    taken.append(box)
                    break
                text.remove()


def _cost(box: Bbox, taken: Sequence[Bbox], dots: np.ndarray, frame: Bbox, pixel: float) -> float:
    cost = 0.0
    for other in taken:
        common = Bbox.intersection(box, other)
        if common is not None:
            cost += 2000 + common.width * common.height
    around = box.padded(5 * pixel)
    inside = (
        (dots[:, 0] > around.x0)
        & (dots[:, 0] < around.x1)
        & (dots[:, 1] > around.y0)
        & (dots[:, 1] < around.y1)
    )
    cost += 120 * float(inside.sum())
    out = (frame.x0 - box.x0, box.x1 - frame.x1, frame.y0 - box.y0, box.y1 - frame.y1)
    return cost + 500 * sum(over > 0 for over in out)


def _connect(axes: Axes, label: Label, box: Bbox) -> None:
    """Draw a thin line from the label's nearest edge to its point."""
    x, y = axes.transData.transform((label.x, label.y))
    edge = (min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1))
    start = axes.transData.inverted().transform(edge)
    axes.plot(
        [start[0], label.x], [start[1], label.y], color=label.color, lw=0.7, alpha=0.7, zorder=2
    )
