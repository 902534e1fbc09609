"""What a replica minimises: loss functions (params, batch) -> (loss, metrics).

A loss that is a mean over examples may be taken in parts (`step.mean_gradient`); it draws nothing
at random, so that the parts do not change it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

Loss = Callable[[Any, dict[str, jax.Array]], tuple[jax.Array, dict[str, jax.Array]]]


def cross_entropy(
    apply: Callable[[Any, jax.Array], jax.Array],
    normalize: Callable[[jax.Array], jax.Array],
    *,
    label_smoothing: float = 0.0,
) -> Loss:
    """Softmax cross-entropy of a classifier, averaged over the batch.

    loss = -mean_b sum_k y_bk log softmax(logits_b)_k, y = (1 - s) onehot + s / K. Of a batch with
    "other_label" and "share" (`augment.mixup`), onehot is the blend of both labels' in that share.

    Args:
      apply: (params, images float [B, H, W, 3]) -> logits [B, K].
      normalize: images of 0 to 255 [B, H, W, 3] -> images float.
      label_smoothing: s, in [0, 1).
    """

    def loss_fn(params, batch):
        logits = apply(params, normalize(batch["image"]))
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        one_hot = partial(jax.nn.one_hot, num_classes=logits.shape[-1], dtype=logits.dtype)
        target = one_hot(batch["label"])
        if "share" in batch:
            share = batch["share"][:, None].astype(logits.dtype)
            target = share * target + (1 - share) * one_hot(batch["other_label"])
        target = optax.smooth_labels(target, label_smoothing)
        loss = optax.softmax_cross_entropy(logits, target).mean()
        accuracy = 100 * (logits.argmax(-1) == batch["label"]).mean(dtype=logits.dtype)
        return loss, {"loss": loss, "accuracy": accuracy}

    return loss_fn


def contrastive(
    encode_image: Callable[[Any, jax.Array], jax.Array],
    encode_text: Callable[[Any, jax.Array], jax.Array],
    normalize: Callable[[jax.Array], jax.Array],
) -> Loss:
    """CLIP's symmetric InfoNCE (Radford et al. 2021, figure 3).

    loss = (CE(s I T', arange) + CE(s T I', arange)) / 2 with unit rows I, T [B, E] and
    s = exp(logit_scale), held at 100 at most as CLIP does. Every image meets every text of the
    batch: it is no mean over examples.
    """

    def loss_fn(params, batch):
        images = encode_image(params["image_tower"], normalize(batch["image"]))
        texts = encode_text(params["text_tower"], batch["text"])
        images, texts = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (images, texts))
        images = images / jnp.linalg.norm(images, axis=-1, keepdims=True)
        texts = texts / jnp.linalg.norm(texts, axis=-1, keepdims=True)
        scale = jnp.exp(jnp.minimum(params["logit_scale"], jnp.log(100.0)))
        logits = scale * images @ texts.T
        same = jnp.arange(logits.shape[0])
        pair = optax.softmax_cross_entropy_with_integer_labels
        loss = (pair(logits, same).mean() + pair(logits.T, same).mean()) / 2
        accuracy = 100 * (logits.argmax(-1) == same).mean(dtype=logits.dtype)
        return loss, {"loss": loss, "accuracy": accuracy}

    return loss_fn
