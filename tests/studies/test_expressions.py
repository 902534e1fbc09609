"""Expressions of models against direct NumPy, and their keys."""

from __future__ import annotations

import chex
import jax
import numpy as np
import pytest

from modelstock_jax.merging import lines, model_stock, monosoup, stack_replicas
from studies.catalog.model_pool import pool
from studies.expressions import (
    Anchor,
    Best,
    Between,
    Greedy,
    InPlane,
    LiNeS,
    Mean,
    Merge,
    Merged,
    MonoSoup,
    Noisy,
    Replica,
)
from studies.runs import Run
from tests.studies.context import SPREAD, DrawnContext

CONTEXT = DrawnContext()
ONE, TWO, THREE = pool((0, 1))[:3]


def test_a_mean_is_the_mean():
    built = [model.build(CONTEXT) for model in (ONE, TWO, THREE)]
    expected = jax.tree.map(lambda *w: np.mean(np.float64(w), axis=0), *built)
    # Three float32 roundings of values near 1.
    chex.assert_trees_all_close(Mean((ONE, TWO, THREE)).build(CONTEXT), expected, atol=1e-6)


def test_points_of_lines_and_planes():
    w0, u, v = CONTEXT.anchor(), ONE.build(CONTEXT), TWO.build(CONTEXT)
    between = Between(ONE, 0.25).build(CONTEXT)
    chex.assert_trees_all_close(
        between, jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, w0, u), atol=1e-6
    )
    in_plane = InPlane(ONE, TWO, 0.5, -2.0).build(CONTEXT)
    expected = jax.tree.map(lambda a, b, c: a + 0.5 * (b - a) - 2 * (c - a), w0, u, v)
    chex.assert_trees_all_close(in_plane, expected, atol=4e-6)


def test_a_merge_equals_the_librarys():
    replicas = stack_replicas([ONE.build(CONTEXT), TWO.build(CONTEXT)])
    expected, _ = model_stock(CONTEXT.anchor(), replicas)
    chex.assert_trees_all_equal(Merge((ONE, TWO)).build(CONTEXT), expected)
    one = stack_replicas([expected])
    on_top, _ = monosoup(CONTEXT.anchor(), one)
    chex.assert_trees_all_equal(MonoSoup(Merge((ONE, TWO))).build(CONTEXT), on_top)
    by_layer, _ = lines(CONTEXT.anchor(), one, 0.25)
    chex.assert_trees_all_equal(LiNeS(Merge((ONE, TWO)), 0.25).build(CONTEXT), by_layer)


def test_noise_has_the_distance_of_a_model():
    models = pool(range(8))
    center = Mean(models).build(CONTEXT)
    for scale in (0.5, 1.0):
        noisy = Noisy(models, scale, seed=0).build(CONTEXT)
        squares = jax.tree.map(lambda a, b: float(((a - b) ** 2).sum()), noisy, center)
        # Chi-square of 3,250 elements: one standard deviation is 1.2 % of the distance.
        assert np.sqrt(sum(jax.tree.leaves(squares))) == pytest.approx(
            scale * SPREAD * np.sqrt(CONTEXT.size), rel=0.04
        )


def test_selection_on_held_out_data():
    models = (ONE, TWO, THREE)
    best = max(models, key=lambda model: CONTEXT.validate(model.build(CONTEXT)))
    chex.assert_trees_all_equal(Best(models).build(CONTEXT), best.build(CONTEXT))
    # Models are independent with equal distance to the center, so each improves the soup.
    chex.assert_trees_all_close(
        Greedy(models).build(CONTEXT), Mean(models).build(CONTEXT), atol=1e-6
    )


def test_keys_differ_between_models():
    longer = Replica(Run.of(0, {"epochs": 16}))
    models = [
        Anchor(), ONE, TWO, THREE, longer, Merged(Run(0)), Mean((ONE, TWO)), Mean((ONE, THREE)),
        Merge((ONE, TWO)), Merge((ONE, TWO), unit="global"),
        Merge((ONE, TWO), "weighted_model_stock"), Merge((ONE, TWO), "unclamped"),
        Between(ONE, 0.5), Between(ONE, 0.25), InPlane(ONE, TWO, 0.5, 0.25),
        InPlane(ONE, TWO, 0.25, 0.5), Noisy((ONE, TWO), 1.0, 0), Noisy((ONE, TWO), 1.0, 1),
        Replica(ONE.run, 0, epoch=3), Best((ONE, TWO)), Greedy((ONE, TWO)),
        MonoSoup(ONE), MonoSoup(TWO), LiNeS(ONE, 0.5), LiNeS(ONE, 0.25),
    ]  # fmt: skip
    keys = [repr(model.key(CONTEXT)) for model in models]
    assert len(set(keys)) == len(keys)
    assert repr(Mean((ONE, TWO)).key(CONTEXT)) == keys[6]
