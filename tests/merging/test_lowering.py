"""The compiled merge: no dot on any backend, and no gathered tensor under sharding."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from modelstock_jax.merging import (
    constant_ratio,
    model_stock,
    model_stock_carried,
    slerp,
    task_arithmetic,
    ties,
    uniform_mean,
    weighted_model_stock,
    wise_ft,
)
from tests.merging.trees import nested, replicas

SHAPES = {
    **{f"self_attn.{role}_proj.kernel": (64, 64) for role in ("q", "k", "v", "out")},
    "mlp.kernel": (64, 256),
    "mlp.bias": (256,),
    "logit_scale": (),
}
MERGES = {
    "stock": model_stock,
    "filter": lambda w0, w: model_stock(w0, w, unit="filter"),
    "head": lambda w0, w: model_stock(w0, w, unit="head", num_heads=8),
    "weighted": weighted_model_stock,
    "carried": model_stock_carried,
    "mean": uniform_mean,
    "wise_ft": lambda w0, w: wise_ft(w0, w, 0.5),
    "constant": constant_ratio,
    "task_arithmetic": lambda w0, w: task_arithmetic(w0, w, 0.4),
    "ties": ties,
    "slerp": slerp,
}


def low_precision(text):
    """Return the operations of a StableHLO module that a backend may run in TF32 or bfloat16."""
    dots = re.findall(r"stablehlo\.(?:dot_general|dot|convolution)\b.*", text)
    narrow = re.findall(
        r"stablehlo\.(?:add|subtract|multiply|divide|reduce|sqrt)\b.*x(?:bf16|f16|f8\w+)>.*", text
    )
    return dots + narrow


def _module(merge, platform, dtype):
    w0, w = replicas(SHAPES, 3, dtype=dtype)
    lowered = export.export(jax.jit(merge), platforms=[platform])(nested(w0), nested(w))
    return lowered.mlir_module()


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("name", MERGES)
def test_no_low_precision_operation(name, platform):
    text = _module(MERGES[name], platform, jnp.bfloat16)
    assert low_precision(text) == []
    assert re.search(r"stablehlo\.reduce.*f64", text), "the sum over elements is in float64"


@pytest.mark.parametrize(
    "wrong",
    [
        lambda w0, w: jnp.vdot(w - w0[None], w - w0[None]),
        lambda w0, w: jnp.einsum("nij,mij->nm", w.astype(jnp.float32), w.astype(jnp.float32)),
        lambda w0, w: jnp.linalg.norm(w - w0[None]),
    ],
)
def test_low_precision_operations_are_found(wrong):
    w0, w = (tree["mlp.kernel"] for tree in replicas(SHAPES, 2, dtype=jnp.bfloat16))
    text = export.export(jax.jit(wrong), platforms=["tpu"])(w0, w).mlir_module()
    assert low_precision(text)


@pytest.mark.parametrize("num", [2, 5])
def test_no_tensor_stays_in_memory_between_the_two_passes(num):
    """XLA does not reuse the float64 task vectors of the Gram matrix for the merged weights."""
    w0, w = replicas({"fc1.kernel": (256, 1024), "fc2.kernel": (1024, 256)}, num)
    compiled = jax.jit(model_stock).lower(nested(w0), nested(w)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**16  # a kernel has 2^20


SPECS = [P("data", None), P(None, "data"), P(("replica", "data"), None)]


def _sharded_models(spec):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("replica", "data"))
    w0, w = replicas(SHAPES, 2)

    def put(x, lead):
        rank = x.ndim - lead
        axes = tuple(spec) if rank == 2 else ("data",) * rank
        return jax.device_put(x, NamedSharding(mesh, P(*(None,) * lead, *axes)))

    return nested({k: put(v, 0) for k, v in w0.items()}), nested(
        {k: put(v, 1) for k, v in w.items()}
    )


@pytest.mark.parametrize(
    "unit,spec",
    [
        *(("tensor", spec) for spec in SPECS),
        ("layer", SPECS[2]),
        ("filter", SPECS[1]),
        ("filter", SPECS[2]),
        ("head", SPECS[1]),
        ("global", SPECS[0]),
    ],
)
def test_sharded_equals_unsharded_and_gathers_no_tensor(spec, unit):
    options = {"unit": unit, "num_heads": 8 if unit == "head" else None}
    w0, w = _sharded_models(spec)
    jitted = jax.jit(model_stock, static_argnames=("unit", "num_heads"))
    text = jitted.lower(w0, w, **options).compile().as_text()
    # Statistics may be gathered, at most N x N x 256 filters of all tensors; weights never.
    gathers = re.findall(
        r"= \(?(\w+)\[([\d,]*)\]\S* (all-gather|all-to-all|collective-permute)", text
    )
    for dtype, shape, op in gathers:
        dims = [int(d) for d in shape.split(",") if d]
        full = any(np.prod(dims) >= np.prod(s) and len(s) == 2 for s in SHAPES.values())
        assert not full or dims[:2] == [2, 2], (dtype, shape, op)
    plain0, plain = replicas(SHAPES, 2)
    expected = model_stock(nested(plain0), nested(plain), **options)
    merged, stats = jitted(w0, w, **options)
    for got, want in zip(jax.tree.leaves(stats), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-7)  # float32's rounding of float64 sums
    for got, want in zip(jax.tree.leaves(merged), jax.tree.leaves(expected[0]), strict=True):
        np.testing.assert_array_max_ulp(np.asarray(got), np.asarray(want), 1)
    kernel = merged["mlp"]["kernel"]
    assert kernel.sharding.is_equivalent_to(w0["mlp"]["kernel"].sharding, 2)


def test_a_ravel_would_gather():
    w0, w = _sharded_models(P(None, "data"))
    d0, d = w0["mlp"]["kernel"], w["mlp"]["kernel"]
    wrong = jax.jit(lambda a, b: jnp.sum(jnp.cumsum((b - a[None]).reshape(2, -1), axis=1)))
    assert re.search(
        r"all-gather|all-to-all|collective-permute", wrong.lower(d0, d).compile().as_text()
    )
