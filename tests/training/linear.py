"""A linear model in training, compiled in a moment, whose batches are spoiled where a test says."""

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


def loss_fn(params, batch, reference=None):
    """Squared error; `curse` is one a replica, and its gradient is that of the kernel alone."""
    head = params["head"]
    features = batch["image"] * params["image_tower"]["scale"][None]
    error = features @ head["kernel"] + head["bias"][None] - batch["target"]
    loss = (error**2).mean() + (batch["curse"].mean() - 1) * head["kernel"].sum()
    return loss, {"loss": loss, "accuracy": (error**2 < 1).mean(dtype=jnp.float32)}


def batches(config, start: int, spoiled=()):
    """Endless batches; of each (step, replica, name, value) in `spoiled`, `name` is `value`."""
    step = start
    while True:
        step += 1
        rng = np.random.default_rng([config.seed, step])
        lead = (config.num_replicas, config.batch_size)
        batch = {
            "image": rng.standard_normal((*lead, INPUTS)).astype(np.float32),
            "target": rng.standard_normal((*lead, OUTPUTS)).astype(np.float32),
            "curse": np.ones(lead, np.float32),
        }
        for at, replica, name, value in spoiled:
            if at == step:
                batch[name][replica] = value
        yield batch


def config(**changes):
    return tiny.config(
        **{"batch_size": BATCH, "log_every_steps": 2, "checkpoint__save_every_steps": 5} | changes
    )


def step_functions(made, steps: int = 8) -> StepFunctions:
    task = Task(params(), loss_fn, 4, steps, num_heads=1, augment=lambda key, batch: batch)
    return StepFunctions(made, task)


def trainer(workdir, spoiled=(), steps: int = 8, step_functions: StepFunctions | None = None, **changes):
    """Eight steps, a merge at the fourth and the eighth, a save at the fifth too."""
    made = config(**changes)
    return Trainer(
        made,
        step_functions or step_functions(made, steps),
        lambda start: batches(made, start, spoiled),
        workdir,
        "run",
    )
