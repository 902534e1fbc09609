"""A tiny classifier: one transformer block of width 12 on 12 x 12 images of random pixels."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from configs import default
from modelstock_jax.data.image_set import ImageSet
from modelstock_jax.data.loader import steps_per_epoch, train_batches
from modelstock_jax.models.clip import CLIPConfig
from modelstock_jax.models.compute import Compute
from modelstock_jax.models.config import TextConfig, VisionConfig
from modelstock_jax.models.model import classifier, init
from modelstock_jax.training.losses import cross_entropy
from modelstock_jax.training.step_fns import StepFunctions, Task
from modelstock_jax.training.trainer import Trainer

CLASSES = 5


def clip_config() -> CLIPConfig:
    size = dict(hidden_size=12, intermediate_size=24, num_attention_heads=2, num_hidden_layers=1)
    return CLIPConfig(
        VisionConfig(**size, image_size=12, patch_size=6),
        TextConfig(**size, vocab_size=9, max_position_embeddings=4),
        projection_dim=8,
    )


@cache
def params(dtype=np.float32):
    """Anchor parameters (image tower and head); no parameter is exactly 0 or 1."""
    tree = {
        "image_tower": init(clip_config(), jax.random.key(3))["image_tower"],
        "head": {"kernel": jnp.zeros((8, CLASSES)), "bias": jnp.zeros(CLASSES)},
    }
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: np.asarray(x + 0.1 * rng.standard_normal(x.shape), dtype), tree)


def images(count: int = 64, seed: int = 1) -> ImageSet:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, 12, 12, 3)).astype(np.uint8)
    return ImageSet("train", pixels, rng.integers(0, CLASSES, count).astype(np.int32))


def loss_fn(dtype=jnp.float32):
    apply = classifier(clip_config(), Compute(dtype=dtype))
    return cross_entropy(apply, lambda images: images, label_smoothing=0.1)


def augment(key, batch, dtype=jnp.float32):
    """Add a random brightness to each image."""
    pixels = batch["image"]
    noise = jax.random.uniform(key, (pixels.shape[0], 1, 1, 1), dtype)
    return batch | {"image": pixels.astype(dtype) / 255.0 + 0.1 * noise}


def config(**changes):
    """Default options for this model; in the names of `changes`, '__' stands for '.'."""
    config = default.get_config()
    config.batch_size = 16
    config.optimizer.learning_rate = 1e-2
    config.optimizer.warmup_steps = 2
    config.checkpoint.save_every_steps = 1000
    config.log_every_steps = 1
    config.mesh.replica = config.mesh.data = 1
    with config.unlocked():
        for name, value in changes.items():
            config.update_from_flattened_dict({name.replace("__", "."): value})
    return config


def batches(config, start: int = 0):
    return train_batches(
        images(),
        batch_size=config.batch_size,
        seed=config.seed,
        num_replicas=config.num_replicas,
        start_step=start,
    )


def task(config, epochs: int = 2, dtype=np.float32) -> Task:
    steps = steps_per_epoch(len(images()), config.batch_size)
    return Task(
        params(dtype),
        loss_fn(jnp.dtype(dtype)),
        steps,
        epochs * steps,
        num_heads=2,
        augment=partial(augment, dtype=dtype),
    )


def trainer(workdir, epochs: int = 2, **changes) -> Trainer:
    run_config = config(**changes)
    fns = StepFunctions(run_config, task(run_config, epochs))
    return Trainer(run_config, fns, partial(batches, run_config), workdir, "run")
