"""`modelstock average`: checkpoints of one run, with weights from their steps."""

from __future__ import annotations

import json

import numpy as np
import pytest

from modelstock_jax import decay_weights, ema_weights
from modelstock_jax.tensor_files.reader import TensorFiles
from modelstock_jax.tensor_files.writer import write_tensors

STEPS = (500, 1000, 1500, 10000)


@pytest.fixture
def run(tmp_path):
    """Checkpoints of a run, with an optimizer's pickles as transformers writes them."""
    rng, weights = np.random.default_rng(0), np.zeros(6, np.float32)
    for step in STEPS:
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        weights = weights + rng.standard_normal(6).astype(np.float32)
        write_tensors(folder / "model.safetensors", {"w": weights})
        (folder / "config.json").write_text('{"model_type": "llama"}')
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
            (folder / name).write_bytes(b"not read")
    return tmp_path


def paths(run, steps=STEPS):
    return [run / f"checkpoint-{step}" for step in steps]


def average(say, run, *arguments):
    result = say("average", *arguments, "--out", run / "out", "--overwrite")
    assert result.status == 0, result.err
    assert not any((run / "out").glob("*.pt*"))
    return TensorFiles(run / "out")["w"], result


def expected(run, weights, steps=STEPS):
    models = [TensorFiles(path)["w"].astype(np.float64) for path in paths(run, steps)]
    return np.average(models, axis=0, weights=weights)


CASES = [
    ((), [1, 1, 1, 1]),
    (("--weights", "4,3,2,1"), [4, 3, 2, 1]),
    (("--ema", "0.7"), ema_weights(0.7, 4)),
    (("--schedule", "cosine"), decay_weights("cosine", STEPS)),
    (("--schedule", "1-sqrt:9000"), decay_weights("1-sqrt", STEPS, 9000)),
    (("--schedule", "linear:8000"), decay_weights("linear", STEPS, 8000)),
]


@pytest.mark.parametrize(("flags", "weights"), CASES, ids=[" ".join(f) for f, _ in CASES])
def test_averages(say, run, flags, weights):
    out, _ = average(say, run, *paths(run), *flags)
    np.testing.assert_allclose(out, expected(run, weights), rtol=2**-23, atol=1e-7)
    report = json.loads((run / "out" / "merge_report.json").read_text())
    assert report["base"] is None and report["options"]["method"] == "linear"
    used = np.array(weights) > 0
    assert [m["model"] for m in report["models"]] == [
        str(path) for path, is_used in zip(paths(run), used, strict=True) if is_used
    ]


@pytest.mark.parametrize("flags", [("--ema", "0.7"), ("--schedule", "cosine"), ()])
def test_a_pattern_of_the_shell_has_another_order(say, run, flags):
    """checkpoint-10000 is before checkpoint-500 in the order of characters."""
    by_name = sorted(paths(run), key=str)
    assert by_name != paths(run)
    found, result = average(say, run, *by_name, *flags)
    assert "in the order of the steps" in result.err
    np.testing.assert_array_equal(found, average(say, run, *paths(run), *flags)[0])


def test_weights_are_in_the_order_given(say, run):
    found, result = average(say, run, *paths(run)[::-1], "--weights", "1,2,3,4")
    assert "order of the steps" not in result.err
    np.testing.assert_allclose(found, expected(run, [4, 3, 2, 1]), rtol=2**-23, atol=1e-7)


def test_checkpoints_before_the_decay_are_not_read(say, run):
    (run / "checkpoint-500" / "model.safetensors").write_bytes(b"broken")
    _, result = average(say, run, *paths(run), "--schedule", "cosine:9000")
    assert "checkpoint-500" in result.err and "weight 0" in result.err


def test_names_without_steps_have_equal_distances(say, run):
    named = [run / name for name in ("first", "second", "third")]
    for path, step in zip(named, STEPS, strict=False):
        (run / f"checkpoint-{step}").rename(path)
    models = [TensorFiles(path)["w"].astype(np.float64) for path in named]
    found, _ = average(say, run, *named, "--schedule", "linear")
    wanted = np.average(models, axis=0, weights=decay_weights("linear", [0, 1, 2]))
    np.testing.assert_allclose(found, wanted, rtol=2**-23, atol=1e-7)


@pytest.mark.parametrize(("arguments", "pattern"), [
    (["--ema", "0.5", "--schedule", "cosine"], "only one of --ema, --schedule"),
    (["--weights", "1,2"], "--weights has 2 values"),
    (["--ema", "1.5"], "decay .*1.5"),
    (["--schedule", "exponential"], "'exponential' .*cosine"),
    (["--schedule", "cosine:x"], "STEPS .*integer"),
    (["--schedule", "cosine:\u00b2"], "STEPS .*integer"),
    (["--weights", "0,0,0,0"], "not all weights"),
    (["--schedule", "cosine:99999"], "9500 steps"),
])  # fmt: skip
def test_errors(say, run, arguments, pattern):
    import re

    result = say("average", *paths(run), *arguments, "--out", run / "out")
    assert result.status == 1 and re.search(pattern, result.err), result.err
    assert result.err.count("\n") == 1 and not (run / "out").exists()


def test_steps_that_are_needed_and_one_checkpoint(say, run):
    (run / "checkpoint-500").rename(run / "last")
    models = [*paths(run)[1:], run / "last"]
    result = say("average", *models, "--schedule", "cosine:100", "--out", run / "out")
    assert result.status == 1 and "checkpoint-500" in result.err
    result = say("average", run / "last", "--out", run / "out")
    assert result.status == 1 and "two or more" in result.err


def test_options_of_merge_are_named(say, run):
    result = say("average", *paths(run), "--method", "ties", "--out", run / "out")
    assert result.status == 2 and "modelstock merge" in result.err


def test_a_dry_run(say, run):
    plan = json.loads(say("average", *paths(run), "--dry-run", "--json").out)
    assert plan["base"] is None and len(plan["models"]) == 4


def test_names_that_differ_in_more_than_a_number_have_no_steps(say, run):
    named = [run / name for name in ("epoch-1-step-100", "epoch-2-step-50")]
    for path, step in zip(named, STEPS, strict=False):
        (run / f"checkpoint-{step}").rename(path)
    models = [TensorFiles(path)["w"].astype(np.float64) for path in named]
    found, result = average(say, run, *named, "--ema", "0.9")
    assert "order of the steps" not in result.err
    np.testing.assert_allclose(found, 0.9 * models[0] + 0.1 * models[1], rtol=2**-22, atol=1e-7)
