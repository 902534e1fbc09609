"""Checks of the device's results: against the CPU in float32, against float64, and bit for bit.

gpu_parts.py runs them. Every function yields rows {"check", "found", "allowed", "ok", "reason"}.
"""

from __future__ import annotations

import functools
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import models
from modelstock_jax.merging import model_stock
from modelstock_jax.models.model import init
from modelstock_jax.models.transformer import attention
from modelstock_jax.training.checkpoints import Checkpoints
from modelstock_jax.training.cost_analysis import device_bytes
from modelstock_jax.training.sharding import put_batch

Row = dict[str, Any]
# An operation that may run in TF32, bfloat16 or float16.
LOW_PRECISION = re.compile(r"\b(dot|convolution)\(|custom-call.*(gemm|cublas|cudnn)|\bb?f16\[")
# Relative errors of the gradient and the loss, by the dtype of the towers. On a CPU, bfloat16 has
# errors of 0.009 and 2.4e-4 (small CLIP), and of 0.012 and 3.4e-4 (B/32).
GRADIENT_ALLOWED = {"float32": 1e-4, "bfloat16": 0.04}
LOSS_ALLOWED = {"float32": 1e-5, "bfloat16": 1e-3}
REASON = {
    "float32": "sums in another order",
    "bfloat16": "8 bits of mantissa; three times the error on a CPU",
}


def row(check: str, found: float, allowed: float, reason: str) -> Row:
    """Return the row of a check that passes if the found value is at most the allowed one."""
    ok = bool(found <= allowed)  # False for NaN.
    return {
        "check": check, "found": float(found), "allowed": allowed, "ok": ok, "reason": reason,
    }  # fmt: skip


def merge_is_exact() -> Iterator[Row]:
    """`model_stock` equals equation 3 in float64, and contains no product in low precision."""
    rng = np.random.default_rng(0)
    w0, w = {}, {}
    for name, shape in {"kernel": (768, 3072), "square": (1024, 1024), "bias": (768,)}.items():
        w0[name] = (0.02 * rng.standard_normal(shape)).astype(np.float32)
        update = 1e-3 * (rng.standard_normal(shape) + rng.standard_normal((2, *shape)))
        w[name] = (w0[name] + update).astype(np.float32)
    program = jax.jit(model_stock).lower(w0, w).compile()
    merged, _ = program(w0, w)
    errors = []
    for name, anchor in w0.items():
        expected = float64_merge(anchor, w[name])
        found = np.asarray(merged[name], np.float64)
        errors.append(np.linalg.norm(found - expected) / np.linalg.norm(expected - anchor))
    yield row(
        "model_stock against float64, relative to the update", max(errors), 3e-6,
        "the result is rounded once to float32, at 20 times the size of the update",
    )  # fmt: skip
    found = len(LOW_PRECISION.findall(program.as_text()))
    yield row("low-precision operations in the compiled model_stock", found, 0, "exact count")


def float64_merge(w0: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Return the merge of two replicas by equation 2, in float64."""
    first, second = (w.astype(np.float64) - w0).reshape(2, -1)
    cosine = first @ second / (np.linalg.norm(first) * np.linalg.norm(second))
    t = 2 * cosine / (1 + cosine)
    return t * w.astype(np.float64).mean(axis=0) + (1 - t) * w0


@functools.cache
def gradient_function(size: str, dtype: str, attention_impl: str, vmapped: bool = False):
    """Return a jitted (params, batch) -> (loss, gradient) of a training step."""
    config = models.run_config(size, dtype)
    config.compute.attention_impl = attention_impl
    loss_fn = models.make_loss(config, size)
    function = jax.value_and_grad(lambda params, batch: loss_fn(params, batch)[0])
    return jax.jit(jax.vmap(function) if vmapped else function)


@functools.cache
def inputs(size: str, seed: int, batch_size: int) -> tuple[Any, dict[str, np.ndarray]]:
    """Return initial parameters and a batch on the host."""
    *_, side, features, classes = models.SIZES[size]
    with jax.default_device(jax.devices("cpu")[0]):
        tower = init(models.clip_config(size), jax.random.key(seed))["image_tower"]
    rng = np.random.default_rng(seed)
    head = {
        "kernel": rng.standard_normal((features, classes), np.float32),
        "bias": np.zeros(classes, np.float32),
    }
    batch = {
        "image": rng.integers(0, 256, (batch_size, side, side, 3), np.uint8),
        "label": rng.integers(0, classes, batch_size).astype(np.int32),
    }
    return {"image_tower": jax.tree.map(np.asarray, tower), "head": head}, batch


def compute_gradient(size: str, dtype: str, attention_impl: str, values, device, vmapped=False):
    """Return (loss, gradient) on the host, computed on a device; float32 without TF32."""
    function = gradient_function(size, dtype, attention_impl, vmapped)
    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        return jax.device_get(function(*jax.device_put(values, device)))


@functools.cache
def reference(size: str, batch_size: int):
    """Return (loss, gradient) of the CPU in float32."""
    return compute_gradient(
        size, "float32", "xla", inputs(size, 0, batch_size), jax.devices("cpu")[0]
    )


def relative_error(found: Any, expected: Any) -> float:
    """Return |found - expected| / |expected| over all leaves."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    squares = [
        (np.sum((np.float64(a) - b) ** 2), np.sum(np.float64(b) ** 2)) for a, b in pairs
    ]  # fmt: skip
    difference, norm = np.sum(squares, axis=0)
    return float(np.sqrt(difference / norm))


