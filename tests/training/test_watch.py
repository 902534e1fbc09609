"""What is not finite is named, and reaches no merge and no checkpoint, whatever the policy."""

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
SURVIVING = ("skip_step", "restore_last_merge")
compiled = functools.cache(
    lambda policy, rate=1e-2: linear.step_functions(
        linear.config(monitor__on_non_finite=policy, optimizer__learning_rate=rate)
    )
)
CARELESS = {"optimizer__b1": 0.0, "optimizer__b2": 0.0, "optimizer__eps": 0.0}
careless = functools.cache(
    lambda policy: linear.step_functions(linear.config(monitor__on_non_finite=policy, **CARELESS))
)


def run(workdir, policy, spoiled=(), **changes):
    changes["monitor__on_non_finite"] = policy
    return linear.trainer(workdir, spoiled, step_functions=compiled(policy), **changes)


def events(workdir):
    return read_lines(workdir / "runs/run/events.jsonl")


def saved(workdir, folder):
    with Checkpoints(workdir / "runs/run" / folder, keep=0) as checkpoints:
        return checkpoints.steps


def test_what_overflows_in_the_square_is_not_finite():
    def of(value):
        grads = {"a": jnp.ones(2), "b": jnp.full(1, value, jnp.float32)}
        found = finite_checks(jnp.float32(1), grads, {"a": jnp.ones(2), "b": jnp.ones(1)})
        return bool(found["ok"]), int(found["first_bad"]), float(found["grad_norm"])

    assert of(1e19)[:2] == (True, -1)
    assert of(2e19) == (False, 1, np.inf)
    assert of(-np.inf)[:2] == (False, 1)
    lost = finite_checks(jnp.float32("inf"), {"a": jnp.ones(2)}, {"a": jnp.ones(2)})
    assert not lost["ok"] and lost["first_bad"] == -1


@pytest.mark.parametrize("policy", SURVIVING)
@pytest.mark.parametrize(
    ("execution", "shape"), [("map", (1, 1)), ("vmap", (1, 1)), ("vmap", (2, 4))]
)
def test_a_bad_step_leaves_nothing_behind_and_its_neighbor_alone(policy, execution, shape):
    config = linear.config(
        monitor__on_non_finite=policy,
        compute__replica_mode=execution,
        mesh__replica=shape[0],
        mesh__data=shape[1],
    )
    programs = linear.step_functions(config)
    anchor = programs.anchor
    last = jax.tree.map(lambda x: x + 1, anchor)
    reference = programs.step_constants(anchor, last)

    def steps(spoiled):
        stream, state = linear.batches(config, 0, spoiled), programs.init_state(0)
        for _ in range(2):
            batch = put_batch(programs.mesh, next(stream))
            before = jax.device_get(state)
            state, values = programs.train_step(state, batch, reference)
        return before, jax.device_get(state), jax.device_get(values)

    _, clean, values = steps(())
    assert values["ok"].all() and (values["first_bad"] == -1).all()
    before, after, values = steps([(2, 1, "curse", HUGE)])  # Its square overflows.
    np.testing.assert_array_equal(values["ok"], [True, False])
    np.testing.assert_array_equal(values["first_bad"], [-1, linear.NAMES.index("head.kernel")])
    if policy == "skip_step":
        expected = (before.params, before.opt_state)
    else:
        expected = jax.device_get((last, programs.init_state(0).opt_state))
        expected = (jax.tree.map(lambda x: np.stack([x, x]), expected[0]), expected[1])
    for replica, want in ((0, (clean.params, clean.opt_state)), (1, expected)):
        chex.assert_trees_all_equal(
            *(
                jax.tree.map(lambda x, r=replica: x[r], t)
                for t in ((after.params, after.opt_state), want)
            )
        )
    assert after.step == 2


