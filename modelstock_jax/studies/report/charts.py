"""Charts of accuracies: WiSE-FT curves side by side, and accuracy against cost."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from modelstock_jax.reporting.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    draw,
)
from modelstock_jax.reporting.tables import mean_and_error
from modelstock_jax.studies.report.curves import Curve

# Each line has a marker of its own, so that a print without colours can be read.
_COLOURS = (GREY, SKY, ORANGE, BLUE, PURPLE, VERMILION, GREEN)
_MARKERS = "oDsP^v<>XhpdH8"


def wise_ft_curves(
    curves: Mapping[str, Sequence[Curve]],
    path: str | Path | None = None,
    *,
    strong: Collection[str] = (),
) -> Figure:
    """Accuracy in distribution against the shifts along w0 + alpha (w - w0), of each method.

    Args:
      curves: a method's label -> its curves, one a seed; means are drawn, and at alpha = 1 the
        standard error over seeds.
      path: a .png file; None only draws.
      strong: labels whose lines stand out.
    """

    def fill(figure: Figure) -> None:
        axes = figure.subplots()
        for number, (label, seeds) in enumerate(curves.items()):
            middle = Curve(np.mean([one.points for one in seeds], axis=0).tolist())
            bold = label in strong
            shade = _COLOURS[number % len(_COLOURS)]
            (x, dx), (y, dy) = (
                mean_and_error(ends) for ends in zip(*(one.own for one in seeds), strict=True)
            )
            look = {"color": shade, "zorder": 3 if bold else 2}
            axes.plot(*middle.dense, "-" if bold else "--", lw=2.4 if bold else 1.1, **look)
            axes.plot(*np.array(middle.points)[:, 1:].T, ".", **look)
            axes.errorbar(
                x,
                y,
                yerr=dy,
                xerr=dx,
                fmt=_MARKERS[number % len(_MARKERS)],
                color=shade,
                mec=BLACK,
                mew=0.6,
                ms=11 if bold else 7,
                capsize=2,
                label=label,
                zorder=4,
            )
        start = next(iter(curves.values()))[0].points[0]
        axes.plot(*start[1:], "*", color=BLACK, ms=14, label="zero-shot", zorder=5)
        axes.set_xlabel("in-distribution accuracy (%)")
        axes.set_ylabel("average accuracy over the shifts (%)")
        figure.legend(loc="outside right upper", title="marker: α = 1, line: α from 0")

    return draw(fill, (9.6, 5.2), path)


def costs(
    methods: Mapping[str, tuple[float, Sequence[float], Sequence[float]]],
    path: str | Path | None = None,
) -> Figure:
    """Accuracy against what a model costs (the horizontal axis that the paper speaks of).

    Args:
      methods: a label -> (cost in fine-tunings of one model, accuracies in distribution, averages
        over the shifts), one of each a seed.
      path: a .png file; None only draws.
    """

    def fill(figure: Figure) -> None:
        panels = figure.subplots(1, 2)
        names = ("in-distribution accuracy (%)", "average accuracy over the shifts (%)")
        for place, (axes, name) in enumerate(zip(panels, names, strict=True)):
            for number, (label, (cost, *accuracies)) in enumerate(methods.items()):
                mean, error = mean_and_error(accuracies[place])
                axes.errorbar(
                    cost,
                    mean,
                    error,
                    fmt=_MARKERS[number % len(_MARKERS)],
                    color=_COLOURS[number % len(_COLOURS)],
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
            axes.set_xlabel("cost (fine-tunings of one model)")
            axes.set_ylabel(name)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)

    return draw(fill, (8.6, 4.4), path)
