"""Planes, random points and shells, compared with plain linear algebra."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modelstock_jax.errors import UserError
from modelstock_jax.merging import (
    mean_distance,
    mean_model,
    norms,
    num_averaged,
    plane_coordinates,
    plane_point,
    plane_through,
    random_point,
    shell,
    stack_replicas,
    thin_shell,
    true_distance,
)
from tests.merging.trees import replicas

SHAPES = {"a": (8, 8)}


def flat(tree, lead=1):
    return np.concatenate(
        [np.asarray(tree[k], np.float64).reshape(*tree[k].shape[:lead], -1) for k in SHAPES],
        axis=-1,
    )


def test_plane_through_three_models():
    w0, w = replicas(SHAPES, 3)
    a, b, off = ({k: v[i] for k, v in w.items()} for i in range(3))
    plane = plane_through(w0, a, b)
    coordinates = np.asarray(plane_coordinates(plane, stack_replicas([w0, a, b, off])))
    d = flat(w) - flat(w0, 0)
    x_axis = d[0] / np.linalg.norm(d[0])
    y_axis = d[1] - (d[1] @ x_axis) * x_axis
    y_axis /= np.linalg.norm(y_axis)
    expected = np.stack([[0, 0], *(np.array([v @ x_axis, v @ y_axis]) for v in d)])
    # float32 products of values of order 1.
    np.testing.assert_allclose(coordinates, expected, atol=1e-6)
    grid = jax.jit(jax.vmap(lambda x, y: plane_point(plane, x, y)))(
        coordinates[:3, 0], coordinates[:3, 1]
    )
    for k in SHAPES:
        np.testing.assert_allclose(grid[k], np.stack([w0[k], a[k], b[k]]), atol=1e-6)


def test_collinear_models_define_no_plane():
    w0, w = replicas(SHAPES, 2)
    a = {k: v[0] for k, v in w.items()}
    half = {k: ((a[k] + w0[k]) / 2).astype(np.float32) for k in a}
    for first, second in ((a, half), (a, a), (a, w0), (w0, a)):
        with pytest.raises(UserError, match="plane"):
            plane_through(w0, first, second)


def test_random_points_have_the_given_distances():
    w0, w = replicas(SHAPES, 3)
    center = mean_model(w)
    expected = jax.tree.map(lambda d: jnp.mean(d, axis=0), norms(center, w, unit="filter"))
    points = [random_point(jax.random.key(k), center, expected, unit="filter") for k in (0, 1, 0)]
    found = norms(center, stack_replicas(points), unit="filter")["a"]
    # Weights of order 1, rounded to float32, and updates of 0.1.
    np.testing.assert_allclose(found, np.stack([expected["a"]] * 3), rtol=1e-5)
    d = [np.asarray(p["a"] - center["a"]).ravel() for p in points]
    assert abs(d[0] @ d[1]) < 0.5 * np.linalg.norm(d[0]) * np.linalg.norm(d[1])
    np.testing.assert_array_equal(d[0], d[2])


def held_out(d):
    """Compute the shell by loops; every estimate leaves out the models that it is about."""
    count = len(d)
    gram = d @ d.T

    def mu_dot(i, left_out):
        return np.mean([gram[i, j] for j in range(count) if j not in left_out])

    def mu_square(left_out):
        others = [j for j in range(count) if j not in left_out]
        return np.mean([gram[j, k] for j in others for k in others if j != k])

    radius = [np.sqrt(gram[i, i] - 2 * mu_dot(i, {i}) + mu_square({i})) for i in range(count)]
    length = np.sqrt(mu_square(set()))
    anchor = [(mu_square({i}) - mu_dot(i, {i})) / radius[i] / length for i in range(count)]
    pairs = np.ones((count, count))
    for i in range(count):
        for j in range(count):
            if i != j:
                inner = gram[i, j] - mu_dot(i, {i, j}) - mu_dot(j, {i, j}) + mu_square({i, j})
                pairs[i, j] = inner / radius[i] / radius[j]
    return radius, anchor, pairs, length


def test_shell_uses_the_other_models_as_center():
    w0, w = replicas(SHAPES, 6)
    for found, expected in zip(thin_shell(w0, w), held_out(flat(w) - flat(w0, 0)), strict=True):
        # float32 products, and sums of many of them that nearly cancel.
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)
    tree = thin_shell(w0, w, unit="filter")
    assert tree["a"].radius.shape == (6, 8) and tree["a"].pair_cosine.shape == (6, 6, 8)
    d = (w["a"].astype(np.float64) - w0["a"])[:, :, 3]
    np.testing.assert_allclose(tree["a"].radius[:, 3], held_out(d)[0], rtol=1e-5)


def test_shell_is_unbiased_unlike_the_sample_mean():
    rng = np.random.default_rng(0)
    mu, noise = rng.standard_normal(20_000), rng.standard_normal((5, 20_000))
    d = mu + noise
    truth = np.linalg.norm(noise, axis=1)
    found = shell(d @ d.T)
    # 20,000 elements: 1 / sqrt(20000) = 0.7 %.
    np.testing.assert_allclose(found.radius, truth, rtol=0.015)
    np.testing.assert_allclose(found.center, np.linalg.norm(mu), rtol=0.02)
    assert abs(found.anchor_cosine).max() < 0.03
    assert abs(found.pair_cosine - np.eye(5)).max() < 0.04
    biased = np.linalg.norm(d - d.mean(axis=0), axis=1)
    assert (biased < 0.91 * truth).all()
    np.testing.assert_allclose(true_distance(biased, 1, 5), truth, rtol=0.015)
    other = mu + rng.standard_normal(20_000)
    measured = np.linalg.norm(other - d.mean(axis=0))
    assert true_distance(measured, 1, 5, included=False) == pytest.approx(np.sqrt(20_000), rel=0.02)
    with pytest.raises(UserError, match="4 models.* 3"):
        shell(np.eye(3))
    with pytest.raises(UserError, match="5 of 5 models"):
        true_distance(1.0, 5, 5)


def test_wrong_rows_of_a_table_are_found():
    # Tables 1 and 7: N from a distance alone; the pseudo-center includes the averaged models.
    for stated, distance, actual in [(2, 9.19, 2), (3, 7.44, 3), (5, 5.633, 5), (4, 5.63, 5)]:
        implied = num_averaged(13.133, distance, 50)
        assert implied == pytest.approx(actual, abs=0.03)
        assert (abs(implied - stated) > 0.5) == (stated == 4)
    assert num_averaged(7.0, mean_distance(7.0, 6)) == pytest.approx(6)
