"""Merged weights are the float64 result, rounded once: coefficients keep more than float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modelstock_jax.merging import model_stock, slerp, task_arithmetic, ties, uniform_mean, wise_ft
from tests.merging import reference
from tests.merging.trees import replicas

SHAPES = {"kernel": (64, 96), "bias": (96,)}


def _exact(anchor, deltas, coefficients):
    """Return w0 + sum_i a_i d_i in float64."""
    return anchor.astype(np.float64) + np.tensordot(coefficients, deltas, 1)


def _assert_rounded_once(merged, exact):
    """The error is at most half an ulp. 1e-6 of it, because many exact results are close to ties:
    means of float32 numbers of one exponent often end halfway between two of them.
    """
    merged = np.asarray(merged)
    assert merged.dtype == np.float32
    half_ulp = np.maximum(np.spacing(np.abs(merged)), np.spacing(np.abs(np.float32(exact)))) / 2
    np.testing.assert_array_less(np.abs(merged - exact), half_ulp * (1 + 1e-6))


def _deltas(w0, w):
    return w.astype(np.float64) - w0.astype(np.float64)


@pytest.mark.parametrize("num", [2, 3, 5, 7])
@pytest.mark.parametrize("jitted", [False, True])
def test_the_mean_of_equal_replicas_is_the_replica(num, jitted):
    w0, w = replicas(SHAPES, 1)
    equal = jax.tree.map(lambda x: np.repeat(x, num, axis=0), w)
    for merge in (uniform_mean, model_stock):
        merged, _ = (jax.jit(merge) if jitted else merge)(w0, equal)
        for name in SHAPES:
            np.testing.assert_array_equal(merged[name], w[name][0], merge.__name__)


MERGES = {
    "uniform_mean": (uniform_mean, lambda n: np.full(n, 1 / n)),
    "wise_ft": (lambda w0, w: wise_ft(w0, w, 0.7), lambda n: np.full(n, 0.7 / n)),
    "task_arithmetic": (lambda w0, w: task_arithmetic(w0, w, 0.7), lambda n: np.full(n, 0.7)),
    "one scale each": (
        lambda w0, w: task_arithmetic(w0, w, (0.7, -0.1, 0.3)),
        lambda n: np.array([0.7, -0.1, 0.3]),
    ),
}


@pytest.mark.parametrize("name", MERGES)
@pytest.mark.parametrize("jitted", [False, True])
def test_given_coefficients(name, jitted):
    merge, coefficients = MERGES[name]
    w0, w = replicas(SHAPES, 3)
    merged, _ = (jax.jit(merge) if jitted else merge)(w0, w)
    for key in SHAPES:
        exact = _exact(w0[key], _deltas(w0[key], w[key]), coefficients(3))
        _assert_rounded_once(merged[key], exact)


@pytest.mark.parametrize("jitted", [False, True])
def test_ties_scale_is_a_float64(jitted):
    w0, w = replicas(SHAPES, 2)
    merge = lambda w0, w: ties(w0, w, 0.3, scale=0.7, unit="tensor")  # noqa: E731
    merged, _ = (jax.jit(merge) if jitted else merge)(w0, w)
    for key in SHAPES:
        keep = np.full(2, round(0.3 * w0[key].size))
        exact = reference.ties(w0[key].ravel(), w[key].reshape(2, -1), keep, 0.7)
        _assert_rounded_once(np.ravel(merged[key]), exact)


@pytest.mark.parametrize("jitted", [False, True])
def test_measured_coefficients(jitted):
    """The ratio follows from Gram matrices in float32; the weights follow from it in float64."""
    w0, w = replicas(SHAPES, 2)
    merged, _ = (jax.jit(model_stock) if jitted else model_stock)(w0, w)
    on_arc, _ = (jax.jit(slerp) if jitted else slerp)(w0, w)
    for key in SHAPES:
        deltas = _deltas(w0[key], w[key])
        flat = deltas.reshape(2, -1)
        gram = np.float32(flat @ flat.T).astype(np.float64)
        cosine = gram[0, 1] / np.sqrt(gram[0, 0]) / np.sqrt(gram[1, 1])
        ratio = 2 * cosine / (1 + cosine)
        _assert_rounded_once(merged[key], _exact(w0[key], deltas, np.full(2, ratio / 2)))
        omega = np.arccos(cosine)
        factor = np.sin(omega / 2) / np.sin(omega)
        _assert_rounded_once(on_arc[key], _exact(w0[key], deltas, np.full(2, factor)))


def test_a_traced_coefficient_is_what_was_passed():
    w0, w = replicas(SHAPES, 2)
    merged, _ = jax.jit(wise_ft)(w0, w, jnp.float32(0.7))
    half = np.float64(np.float32(0.7)) / 2
    for key in SHAPES:
        _assert_rounded_once(
            merged[key], _exact(w0[key], _deltas(w0[key], w[key]), np.full(2, half))
        )
