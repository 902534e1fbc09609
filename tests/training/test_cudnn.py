"""cuDNN's attention in a training step: every operand has the replica axis, lengths are even.

JAX's own rules of the primitive run here (jax issue 36702); cuDNN is not needed to trace a step.
"""

from __future__ import annotations

from collections.abc import Iterator

import chex
import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from configs import glyphs
from modelstock_jax.experiment.dry_run import abstract_step_functions
from modelstock_jax.models.transformer import attention

REPLICAS, BATCH = 2, 6
# Every objective with a backward pass through the towers, and the options that change the pass.
CASES = {
    "cross_entropy": {},
    "remat": {"compute.remat": True},
    "micro-batches": {"gradient_accumulation_steps": 3},
    "mixup": {"data.augment.mixup": 0.4},
    "car_ft": {"objective.name": "car_ft"},
    "flyp": {"objective.name": "flyp"},
    "l2_sp": {"objective.name": "l2_sp"},
    "bitfit": {"objective.name": "bitfit"},
    "ftp": {"optimizer.projection.name": "ftp"},
    "restore_last_merge": {"monitor.on_non_finite": "restore_last_merge"},
    "siglip": {"pretrained": "google/siglip-base-patch16-224"},
}


@pytest.fixture(autouse=True)
def _cudnn_is_installed(monkeypatch):
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)


def attention_operands(jaxpr) -> Iterator[list[tuple[int, ...]]]:
    """Yield the shapes of the operands of each of cuDNN's primitives; placeholders are left out."""
    for equation in jaxpr.eqns:
        if "dot_product_attention" in equation.primitive.name:
            shapes = [x.aval.shape for x in equation.invars]
            yield [shape for shape in shapes if len(shape) >= 3 and 0 not in shape]
        for parameter in jax.tree.leaves(
            equation.params, is_leaf=lambda x: isinstance(x, jax.extend.core.ClosedJaxpr)
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from attention_operands(inner)


@pytest.mark.parametrize("name", CASES)
def test_every_operand_has_the_replica_axis(name):
    config = glyphs.get_config()
    config.compute.dtype, config.compute.attention_impl = "bfloat16", "cudnn"
    config.compute.replica_mode, config.batch_size = "vmap", BATCH
    config.mesh.replica = config.mesh.data = 1
    config.update_from_flattened_dict(CASES[name])
    programs, sizes = abstract_step_functions(config)
    batch = programs.abstract_batch(sizes.image_size)
    traced = programs.train_step.trace(programs.abstract_state, batch, programs.step_constants())
    found = list(attention_operands(traced.jaxpr.jaxpr))
    rows = REPLICAS * BATCH // config.gradient_accumulation_steps
    assert len(found) >= 2 * 4, "forward and backward of the blocks"
    for shapes in found:
        assert {shape[0] for shape in shapes} == {rows}, shapes


def test_an_operand_without_the_axis_is_found():
    x = jnp.zeros((BATCH, 4, 2, 8), jnp.bfloat16)
    unmapped = jax.make_jaxpr(jax.vmap(lambda y: y + attention(x, x, x, False, "cudnn").sum()))
    (shapes,) = attention_operands(unmapped(jnp.zeros(REPLICAS)).jaxpr)
    assert {shape[0] for shape in shapes} == {BATCH}


@pytest.mark.parametrize(
    ("queries", "keys", "causal", "vmapped"),
    [
        (4, 4, False, False), (5, 5, False, False), (5, 5, False, True), (5, 5, True, False),
        (1, 6, False, False), (1, 5, False, False),
    ],
)  # fmt: skip
def test_padding_changes_neither_result_nor_gradient(queries, keys, causal, vmapped, monkeypatch):
    """The same call of JAX, with its `xla` implementation."""
    compute = jax.nn.dot_product_attention

    def on_cpu(q, k, v, *, implementation, **options):
        assert implementation == "cudnn" and q.shape[1] % 2 == k.shape[1] % 2 == 0
        return compute(q, k, v, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", on_cpu)
    rng = jax.random.key(0)
    q, k, v, weight = (
        jax.random.normal(jax.random.fold_in(rng, i), (REPLICAS, 3, length, 2, 8))
        for i, length in enumerate((queries, keys, keys, queries))
    )

    def loss(kind):
        def function(q, k, v, weight):
            y = attention(q, k, v, causal, kind)
            return (y * weight).sum(), y

        function = jax.jit(jax.value_and_grad(function, argnums=(0, 1, 2), has_aux=True))
        if vmapped:
            return jax.vmap(function)(q, k, v, weight)
        return function(q[0], k[0], v[0], weight[0])

    # Sums in another order.
    chex.assert_trees_all_close(loss("cudnn"), loss("xla"), rtol=1e-5, atol=1e-5)
