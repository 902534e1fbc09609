"""The benchmarks of the step and the merge run, and their counts are correct."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest

from benchmarks import compile, models, step, turns
from modelstock_jax.models.clip import classifier
from modelstock_jax.models.transformer import Compute

ROOT = Path(__file__).parents[1]
# Packages that a minimal environment lacks: it has jax, flax, optax and ml_collections.
ABSENT = ("PIL", "chex", "datasets", "google", "grain", "huggingface_hub", "matplotlib", "orbax",
          "safetensors", "simplejpeg", "sklearn", "tensorboardX", "tensorflow_datasets",
          "tokenizers", "torch", "transformers", "zlib_ng")  # fmt: skip
BARE = f"""
import runpy, sys
for name in {ABSENT}:
    sys.modules[name] = None
for script, arguments in {{}}:
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.slow
def test_they_need_only_jax_flax_and_optax(tmp_path):
    files = tmp_path / "step.json", tmp_path / "merge.json"
    common = ["--sizes", "tiny", "--rounds", "2", "--seconds", "0.001", "--json"]
    scripts = [
        (
            "benchmarks/step.py",
            [*common, str(files[0]), "--batch", "2", "--side", "64", "--torch", ""],
        ),
        ("benchmarks/merge.py", [*common, str(files[1])]),
    ]
    done = subprocess.run(
        [sys.executable, "-c", BARE.format(scripts)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    steps, merges = (json.loads(path.read_text()) for path in files)
    assert steps["versions"]["jax"] == jax.__version__ and steps["dtype"] == "float32"
    assert [row["way"] for row in steps["rows"]] == [
        "two by vmap, xla", "two by map, xla", "one replica, xla",
    ]  # fmt: skip
    for row in steps["rows"] + merges["rows"]:
        assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0, row
        assert row["way"] in done.stdout
    pair, _, single = steps["rows"]
    # Weights and two Adam moments, float32, of each replica.
    state_bytes = 12 * sum(x.size for x in jax.tree.leaves(models.abstract_weights("tiny")))
    assert pair["memory_bytes"] > 2 * state_bytes and single["memory_bytes"] > state_bytes


def test_rate_is_relative_to_the_product_of_its_round():
    row = {"size": "b32", "batch": 8}
    # Two replicas of eight images; the machine was half as fast in the second round.
    step._rate(row, step=[0.5, 1.0], product=[0.1, 0.2], flops=1e12, replicas=2)
    assert row["images_per_second"] == 16 / 0.75
    assert row["of_peak"] == pytest.approx(16 * models.image_flops("b32") / 0.5 / 1e13)


def test_processes_are_compared_by_their_fraction_of_peak():
    """PyTorch's process ran while the machine was twice as fast."""
    ours = {"size": "b32", "way": "two by vmap, xla", "images_per_second": 2.0, "of_peak": 0.5}
    torch = {"size": "b32", "way": "PyTorch, one replica", "images_per_second": 4.0, "of_peak": 0.4}
    assert step.peers([torch, ours]) == ["b32, two by vmap, xla: 1.25 x PyTorch's % of peak"]


@pytest.mark.parametrize(("size", "billions"), [("b32", 26.2), ("b16", 105.2), ("l14", 485.8)])
def test_operations_of_the_published_sizes(size, billions):
    assert models.image_flops(size) / 1e9 == pytest.approx(billions, abs=0.05)


def test_operations_agree_with_the_count_of_xla():
    """For the gradient of the loss; norms, softmax and activations add a few % in XLA's count."""
    clip = models.clip_config("b32")
    classify = classifier(clip, Compute())
    batch = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    lowered = jax.jit(jax.grad(lambda w, x: classify(w, x).sum())).lower(
        models.abstract_weights("b32"), batch
    )
    counted = lowered.cost_analysis()["flops"] / 2
    assert models.image_flops("b32") < counted < 1.05 * models.image_flops("b32")


def test_turns_change_their_order():
    calls = []
    variants = {name: lambda count, name=name: calls.append((name, count)) for name in "ab"}
    seconds = turns.take_turns(variants, rounds=2, seconds=0.0)
    assert [name for name, _ in calls[-4:]] == ["a", "b", "b", "a"]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}
    assert turns.ratio([1.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == 2.0


def test_programs_that_are_compiled_return_the_state_of_a_run():
    programs, setup = compile.config_programs("configs/glyphs.py")
    assert list(programs) == ["step", "merge"] and setup["cpu"] > 0
    step, (state, *inputs) = programs["step"]
    merge, (anchor, merged_state) = programs["merge"]
    for new in (step.eval_shape(state, *inputs)[0], merge.eval_shape(anchor, merged_state)[0]):
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state, merged_state)


def test_compile_prints_and_writes_its_results(monkeypatch, tmp_path, capsys):
    def slow(run):
        return run(), {"cpu": 0.25, "wall": 0.5}

    shape = jax.ShapeDtypeStruct((3, 3), jnp.float32)
    programs = {name: (jax.jit(lambda x: x @ x), (shape,)) for name in ("step", "merge")}
    monkeypatch.setattr(compile, "config_programs", lambda path: (programs, slow(list)[1]))
    monkeypatch.setattr(compile, "timed", slow)
    monkeypatch.setattr(compile, "use_compilation_cache", lambda option: None)
    compile.main(["--cases", "glyphs", "--no-dry-run", "--json", str(tmp_path / "file.json")])
    assert "| glyphs, merge | 0.2 (0.5) | 0.2 (0.5) | 0.2 (0.5) | 0.8 (1.5) |" in (
        capsys.readouterr().out
    )
    (result,) = json.loads((tmp_path / "file.json").read_text())["results"]
    assert result["programs"]["step"] == dict.fromkeys(compile.STAGES, slow(list)[1])


def test_timed_counts_the_seconds_of_all_threads():
    with ThreadPoolExecutor(2) as pool:
        start = time.process_time()
        result, seconds = compile.timed(lambda: list(pool.map(sum, [range(10**6)] * 4)))
        assert 0 < seconds["cpu"] <= time.process_time() - start and len(result) == 4
    assert seconds["wall"] > 0


def test_failed_dry_run_is_no_result():
    with pytest.raises(RuntimeError, match="configs/none.py: the dry run failed"):
        compile.dry_run("configs/none.py", None)
