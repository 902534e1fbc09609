"""Tensors of up to 10^8 numbers: accuracy does not depend on size."""

from __future__ import annotations

import numpy as np
import pytest

from modelstock_jax.merging import model_stock
from tests.merging.reference import allowed

EXACT = 1e-6  # absolute, on cosine and ratio


def _large(shape, num=2):
    """Float32 replicas made in pieces, and float64 sums over pieces, for tensors of gigabytes."""
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
        part0, part = flat0[chunk].astype(np.float64), flat_w[:, chunk]
        target = ratio * part.mean(axis=0, dtype=np.float64) + (1 - ratio) * part0
        error = np.abs(merged[chunk] - target)
        assert (error <= allowed(part0, part, target)).all()


@pytest.mark.parametrize("shape", [(10**7,), (1, 9_999_991), (4882, 2048)])
def test_ten_million_numbers(shape):
    _check_large(shape)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(10**8,), (32000, 2048)])
def test_hundred_million_numbers(shape):
    # 32000 x 2048 is where a float32 norm on a CPU was seen 0.6 % off.
    _check_large(shape)
