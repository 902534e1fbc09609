"""Loss functions of one replica: (params, batch, constants) -> (loss, metrics).

A loss that is a mean over examples can be accumulated over micro-batches
(`train_step.mean_gradient`). Losses draw no random numbers, so that splitting a batch does not
change them. `constants` (`StepConstants`) contains the pretrained parameters, for losses that use
them, and the replica's own hyperparameters.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from modelstock_jax.merging.trees import PyTree
from modelstock_jax.models.model import l2_normalize
from modelstock_jax.models.transformer import widen
from modelstock_jax.training.state import StepConstants

Apply = Callable[[Any, jax.Array], jax.Array]
Normalize = Callable[[jax.Array], jax.Array]
Metrics = dict[str, jax.Array]
Loss = Callable[..., tuple[jax.Array, Metrics]]

NO_CONSTANTS = StepConstants()


def cross_entropy(apply: Apply, normalize: Normalize, *, label_smoothing: float = 0.0) -> Loss:
    """Return the softmax cross-entropy of a classifier, averaged over the batch.

        loss = -mean_b sum_k y_bk log softmax(logits_b)_k,   y = (1 - s) onehot + s / K

    If the batch contains "other_label" and "share" (see `augment.mixup`), onehot is the mixture of
    both labels, with weight `share` on "label".

    Args:
      apply: (params, images float [B, H, W, 3]) -> logits [B, K]
      normalize: images [B, H, W, 3] with values 0 to 255 -> images float
      label_smoothing: s in [0, 1), unless the replica has its own
    """

    def loss_fn(params, batch, constants=NO_CONSTANTS):
        logits = widen(apply(params, normalize(batch["image"])))
        return _cross_entropy(
            logits, batch, constants.hyper.get("label_smoothing", label_smoothing)
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
    """Return the CAR-FT loss (Mao et al. 2022): cross-entropy plus a context divergence.

        loss = CE + alpha mean_b KL(p0_b || p_b),   p = softmax(s f(x) . W)

    p0 is the context distribution of the pretrained model, f are unit-norm image features, and W
    has one column per context: the mean over classes of the text features of one prompt template
    ('a sketch of a {}.'). A column of the zero-shot head is instead the mean over templates. W and
    s are those of the pretrained model and are not trained. The step computes the features of the
    pretrained model in a second forward pass, without a backward pass.

    Args:
      apply: (params, images float [B, H, W, 3]) -> logits [B, K], from unit-norm features and
        params["head"]; one call serves the head and the contexts
      normalize: images [B, H, W, 3] with values 0 to 255 -> images float
      contexts: {"kernel": s W [E, C], "bias" [C]}, see `zero_shot.context_head`
      alpha: weight of the divergence, >= 0
      label_smoothing: of the cross-entropy, unless the replica has its own
    """

    def loss_fn(params, batch, constants=NO_CONSTANTS):
        images, num_classes = normalize(batch["image"]), params["head"]["bias"].shape[0]
        joint_head = jax.tree.map(
            lambda h, c: jnp.concatenate([h, c.astype(h.dtype)], axis=-1), params["head"], contexts
        )
        logits = widen(apply(params | {"head": joint_head}, images))
        smoothing = constants.hyper.get("label_smoothing", label_smoothing)
        loss, metrics = _cross_entropy(logits[:, :num_classes], batch, smoothing)
        pretrained_logits = apply(constants.pretrained | {"head": contexts}, images)
        log_p0 = jax.lax.stop_gradient(jax.nn.log_softmax(widen(pretrained_logits)))
        log_p = jax.nn.log_softmax(logits[:, num_classes:])
        divergence = (jnp.exp(log_p0) * (log_p0 - log_p)).sum(-1).mean()
        loss = loss + alpha * divergence
        return loss, metrics | {"loss": loss, "divergence": divergence}

    return loss_fn


def l2_sp(loss_fn: Loss, *, alpha: float, beta: float) -> Loss:
    """Add the L2-SP penalty (Li et al. 2018): the squared distance from the pretrained parameters.

        loss + alpha/2 |w_S - w0_S|^2 + beta/2 |w_new|^2

    S are the pretrained parameters (all except the head), and w_new is the head. The penalty
    replaces weight decay.

    Args:
      loss_fn: the loss without the penalty
      alpha: weight of the distance from the pretrained parameters, >= 0
      beta: weight of the norm of the head, >= 0

    Example:
      >>> penalized = l2_sp(lambda *_: (jnp.float32(0), {}), alpha=1.0, beta=4.0)
      >>> params = {"image_tower": jnp.full(2, 3.0), "head": jnp.ones(2)}
      >>> w0 = {"image_tower": jnp.ones(2), "head": jnp.ones(2)}
      >>> float(penalized(params, {}, StepConstants(pretrained=w0))[0])
      8.0
    """

    def penalized(params, batch, constants=NO_CONSTANTS):
        loss, metrics = loss_fn(params, batch, constants)
        shared = {name: subtree for name, subtree in params.items() if name != "head"}
        task_vector = jax.tree.map(
            jnp.subtract, shared, {name: constants.pretrained[name] for name in shared}
        )
        head = params.get("head")
        penalty = alpha / 2 * _squared_norm(task_vector) + beta / 2 * _squared_norm(head)
        loss = loss + penalty
        return loss, metrics | {"loss": loss, "penalty": penalty}

    return penalized


def flyp(
    encode_image: Callable[[Any, jax.Array], jax.Array],
    encode_text: Callable[[Any, jax.Array], jax.Array],
    normalize: Normalize,
) -> Loss:
    """Return CLIP's contrastive loss (Radford et al. 2021, figure 3), the loss of FLYP.

        loss = (CE(s I T', arange) + CE(s T I', arange)) / 2

    I and T [B, E] have unit rows, and s = exp(logit_scale) <= 100. CLIP clips the parameter after
    each step; here the value is clipped and the gradient is not, so that a scale at 100 can
    decrease. Every image is compared with every text of the batch: the loss is not a mean over
    examples.

    FLYP (Goyal et al. 2023) fine-tunes both towers and the scale with this loss. The text of an
    image is a prompt of its class with a randomly drawn template. Images of the same class in a
    batch count as negatives of each other, as in the authors' code.

    Args:
      encode_image: (image tower, normalized images) -> features [B, E]
      encode_text: (text tower, token ids [B, L]) -> features [B, E]
      normalize: images [B, H, W, 3] with values 0 to 255 -> images float
    """

    def loss_fn(params, batch, constants=NO_CONSTANTS):
        images, texts = _unit_features(encode_image, encode_text, normalize, params, batch)
        scale = jnp.exp(_clip_max_straight_through(params["logit_scale"], jnp.log(100.0)))
        logits = scale * images @ texts.T
        labels = jnp.arange(logits.shape[0])
        ce = optax.softmax_cross_entropy_with_integer_labels
        loss = (ce(logits, labels).mean() + ce(logits.T, labels).mean()) / 2
        accuracy = 100 * (logits.argmax(-1) == labels).mean(dtype=logits.dtype)
        return loss, {"loss": loss, "accuracy": accuracy}

    return loss_fn


def flyp_sigmoid(
    encode_image: Callable[[Any, jax.Array], jax.Array],
    encode_text: Callable[[Any, jax.Array], jax.Array],
    normalize: Normalize,
) -> Loss:
    """Return SigLIP's sigmoid loss (Zhai et al. 2023, equation 1), the loss of FLYP on a SigLIP.

        loss = -1/B sum_ij log sigmoid(z_ij (s I_i . T_j + b)),   z_ij = 1 if i = j, else -1

    I and T [B, E] have unit rows, s = exp(logit_scale), b = logit_bias. As in `flyp`, every image
    is compared with every text of the batch, and images of the same class count as negatives.

    Arguments are those of `flyp`.
    """

    def loss_fn(params, batch, constants=NO_CONSTANTS):
        images, texts = _unit_features(encode_image, encode_text, normalize, params, batch)
        logits = jnp.exp(params["logit_scale"]) * images @ texts.T + params["logit_bias"]
        count = logits.shape[0]
        sign = 2 * jnp.eye(count, dtype=logits.dtype) - 1
        loss = -jax.nn.log_sigmoid(sign * logits).sum() / count
        accuracy = 100 * (logits.argmax(-1) == jnp.arange(count)).mean(dtype=logits.dtype)
        return loss, {"loss": loss, "accuracy": accuracy}

    return loss_fn


def _unit_features(
    encode_image, encode_text, normalize, params, batch
) -> tuple[jax.Array, jax.Array]:
    """Return the features of the images and texts of a batch, [B, E], float32 with unit rows."""
    images = encode_image(params["image_tower"], normalize(batch["image"]))
    texts = encode_text(params["text_tower"], batch["text"])
    return l2_normalize(widen(images)), l2_normalize(widen(texts))


def _clip_max_straight_through(x: jax.Array, max_x: Any) -> jax.Array:
    """Return min(x, max_x) with the derivative of x."""
    return x + jax.lax.stop_gradient(jnp.minimum(x, max_x) - x)


def _squared_norm(tree: PyTree) -> jax.Array:
    squares = (jnp.square(widen(x)).sum() for x in jax.tree.leaves(tree))
    return sum(squares, start=jnp.float32(0))
