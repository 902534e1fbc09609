"""Figures are written with their labels, and no label covers another."""

import itertools

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from modelstock_jax.registry import ROWS
from modelstock_jax.reporting import figures
from modelstock_jax.reporting.style import COLORS
from modelstock_jax.reporting.tables import summarize
from tests.reporting import made_up


def texts(figure):
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


@pytest.mark.parametrize("seeds", [[0], range(4)])
def test_id_against_shifts(tmp_path, seeds):
    rows = made_up.rows(seeds)
    path = tmp_path / "figures" / "a.png"
    figure = figures.id_against_shifts(rows, path, title="Glyphs")
    with Image.open(path) as image:
        assert image.width > 1000
    shown = texts(figure)
    for text in [
        "zero-shot",
        "single\nfine-tuned",
        "mean of 2",
        "mean, one\nglobal ratio",
        "Model Stock,\nafter training",
        "Model Stock,\nperiodic",
        "Glyphs",
        "0.5",
        "WiSE-FT of a single model (α)",
        "WiSE-FT of the uniform mean (α)",
    ]:
        assert text in shown, text
    (axes,) = figure.axes
    renderer = figure.canvas.get_renderer()
    boxes = {text: text.get_window_extent(renderer) for text in axes.texts}
    (legend,) = figure.legends
    boxes[legend] = legend.get_window_extent(renderer)
    assert not boxes[legend].overlaps(axes.get_window_extent(renderer)), "outside of the data"
    assert len(boxes) > 15
    for a, b in itertools.combinations(boxes.values(), 2):
        assert not a.overlaps(b)
    frame = figure.bbox
    assert all(
        frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1) for box in boxes.values()
    )


def test_every_method_has_the_marker_and_color_of_the_registry():
    """Small markers are above large ones, so that none is hidden."""
    rows = made_up.rows()
    drawn = {row["method"] for row in rows} - {"wise_ft"}
    # All other rows of the registry, at other positions.
    first = rows[0]
    for number, method in enumerate(ROWS.keys() - drawn - {"wise_ft"}):
        rows.append({**first, "method": method, "id": 70 + number, "avg_shifts": 50.0})
    (axes,) = figures.id_against_shifts(rows).axes
    lines = {
        (round(float(x), 6), round(float(y), 6)): line
        for line in axes.lines
        if line.get_marker() not in (".", "None") and line.get_linestyle() == "None"
        for x, y in zip(*line.get_data(), strict=True)
    }
    summaries = [s for s in summarize(rows) if s.method != "wise_ft"]
    assert len(summaries) == len(ROWS) - 1 > 30
    for summary in summaries:
        style = ROWS[summary.method]
        if style.marker != ".":
            line = lines[round(summary.id.mean, 6), round(summary.avg_shifts.mean, 6)]
            assert (line.get_marker(), line.get_color()) == (style.marker, COLORS[style.color])
    sizes = sorted((line.get_markersize(), -line.get_zorder()) for line in lines.values())
    assert [order for _, order in sizes] == sorted(order for _, order in sizes)


def test_norms_are_logarithmic_if_the_head_changes_much_more():
    tensors = [f"image_tower.blocks.block_0{i}.mlp.fc1.kernel" for i in range(3)]
    for head, scale in ((0.02, "linear"), (0.2, "log")):
        rows = [{"name": name, "angles": [45.0], "rms": [0.01]} for name in tensors]
        rows.append({"name": "head.kernel", "angles": [10.0], "rms": [head]})
        panels = figures.angle_by_layer(rows).axes
        assert [axes.get_yscale() for axes in panels] == ["linear"] * 2 + [scale] * 2


def test_the_legend_of_layers_has_each_color_once():
    rows = figures.layer_rows([made_up.report(seed, 4) for seed in range(3)])
    figure = figures.angle_by_layer(rows)
    (legend,) = figure.legends
    entries = [(text.get_text(), handle.get_facecolor()) for text, handle in zip(
        legend.get_texts(), legend.get_patches(), strict=True)]  # fmt: skip
    assert len({name for name, _ in entries}) == len({color for _, color in entries})
    assert len(entries) == len(set(entries)) > 5
    drawn = {patch.get_facecolor() for axes in figure.axes[:2] for group in axes.containers
             for patch in getattr(group, "patches", ())}  # fmt: skip
    assert drawn == {color for _, color in entries}


def test_error_bars_only_over_several_seeds():
    def bars(figure):
        return sum(len(c.lines[2]) for c in figure.axes[0].containers)

    single, four = (figures.id_against_shifts(made_up.rows(seeds)) for seeds in ([0], range(4)))
    assert bars(single) == 0
    assert bars(four) == 2 * 5  # x and y of every method except zero-shot, which has no seed


def test_wise_ft_curve_connects_the_anchor_and_the_mean():
    rows = made_up.rows()
    figure = figures.id_against_shifts(rows)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    ends = {row["method"]: (row["id"], row["avg_shifts"]) for row in rows}
    points = list(zip(*lines["WiSE-FT of the uniform mean (α)"].get_data(), strict=True))
    assert (
        points[0] == ends["zero_shot"] and points[-1] == ends["uniform_mean"] and len(points) == 11
    )


