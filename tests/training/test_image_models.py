"""Replicas of image models on several devices, and one after the other or in parallel."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import numpy as np
import pytest

from modelstock_jax.training import step_fns
from modelstock_jax.training.classifier import make_classifier
from modelstock_jax.training.cost_analysis import collectives
from modelstock_jax.training.finetune import make_task
from modelstock_jax.training.sharding import put_batch
from modelstock_jax.training.step_fns import StepFunctions
from tests.experiment import image_models
from tests.experiment.image_models import BATCH, CLASSES, KINDS, SIDE, leaves

MODELS = ["resnet", pytest.param("siglip", marks=pytest.mark.slow)]
STEPS = 3


def make_fns(kind, shape, replica_mode, dtype=np.float64) -> StepFunctions:
    """Return the step functions of a kind on a mesh; large tensors are sharded."""
    config = image_models.config(
        kind,
        Path("not read"),
        Path("not read"),
        mesh__replica=shape[0],
        mesh__data=shape[1],
        mesh__fsdp_min_size=64,
        compute__replica_mode=replica_mode,
        compute__dtype=np.dtype(dtype).name,
        optimizer__warmup_fraction=0.0,
    )
    checkpoint = image_models.checkpoint(kind)
    rng, size = np.random.default_rng(0), checkpoint.config.feature_size
    head = {"kernel": rng.standard_normal((size, len(CLASSES))), "bias": np.zeros(len(CLASSES))}
    params = {"image_tower": checkpoint.params["image_tower"], "head": head}
    params = jax.tree.map(lambda x: np.asarray(x, dtype), params)
    anchor = make_classifier(config, checkpoint.config, params, checkpoint.preprocessor)
    task = make_task(config, anchor, image_models.TRAIN_IMAGES, lambda key, images: images)
    return StepFunctions(config, task)


@functools.cache
def compiled(kind, shape, replica_mode):
    """Return step functions with the compiled step."""
    with jax.enable_x64(True):
        fns = make_fns(kind, shape, replica_mode)
        batch = fns.abstract_batch(SIDE)
        lowered = fns.train_step.lower(fns.abstract_state, batch, fns.step_constants())
        return fns, lowered.compile()


@functools.cache
def trained(kind, shape, replica_mode) -> dict[str, np.ndarray]:
    """Return both replicas after a few steps."""
    fns, train_step = compiled(kind, shape, replica_mode)
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        state = fns.init_state(0)
        for _ in range(STEPS):
            images = rng.integers(0, 256, (2, BATCH, SIDE, SIDE, 3), np.uint8)
            labels = rng.integers(0, len(CLASSES), (2, BATCH)).astype(np.int32)
            batch = put_batch(fns.mesh, {"image": images, "label": labels})
            state, _ = train_step(state, batch, fns.step_constants(fns.anchor))
        return leaves(state.params)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("shape", "replica_mode"), [((1, 1), "vmap"), ((2, 2), "vmap")])
def test_every_mesh_and_mode_equals_one_device(kind, shape, replica_mode):
    expected, found = trained(kind, (1, 1), "map"), trained(kind, shape, replica_mode)
    start = leaves(make_fns(kind, (1, 1), "map").task.params)
    for name, value in expected.items():
        update = np.linalg.norm(value - start[name][None])
        error = np.abs(found[name] - value).max()
        # Rounding of float64 over three steps. A key bias receives no gradient but rounding
        # errors, which Adam divides by its epsilon of 1e-8.
        assert error <= 1e-8 * update + 1e-9, (name, error, update)


@pytest.mark.parametrize("kind", MODELS)
def test_a_step_has_no_collective_across_replicas(kind):
    used = collectives(compiled(kind, (2, 2), "vmap")[1].as_text())
    assert used
    for collective in used:
        assert collective.within(2), collective  # Mesh rows are consecutive devices.
        assert collective.kind in ("all-gather", "all-reduce", "reduce-scatter"), collective


@pytest.mark.parametrize("kind", KINDS)
def test_replicas_of_convolutional_nets_run_one_after_the_other(kind, monkeypatch):
    def modes():
        fns = (make_fns(kind, shape, "auto", np.float32) for shape in ((1, 1), (2, 1)))
        return [x.replica_mode for x in fns]

    # On a CPU, that is the default of every model.
    assert modes() == ["map", "vmap"]
    monkeypatch.setattr(step_fns.jax, "default_backend", lambda: "gpu")
    alone = "map" if KINDS[kind].config.is_convolutional else "vmap"
    assert modes() == [alone, "vmap"]
