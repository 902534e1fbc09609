"""Mistakes in the arguments of a merge: one clear line, the same for every method."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import modelstock_jax
from modelstock_jax import UserError, stack_replicas, wise_ft
from modelstock_jax.registry import FUNCTIONS

W0 = {"blocks.0": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}}
A, B = (jax.tree.map(lambda x, k=k: x + k, W0) for k in (1.0, 2.0))
BOTH = stack_replicas([A, B])
# Required arguments of a method other than the trees.
MORE = {
    name: (0.5,) for name in ("wise_ft", "task_arithmetic", "lines", "dare_linear", "dare_ties")
}


class Parameter:
    """A tensor of torch that NumPy cannot convert."""

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("use tensor.detach().numpy()")


Parameter.__module__ = "torch.nn.parameter"


class Linear:
    """A module of torch."""

    def state_dict(self):
        return {}


def with_kernel(kernel):
    return {"blocks.0": {**BOTH["blocks.0"], "kernel": kernel}}


MISTAKES = {
    "a list": (W0, [A, B], "finetuned.* sequence .*stack_replicas"),
    "a generator": (W0, (x for x in ()), "finetuned.* sequence .*stack_replicas"),
    "a dict of models": (W0, {"x": A, "y": B}, r"finetuned.* \(x, y\).*stack_replicas"),
    "one model": (W0, A, r"finetuned .*no replica axis.*stack_replicas\(\[a, b\]\)"),
    "swapped": (BOTH, A, "swapped"),
    "a missing leaf": (W0, {"blocks.0": {"bias": BOTH["blocks.0"]["bias"]}}, "blocks.0.kernel"),
    "another shape": (W0, with_kernel(jnp.zeros((2, 2, 3))), r"kernel .*\(3, 2\) .*\(2, 2, 3\)"),
    "other replica counts": (W0, with_kernel(jnp.zeros((3, 3, 2))), "kernel.*bias|bias.*kernel"),
    "nothing": (W0, None, "only in pretrained: .*kernel"),
    "a path": ("a.safetensors", "b.safetensors", "type str; .*modelstock merge"),
    "a tensor of torch": ({"w": Parameter()}, {"w": Parameter()}, r"'w' .*\.detach\(\)"),
    "a module of torch": (Linear(), Linear(), r"Linear; .*state_dict\(\)"),
    "a unit": (W0, BOTH, "'layr'.*tensor, layer"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_mistake_is_one_line(name, mistake):
    pretrained, finetuned, message = MISTAKES[mistake]
    options = {"unit": "layr"} if mistake == "a unit" else {}
    with pytest.raises(UserError, match=message) as error:
        getattr(modelstock_jax, name)(pretrained, finetuned, *MORE.get(name, ()), **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_models_one_after_the_other(name):
    with pytest.raises(UserError, match=r"stack_replicas\(\[a, b\]\)"):
        getattr(modelstock_jax, name)(W0, A, B)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_replica_is_merged_or_named(name):
    method = getattr(modelstock_jax, name)
    if name in ("model_stock", "weighted_model_stock", "model_stock_carried", "constant_ratio"):
        with pytest.raises(UserError, match="at least 2 .*not 1; .*wise_ft"):
            method(W0, stack_replicas([A]))
    else:
        method(W0, stack_replicas([A]), *MORE.get(name, ()))


def test_numpy_float16_trees_are_merged():
    w0 = jax.tree.map(lambda x: np.asarray(x, np.float16), W0)
    both = jax.tree.map(lambda x: np.asarray(x, np.float16), BOTH)
    merged, _ = wise_ft(w0, both, 0.5)
    assert {x.dtype for x in jax.tree.leaves(merged)} == {np.dtype(np.float16)}
    np.testing.assert_array_equal(merged["blocks.0"]["bias"], np.full(2, 0.75))
