"""Means on a sphere against the same means of complete vectors, in float64."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from modelstock_jax.errors import UserError
from modelstock_jax.merging import spherical


def vectors(number, angle, seed=0):
    """Vectors of different lengths, whose directions are about `angle` from their mean."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal(60)
    noise = rng.standard_normal((number, 60)) * np.tan(angle)
    return (common + noise) * rng.uniform(0.5, 2, (number, 1))


def gram(v):
    return (v @ v.T)[..., None]


def unit(v):
    return v / np.linalg.norm(v, axis=-1, keepdims=True)


@pytest.mark.parametrize("angle", [1e-4, 0.01, 0.5, 1.2])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (0.0, 2.0)])
def test_nuslerp_turns_in_the_plane_of_both(angle, weights):
    v = unit(vectors(2, angle))
    t = weights[1] / sum(weights)
    merged = spherical.nuslerp(gram(v), np.array(weights))[:, 0] @ v
    total = 2 * np.arcsin(np.linalg.norm(v[0] - v[1]) / 2)
    turned = 2 * np.arcsin(np.linalg.norm(v[0] - merged) / 2)
    # The angle from the product of two directions is precise to eps / angle.
    assert turned == pytest.approx(t * total, abs=4e-16 / angle)
    assert np.linalg.norm(merged) == pytest.approx(1)


def test_nuslerp_of_parallel_or_missing_vectors_is_linear():
    v = np.ones((2, 4)) * [[1.0], [3.0]]
    np.testing.assert_allclose(spherical.nuslerp(gram(v), np.ones(2))[:, 0], 0.5)
    v[1] = 0
    np.testing.assert_allclose(spherical.nuslerp(gram(v), np.ones(2))[:, 0], 0.5)


@pytest.mark.parametrize("number", [2, 3, 5])
def test_multislerp_is_the_mean_direction_times_the_mean_norm(number):
    v, weights = vectors(number, 0.7), np.arange(1.0, number + 1) / number
    mean = weights @ unit(v)
    expected = mean / np.linalg.norm(mean) * (weights @ np.linalg.norm(v, axis=1))
    merged = spherical.multislerp(gram(v), weights)[:, 0] @ v
    np.testing.assert_allclose(merged, expected, rtol=1e-12, atol=1e-14)


def test_multislerp_of_opposed_vectors():
    v = np.array([[1.0, 0], [-1, 0]])
    np.testing.assert_allclose(spherical.multislerp(gram(v), np.full(2, 0.5))[:, 0], 0.5)
    three = np.array([[1.0, 0], [-0.5, np.sqrt(0.75)], [-0.5, -np.sqrt(0.75)]])
    with pytest.raises(UserError, match="sum to zero"):
        spherical.multislerp(gram(three), np.full(3, 1 / 3))
    zeros = np.zeros((3, 2))
    np.testing.assert_array_equal(spherical.multislerp(gram(zeros), np.full(3, 1 / 3)), 0)


@pytest.mark.parametrize(("number", "angle"), [(2, 0.6), (3, 0.9), (4, 1e-3)])
def test_karcher_mean_minimizes_the_squared_angles(number, angle):
    v = vectors(number, angle)
    found = spherical.karcher_mean(gram(v), max_iter=50, tol=1e-12)[:, 0] @ v
    assert np.linalg.norm(found) == pytest.approx(np.linalg.norm(v, axis=1).mean(), rel=1e-9)

    def squared_angles(coefficients):
        direction = unit(coefficients @ unit(v))
        return (2 * np.arcsin(np.linalg.norm(unit(v) - direction, axis=1) / 2) ** 2).sum()

    start = np.linalg.lstsq(unit(v).T, unit(found), rcond=None)[0]
    best = minimize(squared_angles, start, tol=1e-15)
    assert squared_angles(start) == pytest.approx(best.fun, rel=1e-9)
    worse = start * (1 + 1e-2 * np.arange(number))
    assert squared_angles(worse) > squared_angles(start)


def test_karcher_mean_leaves_out_vectors_without_a_direction():
    v = np.vstack([vectors(2, 0.5), np.zeros(60)])
    found = spherical.karcher_mean(gram(v))[:, 0] @ v
    two = spherical.karcher_mean(gram(v[:2]))[:, 0] @ v[:2]
    np.testing.assert_allclose(unit(found), unit(two), rtol=1e-12)
    assert np.linalg.norm(found) == pytest.approx(np.linalg.norm(two) * 2 / 3)
    np.testing.assert_array_equal(spherical.karcher_mean(gram(np.zeros((2, 5)))), 0)


def test_units_are_independent():
    pairs = [vectors(2, angle, seed) for seed, angle in enumerate((1e-3, 0.3, 1.0))]
    grams = np.concatenate([gram(v) for v in pairs], axis=-1)
    for function in (
        lambda g: spherical.nuslerp(g, np.array([1.0, 2.0])),
        lambda g: spherical.multislerp(g, np.array([0.4, 0.6])),
        spherical.karcher_mean,
    ):
        separate = np.concatenate([function(gram(v)) for v in pairs], axis=-1)
        np.testing.assert_allclose(function(grams), separate, rtol=1e-12)
