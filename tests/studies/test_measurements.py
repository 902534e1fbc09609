"""Geometry of drawn models, where the truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from studies.catalog.model_pool import groups, pool
from studies.expressions import Anchor, Between, Mean
from studies.measurements import Angles, Distance, Predicted, Projected, Shell
from tests.studies.bench import SPREAD, DrawnBench

BENCH = DrawnBench()
RADIUS = SPREAD * np.sqrt(BENCH.size)
# Numbers of a model: 3,250. Its distance varies by 1.2 %, a cosine of two such vectors by 0.018.


def test_distances_to_a_held_out_center():
    models = pool(range(8))
    mine, others = models[:8], models[8:]
    found = Shell(mine, others).measure(BENCH)
    assert np.mean(found["distance"]) == pytest.approx(RADIUS, rel=0.015)
    # The held-out center is 1/sqrt(8) of the radius away from the true one: uncorrected, the
    # cosines between models would be 1 / 9 and the distances 6 % too large.
    assert np.abs(np.mean(found["between"])) < 0.015
    assert np.abs(found["to_anchor"]).max() < 0.06
    for size in (2, 4):
        means = tuple(Mean(group) for group in groups(mine, size))
        at = Shell(means, others).measure(BENCH)["distance"]
        assert np.mean(at) == pytest.approx(RADIUS / np.sqrt(size), rel=0.04)


def test_predicted_distances_are_those_measured():
    team = pool(range(1))
    predicted = Predicted(team).measure(BENCH)
    assert predicted["replica"] == pytest.approx(RADIUS, rel=0.05)
    assert predicted["mean"] == pytest.approx(RADIUS / np.sqrt(2), rel=0.05)


def test_angles_and_distances():
    models = pool(range(2))
    found = Angles(models).measure(BENCH)
    row = found["head.kernel"]
    assert row["size"] == 1500 and len(row["angles"]) == 6 and len(row["norms"]) == 4
    # Task vectors share unit signal and have SPREAD of noise: cos = 1 / (1 + SPREAD^2) = 0.8.
    assert np.cos(np.radians(row["angles"])).mean() == pytest.approx(0.8, abs=0.03)
    total = np.sqrt(sum(row["norms"][1] ** 2 for row in found.values()))
    assert Distance(models[1]).measure(BENCH) == pytest.approx(total, rel=1e-5)
    assert Distance(Anchor()).measure(BENCH) == 0


def test_places_on_a_plane():
    one, two, end = *pool(range(1)), Mean(pool(range(2)))
    found = np.array(
        Projected((Anchor(), end, Between(end, 0.5), one, two), end, (one, two)).measure(BENCH)
    )
    away = Distance(end).measure(BENCH)
    # Sums of 3,250 float64 products of float32 weights.
    np.testing.assert_allclose(found[:3], [[0, 0], [away, 0], [away / 2, 0]], atol=1e-4 * away)
    apart = found[3] - found[4]
    assert np.hypot(*apart) == pytest.approx(Distance(one, two).measure(BENCH), rel=1e-5)
    assert apart[1] > 0