@pytest.mark.parametrize("step", [3, 4, 7])  # Within an epoch; at a merge; after one, and a save.
def test_stop_names_the_tensor_and_leaves_the_last_checkpoint(tmp_path, step):
    with pytest.raises(UserError) as error:
        run(tmp_path, "stop", [(step, 1, "curse", HUGE)]).run()
    assert f"replica 1, step {step}: gradient of head.kernel " in str(error.value)
    assert "learning_rate" in str(error.value) and "monitor.on_non_finite" in str(error.value)
    assert saved(tmp_path, "merged") == [4] * (step > 4)
    assert saved(tmp_path, "state") == [4, 5] * (step > 5)
    (event,) = events(tmp_path)
    assert (event["step"], event["replica"], event["action"]) == (step, 1, "stop")
    if step == 7:  # The state is the one of a run that nothing happened to; it goes on from it.
        again, clean = (run(place, "stop").run() for place in (tmp_path, tmp_path / "clean"))
        chex.assert_trees_all_equal((again.state, again.merged), (clean.state, clean.merged))
        assert events(tmp_path) == []


@pytest.mark.parametrize(("step", "saves"), [(4, []), (5, [4])])  # At a merge; at a save.
def test_weights_lost_by_a_finite_gradient_are_neither_merged_nor_saved(tmp_path, step, saves):
    """Adam without its eps divides a gradient of zero by its norm: 0 / 0."""
    with pytest.raises(UserError) as error:
        linear.trainer(tmp_path, [(step, 1, "image", 0)], step_functions=careless("stop")).run()
    assert f"replica 1, step {step}: weights of head.kernel " in str(error.value)
    assert saved(tmp_path, "state") == saved(tmp_path, "merged") == saves
    (event,) = events(tmp_path)
    assert (event["tensor"], event["replica"], event["step"]) == ("head.kernel", 1, step)
    assert np.isfinite(event["loss"])


def test_weights_lost_by_a_finite_gradient_are_skipped(tmp_path):
    trainer = linear.trainer(
        tmp_path,
        [(5, 1, "image", 0)],
        step_functions=careless("skip_step"),
        monitor__on_non_finite="skip_step",
    )
    result = trainer.run()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((result.state.params, result.merged)))
    assert [(event["step"], event["replica"]) for event in events(tmp_path)] == [(5, 1)]


@pytest.mark.parametrize("policy", SURVIVING)
def test_a_survived_event_is_told_and_replayed_after_a_kill(tmp_path, capsys, policy):
    """One in the first epoch, lost with the kill and made again; one after the restored step."""
    spoiled = [(2, 1, "image", NAN), (6, 0, "target", np.inf), (7, 0, "target", NAN)]

    class Killed(Exception):
        pass

    def until(step):
        trainer = run(tmp_path / "killed", policy, spoiled)
        stream = trainer.batches

        def broken(start):
            for number, batch in enumerate(stream(start), start + 1):
                if number == step:
                    raise Killed
                yield batch

        trainer.batches = broken
        with pytest.raises(Killed):
            trainer.run()

    whole = run(tmp_path / "whole", policy, spoiled).run()
    output = " ".join(capsys.readouterr().out.split())
    assert "replica 1, step 2: gradient of head.bias " in output
    assert re.search(r"\(3 .{,20}20\)", output) and "3 times" in output
    until(3)
    until(8)
    again = run(tmp_path / "killed", policy, spoiled).run()
    chex.assert_trees_all_equal((again.state, again.merged), (whole.state, whole.merged))
    for name in ("events.jsonl", "metrics.jsonl"):
        files = [tmp_path / d / "runs/run" / name for d in ("whole", "killed")]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    told = [(event["step"], event["replica"]) for event in events(tmp_path / "whole")]
    assert told == [(2, 1), (6, 0), (7, 0)]
    clean = run(tmp_path / "clean", policy).run()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(whole.merged))
    assert not np.array_equal(whole.merged["head"]["kernel"], clean.merged["head"]["kernel"])


@pytest.mark.parametrize("policy", ["stop", "restore_last_merge"])
def test_a_rate_that_diverges_ends_the_run_and_is_never_merged(tmp_path, policy):
    changes = {
        "optimizer__learning_rate": 1e30,
        "monitor__on_non_finite": policy,
        "monitor__max_non_finite_steps": 5,
    }
    trainer = linear.trainer(tmp_path, step_functions=compiled(policy, 1e30), **changes)
    with pytest.raises(UserError) as error:
        trainer.run()
    assert "replica 0, step 2" in str(error.value) or policy != "stop"
    assert ("max_events=5" in str(error.value)) == (policy != "stop")
    assert "learning_rate" in str(error.value)
    with Checkpoints(tmp_path / "runs/run/merged", keep=0) as merges:
        for step in merges.steps:
            merged = merges.restore(step, trainer.step_functions.abstract_anchor)
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(merged))


