"""Convolutions as matrix products, compared with XLA's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modelstock_jax.models.compute import Compute
from modelstock_jax.models.convolution import Convolution, Depthwise

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


def test_depthwise_convolution_equals_xla():
    layer = Depthwise(3, 5, Compute(), nnx.Rngs(1))
    layer.bias[...] = jnp.arange(3.0)
    kernel = layer.kernel[...].reshape(5, 5, 1, 3)
    expected = (
        reference(IMAGES, kernel, 5, 1, 3) + np.arange(3.0, dtype=np.float32)[None, None, None]
    )
    np.testing.assert_allclose(layer(jnp.asarray(IMAGES)), expected, atol=1e-5)
