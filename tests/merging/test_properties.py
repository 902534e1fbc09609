"""Properties of the merge over inputs that hypothesis chooses."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from modelstock_jax.merging import geometry, model_stock, weighted_model_stock
from tests.merging.reference import allowed

# One shape for each number of replicas: every new shape would be compiled again.
SIZE = 6
quick = settings(max_examples=60, deadline=None)
numbers = st.floats(-8, 8, width=32).map(lambda x: np.float32(round(x, 3)))


def weights(num):
    return hnp.arrays(np.float32, (num + 1, SIZE), elements=numbers)


several = st.integers(2, 4).flatmap(weights)


def _merge(x, method=model_stock):
    merged, stats = method({"w": x[0]}, {"w": x[1:]})
    return np.asarray(merged["w"]), float(stats.ratio["w"]), float(stats.cosine["w"])


@quick
@given(several)
def test_ratio_lies_in_0_1_and_the_result_on_the_segment(x):
    merged, ratio, cosine = _merge(x)
    assert 0.0 <= ratio <= 1.0
    assert -1.0 <= cosine <= 1.0 or cosine == geometry.COSINE_UNDEFINED
    active = x[1:][(x[1:] != x[0]).any(axis=1)]
    if len(active) == 0:
        assert merged.tobytes() == x[0].tobytes()
        return
    mean = active.mean(axis=0, dtype=np.float64)
    target = x[0] + ratio * (mean - x[0].astype(np.float64))
    assert (np.abs(merged - target) <= allowed(x[0], mean[None], target)).all()


@quick
@given(several, st.randoms())
def test_order_of_replicas_does_not_matter(x, random):
    order = list(range(1, len(x)))
    random.shuffle(order)
    merged, ratio, cosine = _merge(x)
    again, ratio2, cosine2 = _merge(x[[0, *order]])
    assert abs(ratio - ratio2) < 1e-6 and abs(cosine - cosine2) < 1e-6
    spread = np.abs(x[1:] - x[0]).max(axis=0)
    # Twice the tolerance of one merge; where the mean cancels, rounding follows the addends.
    assert (np.abs(merged - again) <= 2e-6 * (spread + np.abs(x[0]))).all()


@quick
@given(several, st.integers(-20, 20), st.sampled_from([-1.0, 1.0]))
def test_scale_of_task_vectors_does_not_matter(x, power, sign):
    deltas = x[1:] - x[0]
    scaled = np.float32(sign * 2.0**power) * deltas
    zero = np.zeros((1, SIZE), np.float32)
    merged, ratio, cosine = _merge(np.concatenate([zero, deltas]))
    again, ratio2, cosine2 = _merge(np.concatenate([zero, scaled]))
    assert abs(ratio - ratio2) < 1e-6 and abs(cosine - cosine2) < 1e-6
    np.testing.assert_allclose(
        again, np.float32(sign * 2.0**power) * merged, rtol=1e-5, atol=1e-6 * 2.0**power
    )


@quick
@given(several, st.integers(0, 2**32 - 1))
def test_rotation_of_a_unit_does_not_matter(x, seed):
    rotation = np.linalg.qr(np.random.default_rng(seed).standard_normal((SIZE, SIZE)))[0]
    x = x.astype(np.float64)
    far = np.linalg.norm(x[1:] - x[0], axis=1)
    if ((far < 1e-3) & (far > 0)).any() or (far == 0).any():
        return  # rounding to float32 below turns the direction of a tiny movement
    merged, ratio, cosine = _merge(x.astype(np.float32))
    again, ratio2, cosine2 = _merge((x @ rotation).astype(np.float32))
    # Rotated weights are rounded to float32: an error of 1e-6 on movements of 1e-3 at least
    # turns each by up to 1e-3; hence the scale with the smallest movement.
    slack = 4e-6 * (1 + np.abs(x).max()) / far.min() * SIZE
    assert abs(cosine - cosine2) < slack
    if cosine > slack:
        # dt/dcos is at most N.
        assert abs(ratio - ratio2) < slack * len(x)
        size = np.abs(x).max() * SIZE + far.max()
        assert np.abs(merged @ rotation - again).max() < slack * len(x) * size + 1e-5


@quick
@given(st.floats(1e-6, 1.0))
def test_equation_2_is_equation_3_for_two(cosine):
    second = np.array([cosine, np.sqrt(1 - cosine**2)])
    gram = np.array([[1.0, cosine], [cosine, second @ second]])
    ratio = float(geometry.ratio(geometry.cosine(gram), 2))
    assert abs(ratio - 2 * cosine / (1 + cosine)) < 1e-12


@quick
@given(weights(1), st.integers(2, 5))
def test_zero_movements_give_the_anchor(x, num):
    merged, ratio, cosine = _merge(np.repeat(x[:1], 4, axis=0))
    assert merged.tobytes() == x[0].tobytes() and cosine == geometry.COSINE_UNDEFINED
    assert ratio == 0.0


@quick
@given(st.integers(2, 5), st.floats(0.01, 0.99), st.floats(-3, 3))
def test_weighted_is_plain_for_replicas_of_equal_noise(num, cosine, power):
    # Task vectors of one length and one angle: a shared direction and one of each one's own.
    deltas = np.zeros((num, SIZE))
    deltas[:, 0] = cosine**0.5
    deltas[np.arange(num), 1 + np.arange(num)] = (1 - cosine) ** 0.5
    x = np.concatenate([np.zeros((1, SIZE)), 10.0**power * deltas]).astype(np.float32)
    plain, ratio, _ = _merge(x)
    weighted, ratio2, _ = _merge(x, weighted_model_stock)
    # Rounding the inputs to float32 makes their noises unequal by 1e-7 of their squares.
    assert abs(ratio - ratio2) < 2e-6 / min(cosine, 1 - cosine)
    np.testing.assert_allclose(
        weighted, plain, rtol=0, atol=2e-6 / min(cosine, 1 - cosine) * 10.0**power
    )


@quick
@given(several)
def test_weighted_never_leaves_the_hull_of_anchor_and_replicas(x):
    merged, ratio, _ = _merge(x, weighted_model_stock)
    assert 0.0 <= ratio <= 1.0 + 1e-6
    low, high = x.min(axis=0), x.max(axis=0)
    assert ((merged >= low - 1e-5) & (merged <= high + 1e-5)).all()
