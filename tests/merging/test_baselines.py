"""Merges at a fixed ratio, the weighted and the carried extension, and distances of models."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modelstock_jax.errors import UserError
from modelstock_jax.merging import (
    UnitOutcome,
    constant_ratio,
    cosines,
    distance,
    distances,
    init_noise,
    mean_model,
    model_stock,
    model_stock_carried,
    norms,
    outcome_counts,
    report,
    uniform_mean,
    weighted_model_stock,
    wise_ft,
)
from tests.merging.reference import equation_3
from tests.merging.trees import replicas

SHAPES = {"a": (30, 20), "b": (50,)}


def test_uniform_mean_and_wise_ft():
    w0, w = replicas(SHAPES, 4)
    mean, stats = uniform_mean(w0, w)
    for name in SHAPES:
        exact = w[name].astype(np.float64).mean(axis=0)
        np.testing.assert_array_equal(mean[name], exact.astype(np.float32))
        half, _ = wise_ft(w0, w, 0.25)
        np.testing.assert_allclose(half[name], 0.75 * w0[name] + 0.25 * exact, rtol=2e-7, atol=1e-8)
    assert outcome_counts(stats) == {"fixed_ratio": 2} and report(stats)[0]["ratio"] == 1.0
    assert float(stats.cosine["a"]) == float(model_stock(w0, w)[1].cosine["a"])


def test_wise_ft_of_one_model_ends_at_anchor_and_model():
    w0, w = replicas(SHAPES, 1)
    np.testing.assert_array_equal(wise_ft(w0, w, 0.0)[0]["a"], w0["a"])
    np.testing.assert_array_equal(wise_ft(w0, w, 1.0)[0]["a"], w["a"][0])
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match=r"\[0, 1\]"):
            wise_ft(w0, w, alpha)
    slope = jax.jit(jax.grad(lambda a: jnp.sum(wise_ft(w0, w, a)[0]["b"])))(0.5)
    np.testing.assert_allclose(slope, (w["b"][0] - w0["b"]).sum(), rtol=1e-5)


def test_constant_ratio_is_as_far_from_the_anchor_as_model_stock():
    w0, w = replicas(SHAPES, 2)
    w["b"] = w0["b"] + 3 * (w["b"] - w0["b"])
    constant, stats = constant_ratio(w0, w)
    far = float(distance(w0, model_stock(w0, w)[0]))
    assert float(distance(w0, constant)) == pytest.approx(far, rel=1e-6)
    assert float(stats.ratio["a"]) == float(stats.ratio["b"])
    jitted = jax.jit(constant_ratio)(w0, w)[0]
    np.testing.assert_allclose(jitted["a"], constant["a"], rtol=1e-6)
    fixed, _ = constant_ratio(w0, w, 0.5)
    np.testing.assert_array_equal(fixed["a"], wise_ft(w0, w, 0.5)[0]["a"])


def test_weighted_formula():
    w0, w = replicas(SHAPES, 3)
    w["a"][2] += 0.1 * np.random.default_rng(0).standard_normal((30, 20)).astype(np.float32)
    merged, stats = weighted_model_stock(w0, w)
    deltas = (w["a"].astype(np.float64) - w0["a"]).reshape(3, -1)
    gram = deltas @ deltas.T
    signal = gram[np.triu_indices(3, 1)].mean()
    inverse = 1 / (np.diag(gram) - signal)
    a = inverse / (1 / signal + inverse.sum())
    np.testing.assert_allclose(
        merged["a"].ravel(), w0["a"].ravel() + a @ deltas, rtol=2e-7, atol=1e-7
    )
    assert float(stats.ratio["a"]) == pytest.approx(a.sum(), abs=1e-6)
    assert stats.outcome["a"] == UnitOutcome.INTERPOLATED


def test_weighted_falls_back_to_equation_3_and_counts_it():
    # The first task vector is shorter than the common part, so its estimated noise is negative.
    w0 = {"w": np.zeros(3, np.float32), "v": np.zeros(3, np.float32)}
    unequal = np.array([[0.1, 0, 0], [2, 1, 0], [2, 0, 1]], np.float32)
    w = {"w": unequal, "v": np.eye(3, dtype=np.float32) + 1}
    merged, stats = weighted_model_stock(w0, w)
    plain, _ = model_stock(w0, w)
    np.testing.assert_array_equal(merged["w"], plain["w"])
    assert outcome_counts(stats) == {"fallback_to_eq3": 1, "interpolated": 1}
    assert float(stats.ratio["w"]) == pytest.approx(equation_3(w0["w"], unequal)[1], abs=1e-6)


def _energy(w0, w):
    """Return the noise energy in the mean, and the squared length of the mean, in float64."""
    d = (w.astype(np.float64) - w0).reshape(len(w), -1)
    gram = d @ d.T
    off = gram[np.triu_indices(len(w), 1)].mean()
    return (np.diag(gram).mean() - off) / len(w), (d.mean(axis=0) ** 2).sum()


def test_first_carried_merge_is_equation_3_of_the_mean_products():
    w0, w = replicas(SHAPES, 3)
    _, stats, noise = model_stock_carried(w0, w)
    d = (w["a"].astype(np.float64) - w0["a"]).reshape(3, -1)
    gram = d @ d.T
    cosine = gram[np.triu_indices(3, 1)].mean() / np.diag(gram).mean()
    t = 3 * cosine / (1 + 2 * cosine)
    assert float(stats.ratio["a"]) == pytest.approx(t, abs=1e-6)
    assert float(noise["a"]) == pytest.approx(t**2 * _energy(w0["a"], w["a"])[0], rel=1e-5)


def test_noise_is_carried_over_merges():
    w0, w = replicas(SHAPES, 2)
    noise, total, rng = None, 0.0, np.random.default_rng(0)
    step = jax.jit(model_stock_carried)
    noise = init_noise(w0)
    for _ in range(4):
        merged, stats, noise = step(w0, w, noise)
        added, square = _energy(w0["a"], w["a"])
        t = 1 - (total + added) / square
        total = t**2 * (total + added)
        assert float(stats.ratio["a"]) == pytest.approx(t, abs=2e-6)
        assert float(noise["a"]) == pytest.approx(total, rel=1e-4)
        plain = float(model_stock(w0, w)[1].ratio["a"])
        w = {
            k: (np.asarray(merged[k]) + 0.03 * rng.standard_normal((2, *v))).astype(np.float32)
            for k, v in SHAPES.items()
        }
    assert t < plain  # equation 3 uses only the noise of the last period


def test_shrinking_at_the_last_merge_only():
    w0, w = replicas(SHAPES, 2)
    merged, stats, noise = model_stock_carried(w0, w, shrink=False)
    np.testing.assert_array_equal(merged["a"], uniform_mean(w0, w)[0]["a"])
    added = _energy(w0["a"], w["a"])[0]
    assert float(noise["a"]) == pytest.approx(added, rel=1e-5)
    _, stats, _ = jax.jit(model_stock_carried)(w0, w, noise, shrink=True)
    square = _energy(w0["a"], w["a"])[1]
    assert float(stats.ratio["a"]) == pytest.approx(1 - 2 * added / square, abs=1e-6)


def test_carried_noise_above_the_update_gives_the_anchor():
    w0, w = replicas(SHAPES, 2)
    noise = jax.tree.map(lambda s: s + 1e6, init_noise(w0))
    merged, stats, noise = model_stock_carried(w0, w, noise)
    np.testing.assert_array_equal(merged["a"], w0["a"])
    assert outcome_counts(stats) == {"clamped": 2} and float(noise["a"]) == 0.0


@pytest.mark.parametrize("unit", ["filter", "global", "tensor"])
def test_noise_has_the_shape_of_the_unit(unit):
    w0, w = replicas({**SHAPES, "i": ()}, 2)
    w0["i"], w["i"] = np.int32(1), np.int32([1, 1])
    _, stats, noise = model_stock_carried(w0, w, None, unit=unit)
    shapes = jax.tree.map(np.shape, noise)
    assert shapes == jax.tree.map(np.shape, init_noise(w0, unit=unit))
    assert shapes == jax.tree.map(np.shape, stats.ratio)


def test_distances_angles_and_norms_of_models():
    w0, w = replicas(SHAPES, 3)
    flat0 = np.concatenate([w0[k].ravel() for k in SHAPES]).astype(np.float64)
    flat = np.concatenate([w[k].reshape(3, -1) for k in SHAPES], axis=1)
    np.testing.assert_allclose(distances(w0, w), np.linalg.norm(flat - flat0, axis=1), rtol=1e-6)
    center = mean_model(w)
    np.testing.assert_allclose(
        distances(center, w), np.linalg.norm(flat - flat.mean(axis=0), axis=1), rtol=1e-5
    )
    d = (w["a"] - w0["a"]).reshape(3, -1).astype(np.float64)
    np.testing.assert_allclose(norms(w0, w)["a"], np.linalg.norm(d, axis=1), rtol=1e-6)
    unit = d / np.linalg.norm(d, axis=1, keepdims=True)
    np.testing.assert_allclose(cosines(w0, w)["a"], unit @ unit.T, atol=1e-6)
    assert cosines(w0, w, unit="filter")["a"].shape == (3, 3, 20)
