"""A non-finite step is reported and is never merged or saved, for any `on_non_finite`."""

from __future__ import annotations

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modelstock_jax.errors import UserError
from modelstock_jax.fileio import JsonLines, read_lines
from modelstock_jax.training.checkpoints import Checkpoints
from modelstock_jax.training.cost_analysis import collectives
from modelstock_jax.training.metrics import SPIKE_WARMUP, NonFiniteMonitor, SpikeDetector
from modelstock_jax.training.sharding import put_batch
from modelstock_jax.training.train_step import finite_checks
from tests.training import linear

NAN, HUGE = np.float32("nan"), np.float32(1e30)
CONTINUING = ("skip_step", "restore_last_merge")
# Adam without eps divides a zero gradient by zero.
NO_EPS = {"optimizer__b1": 0.0, "optimizer__b2": 0.0, "optimizer__eps": 0.0}


@functools.cache
def step_functions(on_non_finite, learning_rate=1e-2):
    return linear.step_functions(
        linear.config(monitor__on_non_finite=on_non_finite, optimizer__learning_rate=learning_rate)
    )


@functools.cache
def step_functions_without_eps(on_non_finite):
    return linear.step_functions(linear.config(monitor__on_non_finite=on_non_finite, **NO_EPS))


def trainer(workdir, on_non_finite, corruptions=(), **changes):
    changes["monitor__on_non_finite"] = on_non_finite
    return linear.trainer(workdir, corruptions, fns=step_functions(on_non_finite), **changes)


def events(workdir):
    return read_lines(workdir / "runs/run/events.jsonl")


def saved_steps(workdir, directory):
    with Checkpoints(workdir / "runs/run" / directory, keep=0) as checkpoints:
        return checkpoints.steps


def test_a_gradient_whose_square_overflows_is_not_finite():
    def check(value):
        grads = {"a": jnp.ones(2), "b": jnp.full(1, value, jnp.float32)}
        checks = finite_checks(jnp.float32(1), grads, {"a": jnp.ones(2), "b": jnp.ones(1)})
        return bool(checks["ok"]), int(checks["first_bad"]), float(checks["grad_norm"])

    assert check(1e19)[:2] == (True, -1)
    assert check(2e19) == (False, 1, np.inf)
    assert check(-np.inf)[:2] == (False, 1)
    checks = finite_checks(jnp.float32("inf"), {"a": jnp.ones(2)}, {"a": jnp.ones(2)})
    assert not checks["ok"] and checks["first_bad"] == -1


@pytest.mark.parametrize("on_non_finite", CONTINUING)
@pytest.mark.parametrize(
    ("replica_mode", "shape"), [("map", (1, 1)), ("vmap", (1, 1)), ("vmap", (2, 4))]
)
def test_a_non_finite_step_does_not_affect_the_other_replica(on_non_finite, replica_mode, shape):
    config = linear.config(
        monitor__on_non_finite=on_non_finite,
        compute__replica_mode=replica_mode,
        mesh__replica=shape[0],
        mesh__data=shape[1],
    )
    fns = linear.step_functions(config)
    anchor = fns.anchor
    last_merged = jax.tree.map(lambda x: x + 1, anchor)
    constants = fns.step_constants(anchor, last_merged)

    def two_steps(corruptions):
        stream, state = linear.batches(config, 0, corruptions), fns.init_state(0)
        for _ in range(2):
            batch = put_batch(fns.mesh, next(stream))
            before = jax.device_get(state)
            state, metrics = fns.train_step(state, batch, constants)
        return before, jax.device_get(state), jax.device_get(metrics)

    _, clean, metrics = two_steps(())
    assert metrics["ok"].all() and (metrics["first_bad"] == -1).all()
    before, after, metrics = two_steps([(2, 1, "curse", HUGE)])  # Its square overflows.
    np.testing.assert_array_equal(metrics["ok"], [True, False])
    np.testing.assert_array_equal(metrics["first_bad"], [-1, linear.NAMES.index("head.kernel")])
    if on_non_finite == "skip_step":
        expected = (before.params, before.opt_state)
    else:
        expected = jax.device_get((last_merged, fns.init_state(0).opt_state))
        expected = (jax.tree.map(lambda x: np.stack([x, x]), expected[0]), expected[1])
    for replica, expected_state in ((0, (clean.params, clean.opt_state)), (1, expected)):
        chex.assert_trees_all_equal(
            *(
                jax.tree.map(lambda x, r=replica: x[r], t)
                for t in ((after.params, after.opt_state), expected_state)
            )
        )
    assert after.step == 2


