"""Properties of the towers of the studies."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modelstock_jax.errors import UserError
from modelstock_jax.models.compute import Compute
from studies.towers import TOWERS, classifier, init

IMAGES = np.random.default_rng(0).standard_normal((2, 24, 24, 3)).astype(np.float32)


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
