"""Derivatives of the merge: finite everywhere, and correct where it is smooth."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modelstock_jax.merging import (
    model_stock,
    model_stock_carried,
    weighted_model_stock,
    wise_ft,
)
from tests.merging.trees import replicas

SHAPES = {"kernel": (4, 3), "bias": (3,), "scale": ()}
MERGES = {
    "tensor": lambda w0, w: model_stock(w0, w),
    "filter": lambda w0, w: model_stock(w0, w, unit="filter"),
    "weighted": lambda w0, w: weighted_model_stock(w0, w),
    "carried": lambda w0, w: model_stock_carried(w0, w)[:2],
    "wise_ft": lambda w0, w: wise_ft(w0, w, 0.3),
}


def _loss(merge):
    def loss(w0, w):
        merged, stats = merge(w0, w)
        weights = jax.tree.map(lambda x: jnp.sin(1.0 + jnp.arange(x.size, dtype=x.dtype)), merged)
        weighted = jax.tree.map(lambda x, a: jnp.sum(x.ravel() * a), merged, weights)
        measures = [jnp.sum(x) for x in jax.tree.leaves((stats.ratio, stats.predicted_distance))]
        return sum(jax.tree.leaves(weighted)) + 0.1 * sum(measures)

    return loss


@pytest.mark.parametrize("name", MERGES)
def test_gradients_against_finite_differences(name, x64):
    w0, w = replicas(SHAPES, 3, dtype=np.float64, size=0.5, cosine=0.8)
    both = jax.jit(jax.value_and_grad(_loss(MERGES[name]), (0, 1)))
    loss, gradient = lambda *x: both(*x)[0], both(w0, w)[1]  # compiled once
    for seed in range(3):
        rng = np.random.default_rng(seed)
        direction = jax.tree.map(lambda x, rng=rng: rng.standard_normal(x.shape), (w0, w))
        h = 1e-5
        ahead = loss(*jax.tree.map(lambda x, d, h=h: x + h * d, (w0, w), direction))
        behind = loss(*jax.tree.map(lambda x, d, h=h: x - h * d, (w0, w), direction))
        slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: jnp.sum(g * d), gradient, direction)))
        # Central differences: h^2 = 1e-10 of the third derivative, 1e-16 / h = 1e-11 of rounding.
        np.testing.assert_allclose(slope, (ahead - behind) / (2 * h), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["tensor", "weighted", "carried"])
def test_gradients_are_finite_in_degenerate_units(name):
    # One tensor, and one unit, per degenerate case.
    cases = ("frozen", "one changed", "opposed", "equal", "not finite", "bad anchor", "huge")
    w0, w = replicas({case: (4, 3) for case in cases}, 3, size=0.5)
    w["frozen"][:] = w0["frozen"]
    w["one changed"][1:] = w0["one changed"]
    w["opposed"][1] = 2 * w0["opposed"] - w["opposed"][0]
    w["opposed"][2] = w0["opposed"]
    w["equal"][:] = w["equal"][0]
    w["not finite"][1, 0, 0] = np.inf
    w0["bad anchor"][2, 1] = np.nan
    w["huge"] *= 1e30
    merged = jax.jit(lambda a, b: MERGES[name](a, b)[0])(w0, w)
    gradient = jax.jit(jax.grad(_loss(MERGES[name]), (0, 1)))(w0, w)
    for case in cases:
        for side in gradient:
            assert np.isfinite(side[case]).all(), case
        if case != "bad anchor":
            assert np.isfinite(merged[case]).all(), case
    if name == "tensor":
        assert not np.asarray(gradient[0]["one changed"]).any()  # the replica's weights, not w0's


def test_forward_mode_and_vmap_agree_with_reverse():
    w0, w = replicas({"kernel": (4, 3)}, 2, size=0.5)
    loss = _loss(MERGES["tensor"])
    forward = jax.jit(jax.jacfwd(loss, 1))(w0, w)["kernel"]
    np.testing.assert_allclose(
        forward, jax.jit(jax.grad(loss, 1))(w0, w)["kernel"], rtol=1e-4, atol=1e-5
    )  # float32 derivatives in two orders of summation
    scaled = jax.tree.map(lambda x: np.stack([x, 2 * x]), (w0, w))
    both = jax.vmap(lambda a, b: model_stock(a, b)[0]["kernel"])(*scaled)
    np.testing.assert_allclose(both[0], model_stock(w0, w)[0]["kernel"], rtol=2e-7)
    np.testing.assert_allclose(both[1], 2 * both[0], rtol=2e-7)