def test_the_limit_counts_the_events_of_earlier_lives(tmp_path):
    spoiled = [(step, 0, "image", NAN) for step in (1, 2, 3, 7, 8)]
    with pytest.raises(UserError, match="step 7.*max_events=3"):
        run(tmp_path, "skip_step", spoiled, monitor__max_non_finite_steps=3).run()
    with pytest.raises(UserError, match="step 7.*max_events=3"):
        run(tmp_path, "skip_step", spoiled, monitor__max_non_finite_steps=3).run()
    run(tmp_path, "skip_step", spoiled, monitor__max_non_finite_steps=5).run()
    assert [event["step"] for event in events(tmp_path)] == [1, 2, 3, 7, 8]


def test_an_unknown_policy_is_refused():
    with pytest.raises(UserError, match="monitor.on_non_finite='ignore'.*skip_step"):
        linear.step_functions(linear.config(monitor__on_non_finite="ignore"))


@pytest.mark.parametrize("policy", SURVIVING)
def test_policies_bring_no_collective_across_replicas(policy):
    config = linear.config(monitor__on_non_finite=policy, mesh__replica=2, mesh__data=4)
    programs = linear.step_functions(config)
    batch = put_batch(programs.mesh, next(linear.batches(config, 0)))
    text = programs.train_step.lower(programs.abstract_state, batch, programs.step_constants())
    text = text.compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text and "permute" not in text
    # Devices 0-3 hold replica 0, devices 4-7 replica 1.
    found = collectives(text)
    assert found and len(found) == text.count("replica_groups=")
    assert all(one.within(4) for one in found)


def test_a_band_follows_its_series():
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(5000)
    band = SpikeDetector(deviations=6.0, window=100)
    assert not any(band.leaves(x) for x in 3 + 0.1 * noise)
    # An exponential window of 100 knows a mean to 1/sqrt(200) of a deviation, and that to 7 %.
    assert abs(band.mean - 3) < 0.03 and abs(band.deviation - 0.1) < 0.03
    assert band.leaves(30.0) and band.leaves(5.0), "one spike hides no other"
    assert not any(band.leaves(x) for x in 3 + 0.1 * noise[:100])
    assert not band.leaves(-30.0), "what falls is no alarm"
    same = SpikeDetector(deviations=6.0, window=100)
    assert not any(same.leaves(2.0 + 1e-4 * (i % 2)) for i in range(100)), "rounding is no spike"
    level = SpikeDetector(deviations=6.0, window=20)
    seen = [level.leaves(x) for x in [*(1 + 0.1 * noise[:50]), *(3 + 0.1 * noise[50:150])]]
    assert seen[50] and not any(seen[-50:]), "a new level is learnt"


def test_a_spike_is_a_line_once_and_survives_a_restart(tmp_path):
    def line(step):
        loss = 9.0 if step in (30, 40) else 1 + 0.01 * (step % 3)
        return {"train/loss/replica_0": loss, "train/grad_norm/replica_0": None}

    config = linear.config().watch
    with JsonLines(tmp_path / "a.jsonl") as lines:
        watch = NonFiniteMonitor(config, linear.NAMES, lines, print)
        for step in range(50):
            watch.check_spikes(step, line(step))
    with JsonLines(tmp_path / "b.jsonl") as lines:
        watch = NonFiniteMonitor(config, linear.NAMES, lines, print)
        for step in range(50):
            watch.check_spikes(step, line(step), again=step <= 35)
    whole, resumed = (read_lines(tmp_path / f"{name}.jsonl") for name in "ab")
    assert [(e["event"], e["step"], e["loss"]) for e in whole] == [
        ("loss_spike", 30, 9.0),
        ("loss_spike", 40, 9.0),
    ]
    assert resumed == whole[1:] and watch.spikes == 2
    assert SPIKE_WARMUP < 30
    config.spike_deviations = 0.0
    silent = NonFiniteMonitor(config, linear.NAMES, None, print)
    for step in range(50):
        silent.check_spikes(step, line(step))
    assert silent.spikes == 0
