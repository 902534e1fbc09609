"""Expressions of models against direct NumPy; and what their keys tell apart."""

from __future__ import annotations

import chex
import jax
import numpy as np
import pytest

from modelstock_jax.merging import model_stock, stack_replicas
from studies.catalog.model_pool import pool
from studies.expressions import (
    Anchor,
    Best,
    Between,
    Greedy,
    InPlane,
    Mean,
    Merge,
    Merged,
    Noisy,
    Replica,
)
from studies.runs import Run
from tests.studies.bench import SPREAD, DrawnBench

BENCH = DrawnBench()
ONE, TWO, THREE = pool((0, 1))[:3]


def test_a_mean_is_the_mean():
    built = [one.build(BENCH) for one in (ONE, TWO, THREE)]
    expected = jax.tree.map(lambda *w: np.mean(np.float64(w), axis=0), *built)
    # Three float32 roundings of numbers near 1.
    chex.assert_trees_all_close(Mean((ONE, TWO, THREE)).build(BENCH), expected, atol=1e-6)


def test_points_of_lines_and_planes():
    w0, u, v = BENCH.anchor(), ONE.build(BENCH), TWO.build(BENCH)
    between = Between(ONE, 0.25).build(BENCH)
    chex.assert_trees_all_close(
        between, jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, w0, u), atol=1e-6
    )
    found = InPlane(ONE, TWO, 0.5, -2.0).build(BENCH)
    expected = jax.tree.map(lambda a, b, c: a + 0.5 * (b - a) - 2 * (c - a), w0, u, v)
    chex.assert_trees_all_close(found, expected, atol=4e-6)


def test_a_merge_is_the_librarys():
    replicas = stack_replicas([ONE.build(BENCH), TWO.build(BENCH)])
    expected, _ = model_stock(BENCH.anchor(), replicas)
    chex.assert_trees_all_equal(Merge((ONE, TWO)).build(BENCH), expected)


def test_noise_lies_as_far_as_a_model():
    models = pool(range(8))
    center = Mean(models).build(BENCH)
    for scale in (0.5, 1.0):
        noisy = Noisy(models, scale, seed=0).build(BENCH)
        squares = jax.tree.map(lambda a, b: float(((a - b) ** 2).sum()), noisy, center)
        # chi-square of 3,250 numbers: one standard deviation is 1.2 % of the distance.
        assert np.sqrt(sum(jax.tree.leaves(squares))) == pytest.approx(
            scale * SPREAD * np.sqrt(BENCH.size), rel=0.04
        )


def test_what_is_chosen_on_held_out_data():
    models = (ONE, TWO, THREE)
    best = max(models, key=lambda model: BENCH.validate(model.build(BENCH)))
    chex.assert_trees_all_equal(Best(models).build(BENCH), best.build(BENCH))
    # Every model lies as far from the center, all independently: each helps the soup.
    chex.assert_trees_all_close(Greedy(models).build(BENCH), Mean(models).build(BENCH), atol=1e-6)


def test_keys_tell_models_apart():
    longer = Replica(Run.of(0, {"epochs": 16}))
    models = [
        Anchor(), ONE, TWO, THREE, longer, Merged(Run(0)), Mean((ONE, TWO)), Mean((ONE, THREE)),
        Merge((ONE, TWO)), Merge((ONE, TWO), unit="global"), Merge((ONE, TWO), "weighted_model_stock"),
        Merge((ONE, TWO), "unclamped"),
        Between(ONE, 0.5), Between(ONE, 0.25), InPlane(ONE, TWO, 0.5, 0.25),
        InPlane(ONE, TWO, 0.25, 0.5), Noisy((ONE, TWO), 1.0, 0), Noisy((ONE, TWO), 1.0, 1),
        Replica(ONE.run, 0, epoch=3), Best((ONE, TWO)), Greedy((ONE, TWO)),
    ]  # fmt: skip
    keys = [repr(model.key(BENCH)) for model in models]
    assert len(set(keys)) == len(keys)
    assert repr(Mean((ONE, TWO)).key(BENCH)) == keys[6]
