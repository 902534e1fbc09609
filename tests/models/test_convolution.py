"""Convolutions as matrix products, compared with XLA's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modelstock_jax.models.compute import Compute
from modelstock_jax.models.convolution import Convolution, Depthwise, max_pool

IMAGES = np.random.default_rng(0).standard_normal((2, 24, 24, 3)).astype(np.float32)


def reference(x, kernel, size, stride, groups):
    """XLA's convolution, padded by half a window."""
    pads = ((size // 2, size // 2),) * 2
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (1, 2)])
def test_convolution_equals_xla(size, stride):
    layer = Convolution(3, 5, size, Compute(), nnx.Rngs(1), stride)
    kernel = layer.kernel[...].reshape(size, size, 3, 5)
    found = layer(jnp.asarray(IMAGES))
    # Sums of at most 27 float32 products of values near 1, in another order.
    np.testing.assert_allclose(found, reference(IMAGES, kernel, size, stride, 1), atol=1e-5)


@pytest.mark.parametrize("side", [24, 23])
def test_max_pooling_equals_xla(side):
    x = jnp.asarray(IMAGES)[:, :side, :side] - 5  # Padding with zeros would be seen.
    expected = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    np.testing.assert_array_equal(max_pool(x, 3, stride=2), expected)
    weights = jax.random.normal(jax.random.key(0), expected.shape)
    pools = (
        lambda x: (weights * max_pool(x, 3, stride=2)).sum(),
        lambda x: (weights * nnx.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))).sum(),
    )
    ours, theirs = (jax.grad(pool)(x) for pool in pools)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)  # Sums of four float32 numbers.


def test_depthwise_convolution_equals_xla():
    layer = Depthwise(3, 5, Compute(), nnx.Rngs(1))
    layer.bias[...] = jnp.arange(3.0)
    kernel = layer.kernel[...].reshape(5, 5, 1, 3)
    expected = (
        reference(IMAGES, kernel, 5, 1, 3) + np.arange(3.0, dtype=np.float32)[None, None, None]
    )
    np.testing.assert_allclose(layer(jnp.asarray(IMAGES)), expected, atol=1e-5)
