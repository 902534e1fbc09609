"""Merges that only studies use, against direct float64 NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from modelstock_jax.merging import model_stock, outcome_counts
from studies.expressions import unclamped


@pytest.mark.parametrize("number", [2, 3])
def test_unclamped_equation_3_is_negative_above_90_degrees(number):
    rng = np.random.default_rng(number)
    w0 = {"kernel": rng.standard_normal((5, 40)).astype(np.float32)}
    w = {"kernel": w0["kernel"] + rng.standard_normal((number, 5, 40)).astype(np.float32)}
    d = np.float64(w["kernel"]) - np.float64(w0["kernel"])
    unit = d / np.linalg.norm(d, axis=1, keepdims=True)
    pairs = [(unit[i] * unit[j]).sum(0) for i in range(number) for j in range(i)]
    cosine = np.mean(pairs, axis=0)
    expected = number * cosine / (1 + (number - 1) * cosine)
    assert (expected < -0.1).sum() > 5 and (expected > 0.1).sum() > 5

    merged, stats = unclamped(w0, w, "filter")
    # Cosines and weights are float32, and the divisor 1 + (N - 1) cos is as small as 0.1.
    np.testing.assert_allclose(stats.ratio["kernel"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        merged["kernel"], w0["kernel"] + expected * d.mean(0), rtol=1e-6, atol=2e-6
    )
    clamped, stats = model_stock(w0, w, unit="filter")
    below = expected <= 0
    np.testing.assert_array_equal(clamped["kernel"][:, below], w0["kernel"][:, below])
    np.testing.assert_allclose(
        clamped["kernel"][:, ~below], merged["kernel"][:, ~below], rtol=1e-6, atol=1e-6
    )
    assert outcome_counts(stats)["clamped"] == below.sum()


def test_opposite_task_vectors_give_the_anchor():
    w0 = {"w": np.array([1.0, 2.0], np.float32)}
    w = {"w": w0["w"] + np.array([[1, 1], [-1, -1]], np.float32)}
    np.testing.assert_array_equal(unclamped(w0, w)[0]["w"], w0["w"])