def gradients_agree(size: str, batch_size: int, dtype: str, attention_impl: str) -> Iterator[Row]:
    """The loss and the gradient of a step equal those of the CPU in float32."""
    expected_loss, expected = reference(size, batch_size)
    loss, gradient = compute_gradient(
        size, dtype, attention_impl, inputs(size, 0, batch_size), jax.devices()[0]
    )
    name = f"{size}, {dtype}, {attention_impl}"
    yield row(
        f"{name}: loss", relative_error(loss, expected_loss), LOSS_ALLOWED[dtype], REASON[dtype]
    )
    yield row(
        f"{name}: gradient", relative_error(gradient, expected), GRADIENT_ALLOWED[dtype],
        REASON[dtype],
    )  # fmt: skip


def pair_agrees(size: str, batch_size: int, dtype: str, attention_impl: str) -> Iterator[Row]:
    """Each replica of a vmapped pair has the loss and gradient of a single replica."""
    singles = [inputs(size, seed, batch_size) for seed in (0, 1)]
    device = jax.devices()[0]
    pair = jax.tree.map(lambda *x: np.stack(x), *singles)
    found = compute_gradient(size, dtype, attention_impl, pair, device, vmapped=True)
    expected = [compute_gradient(size, dtype, attention_impl, x, device) for x in singles]
    yield row(
        f"{size}, {dtype}, {attention_impl}: vmapped pair against single replicas",
        relative_error(found, jax.tree.map(lambda *x: np.stack(x), *expected)),
        GRADIENT_ALLOWED[dtype], REASON[dtype],
    )  # fmt: skip


def attentions_agree(tokens: int, kind: str, vmapped: bool) -> Iterator[Row]:
    """An attention in bfloat16 is as exact as `xla`, forward and backward.

    Args:
      tokens: length of q, k and v
      kind: the attention implementation
      vmapped: under `vmap`, as for a pair of replicas
    """
    shape = (4, tokens, 2, 64)
    *qkv, weight = (
        jax.random.normal(key, (2, *shape) if vmapped else shape)
        for key in jax.random.split(jax.random.key(0), 4)
    )

    def compute(kind, dtype):
        def loss(q, k, v, weight):
            y = attention(*(x.astype(dtype) for x in (q, k, v)), False, kind)
            return (y.astype(jnp.float32) * weight).sum(), y.astype(jnp.float32)

        function = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
        with jax.default_matmul_precision("highest"):
            return jax.device_get(
                jax.jit(jax.vmap(function) if vmapped else function)(*qkv, weight)
            )

    exact = compute("xla", jnp.float32)
    xla, found = (compute(name, jnp.bfloat16) for name in ("xla", kind))
    for part, name in ((1, "output"), (0, "gradient")):
        yield row(
            f"attention {kind}, {tokens} tokens{', vmap' * vmapped}: {name}",
            relative_error(found[part], exact[part]),
            2 * relative_error(xla[part], exact[part]),
            "twice the error of xla in bfloat16",
        )  # fmt: skip


