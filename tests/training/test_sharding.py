"""One program on any mesh: the parameters of plain runs; what its devices hold and send."""

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
from modelstock_jax.models.clip import classifier
from modelstock_jax.models.transformer import Compute
from modelstock_jax.training.cost_analysis import collectives, device_bytes
from modelstock_jax.training.losses import cross_entropy
from modelstock_jax.training.sharding import fsdp_spec, mesh_shape, put_batch
from modelstock_jax.training.step_fns import StepFunctions, use_compilation_cache
from tests.training import tiny

STEPS, MERGED_AFTER = 20, 10
SPLIT = 64  # elements: every kernel of the tiny model, none of its biases and norms
SEED = 0


def plain_run(dtype, steps: int):
    """Two replicas, one after the other, by jax.grad and optax; then the merge by NumPy.

    Returns:
      start, the replicas' weights at the end, and loss and gradient of each one's first step.
    """
    config = tiny.config()
    loss_fn, rate = tiny.loss_fn(dtype), config.optimizer.learning_rate

    def schedule(count):  # In float32 whatever the weights are, as the run's.
        progress = (count - 2) / (STEPS - 2)
        falling = 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return rate * jnp.where(count < 2, (count + 1) / 2, falling)

    tx = optax.chain(
        optax.clip_by_global_norm(config.optimizer.clip_norm),
        optax.adamw(schedule, weight_decay=config.optimizer.weight_decay),
    )

    @jax.jit
    def step(params, moments, key, batch):
        batch = tiny.augment(key, batch, dtype)
        (loss, _), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params, batch)
        updates, moments = tx.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments, loss, gradient

    start = tiny.params(dtype)
    stream = tiny.batches(config)
    data = [next(stream) for _ in range(steps)]
    replicas, moments, first = [start, start], [tx.init(start), tx.init(start)], []
    for s, batch in enumerate(data):
        if s == MERGED_AFTER:
            replicas = [jax.tree.map(merge_in_numpy, start, *replicas)] * 2
        for r in (0, 1):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), r), s)
            own = {name: value[r] for name, value in batch.items()}
            replicas[r], moments[r], loss, gradient = step(replicas[r], moments[r], key, own)
            if s == 0:
                first.append((loss, gradient))
    return start, replicas, first


def merge_in_numpy(start, *replicas):
    """Equation 2 of one tensor: t = 2 cos / (1 + cos), w0 + t (mean of the replicas - w0)."""
    one, two = (np.asarray(replica, np.float64) - start for replica in replicas)
    cosine = (one * two).sum() / np.sqrt((one**2).sum() * (two**2).sum())
    ratio = 2 * cosine / (1 + cosine) if cosine > 0 else 0.0
    return start + ratio * (one + two) / 2


plain_run_once = functools.cache(plain_run)


