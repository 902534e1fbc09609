"""Tensors of up to 10^8 elements: accuracy does not depend on size."""

from __future__ import annotations

import numpy as np
import pytest

from modelstock_jax.merging import model_stock
from tests.merging.reference import allowed

EXACT = 1e-6  # absolute, on cosine and ratio


def _large(shape, num=2):
    """Return an anchor and float32 replicas, computed one replica at a time to save memory."""
    rng = np.random.default_rng(0)
    w0 = rng.standard_normal(shape, dtype=np.float32)
    w = np.empty((num, *shape), np.float32)
    shared = rng.standard_normal(shape, dtype=np.float32)
    for replica in w:
        np.add(shared, rng.standard_normal(shape, dtype=np.float32), out=replica)
        replica *= np.float32(1e-3)
        replica += w0
    return w0, w


def _check_large(shape):
    w0, w = _large(shape)
    flat0, flat_w = w0.ravel(), w.reshape(2, -1)
    gram = np.zeros((2, 2))
    chunks = [slice(k, k + 2**20) for k in range(0, w0.size, 2**20)]
    for chunk in chunks:
        deltas = flat_w[:, chunk].astype(np.float64) - flat0[chunk]
        gram += deltas @ deltas.T
    cosine = gram[0, 1] / np.sqrt(gram[0, 0] * gram[1, 1])
    ratio = 2 * cosine / (1 + cosine)
    merged, stats = model_stock({"w": w0}, {"w": w})
    assert abs(float(stats.cosine["w"]) - cosine) < EXACT
    assert abs(float(stats.ratio["w"]) - ratio) < EXACT
    merged = np.asarray(merged["w"]).ravel()
    for chunk in chunks:
        anchor, tuned = flat0[chunk].astype(np.float64), flat_w[:, chunk]
        target = ratio * tuned.mean(axis=0, dtype=np.float64) + (1 - ratio) * anchor
        error = np.abs(merged[chunk] - target)
        assert (error <= allowed(anchor, tuned, target)).all()


@pytest.mark.parametrize("shape", [(10**7,), (1, 9_999_991), (4882, 2048)])
def test_ten_million_elements(shape):
    _check_large(shape)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(10**8,), (32000, 2048)])
def test_hundred_million_elements(shape):
    # At 32000 x 2048, a float32 norm on a CPU was off by 0.6 %.
    _check_large(shape)
