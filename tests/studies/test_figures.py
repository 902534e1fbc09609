"""Figures of the studies: markers of the methods, legends, axes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from modelstock_jax.registry import ROWS
from modelstock_jax.reporting.style import COLORS
from studies import figures
from studies.catalog import STUDIES
from studies.catalog.fig6_7 import triangle
from tests.studies.context import DrawnContext
from tests.studies.test_studies import SETUP, value

STYLES = {row: (style.marker, COLORS[style.color]) for row, style in ROWS.items()}
# Small dots are points of a curve, or measured points of a map.
DOT = (".", "None", "none", "")


@pytest.fixture(scope="module")
def context():
    return DrawnContext()


def markers(artists):
    """Return the (marker, color) of lines that are not dots; those of error bars are caps."""
    found = []
    for line in artists:
        marker = line.get_marker()
        if isinstance(marker, str) and marker not in (*DOT, "_", "|"):
            found.append((marker, line.get_color()))
    return found


@pytest.mark.parametrize(("name", "stem", "rows"), [
    ("fig1", "fig1", ["zero_shot", "single_model", "uniform_mean", "model_stock", "uniform_soup",
                      "greedy_soup"]),
    ("fig1", "fig1_cost", ["single_model", "uniform_mean", "model_stock", "uniform_soup",
                           "greedy_soup"]),
    ("fig3", "fig3", ["zero_shot", "single_model", "center"]),
    ("fig4", "fig4", ["single_model", "uniform_mean", "center"]),
    ("table1", "table1", ["single_model", "uniform_mean"]),
    ("fig6", "fig6", ["zero_shot", "single_model", "uniform_mean", "model_stock", "center"]),
    ("fig7", "fig7", ["zero_shot", "single_model", "uniform_mean", "periodic_model_stock"]),
    ("carried", "carried", ["zero_shot", "single_model", "uniform_mean", "model_stock",
                            "periodic_model_stock", "model_stock_carried",
                            "model_stock_carried_last"]),
    ("sentence_encoder", "sentence_encoder", ["zero_shot", "single_model", "uniform_mean",
                                              "model_stock", "constant_ratio"]),
])  # fmt: skip
def test_every_method_has_the_marker_and_color_of_the_registry(name, stem, rows, context, tmp_path):
    study = STUDIES[name]
    values = {key: value(m, context) for key, m in study.measurements(SETUP).items()}
    figure = study.summarize(SETUP, values).figures[stem](tmp_path / "figure.png")
    drawn = markers(line for axes in figure.axes for line in axes.lines)
    assert set(drawn) == {STYLES[row] for row in rows}
    (legend,) = figure.legends
    named = markers(legend.get_lines())
    assert sorted(named) == sorted(set(drawn)), "each marker is in the legend, once"
    assert len(rows) <= 7
    # The legend is outside of the data, and complete.
    box = legend.get_window_extent()
    assert not any(box.overlaps(axes.get_window_extent()) for axes in figure.axes)
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0


def test_the_number_of_models_has_integer_ticks():
    (axes,) = figures.distances({1: [4.0, 4.1], 2: [2.9], 5: [1.8]}, 4.0).axes
    assert list(axes.get_xticks()) == [1, 2, 5] and not len(axes.get_xticks(minor=True))


def test_the_center_is_above_the_merged_weights():
    """Seen from the side: the triangle w0, center, w12 has a right angle at the center."""
    shape = triangle(60.0, (1.0, 1.0))
    figure = figures.triangles({"a.kernel": shape})
    _, side = figure.axes
    positions = {
        row: np.ravel(line.get_data())
        for row, line in itertools.product(("center", "uniform_mean", "model_stock"), side.lines)
        if markers([line]) == [STYLES[row]]
    }
    center, mean = positions["center"], positions["uniform_mean"]
    assert center[0] == positions["model_stock"][0] == shape.merged and center[1] > 0.1
    assert abs(center @ (center - mean)) < 1e-12  # float64 rounding of lengths of about 1.
    # |w12 - center| = l sqrt((1 - cos) / 2) = 1/2: the predicted distance of a mean of two.
    assert np.linalg.norm(center - mean) == pytest.approx(0.5, rel=1e-12)  # float64 rounding.
    assert "μ" in {text.get_text() for text in side.texts}


def test_the_landscape_goes_through_its_points_and_ends_at_them(tmp_path):
    rng = np.random.default_rng(0)
    points = [(x, y, 5 + x * x + y * y + rng.uniform()) for x in range(-4, 5) for y in range(-3, 4)]
    *places, errors = np.array(points).T
    through = figures.interpolate(points, np.stack(places, axis=1))
    np.testing.assert_allclose(through, errors, rtol=1e-9)  # A linear system of 63 in float64.
    # Rows of points may be shifted against each other; the frame has no point outside of all rows.
    slanted = [(x - 0.1 * y, y, error) for x, y, error in points]
    marks = {"zero_shot": (-3.0, 0.0), "single_model": (3.0, 0.0), "center": (0.0, 1.0)}
    axes, *_ = figures.landscape(slanted, marks, tmp_path / "map.png").axes
    assert axes.get_xlim() == pytest.approx((-3.7, 3.7)) and axes.get_ylim() == (-3, 3)
