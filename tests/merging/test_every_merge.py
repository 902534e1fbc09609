"""Properties that every merge method must have."""

from __future__ import annotations

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from modelstock_jax import merging
from modelstock_jax.errors import UserError
from modelstock_jax.merging import NonFiniteError, check_finite, report, total_distance
from modelstock_jax.registry import FUNCTIONS
from tests.merging.trees import replicas

# Required arguments, and arguments whose default would test little.
ARGUMENTS = {
    "wise_ft": {"alpha": 0.3},
    "task_arithmetic": {"scale": 0.4},
    "ties": {"density": 0.5, "scale": 0.7},
    "dare_linear": {"density": 0.5, "scale": 0.4},
    "dare_ties": {"density": 0.5, "scale": 0.4, "normalize": True},
    "lines": {"alpha": 0.3, "layer_of": lambda name: 2 if "scale" in name else 1},
}
MERGES = {name: partial(getattr(merging, name), **ARGUMENTS.get(name, {})) for name in FUNCTIONS}
# It also returns the noise for the next merge.
MERGES["model_stock_carried"] = lambda w0, w, **options: merging.model_stock_carried(
    w0, w, **options
)[:2]
every_merge = pytest.mark.parametrize("name", MERGES)


def fast_for(*names):
    """All merges; those not named are in the slow suite, because each takes seconds to compile."""
    return pytest.mark.parametrize(
        "name",
        [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in MERGES],
    )


WEIGHTS = ("kernel", "scale")


def models(num=2, seed=0):
    """Return the same tree for all tests, so that each merge is compiled once."""
    w0, w = replicas({"kernel": (8, 8), "scale": ()}, num, seed)
    w0 |= {
        "scale": w0["scale"].astype(jnp.bfloat16),
        "count": np.int32(3),
        "none": None,
        "on": np.array([True, False]),
        "empty": np.zeros((0, 4), np.float32),
    }
    w |= {
        "scale": w["scale"].astype(jnp.bfloat16),
        "count": np.int32([5] * num),
        "none": None,
        "on": np.zeros((num, 2), bool),
        "empty": np.zeros((num, 0, 4), np.float32),
    }
    return w0, w


@every_merge
def test_structure_dtypes_and_copied_tensors(name):
    w0, w = models()
    merged, stats = MERGES[name](w0, w)
    assert jax.tree.structure(merged) == jax.tree.structure(w0)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), merged) == jax.tree.map(
        lambda x: (x.shape, x.dtype), w0
    )
    assert int(merged["count"]) == 3 and merged["on"].tolist() == [True, False]
    assert not np.array_equal(merged["kernel"], w0["kernel"])
    narrow, _ = MERGES[name](w0, w, dtype=jnp.bfloat16)
    assert narrow["kernel"].dtype == narrow["empty"].dtype == jnp.bfloat16
    assert narrow["count"].dtype == np.int32
    assert len(report(stats)) == 5 and total_distance(stats).replica > 0
    assert jax.tree.structure(stats.ratio) == jax.tree.structure(w0)


@every_merge
def test_unchanged_replicas_give_the_anchor_bit_for_bit(name):
    w0, _ = models()
    w0["kernel"][0, 0] = -0.0
    merged, _ = MERGES[name](w0, jax.tree.map(lambda x: np.stack([x] * 2), w0))
    for key in WEIGHTS:
        assert np.asarray(merged[key]).tobytes() == w0[key].tobytes(), key


@every_merge
def test_a_non_finite_replica_is_named(name):
    w0, w = models()
    w["kernel"][1, 2, 3] = np.inf
    with pytest.raises(NonFiniteError, match=r"replica 1 .*'kernel'"):
        MERGES[name](w0, w)


