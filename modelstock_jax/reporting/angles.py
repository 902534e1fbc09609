"""The panels of angle and norm by layer."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from modelstock_jax.reporting.layers import kind
from modelstock_jax.reporting.style import BLACK, GREEN, KINDS, ORANGE, PURPLE, SKY

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
