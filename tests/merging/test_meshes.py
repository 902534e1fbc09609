"""Meshes with Auto and Explicit axes, `jax.shard_map`, and trees on several devices."""

from __future__ import annotations

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from modelstock_jax import merging
from modelstock_jax.merging import Stats, model_stock, stack_replicas
from tests.merging.trees import nested, replicas

SHAPES = {
    **{f"self_attn.{role}_proj.kernel": (16, 16) for role in "qkv"},
    "mlp.kernel": (16, 32),
    "mlp.bias": (32,),
    "odd": (3, 5),
    "scale": (),
}
W0, W = (nested(tree) for tree in replicas(SHAPES, 2))
FOUR = nested(replicas(SHAPES, 4)[1])
ONES = jax.tree.map(lambda x: np.ones((), np.float32), W0)
MERGES = {
    "model_stock": model_stock,
    "layer": partial(model_stock, unit="layer"),
    "filter": partial(model_stock, unit="filter"),
    "head": lambda w0, w: model_stock(
        {"self_attn": w0["self_attn"]}, {"self_attn": w["self_attn"]}, unit="head", num_heads=4
    ),
    "weighted": merging.weighted_model_stock,
    "carried": merging.model_stock_carried,
    "carried by filter": partial(merging.model_stock_carried, unit="filter"),
    "uniform_mean": merging.uniform_mean,
    "wise_ft": lambda w0, w: merging.wise_ft(w0, w, 0.3),
    "constant_ratio": merging.constant_ratio,
    "task_arithmetic": lambda w0, w: merging.task_arithmetic(w0, w, (0.3, -0.1)),
    "ties": merging.ties,
    "slerp": merging.slerp,
}
ANALYSES = {
    "distances": merging.distances,
    "distance": lambda w0, w: merging.distance(w0, jax.tree.map(lambda x: 2 * x + 1, w0)),
    "cosines": merging.cosines,
    "norms": partial(merging.norms, unit="filter"),
    "mean_model": lambda w0, w: merging.mean_model(w),
    "thin_shell": lambda w0, w: merging.thin_shell(
        w0, jax.tree.map(lambda x: jnp.concatenate([x, 1 - x]), w)
    ),
    "plane": lambda w0, w: _coordinates(w0, w),
    "random_point": lambda w0, w: merging.random_point(jax.random.key(0), w0, ONES),
    "twa": lambda w0, w: merging.twa_params(
        merging.twa_span(w), merging.twa_init(merging.twa_span(w))
    ),
    "stack_replicas": lambda w0, w: stack_replicas([w0, jax.tree.map(np.ones_like, W0)]),
}
FUNCTIONS = MERGES | ANALYSES
EXPLICIT, AUTO = AxisType.Explicit, AxisType.Auto


def _coordinates(w0, w):
    first = jax.tree.map(lambda x: 2 * x + 1, w0)
    second = jax.tree.map(lambda x: x + jnp.cos(x * x), w0)
    return merging.plane_coordinates(merging.plane_through(w0, first, second), w)


def _mesh(*axis_types):
    return jax.make_mesh((2, 4), ("replica", "data"), axis_types=axis_types)


def _placed(mesh, anchor, tuned):
    """Return the models on the mesh; `anchor` and `tuned` say over which axes they are sharded."""

    def put(tree, axes, lead):
        def put_leaf(x):
            inner = [None] * (x.ndim - lead)
            if "data" in axes and inner and x.shape[-1] % 4 == 0:
                inner[-1] = "data"
            first = ["replica" if "replica" in axes else None] * lead
            return jax.device_put(x, NamedSharding(mesh, P(*first, *inner)))

        return jax.tree.map(put_leaf, tree)

    return put(W0, anchor, 0), put(W, tuned, 1)


def _check(name, got, anchor=None):
    """Compare with the result on one device; merged weights are placed as the anchor is."""
    want = FUNCTIONS[name](W0, W)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        # Sums over shards are in float64: float32's last rounding may differ.
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    if anchor is not None and isinstance(got, tuple) and isinstance(got[1], Stats):
        merged = jax.tree.leaves(got[0])
        like = jax.tree.leaves(anchor if len(merged) == len(SHAPES) else anchor["self_attn"])
        for x, y in zip(merged, like, strict=True):
            assert x.sharding.is_equivalent_to(y.sharding, x.ndim), (x.sharding, y.sharding)


PLACES = {"replicas apart": ("", "replica"), "both": ("data", "replica data")}
MORE_PLACES = PLACES | {"as the anchor": ("data", "data"), "anchor whole": ("", "data")}


def _slow_unless(selected, *case):
    """Compiling for eight devices takes seconds, so most combinations are slow tests."""
    return pytest.param(*case, marks=[] if selected else pytest.mark.slow)


@pytest.mark.parametrize(
    "name,places",
    [
        _slow_unless(places == "replicas apart" or name in ("model_stock", "ties"), name, places)
        for name in FUNCTIONS
        for places in PLACES
    ],
)
def test_explicit_mesh(name, places):
    w0, w = _placed(_mesh(EXPLICIT, EXPLICIT), *PLACES[places])
    _check(name, FUNCTIONS[name](w0, w), w0)
    _check(name, jax.jit(FUNCTIONS[name])(w0, w), w0)


