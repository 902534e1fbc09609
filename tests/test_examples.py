"""The example computes what the library computes; it is short and imports no merge or trainer."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import glyphs as glyphs_config
from examples import model_stock_in_100_lines as example
from modelstock_jax import model_stock
from modelstock_jax.data import glyphs
from modelstock_jax.data.augment import shift_and_jitter
from modelstock_jax.data.benchmark import Benchmark
from modelstock_jax.data.glyphs.sets import TRAIN_SIZE
from modelstock_jax.data.loader import steps_per_epoch, train_batches
from modelstock_jax.experiment.setup import classify, open_anchor
from modelstock_jax.models.compute import Compute
from modelstock_jax.models.model import classifier
from modelstock_jax.training.losses import cross_entropy
from modelstock_jax.training.optimizer import warmup_steps
from modelstock_jax.training.sharding import put_batch
from modelstock_jax.training.step_fns import StepFunctions, Task
from modelstock_jax.training.trainer import Trainer
from tests.training import tiny

ROOT = Path(__file__).parents[1]
FILE = Path(example.__file__)
EPOCHS = 2
# Of weights in float64, which rounds to 1e-16. Key biases receive no gradient (softmax is
# shift-invariant), only rounding errors, which Adam scales up: to about 1e-9 of the learning rate.
WEIGHTS_ATOL = 1e-9


def test_the_file_is_short_and_imports_only_data_and_models():
    source = FILE.read_text()
    assert len(source.splitlines()) <= 120
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    package = ("modelstock_jax.data", "modelstock_jax.models")
    others = {name for name in imported if not name.startswith(package)}
    assert others == {"argparse", "pathlib", "jax", "jax.numpy", "optax"}


def random_trees(cosine: float):
    """Return an anchor and two replicas whose task vectors have about this cosine."""
    rng = np.random.default_rng(0)
    shapes = {"kernel": (96, 384), "embedding": (17, 96), "bias": (384,), "patch": (6, 6, 3, 8)}
    signal, noise = abs(cosine) ** 0.5, (1 - abs(cosine)) ** 0.5

    def replicas(w0):
        common, e_1, e_2 = rng.standard_normal((3, *w0.shape))
        d = [signal * common + noise * e_1, np.sign(cosine) * signal * common + noise * e_2]
        return (w0 + 0.02 * np.stack(d)).astype(np.float32)

    tower = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    w0 = {"tower": tower, "head": {"kernel": rng.standard_normal((64, 62)).astype(np.float32)}}
    return w0, jax.tree.map(replicas, w0)


@pytest.mark.parametrize("cosine", [0.9, 0.5, 0.1])
def test_merge_equals_the_library(cosine):
    w0, w = random_trees(cosine)
    merged, ratio = example.merge(w0, w)
    expected, stats = model_stock(w0, w)
    # The library sums in float64 and rounds once. The example's float32 sums err by about 1e-7.
    chex.assert_trees_all_close(ratio, stats.ratio, atol=1e-6, rtol=0)
    jax.tree.map(assert_close, merged, expected, w0, w)
    assert all(0 < t < 1 for t in jax.tree.leaves(ratio))


def assert_close(merged, expected, w0, w):
    """Check the weights of one tensor: four float32 roundings, and the error of the ratio."""
    rounding = 4 * 2**-24 * np.maximum(abs(w0), abs(w).max(0))
    error = abs(np.float64(merged) - np.float64(expected))
    assert (error <= rounding + 1e-6 * abs(w.mean(0) - w0)).all()


def test_tensors_without_a_common_update_keep_the_pretrained_weights():
    w0, w = random_trees(-0.5)
    kernel = w0["head"]["kernel"]
    w["head"]["kernel"] = np.stack([kernel, kernel])  # unchanged, for example a frozen tensor
    w0["orthogonal"] = np.array([1.0, 2.0], np.float32)
    w["orthogonal"] = np.array([[2.0, 2.0], [1.0, 3.0]], np.float32)
    w0["opposite"] = np.array([1.0, 2.0], np.float32)  # equation 2 divides by 0
    w["opposite"] = np.array([[2.0, 2.0], [0.0, 2.0]], np.float32)
    merged, ratio = example.merge(w0, w)
    expected, stats = model_stock(w0, w)
    jax.tree.map(np.testing.assert_array_equal, merged, expected)
    jax.tree.map(np.testing.assert_array_equal, merged, w0)
    jax.tree.map(np.testing.assert_array_equal, ratio, stats.ratio)
    assert not any(jax.tree.leaves(ratio))


def tiny_model():
    """Return (w0, apply, augment) in float64, where rounding cannot hide a wrong constant."""
    apply = classifier(tiny.clip_config(), Compute(dtype=jnp.float64))

    def augment(key, images):
        return tiny.augment(key, {"image": images}, jnp.float64)["image"]

    return tiny.params(np.float64), apply, augment


@pytest.fixture(scope="module")
def library():
    """Return config and step functions of the tiny model, with the optimizer of glyphs.py."""
    config = tiny.config(epochs=EPOCHS, batch_size=4, compute__replica_mode="vmap")
    config.optimizer = glyphs_config.get_config().optimizer
    with jax.enable_x64(True):
        w0, apply, augment = tiny_model()
        steps = steps_per_epoch(len(tiny.images()), config.batch_size)
        task = Task(
            w0,
            cross_entropy(apply, lambda images: images),
            steps,
            EPOCHS * steps,
            num_heads=2,
            augment=lambda key, batch: batch | {"image": augment(key, batch["image"])},
        )
        assert warmup_steps(config.optimizer, task.num_steps) > 1, "the warmup is not tested"
        return config, StepFunctions(config, task)


def test_train_steps_equal_the_library(x64, library):
    config, fns = library
    w0, apply, augment = tiny_model()
    optimizer = example.make_optimizer(fns.task.num_steps)
    train_step = example.make_train_step(apply, augment, optimizer)
    w = example.stack(w0)
    opt_state = jax.vmap(optimizer.init)(w)
    state, batches = fns.init_state(config.seed), tiny.batches(config)
    # Adam's first step does not depend on b1 and b2; the next ones do.
    for step in range(3):
        batch = next(batches)
        keys = [jax.random.fold_in(jax.random.key(config.seed), r) for r in (0, 1)]
        keys = jnp.stack([jax.random.fold_in(key, step) for key in keys])
        w, opt_state, loss = train_step(w, opt_state, keys, batch)
        state, metrics = fns.train_step(state, put_batch(fns.mesh, batch), fns.step_constants())
        # The library logs the loss in float32.
        np.testing.assert_allclose(loss, metrics["loss"], rtol=1e-7)
        chex.assert_trees_all_close(w, state.params, rtol=0, atol=WEIGHTS_ATOL)
    assert loss[0] != loss[1], "the replicas have the same data"


def test_a_complete_run_equals_the_trainer(x64, library, tmp_path, capsys):
    config, fns = library
    result = Trainer(config, fns, partial(tiny.batches, config), tmp_path, "run").run()
    capsys.readouterr()
    w0, apply, augment = tiny_model()
    steps, batches = fns.task.steps_per_epoch, tiny.batches(config)
    w, merged = example.finetune(w0, apply, augment, batches, EPOCHS, steps, config.seed)
    chex.assert_trees_all_close(merged, result.merged, rtol=0, atol=WEIGHTS_ATOL)
    for before, after, start in zip(*map(jax.tree.leaves, (w, merged, w0)), strict=True):
        assert (before[0] != before[1]).any() and (after != start).any()
    epochs = re.findall(r"^epoch (\d+): loss [\d.]+, mean t ", capsys.readouterr().out, re.M)
    assert epochs == [str(epoch + 1) for epoch in range(EPOCHS)]


def test_the_model_is_the_anchor_of_the_library():
    config, train = glyphs_config.get_config(), tiny.images()
    names, templates = glyphs.CLASS_NAMES, glyphs.TEMPLATES
    data = Benchmark(train, train, train, {}, names, templates, shift_and_jitter)
    anchor = classify(config, open_anchor(config), data, heads=None)
    w0, apply = example.load_model()
    jax.tree.map(np.testing.assert_array_equal, w0, anchor.params)
    images = np.random.default_rng(0).integers(0, 256, (4, 24, 24, 3)).astype(np.uint8)
    expected = anchor.apply(anchor.params, anchor.normalize(images))
    np.testing.assert_array_equal(apply(w0, images), expected)


def test_the_defaults_are_those_of_the_glyphs_config(monkeypatch):
    passed, train = {}, tiny.images(256)
    sets = glyphs.GlyphSets(train, train, train, {})

    def finetune(w0, apply, augment, batches, epochs, steps, seed):
        passed.update(augment=augment, batch=next(batches), epochs=epochs, steps=steps, seed=seed)
        raise SystemExit

    monkeypatch.setattr(sys, "argv", [FILE.name])
    monkeypatch.setattr(example, "load_model", lambda: (None, None))
    monkeypatch.setattr(example, "finetune", finetune)
    monkeypatch.setattr(glyphs, "make_sets", lambda **options: passed.update(options) or sets)
    with pytest.raises(SystemExit):
        example.main()
    config = glyphs_config.get_config()
    assert (passed["train_size"], passed["augment"]) == (TRAIN_SIZE, shift_and_jitter)
    assert (passed["epochs"], passed["seed"]) == (config.epochs, config.seed)
    assert passed["steps"] == steps_per_epoch(TRAIN_SIZE, config.batch_size)
    batches = train_batches(
        train, batch_size=config.batch_size, seed=config.seed, num_replicas=config.num_replicas
    )
    jax.tree.map(np.testing.assert_array_equal, passed["batch"], next(batches))


@pytest.mark.slow
def test_the_program_trains_and_prints_accuracies():
    completed = subprocess.run(
        [sys.executable, FILE.relative_to(ROOT), "--epochs=2", "--steps=4", "--batch_size=32"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert completed.returncode == 0, completed.stderr
    epochs = re.findall(r"^epoch \d: loss (\S+), mean t (\S+)$", completed.stdout, re.M)
    (first, t_1), (last, t_2) = ((float(loss), float(t)) for loss, t in epochs)
    assert 0 < last < first < 10 and 0 < t_1 < 1 and 0 < t_2 < 1
    rows = re.findall(r"^(\S+) +(\S+) +([\d.]+) %$", completed.stdout, re.M)
    names, tests = ("pretrained", "w1", "w2", "merged"), ("id", "r")
    assert [row[:2] for row in rows] == [(name, test) for name in names for test in tests]
    accuracy = {(name, test): float(value) for name, test, value in rows}
    # The zero-shot row of the README's table, in which every image is 0.05 %.
    assert accuracy["pretrained", "id"] == pytest.approx(75.45, abs=0.1)
    assert accuracy["pretrained", "id"] < accuracy["merged", "id"] <= 100
