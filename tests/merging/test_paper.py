"""Values of the paper that follow from its geometry alone."""

from __future__ import annotations

import math

import numpy as np
import pytest

from modelstock_jax.merging import geometry, model_stock, total_distance

# Table 1: distance from the mean of 50 fine-tuned models.
SINGLE, TABLE_1 = 13.133, {2: 9.192, 3: 7.439, 5: 5.633}
# Table 7: distances of the uniform mean and of Model Stock after training; rows N = 2, 3, '4'.
TABLE_7 = [(2, 9.19, 7.62), (3, 7.44, 6.49), (4, 5.63, 5.16)]


@pytest.mark.parametrize("num", TABLE_1)
def test_table_1_from_one_distance(num):
    # 0.5 %: the paper's values vary by 0.3 % at N = 3. The pseudo-center includes these models.
    assert geometry.mean_distance(SINGLE, num, 50) == pytest.approx(TABLE_1[num], rel=5e-3)
    assert geometry.mean_distance(SINGLE, num) == pytest.approx(SINGLE / math.sqrt(num))


def _cosine(num, mean, stock):
    """Return the cosine for these distances of mean and stock: 1/stock^2 = 1/mean^2 + 1/mu^2."""
    noise = num * mean**2
    signal = 1 / (1 / stock**2 - 1 / mean**2)
    return signal / (signal + noise)


def test_table_7_has_one_cosine_only_if_its_last_row_is_of_five():
    cosines = [_cosine(n, mean, stock) for n, mean, stock in TABLE_7[:2]]
    five, four = (_cosine(n, *TABLE_7[2][1:]) for n in (5, 4))
    np.testing.assert_allclose([*cosines, five], [0.524, 0.515, 0.512], atol=1e-3)
    assert max(*cosines, five) - min(*cosines, five) < 0.015
    assert four - max(cosines) > 0.04
    # The uniform mean of this row equals that of five models in Table 1.
    assert TABLE_7[2][1] == pytest.approx(geometry.mean_distance(SINGLE, 5, 50), rel=5e-3)
    assert geometry.mean_distance(SINGLE, 4, 50) == pytest.approx(6.36, rel=5e-3)


def test_table_7_from_one_replica_and_one_cosine():
    for num, mean, stock in ((2, 9.19, 7.62), (3, 7.44, 6.49), (5, 5.63, 5.16)):
        noise = num * mean**2
        square = np.array(noise / (1 - 0.517))
        predicted = geometry.predicted_distances(
            square, 0.517 * square, np.array(0.517), num, geometry.ratio(np.array(0.517), num)
        )
        assert float(predicted.mean) == pytest.approx(mean, rel=1e-6)
        assert float(predicted.merged) == pytest.approx(stock, rel=5e-3)


def test_predictions_for_models_about_a_known_center():
    # 40,000 elements: norms and angles of random vectors vary by 1/sqrt(n) = 0.5 %.
    rng = np.random.default_rng(0)
    size, num = 40_000, 3
    mu = rng.standard_normal(size)
    w0 = np.zeros(size, np.float32)
    w = (mu + 0.9 * rng.standard_normal((num, size))).astype(np.float32)
    merged, stats = model_stock({"w": w0}, {"w": w})
    truth = [np.linalg.norm(x - mu) for x in (w[0], w.mean(axis=0), np.asarray(merged["w"]))]
    np.testing.assert_allclose(total_distance(stats), truth, rtol=0.02)
    assert truth[2] < truth[1] < truth[0]


def test_geometry_is_equal_in_numpy_and_jax():
    rng = np.random.default_rng(0)
    d = rng.standard_normal((3, 7)) + 1
    gram = d @ d.T
    import jax.numpy as jnp

    cosine = geometry.cosine(gram)
    assert isinstance(cosine, np.ndarray | np.floating)
    in_jax = geometry.cosine(jnp.asarray(gram))
    np.testing.assert_allclose(in_jax, cosine, rtol=1e-6)
    np.testing.assert_allclose(geometry.ratio(in_jax, 3), geometry.ratio(cosine, 3), rtol=1e-6)
    np.testing.assert_allclose(geometry.angle(in_jax), geometry.angle(cosine), rtol=1e-6)
