"""Optimizers, frozen leaves and per-replica hyperparameters."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from modelstock_jax.data.augment import shift_and_jitter
from modelstock_jax.data.transforms import TrainTransform
from modelstock_jax.errors import UserError
from modelstock_jax.training.finetune import (
    _batch_augment,
    check_method,
    hyper_parameters,
    method_name,
    train_transforms,
)
from modelstock_jax.training.losses import cross_entropy
from modelstock_jax.training.optimizer import make_optimizer
from modelstock_jax.training.state import StepConstants, biases_and_head, init_state, leaf_names
from modelstock_jax.training.train_step import make_train_step
from tests.training import tiny

STEPS = 12


def apply(params, images):
    """Two layers, so that there are a kernel and a bias besides the head."""
    layer, head = params["image_tower"]["fc1"], params["head"]
    hidden = jnp.tanh(images @ layer["kernel"] + layer["bias"][None])
    return hidden @ head["kernel"] + head["bias"][None]


def start(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image_tower": {
            "fc1": {"kernel": rng.standard_normal((4, 5)), "bias": rng.standard_normal(5)}
        },
        "head": {"kernel": rng.standard_normal((5, 3)), "bias": rng.standard_normal(3)},
    }


def batches(replicas, count=STEPS, size=8):
    rng = np.random.default_rng(1)
    return [
        {
            "image": rng.standard_normal((replicas, size, 4)),
            "label": rng.integers(0, 3, (replicas, size)),
        }
        for _ in range(count)
    ]


def train(config, data, *, hyper=None, trained=None, pretrained=None, steps=STEPS, replicas=1):
    """Run `steps` steps of `replicas` replicas; return the final state."""
    tx, schedule = make_optimizer(config.optimizer, steps, trained)
    state = init_state(start(), tx, num_replicas=replicas, seed=0)
    loss_fn = cross_entropy(apply, lambda x: x, label_smoothing=config.label_smoothing)
    step = jax.jit(make_train_step(loss_fn, tx, schedule, "vmap"))
    constants = StepConstants(pretrained=pretrained, hyper=hyper or {})
    for batch in data[:steps]:
        state, _ = step(state, batch, constants)
    return jax.device_get(state)


def test_adamw_is_bitwise_that_of_optax():
    config = tiny.config(optimizer__clip_norm=1.0, optimizer__weight_decay=0.1).optimizer
    tx, _ = make_optimizer(config, STEPS)
    expected = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(0.1),
    )
    params = jax.tree.map(jnp.float32, start())
    states = tx.init(params), expected.init(params)
    for seed in range(3):
        gradient = jax.tree.map(jnp.float32, start(seed + 1))
        updates, first = jax.jit(tx.update)(gradient, states[0], params)
        expected_updates, second = jax.jit(expected.update)(gradient, states[1], params)
        states = first, second
        jax.tree.map(np.testing.assert_array_equal, updates, expected_updates)
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])


def test_momentum_and_decay_to_pretrained_are_geometric(x64):
    config = tiny.config(
        optimizer__name="sgd",
        optimizer__momentum=0.8,
        optimizer__weight_decay=0.0,
        optimizer__clip_norm=0.0,
    ).optimizer
    w, gradient = {"w": jnp.array([2.0, -1.0])}, {"w": jnp.array([0.5, 3.0])}
    tx, _ = make_optimizer(config, STEPS)
    state = tx.init(w)
    for t in range(1, 6):
        updates, state = tx.update(gradient, state, w)
        # m_t = g (1 + b + ... + b^(t-1))
        np.testing.assert_allclose(updates["w"], gradient["w"] * (1 - 0.8**t) / 0.2, rtol=1e-12)

    config.decay_to_pretrained = 0.4
    tx, schedule = make_optimizer(config, STEPS)
    w0, zero_grads = {"w": jnp.array([1.0, 1.0])}, {"w": jnp.zeros(2)}
    state, params, factor = tx.init(w), w["w"], 1.0
    for t in range(STEPS):
        updates, state = tx.update(zero_grads, state, {"w": params}, pretrained=w0)
        params = params - schedule(t) * updates["w"]
        factor *= 1 - schedule(t) * 0.4
    np.testing.assert_allclose(params - w0["w"], factor * (w["w"] - w0["w"]), rtol=1e-12)
    assert factor < 0.99


def test_frozen_leaves_are_bitwise_unchanged_and_have_no_optimizer_state():
    trained = biases_and_head
    config = tiny.config(optimizer__weight_decay=0.3, optimizer__decay_to_pretrained=0.2)
    before = jax.tree.map(np.float32, start())
    state = train(config, batches(1), trained=trained, pretrained=before)
    num_trained = 0
    for name, old, new in zip(
        jax.tree.leaves(leaf_names(before)),
        *map(jax.tree.leaves, (before, state.params)),
        strict=True,
    ):
        num_trained += old.size * trained(name)
        assert np.array_equal(old, new[0]) is not trained(name), name
    counts = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    assert counts == 2 * num_trained + 1, "state of frozen leaves"  # plus Adam's step count


def test_per_replica_hyperparameters_equal_separate_runs(x64):
    """Learning rates, decays, smoothings and numbers of epochs differ; the first ends early."""
    config = tiny.config(num_replicas=3, optimizer__warmup_steps=0, optimizer__warmup_fraction=0.25)
    config.epochs = 3
    values = {
        "learning_rate": (1e-2, 3e-2, 1e-2),
        "weight_decay": (0.0, 0.1, 0.5),
        "label_smoothing": (0.0, 0.1, 0.2),
        "epochs": (2, 3, 3),
    }
    config.per_replica.update(values)
    hyper = hyper_parameters(config, STEPS // 3)
    assert hyper["num_steps"].tolist() == [8, 12, 12]
    data = batches(3)
    together = train(config, data, hyper=hyper, replicas=3)
    for r in range(3):
        alone = tiny.config(
            label_smoothing=values["label_smoothing"][r],
            optimizer__learning_rate=values["learning_rate"][r],
            optimizer__weight_decay=values["weight_decay"][r],
            optimizer__warmup_steps=0,
            optimizer__warmup_fraction=0.25,
        )
        replica_data = [jax.tree.map(lambda x, r=r: x[r : r + 1], batch) for batch in data]
        state = train(alone, replica_data, steps=values["epochs"][r] * STEPS // 3)
        for name, want, got in zip(
            jax.tree.leaves(leaf_names(state.params)),
            *map(jax.tree.leaves, (state.params, together.params)),
            strict=True,
        ):
            # The separate run computes its learning rate in float32: 12 errors of 6e-8 * 3e-2.
            np.testing.assert_allclose(got[r], want[0], atol=2e-8, err_msg=f"{r} {name}")


def test_per_replica_mixup_and_strength_equal_a_separate_run():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
    key, batch = jax.random.key(0), {"image": images, "label": np.arange(4)}
    augment = _batch_augment(shift_and_jitter, 0.0, True, None)

    @jax.jit
    @jax.vmap
    def augment_replicas(mixup, strength):
        return augment(key, batch | {"mixup": mixup, "augment_strength": strength})

    none, some = (
        jax.tree.map(
            lambda x, r=r: np.asarray(x[r]),
            augment_replicas(jnp.array([0.0, 0.4]), jnp.array([0.0, 1])),
        )
        for r in range(2)
    )
    np.testing.assert_array_equal(none["image"], images)
    assert (none["share"] == 1).all() and (some["share"] < 1).all()
    alone = jax.jit(_batch_augment(shift_and_jitter, 0.4, False, None))(key, batch)
    for name, value in alone.items():
        # Mixtures of values up to 255 in float32; the order of operations differs.
        np.testing.assert_allclose(some[name], value, atol=1e-4, err_msg=name)


def test_per_replica_randaugment():
    config = tiny.config(data__name="folder", data__augment__randaugment_magnitude=5)
    assert train_transforms(config, 16) == [TrainTransform.of(config.data.augment, 16)] * 2
    config.per_replica.randaugment_ops = (0, 2.0)
    transforms = train_transforms(config, 16)
    assert [repr(one.randaugment_ops) for one in transforms] == ["0", "2"], "integers"
    assert [one.randaugment_magnitude for one in transforms] == [5, 5]
    config.per_replica.randaugment_magnitude = (1, 20)
    transforms = train_transforms(config, 16)
    assert [one.randaugment_magnitude for one in transforms] == [1, 20]
    assert hyper_parameters(config, 4) == {}, "the train step does not need them"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective__name": "lpft"}, "objective.name='lpft'.*cross_entropy, car_ft"),
        ({"objective__head": "none"}, "objective.head='none'.*zero_shot, random"),
        ({"objective__car_ft_alpha": -1.0}, "objective.car_ft_alpha .*-1.0.*>= 0"),
        ({"objective__probe_epochs": 0}, "objective.probe_epochs .*0.* 1"),
        ({"optimizer__projection__name": "l2"}, "projection.name='l2'.*none, ftp"),
        ({"objective__name": "flyp", "label_smoothing": 0.1}, "'flyp' .*label_smoothing"),
        (
            {"objective__name": "flyp", "gradient_accumulation_steps": 2},
            "gradient_accumulation_steps=2: .*FLYP",
        ),
        (
            {"objective__head": "random", "optimizer__projection__name": "ftp"},
            "optimizer.projection.name='ftp' ",
        ),
        ({"optimizer__name": "adam"}, "optimizer.name='adam'.*adamw, sgd"),
        ({"optimizer__momentum": 1.0}, r"optimizer.momentum .*1.0.*\[0, 1\)"),
        ({"optimizer__decay_to_pretrained": -0.1}, "optimizer.decay_to_pretrained .*-0.1"),
        ({"per_replica__epochs": (1, 2, 3)}, "per_replica.epochs .*3 .*2 "),
        ({"per_replica__mixup": (0.1, -0.2)}, r"per_replica.mixup .*-0.2.*\[0.0,"),
        (
            {"per_replica__label_smoothing": (0.1, 1.0)},
            r"per_replica.label_smoothing .*1.0.*\[0.0, 1.0\)",
        ),
        ({"per_replica__epochs": (1, 2)}, "per_replica.epochs .* epochs=2"),
        (
            {"data__name": "folder", "per_replica__augment_strength": (0.5, 1.0)},
            "per_replica.augment_strength .*glyphs",
        ),
        (
            {"per_replica__randaugment_ops": (0, 2)},
            "per_replica.randaugment_ops .*glyphs.* per_replica.augment_",
        ),
        (
            {"data__name": "folder", "per_replica__randaugment_ops": (0, 1.5)},
            "per_replica.randaugment_ops .*1.5.* integer",
        ),
        (
            {"data__name": "folder", "per_replica__randaugment_magnitude": (0, 31)},
            r"per_replica.randaugment_magnitude .*31.*\[0.0, 30\]",
        ),
        (
            {"per_replica__epochs": (1, float("inf"))},
            "per_replica.epochs .*inf.* integer",
        ),
    ],
)
def test_an_invalid_option_is_one_line_that_says_how_to_fix_it(changes, message):
    config = tiny.config(**changes)
    with pytest.raises(UserError, match=message) as error:
        check_method(config)
        make_optimizer(config.optimizer, STEPS)
        hyper_parameters(config, 4)
    assert "\n" not in str(error.value)


def test_row_names():
    rows = {
        "single_model": {},
        "car_ft": {"objective__name": "car_ft"},
        "ftp": {"optimizer__projection__name": "ftp"},
        "l2_sp+tpgm": {"objective__name": "l2_sp", "optimizer__projection__name": "tpgm"},
        "decay_to_pretrained": {"optimizer__decay_to_pretrained": 0.1},
    }
    for name, changes in rows.items():
        assert method_name(tiny.config(**changes)) == name