def test_equal_rows_give_bitwise_identical_figures(tmp_path):
    for name in "ab":
        figures.id_against_shifts(made_up.rows(), tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_figure_without_a_curve_and_with_an_unknown_method():
    rows = [row for row in made_up.rows() if row["method"] != "wise_ft"]
    rows.append({**rows[-1], "method": "greedy soup"})
    rows.append({**rows[-1], "method": "model_stock", "unit": "filter"})
    shown = texts(figures.id_against_shifts(rows))
    assert "greedy soup" in shown and not any("filter" in text for text in shown)


@pytest.mark.parametrize("num_blocks", [4, 12])
def test_angle_by_layer(tmp_path, num_blocks):
    rows = figures.layer_rows([made_up.report(seed, num_blocks) for seed in range(3)])
    figure = figures.angle_by_layer(rows, tmp_path / "b.png", title="CLIP")
    assert (tmp_path / "b.png").stat().st_size > 10_000
    shown = texts(figure)
    for text in [
        "kernels",
        "biases and norms",
        "angle (degrees)",
        "attention",
        "MLP",
        "head",
        "norm scales",
        "CLIP",
        "in",
        "out",
        "0",
        "2",
    ]:
        assert text in shown, text
    assert any("key biases" in text for text in shown)
    kernels = [
        row
        for row in rows
        if not figures.kind(row["name"]) == "norms" and not row["name"].endswith("bias")
    ]
    heights = [patch.get_height() for patch in figure.axes[0].containers[0].patches]
    assert len(heights) == len(kernels)
    first = next(row for row in kernels if row["name"].endswith("class_embedding"))
    assert heights[0] == pytest.approx(np.mean(first["angles"]), rel=1e-12)  # float64 rounding


@pytest.mark.parametrize(("name", "kind", "color"), [
    ("image_tower.patch_embedding.kernel", "kernels", figures.LEFT["other kernels"]),
    ("image_tower.projection.kernel", "kernels", figures.LEFT["other kernels"]),
    ("image_tower.blocks.block_00.self_attn.q_proj.kernel", "kernels", figures.LEFT["attention"]),
    ("image_tower.blocks.block_00.self_attn.q_proj.bias", "biases", figures.RIGHT["biases"]),
    ("image_tower.blocks.block_00.mlp.fc1.kernel", "kernels", figures.LEFT["MLP"]),
    ("image_tower.blocks.block_00.layer_norm1.bias", "norms", figures.RIGHT["norm biases"]),
    ("image_tower.post_layernorm.scale", "norms", figures.RIGHT["norm scales"]),
    ("image_tower.blocks.block_00.shortcut_norm.scale", "norms", figures.RIGHT["norm scales"]),
    ("image_tower.blocks.block_00.grn.gamma", "norms", figures.RIGHT["norm scales"]),
    ("image_tower.blocks.block_00.grn.beta", "norms", figures.RIGHT["norm biases"]),
    ("image_tower.blocks.block_00.conv1.kernel", "kernels", figures.LEFT["convolutions"]),
    ("image_tower.stem.kernel", "kernels", figures.LEFT["other kernels"]),
    ("logit_bias", "biases", figures.RIGHT["biases"]),
    ("head.kernel", "head", figures.LEFT["head"]),
    ("head.bias", "head", figures.RIGHT["head"]),
])  # fmt: skip
def test_kind_and_color_by_name(name, kind, color):
    assert figures.kind(name) == kind
    row = {"name": name, "angles": [45.0], "rms": [1.0]}
    drawn = figures.angle_by_layer([row]).axes
    (bar,) = [patch for axes in drawn[:2] for group in axes.containers for patch in group.patches]
    assert to_hex(bar.get_facecolor()).upper() == color.upper()


def test_ratio_over_merges(tmp_path):
    histories = {"equation 3": made_up.history(), "carried (extension)": made_up.history(level=0.8)}
    figure = figures.ratio_over_merges(histories, tmp_path / "c.png", title="Ratios")
    shown = texts(figure)
    for text in [
        "equation 3",
        "carried (extension)",
        "kernels",
        "biases",
        "norms",
        "head",
        "epoch",
        "ratio t, median",
        "Ratios",
    ]:
        assert text in shown, text
    line = next(line for line in figure.axes[0].lines if line.get_label() == "kernels")
    assert line.get_ydata()[0] == 0.72 and (tmp_path / "c.png").exists()


def test_ratio_summary_leaves_out_units_without_an_angle():
    report = [{"name": "a.kernel", "cosine": 0.5, "ratio": r} for r in (0.5, 0.6, 0.9)]
    report += [
        {"name": "b.kernel", "cosine": None, "ratio": 0.0},
        {"name": "head.bias", "cosine": 0.9, "ratio": 0.95},
    ]
    summary = figures.ratio_summary(report)
    assert set(summary) == {"kernels", "head"}
    assert summary[
        "kernels"
    ] == pytest.approx(  # quartiles of three values: halfway between neighbors
        {"median": 0.6, "low": 0.55, "high": 0.75, "count": 3}, rel=1e-12
    )


def test_tensor_without_an_angle_has_norms():
    (row,) = figures.layer_rows([[{"name": "w", "angle": None, "norms": [2.0, 4.0], "size": 16}]])
    assert row == {"name": "w", "angles": [], "rms": [0.5, 1.0]}
