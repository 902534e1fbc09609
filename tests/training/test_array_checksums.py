"""A checksum changes with every changed bit and every moved element, and with nothing else."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from modelstock_jax.training.array_checksums import describe_leaves, json_checksum, tree_checksum

SHAPE = (3, 5)
DTYPES = {
    "f64": np.float64,
    "i64": np.int64,
    "f32": np.float32,
    "i32": np.int32,
    "key": np.uint32,
    "bf16": ml_dtypes.bfloat16,
    "f16": np.float16,
    "u8": np.uint8,
    "i8": np.int8,
    "bool": np.bool_,
    "scalar": np.float32,
}


def random_tree(seed: int) -> dict[str, np.ndarray]:
    """Leaves of random bits, including infinities, NaNs with any payload, and subnormals."""
    rng = np.random.default_rng(seed)
    tree = {}
    for name, dtype in DTYPES.items():
        shape = () if name == "scalar" else SHAPE
        bits = rng.integers(0, 2 if name == "bool" else 256, (*shape, np.dtype(dtype).itemsize))
        tree[name] = bits.astype(np.uint8).view(dtype).reshape(shape)
    return tree


def checksum(tree):
    with jax.enable_x64(True):
        return tree_checksum(jax.tree.map(jnp.asarray, tree))


def mix(x):
    x = x ^ (x >> 16)
    x = x * 0x85EBCA6B % 2**32
    x = x ^ (x >> 13)
    x = x * 0xC2B2AE35 % 2**32
    return x ^ (x >> 16)


def reference_checksum(leaf: np.ndarray) -> str:
    """The formula, computed with Python integers."""
    size = min(leaf.dtype.itemsize, 4)
    words = np.ascontiguousarray(leaf).reshape(-1).view(f"u{size}").tolist()
    hashes = [mix((x + 0x9E3779B9 * i) % 2**32) for i, x in enumerate(words)]
    rehashed = [mix((h + 0x6A09E667) % 2**32) for h in hashes]
    return f"{sum(hashes) % 2**32:08x}{sum(rehashed) % 2**32:08x}"


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(sorted(DTYPES)), st.data())
def test_a_change_of_a_leaf_changes_only_its_checksum(seed, name, data):
    tree = random_tree(seed)
    before = checksum(tree)
    assert before == {n: reference_checksum(leaf) for n, leaf in tree.items()}
    flat = tree[name].reshape(-1).copy()
    kind = data.draw(st.sampled_from(["flip", "swap", "permute"]))
    if kind == "flip":
        raw = flat.view(np.uint8)
        bits = [8 * i for i in range(raw.size)] if name == "bool" else range(8 * raw.size)
        bit = data.draw(st.sampled_from(bits))
        raw[bit // 8] ^= 1 << (bit % 8)
    elif kind == "swap":
        i, j = (data.draw(st.integers(0, flat.size - 1)) for _ in range(2))
        flat[[i, j]] = flat[[j, i]]
    else:
        flat = flat[list(data.draw(st.permutations(range(flat.size))))]
    changed = flat.tobytes() != tree[name].tobytes()
    after = checksum({**tree, name: flat.reshape(tree[name].shape)})
    assert {n for n in after if after[n] != before[n]} == ({name} if changed else set())


def test_swapped_signs_are_detected():
    """A sum of bits times odd numbers would miss them: it differs by 2^31 times an even number."""
    leaf = np.asarray([1.0, -1.0, 2.0, -2.0] * 4, np.float32)
    swapped = leaf.reshape(-1, 2)[:, ::-1].reshape(-1)
    assert tree_checksum([jnp.asarray(leaf)]) != tree_checksum([jnp.asarray(swapped)])


def test_checksum_of_a_prng_key_is_that_of_its_data():
    key = jax.random.key(7)
    assert tree_checksum({"k": key}) == tree_checksum({"k": jax.random.key_data(key)})
    assert tree_checksum({"k": key}) != tree_checksum({"k": jax.random.key(8)})


def mesh(replica: int, data: int):
    return jax.make_mesh(
        (replica, data),
        ("replica", "data"),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=jax.devices()[: replica * data],
    )


def test_equal_values_have_the_same_checksum_under_any_sharding():
    rng = np.random.default_rng(0)
    tree = {
        "w": rng.standard_normal((2, 16, 8)).astype(np.float32),
        "m": rng.standard_normal((2, 16, 8)).astype(ml_dtypes.bfloat16),
        "step": np.int32(3),
    }
    expected = {name: reference_checksum(leaf) for name, leaf in tree.items()}
    shardings = [
        (mesh(1, 1), PartitionSpec()),
        (mesh(2, 4), PartitionSpec()),
        (mesh(2, 4), PartitionSpec("replica", "data")),
        (mesh(1, 8), PartitionSpec(None, None, "data")),
    ]
    for device_mesh, spec in shardings:
        placed = {
            name: jax.device_put(
                leaf, NamedSharding(device_mesh, spec if leaf.ndim else PartitionSpec())
            )
            for name, leaf in tree.items()
        }
        assert tree_checksum(placed) == expected, spec
    assert tree_checksum(jax.tree.map(jnp.asarray, tree)) == expected


def test_describe_leaves():
    tree = {"a": {"b": jnp.ones((2, 3), jnp.bfloat16)}, "empty": jnp.ones((0, 4))}
    assert describe_leaves(tree) == {
        "a/b": ["bfloat16", [2, 3], reference_checksum(np.asarray(tree["a"]["b"]))],
        "empty": ["float32", [0, 4], "0" * 16],
    }
    assert tree_checksum({}) == {}
    assert json_checksum({"a": 1, "b": 2}) == json_checksum({"b": 2, "a": 1})
    assert json_checksum({"a": 1}) != json_checksum({"a": 2})


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_positive_and_negative_zero_differ(dtype):
    assert tree_checksum([jnp.asarray(0.0, dtype)]) != tree_checksum([jnp.asarray(-0.0, dtype)])
