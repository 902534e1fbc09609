"""`Stats`: rows as the arrays, trees as views of them, one merge at a time in reports."""

from __future__ import annotations

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modelstock_jax.errors import UserError
from modelstock_jax.merging import (
    NonFiniteError,
    Stats,
    check_finite,
    model_stock,
    outcome_counts,
    report,
    stack_replicas,
    total_distance,
)
from tests.merging.trees import nested, replicas

SHAPES = {"mlp.kernel": (6, 4), "mlp.bias": (4,), "scale": ()}
READERS = (report, total_distance, outcome_counts, check_finite)
TREES = ("cosine", "ratio", "norm", "predicted_distance", "outcome", "finite")


def _models(seed=0):
    w0, w = (nested(tree) for tree in replicas(SHAPES, 2, seed))
    return w0 | {"step": np.int32(3)}, w | {"step": np.zeros(2, np.int32)}


def _several(number):
    return (
        jax.tree.map(lambda *x: np.stack(x), *trees)
        for trees in zip(*map(_models, range(number)), strict=True)
    )


def test_arrays_do_not_grow_with_the_number_of_tensors():
    few = jax.jit(model_stock)(*_models())[1]
    shapes = {f"{k}.w": (4, 3) for k in range(40)}
    many = jax.jit(model_stock)(*(nested(tree) for tree in replicas(shapes, 2)))[1]
    assert len(jax.tree.leaves(few)) == len(jax.tree.leaves(many)) == 8


@pytest.mark.parametrize("unit", ["tensor", "filter"])
def test_vmapped_statistics_have_the_leading_axis(unit):
    w0, w = _several(5)
    _, stats = jax.vmap(lambda a, b: model_stock(a, b, unit=unit))(w0, w)
    for k in range(5):
        _, one = model_stock(*_models(k), unit=unit)
        for name in TREES:
            chex.assert_trees_all_close(
                jax.tree.map(lambda x, k=k: x[k], getattr(stats, name)),
                getattr(one, name),
                rtol=1e-6,
            )
        taken = jax.tree.map(lambda x, k=k: x[k], stats)
        assert [row["name"] for row in report(taken)] == [row["name"] for row in report(one)]
        chex.assert_trees_all_close(taken.norm, one.norm, rtol=1e-6)


@pytest.mark.parametrize("read", READERS)
def test_reports_refuse_several_merges(read):
    w0, w = _several(5)
    stats = jax.vmap(model_stock)(w0, w)[1]
    with pytest.raises(UserError, match=r"leading axes \(5,\).*jax.tree.map"):
        read(stats)


@pytest.mark.parametrize("out_axes", [1, -1])
@pytest.mark.parametrize("number", [2, 3, 4])
def test_other_axes_of_vmap_are_refused(out_axes, number):
    """Also if the number of merges is that of the units (3) or of the replicas (2)."""
    w0, w = _several(number)
    rows = jax.vmap(model_stock)(w0, w)[1].rows
    moved = jax.tree.map(lambda x: jnp.moveaxis(x, 0, out_axes if x.ndim > 1 else 0), rows)
    _, template = model_stock(*_models())
    stats = Stats(moved, template.tensors, template.unit, template.num_replicas)
    for read in (*READERS, lambda stats: stats.ratio):
        with pytest.raises(UserError, match="vmap"):
            read(stats)


def test_scanned_merges():
    w0, w = _several(3)

    def step(carry, models):
        return carry, model_stock(*models)[1]

    _, stats = jax.lax.scan(step, 0, (w0, w))
    assert stats.norm["mlp"]["kernel"].shape == (3, 2)
    assert stats.cosine["step"].shape == (3,)


def test_trees_under_jit():
    """Trees of statistics are values like any other inside of a compiled function."""

    @jax.jit
    def mean_ratio(w0, w):
        ratios = jax.tree.leaves(model_stock(w0, w)[1].ratio)
        return sum(ratios) / len(ratios)

    w0, w = _models()
    expected = [float(x) for x in jax.tree.leaves(model_stock(w0, w)[1].ratio)]
    assert float(mean_ratio(w0, w)) == pytest.approx(np.mean(expected), rel=1e-6)


