"""Angle and norm of the task vectors over depth, as in the paper's Figure 2, for any names."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modelstock_jax.checkpoint_merge.tensor_names import ROLES, place, role
from modelstock_jax.reporting.style import BLUE, GREEN, GREY, ORANGE, PURPLE, VERMILION, draw

COLOURS = dict(zip(ROLES, (VERMILION, ORANGE, GREEN, BLUE, PURPLE, GREY), strict=True))
MOST_TOWERS = 3


def picture(rows: Sequence[Mapping[str, Any]], path: str | Path | None):
    """Draws angles (above) and norms (below) by block; a column for each tower.

    A single fine-tune has no angle: then the norms alone. A dot is a merge unit, a line the median
    of its kind in each block.

    Args:
      rows: of a merge's report: name, shape, angle (degrees or None), norms ([N]).
      path: a .png file; None only draws.

    Returns:
      The figure.
    """
    places = place([row["name"] for row in rows])
    towers = [tower for tower, _ in Counter(p.tower for p in places).most_common(MOST_TOWERS)]
    shown = [tower for tower in dict.fromkeys(p.tower for p in places) if tower in towers]
    groups = {
        tower: [(p.depth, row) for p, row in zip(places, rows, strict=True) if p.tower == tower]
        for tower in shown
    }
    if list(groups) == [""]:  # No blocks: the tensors in their order.
        groups[""] = [(float(number), row) for number, row in enumerate(rows)]

    angles = any(row.get("angle") is not None for row in rows)

    def fill(figure):
        from matplotlib.lines import Line2D

        widths = [math.sqrt(len({depth for depth, _ in group})) for group in groups.values()]
        panels = figure.subplots(
            1 + angles, max(1, len(groups)), squeeze=False, sharex="col", sharey="row",
            width_ratios=widths or None, height_ratios=[1.35, 1] if angles else [1],
        )  # fmt: skip
        roles: set[str] = set()
        for column, (tower, group) in enumerate(groups.items()):
            roles |= _column(panels[0, column] if angles else None, panels[-1, column], group)
            panels[0, column].set_title(tower or "all tensors")
            panels[-1, column].set_xlabel("block" if tower else "tensor, by name")
        if angles:
            _scale_angles(panels[0])
        _scale_norms(panels[-1])
        figure.legend(handles=[
            Line2D([], [], color=colour, marker="o", markersize=5, label=role)
            for role, colour in COLOURS.items() if role in roles
        ], loc="outside lower center", ncols=6)  # fmt: skip

    count = sum(len({depth for depth, _ in group}) for group in groups.values())
    size = (min(13.0, max(7.0, 3 + 0.22 * count)), 5.6 if angles else 3.2)
    return draw(fill, size, path)


def _column(top, bottom, group: Sequence[tuple[float, Mapping[str, Any]]]) -> set[str]:
    """Draws one tower; returns the roles that occur."""
    depths = sorted({depth for depth, _ in group})
    position = {depth: x for x, depth in enumerate(depths)}
    points = defaultdict(lambda: defaultdict(list))
    for depth, row in group:
        points[role(row["name"])][position[depth]].append(row)
    for number, (kind, colour) in enumerate((k, c) for k, c in COLOURS.items() if k in points):
        shift = (number - 2) * 0.07  # Kinds stand beside each other, not on each other.
        if top is not None:
            _series(top, points[kind], _angles, colour, shift)
        _series(bottom, points[kind], _rms, colour, shift)
    names = {-1.0: "in", math.inf: "out"}
    inner = [depth for depth in depths if depth not in names]
    every = max(1, math.ceil(len(inner) / 12))
    ticks = [d for d in depths if d in names or inner.index(d) % every == 0]
    bottom.set_xticks(
        [position[d] for d in ticks], [names.get(d) or str(int(d)) for d in ticks]
    )
    bottom.set_xlim(-0.6, len(depths) - 0.4)
    for axes in filter(None, (top, bottom)):
        axes.grid(axis="x", visible=False)
        axes.tick_params(axis="x", length=0)
    return set(points)


def _series(axes, points: Mapping[int, list], values, colour: str, shift: float) -> None:
    dots, line, last = [], [], None
    for x in sorted(points):
        if seen := [value for row in points[x] for value in values(row)]:
            dots += [(x + shift, value) for value in seen]
            if last is not None and last < x - 1:  # A line over a gap would say too much.
                line.append((x, math.nan))
            line.append((x + shift, float(np.median(seen))))
            last = x
    if not dots:
        return
    axes.plot(*zip(*dots, strict=True), "o", ms=3.2, mew=0, color=colour, alpha=0.55)
    axes.plot(*zip(*line, strict=True), "-", color=colour, lw=1.3)


def _angles(row: Mapping[str, Any]) -> list[float]:
    return [] if row.get("angle") is None else [row["angle"]]


def _rms(row: Mapping[str, Any]) -> list[float]:
    size = max(1, math.prod(row["shape"]))
    return [norm / math.sqrt(size) for norm in row["norms"] if norm]


def _scale_angles(panels) -> None:
    panels[0].set_ylabel("angle (degrees)")
    highest = max(axes.dataLim.y1 for axes in panels)
    limit = 180 if highest > 120 else 125 if highest > 92 else 95
    panels[0].set_ylim(0, limit)
    panels[0].set_yticks(range(0, limit + 1, 30 if limit == 180 else 15))
    for axes in panels:
        axes.axhline(90, color="#AAAAAA", lw=0.8, ls="--", zorder=1)


def _scale_norms(panels) -> None:
    bottom = panels[0]
    bottom.set_ylabel(r"norm of $d_i$ / $\sqrt{n}$")
    lowest, highest = (f(getattr(axes.dataLim, side) for axes in panels)
                       for f, side in ((min, "y0"), (max, "y1")))
    if 0 < 20 * lowest < highest < math.inf:
        bottom.set_yscale("log")
    else:
        bottom.set_ylim(0, 1.06 * highest if highest > 0 else None)
        bottom.ticklabel_format(axis="y", scilimits=(-2, 3), useMathText=True)