@pytest.mark.parametrize(
    "step", [3, 4, 7]
)  # Within an epoch; at a merge; after a merge and a save.
def test_stop_names_the_tensor_and_preserves_the_last_checkpoint(tmp_path, step):
    with pytest.raises(UserError) as error:
        trainer(tmp_path, "stop", [(step, 1, "curse", HUGE)]).run()
    assert f"replica 1, step {step}: gradient of head.kernel " in str(error.value)
    assert "learning_rate" in str(error.value) and "monitor.on_non_finite" in str(error.value)
    assert saved_steps(tmp_path, "models") == [4] * (step > 4)
    assert saved_steps(tmp_path, "state") == [4, 5] * (step > 5)
    (event,) = events(tmp_path)
    assert (event["step"], event["replica"], event["action"]) == (step, 1, "stop")
    if step == 7:  # A run that resumes from the last checkpoint equals one without the error.
        resumed, clean = (trainer(d, "stop").run() for d in (tmp_path, tmp_path / "clean"))
        chex.assert_trees_all_equal((resumed.state, resumed.merged), (clean.state, clean.merged))
        assert events(tmp_path) == []


@pytest.mark.parametrize(("step", "saves"), [(4, []), (5, [4])])  # At a merge; at a save.
def test_non_finite_weights_from_a_finite_gradient_are_not_merged_or_saved_steps(
    tmp_path, step, saves
):
    """Adam without eps divides a gradient of zero by its norm: 0 / 0."""
    with pytest.raises(UserError) as error:
        linear.trainer(
            tmp_path, [(step, 1, "image", 0)], fns=step_functions_without_eps("stop")
        ).run()
    assert f"replica 1, step {step}: weights of head.kernel " in str(error.value)
    assert saved_steps(tmp_path, "state") == saved_steps(tmp_path, "models") == saves
    (event,) = events(tmp_path)
    assert (event["tensor"], event["replica"], event["step"]) == ("head.kernel", 1, step)
    assert np.isfinite(event["loss"])


def test_non_finite_weights_from_a_finite_gradient_are_skipped(tmp_path):
    result = linear.trainer(
        tmp_path,
        [(5, 1, "image", 0)],
        fns=step_functions_without_eps("skip_step"),
        monitor__on_non_finite="skip_step",
    ).run()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((result.state.params, result.merged)))
    assert [(event["step"], event["replica"]) for event in events(tmp_path)] == [(5, 1)]


@pytest.mark.parametrize("on_non_finite", CONTINUING)
def test_events_are_reported_and_are_the_same_after_a_kill(tmp_path, capsys, on_non_finite):
    """One event is before the first save, lost with the kill and repeated; two are later."""
    corruptions = [(2, 1, "image", NAN), (6, 0, "target", np.inf), (7, 0, "target", NAN)]

    class Killed(Exception):
        pass

    def run_until(step):
        killed = trainer(tmp_path / "killed", on_non_finite, corruptions)
        batches = killed.batches

        def killing(start):
            for number, batch in enumerate(batches(start), start + 1):
                if number == step:
                    raise Killed
                yield batch

        killed.batches = killing
        with pytest.raises(Killed):
            killed.run()

    complete = trainer(tmp_path / "complete", on_non_finite, corruptions).run()
    output = " ".join(capsys.readouterr().out.split())
    assert "replica 1, step 2: gradient of head.bias " in output
    assert re.search(r"\(3 .{,20}20 non-finite steps\)", output)
    assert "3 non-finite replica steps" in output
    run_until(3)
    run_until(8)
    resumed = trainer(tmp_path / "killed", on_non_finite, corruptions).run()
    chex.assert_trees_all_equal((resumed.state, resumed.merged), (complete.state, complete.merged))
    for name in ("events.jsonl", "metrics.jsonl"):
        files = [tmp_path / d / "runs/run" / name for d in ("complete", "killed")]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    reported = [(event["step"], event["replica"]) for event in events(tmp_path / "complete")]
    assert reported == [(2, 1), (6, 0), (7, 0)]
    clean = trainer(tmp_path / "clean", on_non_finite).run()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(complete.merged))
    assert not np.array_equal(complete.merged["head"]["kernel"], clean.merged["head"]["kernel"])


@pytest.mark.parametrize("on_non_finite", ["stop", "restore_last_merge"])
def test_a_diverging_run_stops_and_is_never_merged(tmp_path, on_non_finite):
    changes = {
        "optimizer__learning_rate": 1e30,
        "monitor__on_non_finite": on_non_finite,
        "monitor__max_non_finite_steps": 5,
    }
    diverging = linear.trainer(tmp_path, fns=step_functions(on_non_finite, 1e30), **changes)
    with pytest.raises(UserError) as error:
        diverging.run()
    assert "replica 0, step 2" in str(error.value) or on_non_finite != "stop"
    assert ("max_non_finite_steps=5" in str(error.value)) == (on_non_finite != "stop")
    assert "learning_rate" in str(error.value)
    with Checkpoints(tmp_path / "runs/run/models", keep=0) as merges:
        for step in merges.steps:
            merged = merges.restore(step, diverging.step_functions.abstract_anchor)
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(merged))


