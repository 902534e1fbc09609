"""Fine-tuning of the sentence encoder: N replicas under `jax.vmap`, with or without merging."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from modelstock_jax.merging import model_stock
from modelstock_jax.reporting.progress import Progress
from studies.sentences.encoder import NUM_HEADS, Dropout, PyTree, logits
from studies.sentences.texts import Texts


def sentence_config() -> ConfigDict:
    """Return the settings of every run; a study's runs change some of them."""
    config = ConfigDict()
    config.seed = 0
    config.num_replicas = 2
    config.epochs = 2
    config.batch_size = 32
    config.dropout = 0.1
    config.optimizer = ConfigDict()
    # From a prototype: of 3e-5, 1e-4 and 3e-4, the best on the validation set.
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_fraction = 0.1
    config.merge = ConfigDict()
    config.merge.every = "never"  # Or 'epoch': Model Stock at the end of each epoch.
    return config


def steps_per_epoch(config: ConfigDict, num_texts: int) -> int:
    """Return the steps of an epoch; texts that do not fill a batch are left out."""
    return num_texts // config.batch_size


def finetune(
    config: ConfigDict, anchor: PyTree, train: Texts, title: str
) -> tuple[PyTree, PyTree | None]:
    """Fine-tune replicas that differ in the order of the texts and in their dropout.

    Args:
      config: as returned by `sentence_config`.
      anchor: initial parameters of every replica.
      train: texts.
      title: of the progress.

    Returns:
      The replicas, [N, ...] per tensor, and the last merged model, None without merging.
    """
    num_steps = config.epochs * steps_per_epoch(config, len(train))
    params = jax.tree.map(lambda x: jnp.stack([x] * config.num_replicas), anchor)
    optimizer = config.optimizer
    tx = _adam(optimizer.learning_rate, optimizer.warmup_fraction, num_steps)
    opt_state = jax.vmap(tx.init)(params)
    step = _step(tx, config.dropout)
    keys = jax.random.split(jax.random.key(config.seed), config.num_replicas)
    merged = None
    with Progress(title, num_steps) as progress:
        for number, rows in enumerate(_batches(config, len(train)), 1):
            batch = train.tokens[rows], train.labels[rows]
            params, opt_state, loss = step(params, opt_state, *batch, keys, number)
            progress.update(number, {"loss": float(loss.mean())})
            if config.merge.every == "epoch" and number * config.epochs % num_steps == 0:
                merged, _ = model_stock(anchor, params, num_heads=NUM_HEADS)
                params = jax.tree.map(lambda x: jnp.stack([x] * config.num_replicas), merged)
    return jax.device_get(params), jax.device_get(merged)


def _batches(config: ConfigDict, num_texts: int) -> Iterator[np.ndarray]:
    """Yield the rows of each batch, [N, batch size]."""
    for epoch in range(config.epochs):
        orders = np.stack(
            [
                np.random.default_rng([config.seed, replica, epoch]).permutation(num_texts)
                for replica in range(config.num_replicas)
            ]
        )
        for step in range(steps_per_epoch(config, num_texts)):
            yield orders[:, step * config.batch_size : (step + 1) * config.batch_size]


@functools.cache
def _adam(learning_rate: float, warmup_fraction: float, num_steps: int):
    """Return Adam with a linear warm-up, then a cosine to 0."""
    warmup = round(warmup_fraction * num_steps)
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, num_steps)
    return optax.adam(schedule)


@functools.cache
def _step(tx: optax.GradientTransformation, rate: float):
    """Return the compiled step of all replicas; runs that differ only in their seed share it."""

    def loss(params, tokens, labels, key):
        outputs = logits(params, tokens, Dropout(key, rate))
        return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()

    def step(params, opt_state, tokens, labels, key, number):
        value, grads = jax.value_and_grad(loss)(
            params, tokens, labels, jax.random.fold_in(key, number)
        )
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    return jax.jit(jax.vmap(step, in_axes=(0, 0, 0, 0, 0, None)), donate_argnums=(0, 1))
