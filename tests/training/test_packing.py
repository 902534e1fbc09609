"""Packed small arrays: bitwise identical on any mesh, packed without communication."""

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
# Shape and mesh axes: replicated, over the replica axis, or over both axes.
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


def test_small_arrays_with_the_same_sharding_are_one_array():
    arrays = tree(mesh(2, 4), 0)
    packs = array_checksums.plan_packs(arrays)
    rows = {tuple(group.names): group.rows for group in packs.values()}
    assert rows == {
        ("flag",): 0,
        ("key",): 2,
        ("moments/bias", "moments/count"): 2,
        ("narrow",): 0,
        ("step",): 0,
    }
    packed = array_checksums.pack(arrays, packs)
    assert packed["large"] is arrays["large"] and packed["split"] is arrays["split"]
    assert len(packed) == len(packs) + 2
    for key, group in packs.items():
        # The rows of a replica stay on its devices.
        assert (not packed[key].sharding.is_fully_replicated) == bool(group.rows), key
    unpacked = array_checksums.unpack(packed, arrays, packs)
    chex.assert_trees_all_equal(unpacked, arrays)
    assert [x.sharding for x in jax.tree.leaves(unpacked)] == [
        x.sharding for x in jax.tree.leaves(arrays)
    ]


def test_packs_are_restored_on_any_mesh(tmp_path):
    saved = tree(mesh(2, 4), 1)
    with Checkpoints(tmp_path, keep=0) as checkpoints:
        checkpoints.save(1, saved)
        checkpoints.wait()
        for shape in ((2, 4), (1, 8), (2, 1), (1, 1)):
            abstract = tree(mesh(*shape), 0)
            restored = checkpoints.restore(1, abstract)
            chex.assert_trees_all_equal(restored, jax.device_get(saved))
            jax.tree.map(lambda x, y: chex.assert_equal(x.sharding, y.sharding), restored, abstract)
        single = jax.tree.map(jnp.asarray, jax.device_get(saved))
        chex.assert_trees_all_equal(checkpoints.restore(1, single), single)


def test_checkpoints_without_packs_are_restored(tmp_path):
    """Earlier versions saved every array alone; their runs can be resumed."""
    saved = tree(mesh(2, 4), 2)
    with Checkpoints(tmp_path, keep=0) as checkpoints:
        record = {"leaves": describe_leaves(saved), "details": {}}
        document = {"record": record, "sha256": json_checksum(record)}
        items = {"tree": saved, "digests": document}
        checkpoints._checkpointer.save_checkpointables(1, items, force=True)
        chex.assert_trees_all_equal(checkpoints.restore(1, saved), saved)
