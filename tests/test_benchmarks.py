"""The benchmarks of the step and the merge run, and their counts are correct."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import compile, convolutions, gpu_table, merge, merge_compile, models, step, turns
from modelstock_jax.models.compute import Compute
from modelstock_jax.models.convnext import ConvNeXtConfig
from modelstock_jax.models.model import classifier
from modelstock_jax.models.resnet import ResNetConfig

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


def test_processes_are_compared_by_images_per_second_and_fraction_of_peak():
    """PyTorch's process ran while the machine was twice as fast."""
    ours = {"size": "b32", "way": "two by vmap, xla", "images_per_second": 2.0, "of_peak": 0.5}
    torch = {"size": "b32", "way": "PyTorch, one replica", "images_per_second": 4.0, "of_peak": 0.4}
    step.compare_with_torch([torch, ours])
    assert step.peers([torch, ours]) == [
        "b32, two by vmap, xla: 0.50 x PyTorch's images/s, 1.25 x its % of peak"
    ]


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
    monkeypatch.setattr(turns, "timed", slow)
    monkeypatch.setattr(compile, "use_compilation_cache", lambda option: None)
    compile.main(["--cases", "glyphs", "--no-dry-run", "--json", str(tmp_path / "file.json")])
    assert "| glyphs, merge | 0.2 (0.5) | 0.2 (0.5) | 0.2 (0.5) | 0.8 (1.5) |" in (
        capsys.readouterr().out
    )
    (result,) = json.loads((tmp_path / "file.json").read_text())["results"]
    assert result["programs"]["step"] == dict.fromkeys(turns.STAGES, slow(list)[1])


def test_timed_counts_the_seconds_of_all_threads():
    with ThreadPoolExecutor(2) as pool:
        start = time.process_time()
        result, seconds = turns.timed(lambda: list(pool.map(sum, [range(10**6)] * 4)))
        assert 0 < seconds["cpu"] <= time.process_time() - start and len(result) == 4
    assert seconds["wall"] > 0


def test_failed_dry_run_is_no_result():
    with pytest.raises(RuntimeError, match="configs/none.py: the dry run failed"):
        compile.dry_run("configs/none.py", None)


@pytest.mark.parametrize("replicas", [2, 3, 4])
def test_formula_is_equation_3(replicas):
    rng = np.random.default_rng(replicas)
    w0 = {"kernel": rng.standard_normal((5, 7)), "bias": rng.standard_normal(6)}
    w = {name: x + 1 + rng.standard_normal((replicas, *x.shape)) for name, x in w0.items()}
    w0["obtuse"] = np.zeros(2)
    w["obtuse"] = np.array([[1.0, 0.0], [-1.0, 1.0], [-1.0, -1.0], [0.0, -1.0]])[:replicas]
    expected = {}
    for name in w0:
        updates = (w[name] - w0[name]).reshape(replicas, -1)
        unit = updates / np.linalg.norm(updates, axis=1, keepdims=True)
        cosine = (unit @ unit.T)[np.triu_indices(replicas, 1)].mean()
        t = max(0.0, replicas * cosine / (1 + (replicas - 1) * cosine))
        expected[name] = t * w[name].mean(axis=0) + (1 - t) * w0[name]
    result = merge.formula(*jax.tree.map(jnp.float32, (w0, w)))
    chex.assert_trees_all_close(result, jax.tree.map(np.float32, expected), rtol=1e-5, atol=1e-6)
    assert not np.any(result["obtuse"])


def test_compiled_trees_have_the_shapes_of_their_kind():
    anchor, replicas = merge_compile.abstract_trees(1000, "distinct", 4)
    shapes = [x.shape for x in jax.tree.leaves(anchor)]
    assert len(shapes) == len(set(shapes)) == 1000
    assert [x.shape for x in jax.tree.leaves(replicas)] == [(4, *shape) for shape in shapes]
    anchor, replicas = merge_compile.abstract_trees(100, "transformer", 2)
    assert len(jax.tree.leaves(anchor)) == len(jax.tree.leaves(replicas)) == 100
    assert len({x.shape for x in jax.tree.leaves(anchor)}) == 5
    block, _ = merge_compile.abstract_trees(16, "transformer", 2, width=3)
    assert sum(x.size for x in jax.tree.leaves(block)) == 12 * 3**2 + 13 * 3


