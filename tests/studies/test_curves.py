"""Comparisons at equal accuracy, on known curves."""

from __future__ import annotations

import numpy as np
import pytest

from studies.curves import Curve, best_shifts_at, curve_gap, jackknife, mean_curve, model_gap

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)


def rising(alpha):
    """ID rises to 90 at alpha = 0.8 and falls after it; shifts accuracy bends down, as usual."""
    return 90 - 22 * (alpha - 0.8) ** 2, 54 + 3 * alpha - 12 * alpha**2


def measured(law=rising, shift=0.0):
    return Curve([(a, law(a)[0], law(a)[1] + shift) for a in ALPHAS])


def test_the_spline_is_accurate_between_the_alphas():
    alphas = np.linspace(0.03, 0.79, 20)
    shifts = [measured().shifts_at(rising(a)[0]) for a in alphas]
    # A cubic spline is exact for these quadratic functions; its 401 points are joined by lines.
    np.testing.assert_allclose(shifts, rising(alphas)[1], atol=1e-3)
    # Lines between the measured alphas are up to a tenth of a point too low.
    x, y = np.array([rising(a) for a in (0.25, 0.5)]).T
    assert rising(0.375)[1] - np.interp(rising(0.375)[0], x, y) > 0.1


def test_an_accuracy_reached_twice_gives_the_better_shifts():
    curve = measured()
    assert rising(0.6)[0] == pytest.approx(rising(1.0)[0])
    assert curve.endpoint == rising(1.0)
    assert curve.shifts_at(curve.endpoint[0]) == pytest.approx(rising(0.6)[1], abs=1e-3)


def test_a_curve_has_no_value_outside_its_range():
    curve = measured()
    assert curve.shifts_at(90.01) is None and curve.shifts_at(rising(0)[0] - 0.01) is None
    better = Curve([(0.0, 75.92, 54.0), (0.5, 88.0, 54.0), (1.0, 92.0, 50.0)])
    assert model_gap(better.endpoint, [curve]) is None


def test_a_rival_has_its_best_strength():
    weak, strong = measured(shift=-1.0), measured(shift=0.5)
    assert best_shifts_at([weak, strong], 88.0) == strong.shifts_at(88.0)
    curve = measured(shift=2.0)
    rival = rising(0.6)[1] + 0.5  # Of the better curve, at the ID of alpha = 1.
    gap = model_gap(curve.endpoint, [weak, strong])
    assert gap == pytest.approx(curve.endpoint[1] - rival, abs=1e-3)


@pytest.mark.parametrize("shift", [-0.7, 0.0, 1.3])
def test_the_gap_of_shifted_curves_is_the_shift(shift):
    assert curve_gap([measured(shift=shift)], [measured()]) == pytest.approx(shift, abs=1e-9)


def test_curves_without_a_common_accuracy_have_no_gap():
    high = Curve([(0.0, 92.0, 50.0), (0.5, 93.0, 50.0), (1.0, 94.0, 50.0)])
    assert curve_gap([high], [measured()]) is None


def test_mean_curves_are_more_accurate_if_the_rival_bends():
    """Models on the rival's curve, near its highest ID, with noise in each seed's ID."""
    noise = np.random.default_rng(0).normal(0, 0.4, 400)
    points = [(rising(0.7)[0] + error, rising(0.7)[1]) for error in noise]
    rival = measured()
    gaps = [gap for gap in (model_gap(point, [rival]) for point in points) if gap is not None]
    assert abs(np.mean(gaps)) > 0.3 and len(gaps) < len(points)
    curves = [Curve([*rival.points[:-1], (1.0, *point)]) for point in points]
    assert model_gap(mean_curve(curves).endpoint, [rival]) == pytest.approx(0, abs=0.1)


def test_a_jackknife_of_means_is_their_standard_error():
    values = np.random.default_rng(1).normal(size=9)
    estimate = jackknife(lambda samples: float(np.mean(samples)), list(values))
    assert estimate.mean == pytest.approx(values.mean())
    assert estimate.error == pytest.approx(values.std(ddof=1) / 3)
    assert jackknife(lambda samples: None if len(samples) < 9 else 0.0, list(values)) is None
