"""The estimated memory of a step: its parts are exact, and its peak is near XLA's plan."""

from __future__ import annotations

import jax
import pytest

from configs import vitb32
from modelstock_jax.experiment.abstract_run import MemoryPlan, abstract_step_functions
from modelstock_jax.training.cost_analysis import memory
from modelstock_jax.training.memory_estimate import Placement, activations, estimate

PARTS = ("anchor", "params", "opt_state", "merged", "batch", "gradients", "total")


def programs_of(replica=1, data=1, **options):
    config = vitb32.get_config()
    config.compute.dtype, config.batch_size = "float32", 16
    config.mesh.replica, config.mesh.data = replica, data
    with config.unlocked():
        config.update_from_flattened_dict(options, "")
    return config, *abstract_step_functions(config)


@pytest.fixture(scope="module")
def base():
    return programs_of()


def plan_of(programs, mesh=(1, 1)):
    config, functions, sizes = programs
    return MemoryPlan(config, functions, sizes.image_size, mesh)


def test_activations_are_linear_in_the_batch(base):
    _, functions, _ = base
    stored = activations(functions.task, 224)
    width, tokens, blocks = 768, 50, 12
    # Each block stores at least its MLP before and after the activation, its input, the residual
    # stream, query, key, value and the attention's output and weights.
    least = 4 * blocks * (tokens * width * (2 * 4 + 6) + 12 * tokens**2)
    assert least < stored.per_image < 2.5 * least
    assert stored.of(7) - stored.of(3) == 4 * stored.per_image
    assert stored.fixed < 1e6


def test_weights_are_cast_once_for_all_images(base):
    _, functions, _ = base
    half = programs_of(**{"compute.dtype": "bfloat16"})[1]
    matrices = sum(x.size for x in jax.tree.leaves(functions.task.params) if len(x.shape) > 1)
    fixed = activations(half.task, 224).fixed
    # Without embeddings and head, which are not cast or are cast to float32.
    assert 0.95 * 2 * matrices < fixed < 2 * matrices


def test_remat_stores_inputs_and_recomputes_one_block(base):
    _, functions, _ = base
    remat = programs_of(**{"compute.remat": True})[1]
    complete = activations(functions.task, 224)
    stored = activations(remat.task, 224, without_remat=functions.task)
    assert stored.per_image < complete.per_image / 10
    block = (complete.per_image - stored.per_image) / 12
    assert stored.recomputed == pytest.approx(block, rel=1e-6)


def test_sharded_parts_are_those_of_the_mesh():
    """The estimate for a mesh equals what the functions on this mesh store."""
    config, functions, sizes = programs_of(2, 4)
    batch = functions.abstract_batch(sizes.image_size)
    cheap = jax.jit(lambda x: x).lower(1.0).compile()
    expected = memory(functions, {"step": cheap, "merge": cheap}, batch)
    found = plan_of((config, functions, sizes), (2, 4)).memory()
    assert {name: getattr(found, name) for name in PARTS} == {
        name: getattr(expected, name) for name in PARTS
    }


def test_what_each_option_changes(base):
    _, functions, _ = base
    stored, placement = activations(functions.task, 224), Placement(1, 1, 16, 1, "vmap", 2**18)
    one = estimate(functions, stored, placement, 224)
    assert one.step_temporary == 2 * (one.anchor + stored.of(16))
    half = estimate(functions, stored, placement._replace(accumulation=2), 224)
    assert one.step - half.step == 2 * 8 * stored.per_image
    sequential = estimate(functions, stored, placement._replace(replica_mode="map"), 224)
    new_state = one.params + one.opt_state
    assert sequential.step_temporary == one.step_temporary // 2 + new_state
    split = estimate(functions, stored, placement._replace(replica=2), 224)
    assert split.step_temporary == one.step_temporary // 2 and 2 * split.params == one.params
    # The gradient's sums over micro-batches are not sharded.
    sharded = placement._replace(data=4)
    whole, parts = (
        estimate(functions, stored, sharded._replace(accumulation=n), 224) for n in (1, 2)
    )
    gradient = 4 * sum(x.size for x in jax.tree.leaves(functions.task.params))
    more = 2 * (2 * gradient - 2 * stored.per_image)
    assert parts.step_temporary - whole.step_temporary == more


def test_options_that_fit(base):
    plan = plan_of(base)
    peak = plan.memory().peak
    assert plan.changes_that_fit(peak)[0].options == ""
    changes = plan.changes_that_fit(peak - 1)
    assert [change.options for change in changes[:2]] == [
        "--config.gradient_accumulation_steps=2",
        "--config.compute.remat=True",
    ]
    assert all(change.memory.peak <= peak - 1 for change in changes)
    assert any("--config.mesh.replica=2" in change.options for change in changes)
    assert plan.changes_that_fit(1e9) == []


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "data", "steps"), [("vmap", 1, 1), ("map", 1, 1), ("vmap", 8, 2)])
def test_the_peak_is_near_the_plan_of_xla(mode, data, steps):
    options = {"batch_size": 64, "gradient_accumulation_steps": steps}
    config, functions, sizes = programs_of(1, data, **options, **{"compute.replica_mode": mode})
    batch = functions.abstract_batch(sizes.image_size)
    compiled = {name: lowered.compile() for name, lowered in functions.lower(batch).items()}
    planned = memory(functions, compiled, batch).peak
    assert 0.95 < plan_of((config, functions, sizes), (1, data)).memory().peak / planned < 1.25
