"""Interpolated position embeddings."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modelstock_jax.errors import UserError
from modelstock_jax.models.compute import DEFAULT_COMPUTE
from modelstock_jax.models.model import image_tower, resize_positions
from modelstock_jax.models.positions import bicubic, interpolate
from tests.models import small

CONFIG = small.config()
PARAMS = small.perturbed(CONFIG)


def test_a_grid_that_pytorch_resized():
    # torch.nn.functional.interpolate(mode="bicubic", align_corners=False) of a 3 x 3 grid, in
    # float64. With jax.image's a = -0.5, or with antialiasing, values differ by 0.05 or more.
    grid = np.arange(9.0).reshape(3, 3) ** 2
    expected = [
        [-0.60733414, 1.93057632],
        [3.52004623, 11.89499283],
        [21.52780533, 39.02785873],
        [40.43838882, 63.77547836],
    ]
    np.testing.assert_allclose(bicubic(3, 4) @ grid @ bicubic(3, 2).T, expected, atol=1e-8)


@pytest.mark.parametrize("sizes", [(7, 9), (9, 7), (24, 16), (4, 1), (1, 5), (2, 16)])
def test_rows_are_weights_of_four_neighbors(sizes):
    old, new = sizes
    matrix = bicubic(old, new)
    np.testing.assert_allclose(matrix.sum(1), 1.0, rtol=1e-14)
    np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=1e-14)  # Left is as right.
    assert (np.count_nonzero(matrix, axis=1) <= 4).all()


def test_the_same_grid_is_unchanged():
    np.testing.assert_array_equal(bicubic(7, 7), np.eye(7))
    positions = jnp.asarray(PARAMS["image_tower"]["position_embedding"])
    assert interpolate(positions, (4, 4), (4, 4)) is positions
    # The same number of patches in another shape is another grid.
    other = interpolate(positions, (4, 4), (2, 8))
    assert other.shape == positions.shape and np.abs(other - positions).max() > 0.1


def test_rows_columns_and_class_token_keep_their_positions():
    rng = np.random.default_rng(0)
    positions = rng.standard_normal((1 + 16, 3)).astype(np.float32)
    got = np.asarray(interpolate(jnp.asarray(positions), (4, 4), (6, 2)))
    np.testing.assert_array_equal(got[0], positions[0])
    by_hand = np.kron(bicubic(4, 6), bicubic(4, 2)) @ positions[1:].astype(np.float64)
    # Eight successive float32 products of values near 1.
    np.testing.assert_allclose(got[1:], by_hand, atol=1e-6, rtol=0)


def test_gradients_reach_the_stored_embedding():
    positions, rng = jnp.zeros((17, 3)), np.random.default_rng(1)
    weights = rng.standard_normal((13, 3)).astype(np.float32)
    got = jax.grad(lambda p: (interpolate(p, (4, 4), (6, 2)) * weights).sum())(positions)
    by_hand = np.kron(bicubic(4, 6), bicubic(4, 2)).T @ weights[1:]
    np.testing.assert_allclose(got[1:], by_hand, atol=2e-6, rtol=0)  # As above, 12 numbers.
    np.testing.assert_array_equal(got[0], weights[0])


def test_full_precision_on_any_device():
    text = str(jax.make_jaxpr(lambda p: interpolate(p, (4, 4), (6, 2)))(jnp.ones((17, 3))))
    assert text.count("dot_general") == text.count("Precision.HIGHEST, Precision.HIGHEST") == 2


def test_a_resized_model_equals_interpolation_at_every_call():
    x = np.random.default_rng(2).standard_normal((2, 36, 36, 3)).astype(np.float32)
    config, params = resize_positions(PARAMS, CONFIG, 36)
    assert config == small.replaced(CONFIG, "vision", image_size=36)
    positions = params["image_tower"]["position_embedding"]
    assert (type(positions), positions.dtype, positions.shape) == (np.ndarray, np.float32, (37, 96))

    def tokens(config, params):
        return image_tower(config, params["image_tower"], x, DEFAULT_COMPUTE).embed(x)

    np.testing.assert_array_equal(tokens(config, params), tokens(CONFIG, PARAMS))
    # Other leaves are shared, and the input tree is unchanged.
    assert PARAMS["image_tower"]["position_embedding"].shape == (17, 96)
    assert params["image_tower"]["blocks"] is PARAMS["image_tower"]["blocks"]
    assert params["text_tower"] is PARAMS["text_tower"]


def test_a_replica_can_be_resized_too():
    replica = {"image_tower": PARAMS["image_tower"], "head": {"bias": np.zeros(3)}}
    _, resized = resize_positions(replica, CONFIG, 12)
    assert resized["image_tower"]["position_embedding"].shape == (5, 96)
    assert resized["head"] is replica["head"]


@pytest.mark.parametrize("size", [25, 0, -6])
def test_a_size_that_makes_no_patches_is_named(size):
    with pytest.raises(UserError, match=rf"image_size.*{size}"):
        resize_positions(PARAMS, CONFIG, size)