def test_the_limit_includes_events_before_the_run_was_resumed(tmp_path):
    corruptions = [(step, 0, "image", NAN) for step in (1, 2, 3, 7, 8)]
    with pytest.raises(UserError, match="step 7.*max_non_finite_steps=3"):
        trainer(tmp_path, "skip_step", corruptions, monitor__max_non_finite_steps=3).run()
    with pytest.raises(UserError, match="step 7.*max_non_finite_steps=3"):
        trainer(tmp_path, "skip_step", corruptions, monitor__max_non_finite_steps=3).run()
    trainer(tmp_path, "skip_step", corruptions, monitor__max_non_finite_steps=5).run()
    assert [event["step"] for event in events(tmp_path)] == [1, 2, 3, 7, 8]


def test_an_unknown_option_is_an_error():
    with pytest.raises(UserError, match="monitor.on_non_finite='ignore'.*skip_step"):
        linear.step_functions(linear.config(monitor__on_non_finite="ignore"))


@pytest.mark.parametrize("on_non_finite", CONTINUING)
def test_no_collective_crosses_the_replica_axis(on_non_finite):
    config = linear.config(monitor__on_non_finite=on_non_finite, mesh__replica=2, mesh__data=4)
    fns = linear.step_functions(config)
    batch = put_batch(fns.mesh, next(linear.batches(config, 0)))
    lowered = fns.train_step.lower(fns.abstract_state, batch, fns.step_constants())
    text = lowered.compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text and "permute" not in text
    # Replica 0 is on devices 0-3, replica 1 on devices 4-7.
    used = collectives(text)
    assert used and len(used) == text.count("replica_groups=")
    assert all(collective.within(4) for collective in used)


def test_spike_detector():
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(5000)
    detector = SpikeDetector(deviations=6.0, window=100)
    assert not any(detector.update(x) for x in 3 + 0.1 * noise)
    # An exponential window of 100 estimates the mean to 1/sqrt(200) deviations, which are accurate
    # to 7 %.
    assert abs(detector.mean - 3) < 0.03 and abs(detector.deviation - 0.1) < 0.03
    assert detector.update(30.0) and detector.update(5.0), "a spike hides the next one"
    assert not any(detector.update(x) for x in 3 + 0.1 * noise[:100])
    assert not detector.update(-30.0), "a decrease is not a spike"
    rounding = SpikeDetector(deviations=6.0, window=100)
    assert not any(rounding.update(2.0 + 1e-4 * (i % 2)) for i in range(100))
    shifted = SpikeDetector(deviations=6.0, window=20)
    spikes = [shifted.update(x) for x in [*(1 + 0.1 * noise[:50]), *(3 + 0.1 * noise[50:150])]]
    assert spikes[50] and not any(spikes[-50:]), "the detector does not adapt to a new level"


def test_a_spike_is_written_once_also_after_a_restart(tmp_path):
    def metrics(step):
        loss = 9.0 if step in (30, 40) else 1 + 0.01 * (step % 3)
        return {"train/loss/replica_0": loss, "train/grad_norm/replica_0": None}

    config = linear.config().monitor
    with JsonLines(tmp_path / "a.jsonl") as lines:
        monitor = NonFiniteMonitor(config, linear.NAMES, lines, print)
        for step in range(50):
            monitor.check_spikes(step, metrics(step))
    with JsonLines(tmp_path / "b.jsonl") as lines:
        monitor = NonFiniteMonitor(config, linear.NAMES, lines, print)
        for step in range(50):
            monitor.check_spikes(step, metrics(step), replayed=step <= 35)
    complete, resumed = (read_lines(tmp_path / f"{name}.jsonl") for name in "ab")
    assert [(e["event"], e["step"], e["loss"]) for e in complete] == [
        ("loss_spike", 30, 9.0),
        ("loss_spike", 40, 9.0),
    ]
    assert resumed == complete[1:] and monitor.num_spikes == 2
    assert SPIKE_WARMUP < 30
    config.spike_deviations = 0.0
    disabled = NonFiniteMonitor(config, linear.NAMES, None, print)
    for step in range(50):
        disabled.check_spikes(step, metrics(step))
    assert disabled.num_spikes == 0