@functools.cache
def compiled(shape, execution, split, dtype=np.float32, in_parts=False):
    """A run's programs, and its step and merge as compiled."""
    config = tiny.config(
        mesh__replica=shape[0],
        mesh__data=shape[1],
        mesh__fsdp_min_size=split,
        compute__replica_mode=execution,
        gradient_accumulation_steps=2 if in_parts else 1,
        seed=SEED,
    )
    task = tiny.task(config, epochs=STEPS // 4, dtype=dtype)
    if in_parts:
        apply = classifier(tiny.clip_config(), Compute(dtype=dtype, remat=True))
        loss = cross_entropy(apply, lambda images: images, label_smoothing=0.1)
        task = dataclasses.replace(task, loss_fn=loss)
    with jax.enable_x64(dtype == np.float64):
        made = StepFunctions(config, task)
        lowered = made.lower(made.abstract_batch(12))
        return made, {name: program.compile() for name, program in lowered.items()}


def named(tree):
    paths = jax.tree_util.tree_flatten_with_path(jax.device_get(tree))[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}


SHARDED = ((2, 4), "vmap", SPLIT, np.float64)
EVERY = [
    (shape, execution, split, np.float64)
    for shape in ((1, 1), (2, 1), (1, 8), (2, 4))
    for execution in (("vmap", "map") if shape[0] == 1 else ("vmap",))
    for split in (0, SPLIT)
]
OTHERS = [*(case for case in EVERY if case != SHARDED), ((1, 8), "map", SPLIT, np.float64, True),
          ((2, 4), "vmap", SPLIT, np.float64, True)]  # fmt: skip
# Programs take seconds to compile: the fast suite has those of one mesh, and asks them everything.
MESHES = [SHARDED, *(pytest.param((shape, "vmap", split), marks=pytest.mark.slow)
                     for shape in ((2, 1), (1, 8), (2, 4)) for split in (0, SPLIT))]  # fmt: skip


@pytest.mark.parametrize(
    "case", [SHARDED, *(pytest.param(case, marks=pytest.mark.slow) for case in OTHERS)]
)
def test_every_mesh_gives_what_plain_runs_give(x64, case):
    made, programs = compiled(*case)
    state, merged, stream = made.start(SEED), None, tiny.batches(tiny.config())
    for s in range(STEPS):
        if s == MERGED_AFTER:
            state, merged, _ = programs["merge"](made.anchor, state)
        batch = put_batch(made.mesh, next(stream))
        state, _ = programs["step"](state, batch, made.reference(made.anchor, merged))
    start, replicas, _ = plain_run_once(jnp.float64, STEPS)
    got, start = named(state.params), named(start)
    for r, replica in enumerate(replicas):
        for name, want in named(replica).items():
            error, moved = np.abs(got[name][r] - want).max(), np.linalg.norm(want - start[name])
            # No gradient reaches a key's bias (softmax does not see it): its moments are rounding.
            bound = 1e-9 if "k_proj" in name and "bias" in name else 1e-8 * moved
            assert error <= bound, (name, error, moved)
            assert moved > 0, name


@pytest.mark.slow
@pytest.mark.parametrize("split", [0, SPLIT])
@pytest.mark.parametrize("shape", [(2, 1), (1, 8), (2, 4)])
def test_first_step_in_float32(shape, split):
    made, programs = compiled(shape, "vmap", split)
    batch = put_batch(made.mesh, next(tiny.batches(tiny.config())))
    state, metrics = programs["step"](made.start(SEED), batch, made.reference(made.anchor))
    (adam,) = (part for part in state.opt_state if hasattr(part, "mu"))
    _, _, first = plain_run_once(jnp.float32, 1)
    for r, (loss, gradient) in enumerate(first):
        np.testing.assert_allclose(metrics["loss"][r], loss, rtol=1e-5)
        gradient = named(gradient)
        norm = np.sqrt(sum((leaf**2).sum() for leaf in gradient.values()))
        assert norm < 1, "else the moments hold a clipped gradient"
        np.testing.assert_allclose(metrics["grad_norm"][r], norm, rtol=1e-5)
        for name, moment in named(adam.mu).items():
            # From zero, Adam's first moment is (1 - b1) of the gradient. Sums of 16 examples in
            # another order: to 1e-5 of a tensor's largest, or of the norm where all are rounding.
            bound = 1e-5 * max(np.abs(gradient[name]).max(), 1e-3 * norm)
            error = np.abs(moment[r] / 0.1 - gradient[name]).max()
            assert error <= bound, (name, error, bound)


@pytest.mark.parametrize("case", MESHES)
def test_a_step_never_crosses_replicas(case):
    shape, _, split, *_ = case
    found = collectives(compiled(*case)[1]["step"].as_text())
    assert found or shape[1] == 1
    for collective in found:
        assert collective.within(shape[1]), collective  # Devices lie in the mesh row by row.
        # Weights are gathered and gradients summed; activations stay where they are.
        assert collective.kind in ("all-gather", "all-reduce", "reduce-scatter"), collective
    gathered = sorted(_squeezed(s) for c in found if c.kind == "all-gather" for _, s in c.shapes)
    whole = sorted(leaf.shape for leaf in jax.tree.leaves(tiny.params()) if leaf.size >= SPLIT)
    if shape[0] == 2:  # Under (1, 8) both replicas of a kernel are gathered in one.
        cut = [s for s in whole if fsdp_spec(s, shape[1], split) != PartitionSpec()]
        assert gathered == cut, "each split weight, once"


@pytest.mark.parametrize("case", MESHES)
def test_a_merge_gathers_nothing_but_its_result(case):
    shape, _, split, *_ = case
    made, programs = compiled(*case)
    width = made.abstract_anchor["head"]["bias"].dtype.itemsize
    found = collectives(programs["merge"].as_text())
    devices, tensors = math.prod(shape), len(jax.tree.leaves(tiny.params()))
    gathers = [sizes for c in found if c.kind == "all-gather" for _, sizes in c.shapes]
    # Three products of two task vectors, of each tensor: each device's part of these sums, one
    # axis of the mesh after the other.
    sums = [sizes for sizes in gathers if math.prod(sizes) <= devices]
    assert len(sums) <= 2 * 3 * tensors
    tensors_gathered = [sizes for sizes in gathers if sizes not in sums]
    bytes_gathered = sum(width * math.prod(sizes) for sizes in tensors_gathered)
    if shape[0] == 1:
        assert not tensors_gathered, "the replicas lie on the same devices"
    else:
        # The head's bias of 5 classes cannot be cut in two: both replicas' is gathered.
        allowed = device_bytes(made.abstract_anchor) + 2 * 5 * width
        assert bytes_gathered <= allowed, "a merged tensor comes once to where it lies"
        assert any(c.kind == "all-to-all" for c in found), "replicas travel in parts"
        # Half of a replica away and half of the merged model back, in the weights' own dtype.
        sent = sum(c.sent for c in found if c.kind != "all-reduce")
        parts_of_sums = 8 * sum(math.prod(sizes) for sizes in sums)
        weights = device_bytes(made.abstract_anchor)
        assert sent - parts_of_sums <= 1.02 * weights, "and each part once"
    whole = {x.shape for x in jax.tree.leaves(tiny.params())
             if fsdp_spec(x.shape, shape[1], split) != PartitionSpec()}  # fmt: skip
    for collective in found:
        for dtype, sizes in collective.shapes:
            # Neither with nor without its replicas is a tensor that lies split ever in one place.
            bare = _squeezed(sizes)
            assert bare not in whole and bare[1:] not in whole, collective
            # Task vectors are computed in float64: only sums of them may travel, never they.
            assert width == 8 or dtype != "f64" or math.prod(sizes) <= devices, collective


@pytest.mark.parametrize("case", MESHES)
def test_the_state_is_updated_in_place_and_lies_split(case):
    shape, _, split, dtype = *case[:3], np.dtype((*case, np.float32)[3])
    made, programs = compiled(*case)
    state = made.abstract_state
    for name, program in programs.items():
        analysis = program.memory_analysis()
        assert analysis.alias_size_in_bytes >= device_bytes(state), name
        fresh = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        merged = device_bytes(made.abstract_anchor) if name == "merge" else 0
        # Metrics, or the merge's statistics: twenty numbers a leaf, no copy of the state.
        assert 0 <= fresh - merged < 20 * 8 * len(jax.tree.leaves(state.params)), name
    weights = [x for x in jax.tree.leaves(state.params) if x.size // 2 >= SPLIT]
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.size // 2 >= SPLIT]
    assert len(moments) == 2 * len(weights) > 0
    total = sum(x.size * dtype.itemsize for x in weights + moments)
    parts = shape[0] * (shape[1] if split else 1)
    uncut = [x for x in weights if not any(size % shape[1] == 0 for size in x.shape[1:])]
    assert not uncut or shape[1] == 8  # On eight devices a kernel of 12 x 12 stays whole.
    if not uncut:
        assert device_bytes(weights + moments) * parts == total
    with jax.enable_x64(dtype == np.float64):
        held = [x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(made.start(SEED))]
        assert sum(held) == device_bytes(state)
        assert device_bytes(made.anchor) == device_bytes(made.abstract_anchor)


def test_a_tensor_is_split_along_its_largest_dimension_that_can_be_cut():
    assert fsdp_spec((768, 3072), 8, 1) == PartitionSpec(None, "data")
    assert fsdp_spec((257, 1024), 8, 1) == PartitionSpec(None, "data")
    assert fsdp_spec((769, 8), 8, 1) == PartitionSpec(None, "data")
    assert fsdp_spec((768, 768), 8, 1) == PartitionSpec("data")
    assert fsdp_spec((768, 768), 8, 768**2) == PartitionSpec("data")
    assert fsdp_spec((768, 768), 8, 768**2 + 1) == PartitionSpec()
    assert fsdp_spec((7, 9), 8, 1) == fsdp_spec((), 8, 1) == PartitionSpec()
    assert fsdp_spec((768, 768), 1, 1) == PartitionSpec()


@pytest.mark.parametrize(
    ("devices", "asked", "shape"),
    [(1, (0, 0), (1, 1)), (2, (0, 0), (2, 1)), (3, (0, 0), (1, 3)), (8, (0, 0), (2, 4)),
     (8, (0, 8), (1, 8)), (8, (1, 0), (1, 8)), (8, (2, 2), (2, 2)), (16, (0, 0), (2, 8))],
)  # fmt: skip
def test_a_mesh_fits_the_devices(devices, asked, shape):
    assert mesh_shape(devices, *asked, num_replicas=2, batch_size=48) == shape


@pytest.mark.parametrize(
    ("asked", "message"),
    [((4, 0), "mesh.replica=4 .*num_replicas=2"), ((2, 8), "16 devices.* 8 "),
     ((0, 16), "replica 1 x data 16 .*16 devices"), ((-1, 0), "mesh.replica=-1"),
     ((1, 5), "mesh.data=5 .*batch_size=48")],
)  # fmt: skip
def test_a_mesh_that_does_not_fit_is_one_line(asked, message):
    with pytest.raises(UserError, match=message) as error:
        mesh_shape(8, *asked, num_replicas=2, batch_size=48)
    assert "\n" not in str(error.value)


def test_map_over_replicas_on_several_devices_is_refused():
    with pytest.raises(UserError, match="compute.replica_mode='map'"):
        compiled((2, 4), "map", SPLIT)


def test_collectives_are_counted_in_loops_and_in_every_form_of_a_group():
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


def test_programs_are_kept_where_the_option_says(tmp_path):
    options = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in options}
    try:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        use_compilation_cache(str(tmp_path / "kept"))
        jax.jit(lambda x: x * 3 + 1)(jnp.zeros(3)).block_until_ready()
        assert any((tmp_path / "kept").iterdir())
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match="compute.compilation_cache"):
            use_compilation_cache(str(tmp_path / "file"))
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        use_compilation_cache(before["jax_compilation_cache_dir"] or "")


def _squeezed(sizes):
    return tuple(size for size in sizes if size != 1)
