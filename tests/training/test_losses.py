"""Losses and their gradients, compared with NumPy in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.linear_model import LogisticRegression

from modelstock_jax.training.classifier import with_captions
from modelstock_jax.training.losses import car_ft, cross_entropy, flyp, flyp_sigmoid, l2_sp
from modelstock_jax.training.state import (
    StepConstants,
    biases_and_head,
    freeze,
    head_only,
    leaf_names,
)
from tests.training import tiny

PIXELS, EMBEDDING, CLASSES, CONTEXTS, BATCH = 6, 3, 4, 5, 7


def softmax_rows(x):
    x = np.exp(x - x.max(1, keepdims=True))
    return x / x.sum(1, keepdims=True)


def unit_rows(x):
    return x / np.sqrt((x**2).sum(1, keepdims=True))


def apply(params, images):
    """A classifier with a one-layer tower, built like `models.clip.classifier`."""
    features = images.reshape(len(images), -1) @ params["image_tower"]["kernel"]
    features = features / jnp.linalg.norm(features, axis=-1, keepdims=True)
    return features @ params["head"]["kernel"] + params["head"]["bias"][None]


def weights(rng, *shape):
    return rng.standard_normal(shape)


@pytest.fixture
def inputs():
    """Random parameters, pretrained parameters, contexts and a batch."""
    rng = np.random.default_rng(0)

    def classifier():
        return {
            "image_tower": {"kernel": weights(rng, PIXELS, EMBEDDING)},
            "head": {"kernel": weights(rng, EMBEDDING, CLASSES), "bias": weights(rng, CLASSES)},
        }

    contexts = {"kernel": 4 * weights(rng, EMBEDDING, CONTEXTS), "bias": np.zeros(CONTEXTS)}
    batch = {"image": weights(rng, BATCH, PIXELS), "label": np.arange(BATCH) % CLASSES}
    return classifier(), classifier(), contexts, batch


def central_differences(value, params, h=1e-6):
    """Gradient of a function of a tree by central differences, entry by entry."""

    def leaf_gradient(leaf):
        gradient = np.zeros_like(leaf)
        for index in np.ndindex(leaf.shape):
            x = leaf[index]
            leaf[index] = x + h
            up = value(params)
            leaf[index] = x - h
            gradient[index] = (up - value(params)) / (2 * h)
            leaf[index] = x
        return gradient

    return jax.tree.map(leaf_gradient, params)


def assert_same_loss(loss_fn, direct, params, *rest):
    """The value up to rounding; the gradient up to the error h^2 f''' + 1e-16 / h = 1e-10."""
    computed = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, *rest)
    (value, metrics), gradient = computed
    np.testing.assert_allclose(value, direct(params), rtol=1e-12)
    assert value == metrics["loss"]
    expected = central_differences(direct, params)
    for name, want, got in zip(
        jax.tree.leaves(leaf_names(params)),
        jax.tree.leaves(expected),
        jax.tree.leaves(gradient),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, atol=1e-8, err_msg=name)
        assert np.abs(want).max() > 1e-3, f"{name}: the gradient is too small to compare"


def direct_cross_entropy(params, batch, smoothing):
    features = unit_rows(batch["image"] @ params["image_tower"]["kernel"])
    probabilities = softmax_rows(features @ params["head"]["kernel"] + params["head"]["bias"])
    target = (1 - smoothing) * np.eye(CLASSES)[batch["label"]] + smoothing / CLASSES
    return -(target * np.log(probabilities)).sum(1).mean()


def test_car_ft_is_cross_entropy_plus_the_context_divergence(x64, inputs):
    params, pretrained, contexts, batch = inputs
    alpha, smoothing = 0.7, 0.1

    def context_distribution(params):
        features = unit_rows(batch["image"] @ params["image_tower"]["kernel"])
        return softmax_rows(features @ contexts["kernel"])

    def direct(params):
        p0, p = context_distribution(pretrained), context_distribution(params)
        divergence = (p0 * np.log(p0 / p)).sum(1).mean()
        return direct_cross_entropy(params, batch, smoothing) + alpha * divergence

    loss_fn = car_ft(apply, lambda x: x, contexts, alpha=alpha, label_smoothing=smoothing)
    assert_same_loss(loss_fn, direct, params, batch, StepConstants(pretrained=pretrained))
    _, metrics = loss_fn(pretrained, batch, StepConstants(pretrained=pretrained))
    assert abs(metrics["divergence"]) < 1e-15, "a model has a divergence from itself"


def test_flyp_is_the_loss_of_clip_for_both_towers_and_the_scale(x64):
    rng = np.random.default_rng(1)
    params = {
        "image_tower": weights(rng, PIXELS, EMBEDDING),
        "text_tower": weights(rng, 9, EMBEDDING),
        "logit_scale": np.array(1.3),
    }
    batch = {"image": weights(rng, BATCH, PIXELS), "label": np.arange(BATCH) % CLASSES}
    prompts = rng.integers(0, 9, (CLASSES, 3, 4))
    batch = with_captions(jax.random.key(0), batch, prompts)
    text = np.asarray(batch["text"])
    for row, label in zip(text, batch["label"], strict=True):
        assert (row == prompts[label]).all(1).any(), "a caption of another class"
    assert len({tuple(row) for row in text}) > CLASSES, "the same template for all images"

    def direct(params):
        images = unit_rows(batch["image"] @ params["image_tower"])
        texts = unit_rows(params["text_tower"][text].mean(1))
        logits = np.exp(params["logit_scale"]) * images @ texts.T
        rows, columns = softmax_rows(logits), softmax_rows(logits.T)
        return -(np.log(np.diag(rows)).mean() + np.log(np.diag(columns)).mean()) / 2

    loss_fn = flyp(
        lambda tower, images: images @ tower, lambda tower, ids: tower[ids].mean(1), lambda x: x
    )
    assert_same_loss(loss_fn, direct, params, batch)

    # CLIP's scale is 100: above it the loss is constant, and the scale still has a gradient.
    def loss_at(scale):
        return loss_fn(jax.tree.map(jnp.asarray, params | {"logit_scale": scale}), batch)[0]

    limit = np.log(100.0)
    slope = jax.grad(loss_at)
    np.testing.assert_allclose(loss_at(limit + 0.3), loss_at(limit), rtol=1e-12)
    np.testing.assert_allclose(slope(limit + 0.3), slope(limit - 1e-9), rtol=1e-6)
    assert slope(limit + 0.3) != 0


def test_flyp_on_a_siglip_is_its_loss_for_both_towers_the_scale_and_the_bias(x64):
    rng = np.random.default_rng(1)
    params = {
        "image_tower": weights(rng, PIXELS, EMBEDDING),
        "text_tower": weights(rng, 9, EMBEDDING),
        "logit_scale": np.array(1.3),
        "logit_bias": np.array(-0.7),
    }
    text = rng.integers(0, 9, (BATCH, 4))
    batch = {"image": weights(rng, BATCH, PIXELS), "text": text}

    def direct(params):
        images = unit_rows(batch["image"] @ params["image_tower"])
        texts = unit_rows(params["text_tower"][text].mean(1))
        logits = np.exp(params["logit_scale"]) * images @ texts.T + params["logit_bias"]
        pair = np.where(np.eye(BATCH) == 1, logits, -logits)
        return np.log1p(np.exp(-pair)).sum() / BATCH

    loss_fn = flyp_sigmoid(
        lambda tower, images: images @ tower, lambda tower, ids: tower[ids].mean(1), lambda x: x
    )
    assert_same_loss(loss_fn, direct, params, batch)


def test_l2_sp_penalizes_the_task_vector_of_the_tower_and_the_head(x64, inputs):
    params, pretrained, _, batch = inputs
    alpha, beta = 0.3, 0.05
    plain = cross_entropy(apply, lambda x: x)
    loss_fn = l2_sp(plain, alpha=alpha, beta=beta)
    constants = StepConstants(pretrained=pretrained)

    def direct(params):
        task_vector = params["image_tower"]["kernel"] - pretrained["image_tower"]["kernel"]
        head = sum((leaf**2).sum() for leaf in params["head"].values())
        penalty = alpha / 2 * (task_vector**2).sum() + beta / 2 * head
        return direct_cross_entropy(params, batch, 0.0) + penalty

    assert_same_loss(loss_fn, direct, params, batch, constants)


def test_per_replica_label_smoothing_replaces_the_default(x64, inputs):
    params, _, _, batch = inputs
    loss, _ = cross_entropy(apply, lambda x: x)(
        params, batch, StepConstants(hyper={"label_smoothing": 0.2})
    )
    np.testing.assert_allclose(loss, direct_cross_entropy(params, batch, 0.2), rtol=1e-12)


def test_a_linear_probe_is_logistic_regression(x64):
    """On inseparable points, where the best head is unique up to shifts of the logits."""
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 3, 120)
    images = rng.standard_normal((120, 2)) + np.eye(3)[labels][:, :2]
    batch = {"image": images, "label": labels}
    start = {
        "image_tower": {"kernel": rng.standard_normal((2, 2))},
        "head": {"kernel": np.zeros((2, 3)), "bias": np.zeros(3)},
    }

    def linear(params, images):
        return (
            images @ params["image_tower"]["kernel"] @ params["head"]["kernel"]
            + params["head"]["bias"][None]
        )

    loss_fn = cross_entropy(linear, lambda x: x)

    def value(params):
        return loss_fn(freeze(params, head_only), batch)[0]

    tx = optax.sgd(1.0, momentum=0.9)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(value)(params), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=1000)[0][0]

    params = train(start)
    np.testing.assert_array_equal(params["image_tower"]["kernel"], start["image_tower"]["kernel"])
    features = images @ start["image_tower"]["kernel"]
    regression = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(features, labels)
    # Both stop at a gradient below 1e-8; probabilities then differ by about as much.
    np.testing.assert_allclose(
        softmax_rows(np.asarray(linear(params, images))),
        regression.predict_proba(features),
        atol=1e-6,
    )


def test_only_trained_leaves_have_a_gradient():
    params = tiny.params()
    names = jax.tree.leaves(leaf_names(params))
    loss_fn = tiny.loss_fn()
    data = {name: value[0] for name, value in next(tiny.batches(tiny.config())).items()}
    batch = tiny.augment(jax.random.key(0), data)

    @jax.jit
    def gradient(params):
        return jax.grad(lambda params: loss_fn(freeze(params, biases_and_head), batch)[0])(params)

    leaves = jax.tree.leaves(gradient(params))
    nonzero = {name for name, g in zip(names, leaves, strict=True) if g.any()}
    # Key biases receive no gradient (softmax is shift-invariant), except rounding errors.
    shift_invariant = {name for name in names if name.endswith("k_proj.bias")}
    expected = {name for name in names if biases_and_head(name)}
    assert nonzero - shift_invariant == expected - shift_invariant