@pytest.mark.parametrize(
    "name,axis_types,places",
    [
        _slow_unless(name == "model_stock" and places == "both", name, axis_types, places)
        for name in ("model_stock", "filter", "ties")
        for axis_types in ((AUTO, AUTO), (EXPLICIT, AUTO), (AUTO, EXPLICIT))
        for places in MORE_PLACES
    ],
)
def test_auto_and_mixed_meshes(name, axis_types, places):
    mesh = _mesh(*axis_types)
    w0, w = _placed(mesh, *MORE_PLACES[places])
    _check(name, FUNCTIONS[name](w0, w), w0)
    _check(name, jax.jit(FUNCTIONS[name])(w0, w))


@pytest.mark.parametrize("places", ["replicas apart", "as the anchor"])
def test_filter_under_set_mesh(places):
    """The output axis is the sharded one, so every device has the units of its channels."""
    mesh = _mesh(EXPLICIT, EXPLICIT)
    with jax.set_mesh(mesh):
        w0, w = _placed(mesh, *MORE_PLACES[places])
        _check("filter", jax.jit(FUNCTIONS["filter"])(w0, w), w0)
        _check("filter", FUNCTIONS["filter"](w0, w), w0)


def test_no_replica_is_gathered():
    """Replicas move in an all-to-all; only the merged tensor is gathered, as the anchor asks."""
    w0, w = _placed(_mesh(EXPLICIT, EXPLICIT), "", "replica")
    w0, w = w0["mlp"]["kernel"], w["mlp"]["kernel"]
    text = jax.jit(model_stock).lower(w0, w).compile().as_text()
    gathered = re.findall(r"= \(?\w+\[([\d,]*)\]\S* (all-gather|all-reduce)\(", text)
    sizes = sorted(int(np.prod([int(d) for d in shape.split(",") if d])) for shape, _ in gathered)
    assert re.search(r" all-to-all\(", text)
    assert sum(size >= w0.size for size in sizes) == 1 and max(sizes) == w0.size, sizes


SHARD_MAP = {k: v for k, v in FUNCTIONS.items() if k not in ("head", "stack_replicas")}


@pytest.mark.parametrize("name", SHARD_MAP)
def test_shard_map(name):
    """Replicas that vary over a mesh axis, with `check_vma`."""
    mesh = _mesh(AUTO, AUTO)

    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("replica")), out_specs=P("replica"))
    def gathered(w0, w):
        w = jax.tree.map(lambda x: jax.lax.all_gather(x[0], "replica"), w)
        return jax.tree.map(lambda x: x[None], SHARD_MAP[name](w0, w))

    for_each_device = jax.jit(gathered)(W0, W)
    _check(name, jax.tree.map(lambda x: x[1], for_each_device))


def test_shard_map_keeps_the_type_of_each_tensor():
    """A tensor that is constant over the mesh remains constant if another tensor varies over it."""
    mesh = _mesh(AUTO, AUTO)
    w0 = {"kernel": W0["mlp"]["kernel"], "bias": W0["mlp"]["bias"]}
    w = {"kernel": np.stack([W["mlp"]["kernel"]] * 4), "bias": W["mlp"]["bias"]}
    out_specs = {"kernel": P("data"), "bias": P()}  # check_vma rejects P() for a varying bias

    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), out_specs), out_specs=out_specs)
    def merge(w0, w):
        merged, _ = model_stock(w0, w | {"kernel": w["kernel"][0]})
        return merged | {"kernel": merged["kernel"][None]}

    merged = jax.jit(merge)(w0, w)
    want, _ = model_stock(w0, W["mlp"])
    np.testing.assert_array_equal(merged["bias"], want["bias"])
    np.testing.assert_array_equal(merged["kernel"][3], want["kernel"])


@pytest.mark.parametrize("name", [name for name in MERGES if name != "layer"])
def test_tensors_on_different_devices(name):
    """Pipeline placement: units are independent, so each is merged where it is."""
    devices = jax.devices()
    function = MERGES[name]
    if name == "ties":
        function = partial(merging.ties, unit="tensor")  # the default ranks all tensors together
    leaves, treedef = jax.tree.flatten(W0)
    own = [devices[0 if name == "head" else k % 3] for k in range(len(leaves))]
    place = treedef.unflatten(own)
    w0, w = jax.device_put(W0, place), jax.device_put(W, place)
    merged, *_ = function(w0, w)
    want, *_ = function(W0, W)
    for x, y, device in zip(*map(jax.tree.leaves, (merged, want)), own, strict=False):
        np.testing.assert_array_equal(x, y)
        assert x.devices() == {device}


def test_shell_and_distances_over_different_devices():
    devices = jax.devices()
    place = jax.tree.unflatten(jax.tree.structure(W0), [devices[k % 3] for k in range(len(SHAPES))])
    w0, w = jax.device_put(W0, place), jax.device_put(FOUR, place)
    np.testing.assert_array_equal(merging.distances(w0, w), merging.distances(W0, FOUR))
    got, want = merging.thin_shell(w0, w), merging.thin_shell(W0, FOUR)
    np.testing.assert_array_equal(got.radius, want.radius)
