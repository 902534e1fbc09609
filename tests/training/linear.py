"""A linear model that compiles quickly, with batches that a test can corrupt."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from modelstock_jax.training.step_fns import StepFunctions, Task
from modelstock_jax.training.trainer import Trainer
from tests.training import tiny

INPUTS, OUTPUTS, BATCH = 6, 3, 8
NAMES = ("head.bias", "head.kernel", "image_tower.scale")


def params():
    rng = np.random.default_rng(0)
    return {
        "image_tower": {"scale": rng.standard_normal(INPUTS).astype(np.float32)},
        "head": {
            "kernel": rng.standard_normal((INPUTS, OUTPUTS)).astype(np.float32),
            "bias": np.zeros(OUTPUTS, np.float32),
        },
    }


def loss_fn(params, batch, constants=None):
    """Squared error; `curse`, one value per replica, affects only the gradient of the kernel."""
    head = params["head"]
    features = batch["image"] * params["image_tower"]["scale"][None]
    error = features @ head["kernel"] + head["bias"][None] - batch["target"]
    loss = (error**2).mean() + (batch["curse"].mean() - 1) * head["kernel"].sum()
    return loss, {"loss": loss, "accuracy": (error**2 < 1).mean(dtype=jnp.float32)}


def batches(config, start: int, corruptions=()):
    """Endless batches; each corruption (step, replica, name, value) sets `name` to `value`."""
    step = start
    while True:
        step += 1
        rng = np.random.default_rng([config.seed, step])
        leading = (config.num_replicas, config.batch_size)
        batch = {
            "image": rng.standard_normal((*leading, INPUTS)).astype(np.float32),
            "target": rng.standard_normal((*leading, OUTPUTS)).astype(np.float32),
            "curse": np.ones(leading, np.float32),
        }
        for corrupted_step, replica, name, value in corruptions:
            if corrupted_step == step:
                batch[name][replica] = value
        yield batch


def config(**changes):
    return tiny.config(
        **{"batch_size": BATCH, "log_every_steps": 2, "checkpoint__save_every_steps": 5} | changes
    )


def step_functions(config, steps: int = 8) -> StepFunctions:
    task = Task(params(), loss_fn, 4, steps, num_heads=1, augment=lambda key, batch: batch)
    return StepFunctions(config, task)


def trainer(workdir, corruptions=(), steps: int = 8, fns: StepFunctions | None = None, **changes):
    """Eight steps, with merges at steps 4 and 8 and an additional save at step 5."""
    run_config = config(**changes)
    return Trainer(
        run_config,
        fns or step_functions(run_config, steps),
        lambda start: batches(run_config, start, corruptions),
        workdir,
        "run",
    )
