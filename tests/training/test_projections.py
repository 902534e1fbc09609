"""Projections toward the pretrained parameters, compared with closed forms."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from modelstock_jax.errors import UserError
from modelstock_jax.training.projections import (
    MIN_RADIUS,
    fast_trainable_projection,
    layer_norms,
    project,
    trainable_projection,
)


def tree(seed):
    rng = np.random.default_rng(seed)
    return {
        "fc1": {"kernel": rng.standard_normal((3, 4)), "bias": rng.standard_normal(4)},
        "position_embedding": rng.standard_normal((5, 2)),
    }


def rows(name, delta):
    """Rows of a leaf: the weights of one output of a kernel, a row of an embedding, a vector."""
    if delta.ndim == 1:
        return delta[None]
    return delta.T if name.endswith("kernel") else delta


NAMES = ["fc1.bias", "fc1.kernel", "position_embedding"]


@pytest.mark.parametrize("norm", ["l2", "mars"])
def test_rows_outside_the_radius_are_projected_and_others_are_bitwise_unchanged(x64, norm):
    w, w0 = tree(0), tree(1)
    delta = jax.tree.map(np.subtract, w, w0)
    radii = {"fc1": {"kernel": 3.5, "bias": 1e9}, "position_embedding": 2.0}
    projected = jax.jit(project, static_argnums=3)(w, w0, radii, norm)
    np.testing.assert_array_equal(projected["fc1"]["bias"], w["fc1"]["bias"])
    outside = []
    for name, x, start, d, radius in zip(
        NAMES, *map(jax.tree.leaves, (projected, w0, delta, radii)), strict=True
    ):
        parts = [d] if norm == "l2" else rows(name, d)
        new_delta = np.asarray(x) - start
        new_parts = [new_delta] if norm == "l2" else rows(name, new_delta)
        for before, after in zip(parts, new_parts, strict=True):
            size = np.sqrt((before**2).sum()) if norm == "l2" else np.abs(before).sum()
            outside.append(size > radius)
            np.testing.assert_allclose(after, min(1.0, radius / size) * before, atol=1e-15)
    assert any(outside) and not all(outside)


def quadratic(best):
    return jax.grad(lambda w: sum(((w[n] - best[n]) ** 2).sum() / 2 for n in w))


def ftp_reference(w, w0, best, *, steps, rate, radius_rate, k):
    """Algorithm 1 with plain gradient descent and the L1 norms of rows, for kernels [in, out]."""
    b1, b2, eps = 0.9, 0.999, 1e-8
    radius, m, v, before = {n: MIN_RADIUS for n in w}, dict.fromkeys(w, 0.0), {}, {}
    v = dict.fromkeys(w, 0.0)
    for t in range(1, steps + 1):
        for n in w:
            gradient = w[n] - best[n]
            c = w[n] - rate * gradient - w0[n]
            sizes = np.abs(c).sum(0, keepdims=True)
            if t > 1:
                slope = (gradient * before[n]).sum()
                slope *= k if slope > 0 else 1.0
                m[n] = b1 * m[n] + (1 - b1) * slope
                v[n] = b2 * v[n] + (1 - b2) * slope**2
                step = m[n] / (1 - b1**t) / (np.sqrt(v[n] / (1 - b2**t)) + eps)
                radius[n] = np.clip(radius[n] - radius_rate * step, MIN_RADIUS, sizes.max())
            before[n] = c / sizes
            w[n] = w0[n] + np.minimum(1.0, radius[n] / sizes) * c
    return w, radius


def run_ftp(w, w0, best, *, steps, rate, radius_rate, k, norm="mars"):
    tx = fast_trainable_projection(optax.identity(), learning_rate=radius_rate, k=k, norm=norm)
    slope = quadratic(best)

    @jax.jit
    def train(w):
        def step(carry, _):
            w, state = carry
            updates, state = tx.update(
                slope(w), state, w, pretrained=w0, learning_rate=jnp.asarray(rate)
            )
            return (jax.tree.map(lambda x, u: x - rate * u, w, updates), state), None

        return jax.lax.scan(step, (w, tx.init(w)), length=steps)[0]

    w, state = train(jax.tree.map(jnp.asarray, w))
    return w, state.radius


@pytest.mark.parametrize("k", [1.0, 0.25])
def test_ftp_follows_its_algorithm_at_every_step(x64, k):
    rng = np.random.default_rng(3)
    w0 = {n: rng.standard_normal((3, 2)) for n in ("a_kernel", "b_kernel")}
    # One layer must move far; the other arrives early, so that its radius shrinks again.
    best = {"a_kernel": w0["a_kernel"] + 5.0, "b_kernel": w0["b_kernel"] + 0.01}
    settings = dict(steps=60, rate=0.3, radius_rate=0.02, k=k)
    expected, radius = ftp_reference({n: x.copy() for n, x in w0.items()}, w0, best, **settings)
    params, learned = run_ftp(w0, w0, best, **settings)
    for n in w0:
        # Rounding of 1e-16, over 60 steps whose radii divide by square roots of small slopes.
        np.testing.assert_allclose(params[n], expected[n], rtol=1e-9)
        np.testing.assert_allclose(learned[n], radius[n], rtol=1e-9)
    assert radius["a_kernel"] > 5 * radius["b_kernel"]


def test_ftp_learns_the_distance_of_the_best_parameters(x64):
    """On |w - best|^2 / 2 the radius converges to the distance of the best parameters."""
    w0 = {"w": np.zeros(2)}
    best = {"w": np.array([0.6, 0.8])}
    params, radius = run_ftp(w0, w0, best, steps=2000, rate=0.1, radius_rate=0.01, k=1.0, norm="l2")
    # The radius oscillates by 0.01 until Adam's first moment has decayed.
    np.testing.assert_allclose(params["w"], best["w"], atol=0.01)
    np.testing.assert_allclose(radius["w"], 1.0, atol=0.02)


def test_ftp_with_radius_zero_keeps_the_anchor_and_a_large_radius_changes_nothing():
    w0 = {"w": np.ones(2, np.float32)}
    best = {"w": np.array([9.0, -4.0], np.float32)}
    params, _ = run_ftp(w0, w0, best, steps=5, rate=0.1, radius_rate=0.0, k=1.0)
    # A radius of 1e-8 is below the rounding of weights of 1.
    np.testing.assert_allclose(params["w"], w0["w"], rtol=2e-7)

    tx = fast_trainable_projection(optax.identity(), norm="l2")
    w = {"w": jnp.array([3.0, 4.0])}
    state = tx.init(w)._replace(radius={"w": jnp.float32(1e9)}, count=jnp.int32(1))
    gradient = {"w": jnp.array([0.1, 0.7])}
    for rate in (0.1, 0.0):
        updates, _ = tx.update(gradient, state, w, pretrained=w0, learning_rate=jnp.float32(rate))
        np.testing.assert_array_equal(updates["w"], gradient["w"])


def test_tpgm_finds_the_radius_that_minimizes_the_held_out_loss(x64):
    """For |w - best|^2: best - w0 projected on the task vector, at most the full task vector."""
    w0 = {"near": np.array([1.0, 1.0]), "far": np.array([0.0, 2.0])}
    w = {"near": np.array([4.0, 5.0]), "far": np.array([3.0, 2.0])}
    # best - w0 = (3, 0) has length 1.8 along (3, 4) / 5; along (1, 0), 7 is beyond w.
    best = {"near": np.array([4.0, 1.0]), "far": np.array([7.0, 2.0])}

    def loss(params, batch):
        return sum(((params[n] - batch[n]) ** 2).sum() for n in params)

    projected, radii = trainable_projection(loss, w, w0, [best] * 600, learning_rate=0.02)
    # Adam's steps of 0.02 have decayed to less than a hundredth of that.
    np.testing.assert_allclose(radii["near"], 1.8, atol=1e-3)
    np.testing.assert_allclose(
        projected["near"], w0["near"] + 1.8 * np.array([0.6, 0.8]), atol=1e-3
    )
    np.testing.assert_allclose(radii["far"], 3.0)
    np.testing.assert_array_equal(projected["far"], w["far"])


def test_an_unknown_norm_or_a_value_out_of_range_is_an_error():
    with pytest.raises(UserError, match="projection.norm='l3'.*l2, mars"):
        layer_norms({}, "l3")
    with pytest.raises(UserError, match="projection.k .*2"):
        fast_trainable_projection(optax.identity(), k=2)
    with pytest.raises(UserError, match="projection.learning_rate .*-1"):
        fast_trainable_projection(optax.identity(), learning_rate=-1)
