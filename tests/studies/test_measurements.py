"""Geometry of random models with known parameters."""

from __future__ import annotations

import numpy as np
import pytest

from studies.catalog.model_pool import groups, pool
from studies.expressions import Anchor, Between, Mean
from studies.measurements import Angles, Distance, Predicted, Projected, Shell
from tests.studies.context import SPREAD, DrawnContext

CONTEXT = DrawnContext()
RADIUS = SPREAD * np.sqrt(CONTEXT.size)
# A model has 3,250 elements. Its distance varies by 1.2 %, a cosine of two models by 0.018.


def test_distances_to_a_held_out_center():
    models = pool(range(8))
    measured, others = models[:8], models[8:]
    shell = Shell(measured, others).measure(CONTEXT)
    assert np.mean(shell["distance"]) == pytest.approx(RADIUS, rel=0.015)
    # The distance of the held-out center to the true one is 1/sqrt(8) of the radius. Uncorrected,
    # the cosines between models would be 1 / 9 and the distances 6 % too large.
    assert np.abs(np.mean(shell["between"])) < 0.015
    assert np.abs(shell["to_anchor"]).max() < 0.06
    for size in (2, 4):
        means = tuple(Mean(group) for group in groups(measured, size))
        distances = Shell(means, others).measure(CONTEXT)["distance"]
        assert np.mean(distances) == pytest.approx(RADIUS / np.sqrt(size), rel=0.04)


def test_predicted_distances_equal_the_known_ones():
    team = pool(range(1))
    predicted = Predicted(team).measure(CONTEXT)
    assert predicted["replica"] == pytest.approx(RADIUS, rel=0.05)
    assert predicted["mean"] == pytest.approx(RADIUS / np.sqrt(2), rel=0.05)


def test_angles_and_distances():
    models = pool(range(2))
    angles = Angles(models).measure(CONTEXT)
    row = angles["head.kernel"]
    assert row["size"] == 1500 and len(row["angles"]) == 6 and len(row["norms"]) == 4
    # The common signal of task vectors has unit variance, the noise SPREAD^2:
    # cos = 1 / (1 + SPREAD^2) = 0.8.
    assert np.cos(np.radians(row["angles"])).mean() == pytest.approx(0.8, abs=0.03)
    total = np.sqrt(sum(row["norms"][1] ** 2 for row in angles.values()))
    assert Distance(models[1]).measure(CONTEXT) == pytest.approx(total, rel=1e-5)
    assert Distance(Anchor()).measure(CONTEXT) == 0


def test_coordinates_on_a_plane():
    first, second, end = *pool(range(1)), Mean(pool(range(2)))
    models = (Anchor(), end, Between(end, 0.5), first, second)
    points = np.array(Projected(models, end, (first, second)).measure(CONTEXT))
    length = Distance(end).measure(CONTEXT)
    # Sums of 3,250 float64 products of float32 weights.
    np.testing.assert_allclose(
        points[:3], [[0, 0], [length, 0], [length / 2, 0]], atol=1e-4 * length
    )
    apart = points[3] - points[4]
    assert np.hypot(*apart) == pytest.approx(Distance(first, second).measure(CONTEXT), rel=1e-5)
    assert apart[1] > 0