def state_is_donated(size: str, batch_size: int) -> Iterator[Row]:
    """A step replaces its state in place, and a checkpoint of it is restored bit for bit."""
    config = models.run_config(size)
    config.batch_size = batch_size
    params, _ = inputs(size, 0, batch_size)
    programs = models.make_programs(config, size, params)
    batch = jax.tree.map(
        lambda *x: np.stack(x), *(inputs(size, seed, batch_size)[1] for seed in range(2))
    )
    batch, constants = put_batch(programs.mesh, batch), programs.step_constants()
    state = programs.init_state(0)
    step = programs.train_step.lower(state, batch, constants).compile()
    state, _ = jax.block_until_ready(step(state, batch, constants))
    state_bytes, before = device_bytes(state), bytes_in_use()
    old, (state, _) = state, jax.block_until_ready(step(state, batch, constants))
    grown, kept = bytes_in_use() - before, [x for x in jax.tree.leaves(old) if not x.is_deleted()]
    yield row(
        "memory added by a step, relative to the state", grown / state_bytes, 0.05,
        "metrics of some bytes; a copy of the state is 1",
    )  # fmt: skip
    yield row("arrays of the old state that still exist", len(kept), 0, "exact count")
    aliased = step.memory_analysis().alias_size_in_bytes
    yield row(
        "part of the state that XLA does not update in place", 1 - aliased / state_bytes, 0.01,
        "its step counter may be copied",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        restored = is_restored_bitwise(Path(directory), state, programs.anchor)
    yield row("checkpoint restored bit for bit (0: yes)", int(not restored), 0, "bitwise")


def bytes_in_use() -> int:
    """Return the bytes of all arrays on the first device."""
    statistics = jax.devices()[0].memory_stats()
    if statistics:
        return statistics["bytes_in_use"]
    return sum(x.nbytes for x in jax.live_arrays())


def is_restored_bitwise(workdir: Path, state, merged) -> bool:
    """Save and restore the state and the merged model; return whether they are equal."""
    tree = {"merged": merged, "state": {k: v for k, v in state._asdict().items() if v is not None}}
    with Checkpoints(workdir, keep=1) as checkpoints:
        checkpoints.save(int(state.step), tree)
        checkpoints.wait()
        restored = checkpoints.restore(int(state.step), tree)
        equal = jax.tree.leaves(jax.tree.map(lambda a, b: np.array_equal(a, b), tree, restored))
    return bool(equal) and all(equal)


def resize_equals_pillow() -> Iterator[Row]:
    """The resize on the device rounds as Pillow's does, and RandAugment has its bits."""
    # The other checks need no image libraries.
    from PIL import Image

    from modelstock_jax.data.device_resize import make_resize
    from modelstock_jax.data.randaugment import ENCODED, apply_operations
    from modelstock_jax.data.transforms import TrainTransform
    from modelstock_jax.data.views import GEOMETRY

    count, size = 64, 64
    transform = TrainTransform(
        size, (0.08, 1.0), flip=True, randaugment_ops=2, randaugment_magnitude=12
    )
    pixels = np.random.default_rng(0).integers(0, 256, (150, 180, 3), np.uint8)
    side = transform.canvas_side(None)
    arrays = {
        "image": np.zeros((count, side, side, 3), np.uint8),
        "geometry": np.zeros((count, GEOMETRY), np.float32),
        "operations": np.zeros((count, 2, ENCODED), np.int32),
    }
    views = [transform.view(pixels, np.random.default_rng(k), side) for k in range(count)]
    for number, view in enumerate(views):
        view.store({name: array[number] for name, array in arrays.items()}, size)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    resize = make_resize(sharding, size, transform.resample)
    augmented = np.asarray(resize(arrays))
    resized = np.asarray(resize({name: arrays[name] for name in ("image", "geometry")}))
    expected = np.stack([np.asarray(view.resize(size, transform.resample)) for view in views])
    levels = np.abs(resized.astype(int) - expected)
    yield row("resize and Pillow's, gray levels", levels.max(), 1, "values near a half")
    yield row(
        "resize and Pillow's, part of different values", (levels > 0).mean(), 1e-3,
        "ten times the part on a CPU; weights in TF32 give 0.03",
    )  # fmt: skip
    expected = np.stack([
        np.asarray(apply_operations(Image.fromarray(image), view.operations))
        for image, view in zip(resized, views, strict=True)
    ])  # fmt: skip
    different = (augmented != expected).sum()
    yield row("RandAugment and Pillow's, different values", different, 0, "bitwise")
