"""Numbers of the paper that follow from its geometry alone."""

from __future__ import annotations

import math

import numpy as np
import pytest

from modelstock_jax.merging import geometry, model_stock, total_distance

# Table 1: distance from the mean of 50 fine-tuned models.
ONE, TABLE_1 = 13.133, {2: 9.192, 3: 7.439, 5: 5.633}
# Table 7: distances of the uniform mean and of Model Stock after training; rows N = 2, 3, '4'.
TABLE_7 = [(2, 9.19, 7.62), (3, 7.44, 6.49), (4, 5.63, 5.16)]


@pytest.mark.parametrize("num", TABLE_1)
def test_table_1_from_one_number(num):
    # 0.5 %: the paper's own spread is 0.3 % at N = 3; the pseudo-center holds the models averaged.
    assert geometry.mean_distance(ONE, num, 50) == pytest.approx(TABLE_1[num], rel=5e-3)
    assert geometry.mean_distance(ONE, num) == pytest.approx(ONE / math.sqrt(num))


def _cosine(num, mean, stock):
    """The cosine that puts mean and stock at these distances: 1/stock^2 = 1/mean^2 + 1/mu^2."""
    noise = num * mean**2
    signal = 1 / (1 / stock**2 - 1 / mean**2)
    return signal / (signal + noise)


def test_table_7_holds_one_cosine_only_if_its_last_row_is_of_five():
    cosines = [_cosine(n, mean, stock) for n, mean, stock in TABLE_7[:2]]
    five, four = (_cosine(n, *TABLE_7[2][1:]) for n in (5, 4))
    np.testing.assert_allclose([*cosines, five], [0.524, 0.515, 0.512], atol=1e-3)
    assert max(*cosines, five) - min(*cosines, five) < 0.015
    assert four - max(cosines) > 0.04
    # And the row's uniform mean is Table 1's of five models.
    assert TABLE_7[2][1] == pytest.approx(geometry.mean_distance(ONE, 5, 50), rel=5e-3)
    assert geometry.mean_distance(ONE, 4, 50) == pytest.approx(6.36, rel=5e-3)


def test_table_7_from_one_replica_and_one_cosine():
    for num, mean, stock in ((2, 9.19, 7.62), (3, 7.44, 6.49), (5, 5.63, 5.16)):
        noise = num * mean**2
        square = np.array(noise / (1 - 0.517))
        predicted = geometry.predicted_distances(
            square, 0.517 * square, np.array(0.517), num, geometry.ratio(np.array(0.517), num)
        )
        assert float(predicted.mean) == pytest.approx(mean, rel=1e-6)
        assert float(predicted.merged) == pytest.approx(stock, rel=5e-3)


def test_predictions_hold_for_models_about_a_known_center():
    # 40,000 numbers: norms and angles of random vectors are sharp to 1/sqrt(n) = 0.5 %.
    rng = np.random.default_rng(0)
    size, num = 40_000, 3
    mu = rng.standard_normal(size)
    w0 = np.zeros(size, np.float32)
    w = (mu + 0.9 * rng.standard_normal((num, size))).astype(np.float32)
    merged, stats = model_stock({"w": w0}, {"w": w})
    truth = [np.linalg.norm(x - mu) for x in (w[0], w.mean(axis=0), np.asarray(merged["w"]))]
    np.testing.assert_allclose(total_distance(stats), truth, rtol=0.02)
    assert truth[2] < truth[1] < truth[0]


def test_geometry_takes_numpy_and_jax_alike():
    rng = np.random.default_rng(0)
    d = rng.standard_normal((3, 7)) + 1
    gram = d @ d.T
    import jax.numpy as jnp

    cosine = geometry.cosine(gram)
    assert isinstance(cosine, np.ndarray | np.floating)
    both = geometry.cosine(jnp.asarray(gram))
    np.testing.assert_allclose(both, cosine, rtol=1e-6)
    np.testing.assert_allclose(geometry.ratio(both, 3), geometry.ratio(cosine, 3), rtol=1e-6)
    np.testing.assert_allclose(geometry.angle(both), geometry.angle(cosine), rtol=1e-6)
