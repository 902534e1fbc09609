"""One look for every figure and name: colours that colour-blind readers can tell apart."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from modelstock_jax.reporting.files import write_atomically

# Okabe and Ito's palette, in print and on screen told apart by all common kinds of colour vision.
BLACK, ORANGE, SKY, GREEN = "#222222", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#8C8C8C"


class Method(NamedTuple):
    """How a method is written and drawn; `label` may hold {n}, {of} and {alpha}."""

    label: str
    short: str
    colour: str
    marker: str


METHODS = {
    "zero_shot": Method("Zero-shot (the anchor)", "zero-shot", BLACK, "s"),
    "replica": Method("One replica", "one replica", GREY, "o"),
    "mean": Method("Mean of {n} replicas", "mean of {n}", SKY, "D"),
    "wise_ft": Method("WiSE-FT of {of}, α = {alpha:g}", "WiSE-FT", GREY, "."),
    "constant_ratio": Method("Mean shrunk by one t", "mean, one t", ORANGE, "P"),
    "model_stock": Method(
        "Model Stock, after training", "Model Stock,\nafter training", VERMILION, "*"
    ),
    "periodic": Method("Model Stock, periodic", "Model Stock,\nperiodic", BLUE, "^"),
    "periodic_mean": Method("Mean, periodic (t = 1)", "mean, periodic", SKY, "<"),
    "carried": Method(
        "Model Stock, periodic, noise carried (ours)",
        "Model Stock,\nnoise carried\n(ours)",
        GREEN,
        "v",
    ),
    "weighted": Method("Model Stock, weighted (ours)", "weighted (ours)", PURPLE, "X"),
    "random_head": Method("Random head (the anchor)", "random head", BLACK, "x"),
    "probed": Method("Linear probe (the anchor)", "probed", BLACK, "d"),
    # One replica of a run whose objective or projection is another (docs/methods.md).
    "linear_probe": Method("Linear probe", "linear probe", BLACK, "d"),
    "lp_ft": Method("LP-FT", "LP-FT", ORANGE, "h"),
    "car_ft": Method("CAR-FT", "CAR-FT", GREEN, "p"),
    "flyp": Method("FLYP", "FLYP", PURPLE, "H"),
    "l2_sp": Method("L2-SP", "L2-SP", SKY, ">"),
    "bitfit": Method("BitFit", "BitFit", BLUE, "8"),
    "ftp": Method("FTP", "FTP", VERMILION, "P"),
    "tpgm": Method("TPGM", "TPGM", ORANGE, "<"),
    "decay_to_pretrained": Method(
        "Decoupled decay to the anchor", "decay\nto the anchor", GREY, "v"
    ),
}

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


class Picture(Figure):
    """A figure that a notebook shows where it is a cell's last value; no display is needed."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        with matplotlib.rc_context(RC):
            self.savefig(file, format="png", dpi=100)
        return file.getvalue()


def ink(colour: str) -> tuple[float, float, float]:
    """The colour darkened for text, which needs more contrast than a marker.

    Example:
      >>> ink("#FF8000")
      (0.75, 0.376..., 0.0)
    """
    red, green, blue = to_rgb(colour)
    return 0.75 * red, 0.75 * green, 0.75 * blue


def draw(
    fill: Callable[[Figure], Any], size: tuple[float, float], path: str | Path | None
) -> Picture:
    """Draws a figure in the house's look and writes it atomically.

    Args:
      fill: draws on the empty figure.
      size: width and height in inches.
      path: a .png file; None only draws.

    Returns:
      The figure, for those who want to look into it; no display is touched.
    """
    with matplotlib.rc_context(RC):
        figure = Picture(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        fill(figure)
        if path is not None:
            # No version in the metadata: equal figures give equal bytes.
            write_atomically(
                path, lambda file: figure.savefig(file, dpi=180, metadata={"Software": None})
            )
    return figure
