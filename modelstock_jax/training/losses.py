"""What a replica minimizes: loss functions (params, batch, reference) -> (loss, metrics).

A loss that is a mean over examples may be taken in parts (`train_step.mean_gradient`); it draws
nothing at random, so that the parts do not change it. `reference` holds the pretrained weights for
those that compare with them, and the numbers that are this replica's own (`finetune`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from modelstock_jax.training.state import StepConstants

Apply = Callable[[Any, jax.Array], jax.Array]
Normalize = Callable[[jax.Array], jax.Array]
Metrics = dict[str, jax.Array]
Loss = Callable[..., tuple[jax.Array, Metrics]]

NO_CONSTANTS = StepConstants()


def cross_entropy(apply: Apply, normalize: Normalize, *, label_smoothing: float = 0.0) -> Loss:
    """Softmax cross-entropy of a classifier, averaged over the batch.

    loss = -mean_b sum_k y_bk log softmax(logits_b)_k, y = (1 - s) onehot + s / K. Of a batch with
    "other_label" and "share" (`augment.mixup`), onehot is the blend of both labels' in that share.

    Args:
      apply: (params, images float [B, H, W, 3]) -> logits [B, K].
      normalize: images of 0 to 255 [B, H, W, 3] -> images float.
      label_smoothing: s, in [0, 1), where the replica has none of its own.
    """

    def loss_fn(params, batch, reference=NO_CONSTANTS):
        logits = _at_least_float32(apply(params, normalize(batch["image"])))
        return _cross_entropy(
            logits, batch, reference.hyper.get("label_smoothing", label_smoothing)
        )

    return loss_fn


def _cross_entropy(logits, batch, label_smoothing) -> tuple[jax.Array, Metrics]:
    one_hot = partial(jax.nn.one_hot, num_classes=logits.shape[-1], dtype=logits.dtype)
    target = one_hot(batch["label"])
    if "share" in batch:
        share = batch["share"][:, None].astype(logits.dtype)
        target = share * target + (1 - share) * one_hot(batch["other_label"])
    target = optax.smooth_labels(target, label_smoothing)
    loss = optax.softmax_cross_entropy(logits, target).mean()
    accuracy = 100 * (logits.argmax(-1) == batch["label"]).mean(dtype=logits.dtype)
    return loss, {"loss": loss, "accuracy": accuracy}


def car_ft(
    apply: Apply,
    normalize: Normalize,
    contexts: Any,
    *,
    alpha: float,
    label_smoothing: float = 0.0,
) -> Loss:
    """CAR-FT (Mao et al. 2022): cross-entropy, and what the pretrained model sees of the context.

        loss = CE + alpha mean_b KL(p0_b || p_b),   p = softmax(s f(x) . W)

    with p0 the pretrained model's, unit features f, and a column of W for each context: the mean
    over classes of the text features of one prompt template ('a sketch of a {}.'), where a column
    of the zero-shot head is the mean over templates. W and s are the pretrained model's and stay.
    Its image features are computed in the step: a second pass forward, none backward.

    Args:
      apply: (params, images float [B, H, W, 3]) -> logits [B, K], by unit features and
        params["head"]. The head and the contexts share one pass of it.
      normalize: images of 0 to 255 [B, H, W, 3] -> images float.
      contexts: {"kernel" [E, C], s W; "bias" [C], zeros}, as `zero_shot.context_head` gives them.
      alpha: of the divergence, >= 0.
      label_smoothing: of the cross-entropy.
    """

    def loss_fn(params, batch, reference=NO_CONSTANTS):
        images, classes = normalize(batch["image"]), params["head"]["bias"].shape[0]
        joined = jax.tree.map(
            lambda h, c: jnp.concatenate([h, c.astype(h.dtype)], axis=-1), params["head"], contexts
        )
        logits = _at_least_float32(apply(params | {"head": joined}, images))
        smoothing = reference.hyper.get("label_smoothing", label_smoothing)
        loss, metrics = _cross_entropy(logits[:, :classes], batch, smoothing)
        pretrained = apply(reference.pretrained | {"head": contexts}, images)
        fixed = jax.lax.stop_gradient(jax.nn.log_softmax(_at_least_float32(pretrained)))
        seen = jax.nn.log_softmax(logits[:, classes:])
        divergence = (jnp.exp(fixed) * (fixed - seen)).sum(-1).mean()
        loss = loss + alpha * divergence
        return loss, metrics | {"loss": loss, "divergence": divergence}

    return loss_fn


def l2_sp(loss_fn: Loss, *, alpha: float, beta: float) -> Loss:
    """L2-SP (Li et al. 2018): a loss, and the distance from the pretrained weights.

        loss + alpha/2 |w_S - w0_S|^2 + beta/2 |w_new|^2

    S is all that was pretrained, here everything but the head, and the head is what is new. Weight
    decay is not part of it: the penalty stands in its place.

    Args:
      loss_fn: what is penalized.
      alpha: toward the pretrained weights, >= 0.
      beta: of the head toward zero, >= 0.

    >>> toward = l2_sp(lambda *_: (jnp.float32(0), {}), alpha=1.0, beta=4.0)
    >>> params = {"image_tower": jnp.full(2, 3.0), "head": jnp.ones(2)}
    >>> w0 = {"image_tower": jnp.ones(2), "head": jnp.ones(2)}
    >>> float(toward(params, {}, Reference(pretrained=w0))[0])
    8.0
    """

    def penalized(params, batch, reference=NO_CONSTANTS):
        loss, metrics = loss_fn(params, batch, reference)
        kept = {name: part for name, part in params.items() if name != "head"}
        moved = jax.tree.map(
            jnp.subtract, kept, {name: reference.pretrained[name] for name in kept}
        )
        penalty = alpha / 2 * _squared_norm(moved) + beta / 2 * _squared_norm(params.get("head"))
        loss = loss + penalty
        return loss, metrics | {"loss": loss, "penalty": penalty}

    return penalized


def flyp(
    encode_image: Callable[[Any, jax.Array], jax.Array],
    encode_text: Callable[[Any, jax.Array], jax.Array],
    normalize: Normalize,
) -> Loss:
    """CLIP's symmetric InfoNCE (Radford et al. 2021, figure 3), and so FLYP (Goyal et al. 2023).

    loss = (CE(s I T', arange) + CE(s T I', arange)) / 2 with unit rows I, T [B, E] and
    s = exp(logit_scale), 100 at most: CLIP clips the parameter after a step; here the value is
    clipped and the gradient is not, so that a scale at 100 can fall. Every image meets every text
    of the batch: it is no mean over examples.

    FLYP fine-tunes with it, both towers and the scale: an image's text is a prompt of its class
    drawn from the templates. Images of one class in a batch count as each other's negatives, as in
    the authors' code.
    """

    def loss_fn(params, batch, reference=NO_CONSTANTS):
        images = encode_image(params["image_tower"], normalize(batch["image"]))
        texts = encode_text(params["text_tower"], batch["text"])
        images, texts = _at_least_float32(images), _at_least_float32(texts)
        images = images / jnp.linalg.norm(images, axis=-1, keepdims=True)
        texts = texts / jnp.linalg.norm(texts, axis=-1, keepdims=True)
        scale = jnp.exp(_at_most(params["logit_scale"], jnp.log(100.0)))
        logits = scale * images @ texts.T
        same = jnp.arange(logits.shape[0])
        pair = optax.softmax_cross_entropy_with_integer_labels
        loss = (pair(logits, same).mean() + pair(logits.T, same).mean()) / 2
        accuracy = 100 * (logits.argmax(-1) == same).mean(dtype=logits.dtype)
        return loss, {"loss": loss, "accuracy": accuracy}

    return loss_fn


def _at_most(x: jax.Array, limit: Any) -> jax.Array:
    """min(x, limit), with the derivative of x itself."""
    return x + jax.lax.stop_gradient(jnp.minimum(x, limit) - x)


def _at_least_float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _squared_norm(tree: Any) -> jax.Array:
    squares = (jnp.square(_at_least_float32(x)).sum() for x in jax.tree.leaves(tree))
    return sum(squares, start=jnp.float32(0))
