"""Small arrays that are saved side by side: the same bits, on any mesh, and nothing is sent."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from modelstock_jax.training import array_checksums
from modelstock_jax.training.array_checksums import describe_leaves, json_checksum
from modelstock_jax.training.checkpoints import Checkpoints
from modelstock_jax.training.sharding import make_mesh

LARGE = array_checksums.MAX_PACKED_BYTES // 8
# Shape and the axes that it is split over: whole, by replicas, by replicas and over the data.
LEAVES = {
    "step": ((), ()),
    "key": ((2, 2), ("replica",)),
    "moments": {"count": ((2,), ("replica",)), "bias": ((2, 7), ("replica",))},
    "split": ((2, 8, 3), ("replica", "data")),
    "narrow": ((12,), ()),
    "flag": ((3,), ()),
    "large": ((2, LARGE), ("replica",)),
}
DTYPES = {"step": "int32", "key": "uint32", "narrow": "bfloat16", "flag": "bool"}


def tree(mesh, value: int):
    rng = np.random.default_rng(value)

    def leaf(path, spec):
        shape, axes = spec
        dtype = DTYPES.get(path[-1].key, "float32")
        array = rng.integers(0, 2 if dtype == "bool" else 99, shape).astype(jnp.dtype(dtype))
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*axes)))

    return jax.tree.map_with_path(leaf, LEAVES, is_leaf=lambda x: isinstance(x, tuple))


def mesh(replica, data):
    return make_mesh(replica, data, num_replicas=2, batch_size=8)


def test_what_is_small_and_lies_alike_is_one_array():
    made = tree(mesh(2, 4), 0)
    packs = array_checksums.plan_packs(made)
    together = {tuple(one.names): one.rows for one in packs.values()}
    assert together == {
        ("flag",): 0,
        ("key",): 2,
        ("moments/bias", "moments/count"): 2,
        ("narrow",): 0,
        ("step",): 0,
    }
    arrays = array_checksums.pack(made, packs)
    assert arrays["large"] is made["large"] and arrays["split"] is made["split"]
    assert len(arrays) == len(packs) + 2
    for key, one in packs.items():
        # A replica's rows stay on its own devices.
        assert (not arrays[key].sharding.is_fully_replicated) == bool(one.rows), key
    back = array_checksums.unpack(arrays, made, packs)
    chex.assert_trees_all_equal(back, made)
    assert [x.sharding for x in jax.tree.leaves(back)] == [
        x.sharding for x in jax.tree.leaves(made)
    ]


def test_every_mesh_restores_what_another_has_packed(tmp_path):
    saved = tree(mesh(2, 4), 1)
    with Checkpoints(tmp_path, keep=0) as checkpoints:
        checkpoints.save(1, saved)
        checkpoints.wait()
        for shape in ((2, 4), (1, 8), (2, 1), (1, 1)):
            like = tree(mesh(*shape), 0)
            got = checkpoints.restore(1, like)
            chex.assert_trees_all_equal(got, jax.device_get(saved))
            jax.tree.map(lambda x, y: chex.assert_equal(x.sharding, y.sharding), got, like)
        whole = jax.tree.map(jnp.asarray, jax.device_get(saved))
        chex.assert_trees_all_equal(checkpoints.restore(1, whole), whole)


def test_a_tree_that_was_saved_array_by_array_comes_back(tmp_path):
    """As it was done before; a run of then goes on."""
    saved = tree(mesh(2, 4), 2)
    with Checkpoints(tmp_path, keep=0) as checkpoints:
        record = {"leaves": describe_leaves(saved), "details": {}}
        document = {"record": record, "sha256": json_checksum(record)}
        parts = {"tree": saved, "digests": document}
        checkpoints._checkpointer.save_checkpointables(1, parts, force=True)
        chex.assert_trees_all_equal(checkpoints.restore(1, saved), saved)