def test_merge_compile_prints_and_writes_its_results(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(merge_compile, "in_new_process", lambda function, *args: function(*args))
    monkeypatch.setattr(merge_compile, "EAGER_TREES", ((1, "transformer"),))
    monkeypatch.setattr(merge_compile, "NUM_BLOCKS", 1)
    monkeypatch.setattr(turns, "timed", lambda run: (run(), {"cpu": 0.25, "wall": 0.5}))
    file = tmp_path / "file.json"
    small = ["--leaves", "1", "2", "--replicas", "3", "--width", "2", "--seconds", "0.001"]
    merge_compile.main([*small, "--json", str(file)])
    printed = capsys.readouterr()
    for line in (
        "| 1 | transformer | 3 | 0.75 | 0.75 | 1.00 | 0.75 | 1.00 |",
        "| distinct | 3 | without stats | 750.0 | 375.0 |",
        "| 1 | transformer | model_stock, eager | 0.25 | 0.50 | 250.00 | 500.00 |",
    ):
        assert line in printed.out.splitlines()
    assert (
        "without stats, 2 leaves, distinct, N = 3, CPU s: trace 0.250, lower 0.250, compile 0.250"
        in printed.err.splitlines()
    )
    results = json.loads(file.read_text())
    assert [(row["leaves"], row["shapes"]) for row in results["compile"]] == [
        (1, "transformer"), (1, "distinct"), (2, "transformer"), (2, "distinct"),
    ]  # fmt: skip
    assert results["run"]["parameters"] == 12 * 2**2 + 13 * 2
    assert {way: len(x) for way, x in results["run"]["seconds"].items()} == dict.fromkeys(
        merge_compile.WAYS, 5
    )
    assert list(results["eager"][0]["ways"]) == ["formula, jitted", "model_stock, eager"]


def test_every_measurement_is_a_new_process_without_a_compilation_cache():
    code = "__import__('os').getpid(), __import__('jax').config.jax_enable_compilation_cache"
    (first, cached), (second, _) = (merge_compile.in_new_process(eval, code) for _ in range(2))
    assert len({first, second, os.getpid()}) == 3 and not cached


def test_ways_take_turns_in_new_processes(monkeypatch):
    calls = []
    monkeypatch.setattr(merge_compile, "in_new_process", lambda function, *args: calls.append(args))
    monkeypatch.setattr(merge_compile, "progress", lambda *args: "")
    results = merge_compile.measure(sum, "ab", 2, 5, "distinct", 4)
    assert calls == [(way, 5, "distinct", 4) for way in "abba"]
    assert results == {"a": [None, None], "b": [None, None]}


def test_ratio_of_compile_seconds_is_that_within_the_rounds():
    def stages(*seconds):
        return [{"stages": {s: {"cpu": x / 3} for s in turns.STAGES}} for x in seconds]

    ways = {
        "formula": stages(1, 2, 4), "model_stock": stages(2, 2, 2), "without stats": stages(3, 2, 8)
    }  # fmt: skip
    row = {"leaves": 10, "shapes": "distinct", "replicas": 2, "ways": ways}
    assert list(merge_compile.compile_cells(row).values()) == [
        "10", "distinct", "2", "2.00", "2.00", "1.00", "3.00", "2.00",
    ]  # fmt: skip
    assert merge_compile.per_leaf_cells([row, row | {"leaves": 20}])[0] == {
        "shapes": "distinct", "N": "2", "CPU ms per leaf": "formula",
        "10 leaves": "200.0", "20 leaves": "100.0",
    }  # fmt: skip


def test_time_of_a_call_is_that_of_the_fastest_round():
    seconds = {"formula": [0.4, 0.2], "model_stock": [0.1, 0.35], "without stats": [0.1, 0.1]}
    temporaries = dict.fromkeys(seconds, 2_500_000)
    result = {"parameters": 2e6, "seconds": seconds, "temporaries": temporaries}
    cells = merge_compile.run_cells(result)[1]
    assert list(cells.values()) == ["model_stock", "100", "1.00", "2.5"]


@pytest.mark.parametrize("kind", ["convolution", "depthwise"])
def test_both_ways_of_a_convolution_have_one_gradient(kind):
    x = np.random.default_rng(0).standard_normal((2, 9, 9, 8), np.float32)
    (params, ours), (_, lax) = convolutions.layer_ways(kind, 8).values()
    found, expected = (convolutions.gradient(way)(params, x) for way in (ours, lax))
    # Sums of some hundred float32 products in another order.
    chex.assert_trees_all_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_convolutions_prints_and_writes_its_results(monkeypatch, tmp_path, capsys):
    small = dict(image_size=16, depths=(1,))
    nets = {
        "resnet": ResNetConfig(embedding_size=8, hidden_sizes=(16,), **small),
        "convnext": ConvNeXtConfig(hidden_sizes=(8,), **small),
    }
    monkeypatch.setattr(convolutions, "NETS", nets)
    monkeypatch.setattr(convolutions, "LAYERS", (("depthwise", 8, 9),))
    monkeypatch.setattr(convolutions, "STEPS", (("map", 1, 1), ("vmap", 2, 1)))
    file = tmp_path / "file.json"
    convolutions.main(["--batch", "2", "--rounds", "2", "--seconds", "0.001", "--json", str(file)])
    printed, results = capsys.readouterr().out, json.loads(file.read_text())
    assert "| depthwise | 9 x 9 x 8 | shifted sums |" in printed
    assert "| resnet | vmap, mesh 2 x 1 | 2 |" in printed
    assert [(row["net"], row["devices"]) for row in results["steps"]] == [
        ("resnet", 1), ("resnet", 2), ("convnext", 1), ("convnext", 2),
    ]  # fmt: skip
    rows = results["layers"] + results["steps"]
    assert len(rows) == 6 + 4 and all(len(row["seconds"]) == 2 for row in rows)


# Tracing a model for each option takes up to 10 seconds.
TABLE = [
    pytest.param(m, marks=pytest.mark.slow if m != "ViT-B/32" else ()) for m in gpu_table.MODELS
]


@pytest.mark.parametrize("model", TABLE)
def test_the_documented_table_of_gpus_is_that_of_the_script(model):
    page = (ROOT / "docs/gpu.md").read_text()
    _, _, table = page.partition(f"\n\n{gpu_table.HEADER}\n")
    documented, _, _ = table.partition("\n\n")
    lines = [line for line in documented.splitlines() if line.startswith(f"| {model} |")]
    assert lines == gpu_table.rows(model)
    assert len(documented.splitlines()) == len(gpu_table.MODELS) * len(gpu_table.GPUS)


def test_hours_are_operations_over_the_assumed_speed():
    config, (_, gpu, *_) = models.run_config("b32"), gpu_table.GPUS
    seconds = 2 * 10 * 1_281_167 * models.image_flops("b32") / (0.3 * 70e12)
    assert gpu_table.hours("b32", config, gpu, remat=False) == pytest.approx(seconds / 3600)
    recomputed = gpu_table.hours("b32", config, gpu, remat=True)
    assert recomputed == pytest.approx(4 / 3 * seconds / 3600)
