"""Convolutions compared with JAX; properties of every tower."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modelstock_jax.errors import UserError
from modelstock_jax.models.convnext import Convolution, Depthwise
from modelstock_jax.models.tower import TOWERS, classifier, init
from modelstock_jax.models.transformer import Compute

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


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_classifies(name):
    params = jax.eval_shape(lambda key: init(name, 7, key), jax.random.key(0))
    logits = jax.eval_shape(classifier(name, Compute("bfloat16")), params, IMAGES)
    assert logits.shape == (2, 7) and logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


@pytest.mark.slow
@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_is_a_function_of_each_image_and_of_all_its_weights(name):
    params = init(name, 7, jax.random.key(0))
    apply = classifier(name, Compute())

    @jax.jit
    def both(params, images):
        loss = lambda params: jnp.square(apply(params, images)).mean()  # noqa: E731
        return apply(params, images), jax.grad(loss)(params)

    logits, gradient = both(params, IMAGES)
    # No batch statistics: the other image has no effect.
    swapped, _ = both(params, IMAGES[::-1])
    np.testing.assert_allclose(swapped[::-1], logits, rtol=1e-5, atol=1e-5)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        where = jax.tree_util.keystr(path)
        # Softmax is invariant to key biases; only rounding errors reach them.
        assert float(jnp.abs(leaf).max()) > 1e-6 or "k_proj" in where, where


def test_an_unknown_tower_is_one_line():
    with pytest.raises(UserError, match="tower:resnt: .*vit, hybrid, resnet"):
        init("resnt", 7, jax.random.key(0))
