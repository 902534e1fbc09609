"""Models at equal accuracy, on curves whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from studies.curves import Curve, best_at, curve_above, jackknife, mean_curve, own_above

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)


def rising(alpha):
    """ID rises to 90 at alpha = 0.8 and falls after it; shifts bend down: a usual curve."""
    return 90 - 22 * (alpha - 0.8) ** 2, 54 + 3 * alpha - 12 * alpha**2


def measured(law=rising, shift=0.0):
    return Curve([(a, law(a)[0], law(a)[1] + shift) for a in ALPHAS])


def test_between_the_alphas_the_curve_is_met():
    alphas = np.linspace(0.03, 0.79, 20)
    found = [measured().at(rising(a)[0]) for a in alphas]
    # The laws are quadratic and so is a spline through them; 401 points of it are joined by lines.
    np.testing.assert_allclose(found, rising(alphas)[1], atol=1e-3)
    # What lines between the measured alphas would say: up to a tenth of a point too little.
    x, y = np.array([rising(a) for a in (0.25, 0.5)]).T
    assert rising(0.375)[1] - np.interp(rising(0.375)[0], x, y) > 0.1


def test_an_accuracy_that_is_met_twice_gives_the_better():
    curve = measured()
    assert rising(0.6)[0] == pytest.approx(rising(1.0)[0])
    assert curve.own == rising(1.0)
    assert curve.at(curve.own[0]) == pytest.approx(rising(0.6)[1], abs=1e-3)


def test_outside_its_range_a_curve_says_nothing():
    curve = measured()
    assert curve.at(90.01) is None and curve.at(rising(0)[0] - 0.01) is None
    better = Curve([(0.0, 75.92, 54.0), (0.5, 88.0, 54.0), (1.0, 92.0, 50.0)])
    assert own_above(better.own, [curve]) is None


def test_a_rival_stands_at_its_best_strength():
    weak, strong = measured(shift=-1.0), measured(shift=0.5)
    assert best_at([weak, strong], 88.0) == strong.at(88.0)
    one = measured(shift=2.0)
    own = rising(0.6)[1] + 0.5  # Of the better curve, where it has the ID of alpha = 1.
    assert own_above(one.own, [weak, strong]) == pytest.approx(one.own[1] - own, abs=1e-3)


@pytest.mark.parametrize("shift", [-0.7, 0.0, 1.3])
def test_curves_that_lie_apart(shift):
    assert curve_above([measured(shift=shift)], [measured()]) == pytest.approx(shift, abs=1e-9)


def test_curves_that_share_no_accuracy():
    high = Curve([(0.0, 92.0, 50.0), (0.5, 93.0, 50.0), (1.0, 94.0, 50.0)])
    assert curve_above([high], [measured()]) is None


def test_where_a_rival_bends_mean_curves_are_nearer_to_the_truth():
    """A model on the rival's own curve, near its highest ID; a seed's noise is in the model's."""
    noise = np.random.default_rng(0).normal(0, 0.4, 400)
    models = [(rising(0.7)[0] + one, rising(0.7)[1]) for one in noise]
    rival = measured()
    apart = [gap for gap in (own_above(one, [rival]) for one in models) if gap is not None]
    assert abs(np.mean(apart)) > 0.3 and len(apart) < len(models)
    curves = [Curve([*rival.points[:-1], (1.0, *one)]) for one in models]
    assert own_above(mean_curve(curves).own, [rival]) == pytest.approx(0, abs=0.1)


def test_a_jackknife_of_means_is_their_standard_error():
    values = np.random.default_rng(1).normal(size=9)
    found = jackknife(lambda some: float(np.mean(some)), list(values))
    assert found.mean == pytest.approx(values.mean())
    assert found.error == pytest.approx(values.std(ddof=1) / 3)
    assert jackknife(lambda some: None if len(some) < 9 else 0.0, list(values)) is None
