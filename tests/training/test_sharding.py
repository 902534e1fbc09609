"""Training on any mesh equals plain runs; memory and traffic of its devices."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from modelstock_jax.errors import UserError
from modelstock_jax.models.compute import Compute
from modelstock_jax.models.model import classifier
from modelstock_jax.training.cost_analysis import collectives, device_bytes
from modelstock_jax.training.losses import cross_entropy
from modelstock_jax.training.sharding import fsdp_spec, mesh_shape, put_batch
from modelstock_jax.training.step_fns import StepFunctions
from tests.training import tiny

STEPS, MERGED_AFTER = 20, 10
MIN_SIZE = 64  # elements: splits every kernel of the tiny model, but no bias or norm
SEED = 0


def plain_run(dtype, steps: int):
    """Train two replicas one after the other with jax.grad and optax; merge with NumPy.

    Returns:
      initial parameters, final parameters of the replicas, and (loss, gradient) of their first step
    """
    config = tiny.config()
    loss_fn, peak = tiny.loss_fn(dtype), config.optimizer.learning_rate

    def schedule(count):  # In float32 for any dtype of the parameters, as in a run.
        progress = (count - 2) / (STEPS - 2)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return peak * jnp.where(count < 2, (count + 1) / 2, cosine)

    tx = optax.chain(
        optax.clip_by_global_norm(config.optimizer.clip_norm),
        optax.adamw(schedule, weight_decay=config.optimizer.weight_decay),
    )

    @jax.jit
    def step(params, opt_state, key, batch):
        batch = tiny.augment(key, batch, dtype)
        (loss, _), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params, batch)
        updates, opt_state = tx.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss, gradient

    start = tiny.params(dtype)
    stream = tiny.batches(config)
    data = [next(stream) for _ in range(steps)]
    replicas, opt_states, first = [start, start], [tx.init(start), tx.init(start)], []
    for s, batch in enumerate(data):
        if s == MERGED_AFTER:
            replicas = [jax.tree.map(merge_in_numpy, start, *replicas)] * 2
        for r in (0, 1):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), r), s)
            replica_batch = {name: value[r] for name, value in batch.items()}
            replicas[r], opt_states[r], loss, gradient = step(
                replicas[r], opt_states[r], key, replica_batch
            )
            if s == 0:
                first.append((loss, gradient))
    return start, replicas, first


def merge_in_numpy(start, *replicas):
    """Equation 2 for one tensor: t = 2 cos / (1 + cos), w0 + t (mean of the replicas - w0)."""
    one, two = (np.asarray(replica, np.float64) - start for replica in replicas)
    cosine = (one * two).sum() / np.sqrt((one**2).sum() * (two**2).sum())
    ratio = 2 * cosine / (1 + cosine) if cosine > 0 else 0.0
    return start + ratio * (one + two) / 2


plain_run_once = functools.cache(plain_run)


@functools.cache
def compiled(shape, replica_mode, min_size, dtype=np.float32, accumulate=False):
    """Return the StepFunctions of a run, and its compiled step and merge."""
    config = tiny.config(
        mesh__replica=shape[0],
        mesh__data=shape[1],
        mesh__fsdp_min_size=min_size,
        compute__replica_mode=replica_mode,
        gradient_accumulation_steps=2 if accumulate else 1,
        seed=SEED,
    )
    task = tiny.task(config, epochs=STEPS // 4, dtype=dtype)
    if accumulate:
        apply = classifier(tiny.clip_config(), Compute(dtype=dtype, remat=True))
        loss = cross_entropy(apply, lambda images: images, label_smoothing=0.1)
        task = dataclasses.replace(task, loss_fn=loss)
    with jax.enable_x64(dtype == np.float64):
        fns = StepFunctions(config, task)
        lowered = fns.lower(fns.abstract_batch(12))
        return fns, {name: step.compile() for name, step in lowered.items()}


def named(tree):
    paths = jax.tree_util.tree_flatten_with_path(jax.device_get(tree))[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}


SHARDED = ((2, 4), "vmap", MIN_SIZE, np.float64)
ALL = [
    (shape, replica_mode, min_size, np.float64)
    for shape in ((1, 1), (2, 1), (1, 8), (2, 4))
    for replica_mode in (("vmap", "map") if shape[0] == 1 else ("vmap",))
    for min_size in (0, MIN_SIZE)
]
OTHERS = [*(case for case in ALL if case != SHARDED), ((1, 8), "map", MIN_SIZE, np.float64, True),
          ((2, 4), "vmap", MIN_SIZE, np.float64, True)]  # fmt: skip
# Compilation takes seconds: the fast suite compiles for one mesh and runs every test on it.
MESHES = [
    SHARDED,
    *(
        pytest.param((shape, "vmap", min_size), marks=pytest.mark.slow)
        for shape in ((2, 1), (1, 8), (2, 4))
        for min_size in (0, MIN_SIZE)
    ),
]


@pytest.mark.parametrize(
    "case", [SHARDED, *(pytest.param(case, marks=pytest.mark.slow) for case in OTHERS)]
)
def test_every_mesh_equals_plain_runs(x64, case):
    fns, steps = compiled(*case)
    state, merged, stream = fns.init_state(SEED), None, tiny.batches(tiny.config())
    for s in range(STEPS):
        if s == MERGED_AFTER:
            state, merged, _ = steps["merge"](fns.anchor, state)
        batch = put_batch(fns.mesh, next(stream))
        state, _ = steps["step"](state, batch, fns.step_constants(fns.anchor, merged))
    start, replicas, _ = plain_run_once(jnp.float64, STEPS)
    params, start = named(state.params), named(start)
    for r, replica in enumerate(replicas):
        for name, expected in named(replica).items():
            error = np.abs(params[name][r] - expected).max()
            update = np.linalg.norm(expected - start[name])
            # Key biases receive no gradient (softmax is shift-invariant), only rounding errors.
            bound = 1e-9 if "k_proj" in name and "bias" in name else 1e-8 * update
            assert error <= bound, (name, error, update)
            assert update > 0, name


@pytest.mark.slow
@pytest.mark.parametrize("min_size", [0, MIN_SIZE])
@pytest.mark.parametrize("shape", [(2, 1), (1, 8), (2, 4)])
def test_first_step_in_float32(shape, min_size):
    fns, steps = compiled(shape, "vmap", min_size)
    batch = put_batch(fns.mesh, next(tiny.batches(tiny.config())))
    state, metrics = steps["step"](fns.init_state(SEED), batch, fns.step_constants(fns.anchor))
    (adam,) = (part for part in state.opt_state if hasattr(part, "mu"))
    _, _, first = plain_run_once(jnp.float32, 1)
    for r, (loss, gradient) in enumerate(first):
        np.testing.assert_allclose(metrics["loss"][r], loss, rtol=1e-5)
        gradient = named(gradient)
        norm = np.sqrt(sum((leaf**2).sum() for leaf in gradient.values()))
        assert norm < 1, "the gradient was clipped"
        np.testing.assert_allclose(metrics["grad_norm"][r], norm, rtol=1e-5)
        for name, moment in named(adam.mu).items():
            # Adam's first moment starts at (1 - b1) times the gradient. Sums of 16 examples in
            # another order agree to 1e-5 of the tensor's maximum, or of 1e-3 of the norm.
            bound = 1e-5 * max(np.abs(gradient[name]).max(), 1e-3 * norm)
            error = np.abs(moment[r] / 0.1 - gradient[name]).max()
            assert error <= bound, (name, error, bound)


@pytest.mark.parametrize("case", MESHES)
def test_a_step_has_no_collective_across_replicas(case):
    shape, _, min_size, *_ = case
    used = collectives(compiled(*case)[1]["step"].as_text())
    assert used or shape[1] == 1
    for collective in used:
        assert collective.within(shape[1]), collective  # Mesh rows are consecutive devices.
        # Parameters are gathered and gradients are summed; activations are not moved.
        assert collective.kind in ("all-gather", "all-reduce", "reduce-scatter"), collective
    gathered = sorted(_squeezed(s) for c in used if c.kind == "all-gather" for _, s in c.shapes)
    large = sorted(leaf.shape for leaf in jax.tree.leaves(tiny.params()) if leaf.size >= MIN_SIZE)
    if shape[0] == 2:  # On (1, 8), one all-gather covers both replicas of a kernel.
        sharded = [s for s in large if fsdp_spec(s, shape[1], min_size) != PartitionSpec()]
        assert gathered == sharded, "each sharded parameter must be gathered once"


@pytest.mark.parametrize("case", MESHES)
def test_a_merge_gathers_only_its_result(case):
    shape, _, min_size, *_ = case
    fns, steps = compiled(*case)
    width = fns.abstract_anchor["head"]["bias"].dtype.itemsize
    used = collectives(steps["merge"].as_text())
    devices, tensors = math.prod(shape), len(jax.tree.leaves(tiny.params()))
    gathers = [sizes for c in used if c.kind == "all-gather" for _, sizes in c.shapes]
    # Each tensor needs three products of two task vectors; the devices' partial sums are gathered
    # along one mesh axis, then along the other.
    sums = [sizes for sizes in gathers if math.prod(sizes) <= devices]
    assert len(sums) <= 2 * 3 * tensors
    tensors_gathered = [sizes for sizes in gathers if sizes not in sums]
    bytes_gathered = sum(width * math.prod(sizes) for sizes in tensors_gathered)
    if shape[0] == 1:
        assert not tensors_gathered, "the replicas are on the same devices"
    else:
        # The head's bias of 5 classes cannot be split in two: it is gathered for both replicas.
        allowed = device_bytes(fns.abstract_anchor) + 2 * 5 * width
        assert bytes_gathered <= allowed, "a merged tensor is gathered more than once"
        assert any(c.kind == "all-to-all" for c in used), (
            "the replicas must be exchanged by all-to-all"
        )
        # Half of a replica and half of the merged model, in the dtype of the parameters.
        sent = sum(c.sent for c in used if c.kind != "all-reduce")
        parts_of_sums = 8 * sum(math.prod(sizes) for sizes in sums)
        params = device_bytes(fns.abstract_anchor)
        assert sent - parts_of_sums <= 1.02 * params, "a part is sent more than once"
    sharded = {x.shape for x in jax.tree.leaves(tiny.params())
               if fsdp_spec(x.shape, shape[1], min_size) != PartitionSpec()}  # fmt: skip
    for collective in used:
        for dtype, sizes in collective.shapes:
            # A sharded tensor is never gathered in full, neither of one replica nor of all.
            squeezed = _squeezed(sizes)
            assert squeezed not in sharded and squeezed[1:] not in sharded, collective
            # Task vectors are float64: only their sums may be sent.
            assert width == 8 or dtype != "f64" or math.prod(sizes) <= devices, collective


@pytest.mark.parametrize("case", MESHES)
def test_the_state_is_donated_and_sharded(case):
    shape, _, min_size, dtype = *case[:3], np.dtype((*case, np.float32)[3])
    fns, steps = compiled(*case)
    state = fns.abstract_state
    for name, step in steps.items():
        analysis = step.memory_analysis()
        assert analysis.alias_size_in_bytes >= device_bytes(state), name
        new_outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        merged = device_bytes(fns.abstract_anchor) if name == "merge" else 0
        # Metrics or merge statistics: at most twenty values per leaf, no copy of the state.
        assert 0 <= new_outputs - merged < 20 * 8 * len(jax.tree.leaves(state.params)), name
    params = [x for x in jax.tree.leaves(state.params) if x.size // 2 >= MIN_SIZE]
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.size // 2 >= MIN_SIZE]
    assert len(moments) == 2 * len(params) > 0
    total = sum(x.size * dtype.itemsize for x in params + moments)
    shards = shape[0] * (shape[1] if min_size else 1)
    indivisible = [x for x in params if not any(size % shape[1] == 0 for size in x.shape[1:])]
    assert not indivisible or shape[1] == 8  # On eight devices a kernel of 12 x 12 is replicated.
    if not indivisible:
        assert device_bytes(params + moments) * shards == total
    with jax.enable_x64(dtype == np.float64):
        leaves = jax.tree.leaves(fns.init_state(SEED))
        assert sum(x.addressable_shards[0].data.nbytes for x in leaves) == device_bytes(state)
        assert device_bytes(fns.anchor) == device_bytes(fns.abstract_anchor)


def test_a_tensor_is_split_along_its_largest_divisible_dimension():
    assert fsdp_spec((768, 3072), 8, 1) == PartitionSpec(None, "data")
    assert fsdp_spec((257, 1024), 8, 1) == PartitionSpec(None, "data")
    assert fsdp_spec((769, 8), 8, 1) == PartitionSpec(None, "data")
    assert fsdp_spec((768, 768), 8, 1) == PartitionSpec("data")
    assert fsdp_spec((768, 768), 8, 768**2) == PartitionSpec("data")
    assert fsdp_spec((768, 768), 8, 768**2 + 1) == PartitionSpec()
    assert fsdp_spec((7, 9), 8, 1) == fsdp_spec((), 8, 1) == PartitionSpec()
    assert fsdp_spec((768, 768), 1, 1) == PartitionSpec()


@pytest.mark.parametrize(
    ("devices", "axes", "shape"),
    [(1, (0, 0), (1, 1)), (2, (0, 0), (2, 1)), (3, (0, 0), (1, 3)), (8, (0, 0), (2, 4)),
     (8, (0, 8), (1, 8)), (8, (1, 0), (1, 8)), (8, (2, 2), (2, 2)), (16, (0, 0), (2, 8))],
)  # fmt: skip
def test_mesh_shape(devices, axes, shape):
    assert mesh_shape(devices, *axes, num_replicas=2, batch_size=48) == shape


@pytest.mark.parametrize(
    ("axes", "message"),
    [((4, 0), "mesh.replica=4 .*num_replicas=2"), ((2, 8), "16 devices.* 8 "),
     ((0, 16), "replica 1 x data 16 .*16 devices"), ((-1, 0), "mesh.replica=-1"),
     ((1, 5), "mesh.data=5 .*batch_size=48")],
)  # fmt: skip
def test_an_invalid_mesh_is_one_line(axes, message):
    with pytest.raises(UserError, match=message) as error:
        mesh_shape(8, *axes, num_replicas=2, batch_size=48)
    assert "\n" not in str(error.value)


def test_map_over_replicas_on_several_devices_is_an_error():
    with pytest.raises(UserError, match="compute.replica_mode='map'"):
        compiled((2, 4), "map", MIN_SIZE)


def test_collectives_in_loops_and_with_every_format_of_groups():
    hlo = """\
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = f32[8]{0} all-reduce(%x), replica_groups={{0,4},{1,5}}, to_apply=%add
}

%fused (p: f32[2]) -> f32[8] {
  %s = (f32[2]{0}, f32[8]{0}) all-gather-start(%p), replica_groups=[2,4]<=[4,2]T(1,0)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %f = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused
  %p = bf16[4]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}, metadata={}
  ROOT %r = f32[8]{0} all-reduce(%x), replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}
}
"""  # noqa: E501
    loop, gather, permute, mesh = collectives(hlo)
    assert (loop.kind, loop.times, loop.groups.tolist()) == ("all-reduce", 3, [[0, 4], [1, 5]])
    assert loop.sent == 3 * 32  # 2 (g - 1) / g of 32 bytes, three times
    assert gather.groups.tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert gather.shapes == (("f32", (8,)),) and gather.sent == 24
    assert permute.within(2) and mesh.within(2) and mesh.within(4)
    assert not (loop.within(4) or gather.within(4) or mesh.within(1))
    assert permute.groups.tolist() == [[0, 1], [1, 0]] and permute.sent == 8
    assert mesh.groups.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(ValueError, match="length"):
        collectives(hlo.replace("known_trip_count", "other"))


def _squeezed(sizes):
    return tuple(size for size in sizes if size != 1)