@pytest.mark.parametrize("unit", ["tensor", "layer", "filter", "head", "block", "global"])
@pytest.mark.parametrize("replica", [0, 2])
def test_the_replica_and_the_tensor_are_named(unit, replica):
    shapes = {f"layers.0.self_attn.{r}_proj.kernel": (4, 4) for r in ("k", "out", "q", "v")}
    w0, w = replicas(shapes | {"layers.0.mlp.kernel": (4, 4)}, 3)
    name = "layers.0.self_attn.q_proj.kernel"
    w[name][replica, 1, 2] = np.nan
    with pytest.raises(NonFiniteError) as eager:
        model_stock(w0, w, unit=unit, num_heads=2 if unit == "head" else None)
    _, stats = jax.jit(lambda a, b: model_stock(a, b, unit=unit, num_heads=2))(w0, w)
    with pytest.raises(NonFiniteError) as jitted:
        check_finite(stats, w0)
    for error in (eager.value, jitted.value):
        assert (error.replica, error.tensor) == (replica, name)


def test_units_tell_whether_something_was_joined():
    attention = {f"attn.{r}_proj.kernel": (4, 4) for r in "qkv"}
    w0, w = replicas(attention | {"mlp.kernel": (4, 4)}, 2)
    assert model_stock(w0, w, unit="layer")[1].units.num_joined == 1
    assert model_stock(w0, w)[1].units.num_joined == 0
    plain = replicas({"mlp.kernel": (4, 4)}, 2)
    with pytest.warns(UserWarning, match="equals unit 'tensor'"):
        assert model_stock(*plain, unit="layer")[1].units.num_joined == 0


def _compiled(function, number):
    w0, w = replicas({f"{k}.w": (16, 8) for k in range(number)}, 2)
    return jax.jit(function).lower(w0, w).compile().as_text()


def _formula(w0, w):
    def merge_leaf(w0, w):
        first, second = w[0] - w0, w[1] - w0
        cosine = jnp.sum(first * second) / (jnp.linalg.norm(first) * jnp.linalg.norm(second))
        ratio = jnp.maximum(0, 2 * cosine / (1 + cosine))
        return ratio * (w[0] + w[1]) / 2 + (1 - ratio) * w0

    return jax.tree.map(merge_leaf, w0, w)


def test_program_grows_as_slowly_as_the_plain_formula():
    """XLA's passes take time per instruction; the rule adds none per tensor."""

    def per_tensor(function):
        small, large = (
            len(re.findall(r"^  (?:ROOT )?%", _compiled(function, n), re.M)) for n in (16, 48)
        )
        return (large - small) / 32

    ours, plain = per_tensor(model_stock), per_tensor(_formula)
    assert ours < 2.5 * plain, (ours, plain)  # 1.9 when this was written


def test_tensors_of_one_shape_share_their_compiled_functions():
    """LLVM compiles each different function; a slice at its own index would make one per tensor."""

    def different(number):
        text = re.sub(r", metadata=\{[^}]*\}", "", _compiled(model_stock, number))
        functions = re.findall(r"^%\S+ .*?^\}", text, re.M | re.S)
        return len({re.sub(r"%[\w.\-]+|\(.*?\) ->", "%", body) for body in functions})

    assert different(48) - different(16) <= 12  # pieces and chunks: twice the root of 48


def test_stacking_is_not_needed_for_replicas_that_are_stacked():
    w0, w = _models()
    one, two = (jax.tree.map(lambda x, k=k: x[k], w) for k in (0, 1))
    chex.assert_trees_all_equal(
        model_stock(w0, stack_replicas([one, two]))[1].rows, model_stock(w0, w)[1].rows
    )
