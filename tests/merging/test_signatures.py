"""Options are keyword-only, and a model in the place of a coefficient is explained."""

from __future__ import annotations

import doctest
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modelstock_jax import merging
from modelstock_jax.errors import UserError
from modelstock_jax.merging import baselines, init_noise, model_stock_carried, ties
from modelstock_jax.registry import FUNCTIONS
from tests.merging.trees import replicas

COEFFICIENTS = {
    "wise_ft": "alpha",
    "task_arithmetic": "scale",
    "slerp": "t",
    "constant_ratio": "ratio",
    "ties": "density",
    "dare_linear": "density",
    "dare_ties": "density",
    "lines": "alpha",
    "model_stock_carried": "noise",
}
MEASURES = ("cosines", "norms", "thin_shell")
W0, W = replicas({"a": (3, 4), "b": (2,)}, 2)
A, B = ({name: x[k] for name, x in W.items()} for k in (0, 1))


@pytest.mark.parametrize("name", [*FUNCTIONS, *MEASURES, "random_point", "init_noise"])
def test_only_trees_and_a_coefficient_are_positional(name):
    parameters = inspect.signature(getattr(merging, name)).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    if name in FUNCTIONS:
        coefficient = [COEFFICIENTS[name]] if name in COEFFICIENTS else []
        assert positional == ["pretrained", "finetuned", *coefficient]
    assert "unit" not in positional
    options = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD)}
    assert "unit" in options and options & {"scan_axes", "unit_options"}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("wrap", [dict, lambda w: w["a"], lambda w: list(w.values())])
def test_a_second_model_in_the_place_of_an_option(name, wrap):
    method = getattr(merging, name)
    with pytest.raises(UserError, match=r"stack_replicas\(\[a, b\]\)"):
        method(wrap(W0), wrap(A), wrap(B))
    with pytest.raises(UserError, match=r"stack_replicas\(\[a, b\]\)"):
        method(wrap(W0), wrap(W), wrap(B))


@pytest.mark.parametrize("name", ["model_stock", "weighted_model_stock", "uniform_mean"])
def test_a_unit_by_position(name):
    with pytest.raises(UserError, match=f"^{name}.*unit='filter'"):
        getattr(merging, name)(W0, W, "filter")
    assert getattr(merging, name).__name__ == name


@pytest.mark.parametrize("name", sorted(COEFFICIENTS.keys() - {"model_stock_carried"}))
@pytest.mark.parametrize("wrong", ["filter", {"a": 0.5}, np.zeros((2, 2)), jnp.zeros((1, 1))])
def test_coefficients_are_numbers(name, wrong):
    with pytest.raises(UserError, match=f"^{COEFFICIENTS[name]} must be a number"):
        getattr(merging, name)(W0, W, wrong)


def test_numbers_of_every_kind_are_coefficients():
    for number in (0.5, 1, True, np.float32(0.5), np.array(0.5), jnp.array(0.5)):
        merging.wise_ft(W0, W, number)
    for scale in ((0.5, 0.5), [0.5, np.float64(1)], np.ones(2), jnp.ones(2)):
        merging.task_arithmetic(W0, W, scale)
    jax.jit(merging.wise_ft)(W0, W, 0.5)
    with pytest.raises(UserError, match="scale must be a number"):
        ties(W0, W, scale=B)


def test_noise_of_another_unit():
    noise = init_noise(W0, unit="filter")
    model_stock_carried(W0, W, noise, unit="filter")
    with pytest.raises(UserError, match="^noise must .*same unit"):
        model_stock_carried(W0, W, noise)
    with pytest.raises(UserError, match="^noise must .*same unit"):
        model_stock_carried(W0, W, {"a": noise["a"]}, unit="filter")


def test_examples_of_decorated_functions_run():
    names = {test.name for test in doctest.DocTestFinder().find(baselines) if test.examples}
    methods = {name for name, method in FUNCTIONS.items() if method.module == "baselines"}
    assert methods <= {name.split(".")[-1] for name in names}