@fast_for("ties")  # the only one that searches for a rank; the others have the same last step
def test_jit_vmap_and_shards(name):
    """Two merges under vmap, weights sharded over eight devices, one merge with a NaN."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    pairs = [models(seed=seed) for seed in (0, 1)]
    pairs[1][1]["kernel"][1, 2, 3] = np.nan
    w0, w = jax.tree.map(lambda *x: np.stack(x), *pairs)
    w0["kernel"] = jax.device_put(w0["kernel"], NamedSharding(mesh, P(None, "data")))
    w["kernel"] = jax.device_put(w["kernel"], NamedSharding(mesh, P(None, None, "data")))
    program = jax.jit(jax.vmap(MERGES[name])).lower(w0, w).compile()
    merged, stats = program(w0, w)

    single, single_stats = MERGES[name](*pairs[0])
    # Sums are in float64: only the last rounding may differ.
    np.testing.assert_array_max_ulp(
        np.asarray(merged["kernel"][0]), np.asarray(single["kernel"]), 1
    )
    np.testing.assert_allclose(stats.ratio["kernel"][0], single_stats.ratio["kernel"], rtol=1e-6)
    np.testing.assert_array_equal(merged["kernel"][1], pairs[1][0]["kernel"])
    with pytest.raises(NonFiniteError, match=r"replica 1 .*'kernel'"):
        check_finite(jax.tree.map(lambda x: x[1], stats), pairs[1][0])

    assert merged["kernel"].sharding.is_equivalent_to(w0["kernel"].sharding, 3)
    if name == "monosoup":  # it decomposes complete matrices
        return
    collectives = re.findall(
        r"= \(?\w+\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute)", program.as_text()
    )
    # Statistics of units may be communicated, 4 values each; never the 64 elements of a kernel.
    assert all(np.prod([int(d) for d in shape.split(",") if d]) < 64 for shape in collectives), (
        collectives
    )


@fast_for("constant_ratio", "ties")
def test_bfloat16_is_the_float32_merge_rounded(name):
    narrow = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if x.dtype == np.float32 else x, models()
    )
    wide = jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == jnp.bfloat16 else x, narrow)
    merged, _ = MERGES[name](*narrow)
    expected, _ = MERGES[name](*wide)
    for key in WEIGHTS:
        # 2^-8: one unit in the last place, where the float32 value is close to a tie.
        np.testing.assert_allclose(
            np.asarray(merged[key], np.float32), expected[key], rtol=2.0**-8, atol=0
        )


@every_merge
def test_one_replica(name):
    w0, w = models(1)
    if FUNCTIONS[name].min_models == 2:  # an angle, or a spread, requires two
        with pytest.raises(UserError, match="at least 2 fine-tuned replicas, not 1; .*wise_ft"):
            MERGES[name](w0, w)
        return
    merged, _ = MERGES[name](w0, w)
    if name == "monosoup":  # it shortens directions of the matrix, not elements
        lengths = [np.linalg.norm(x - w0["kernel"]) for x in (merged["kernel"], w["kernel"][0])]
        assert 0.2 * lengths[1] < lengths[0] < 0.999 * lengths[1]
        return
    # Every element is between anchor and replica (TIES and DARE leave some at the anchor).
    position = (merged["kernel"] - w0["kernel"]) / (w["kernel"][0] - w0["kernel"])
    assert ((position > -1e-5) & (position < 1 + 1e-5)).all() and position.max() > 0.2


# The random elements of DARE depend on the position of the replica.
@pytest.mark.parametrize("name", [name for name in MERGES if not name.startswith("dare")])
def test_order_of_replicas_does_not_matter(name):
    w0, w = models()
    found, reversed_ = (MERGES[name](w0, x)[0] for x in (w, jax.tree.map(lambda x: x[::-1], w)))
    for key in WEIGHTS:
        # float64 sums in another order: after rounding, a few units in the last place near 0.
        np.testing.assert_allclose(
            np.asarray(found[key], np.float32),
            np.asarray(reversed_[key], np.float32),
            rtol=2e-7,
            atol=1e-8,
        )
