"""`make gpu` runs with tiny sizes on a CPU, and keeps what a part has stored when it is stopped."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packaging.requirements import Requirement

from benchmarks import gpu, gpu_checks, gpu_parts, gpu_tables, gpu_wheels, kernels, limits, models
from modelstock_jax.data import device_resize
from modelstock_jax.training.checkpoints import Checkpoints
from modelstock_jax.training.state import TrainState

ROOT = Path(__file__).parents[1]
# A part that stores a result and then does not end.
SLOW = """
import json, pathlib, sys, time
pathlib.Path(sys.argv[1]).write_text(json.dumps({"seconds": 1}))
time.sleep(60)
"""


def rehearse(tmp_path, *parts, code=0):
    """Run parts of the rehearsal; return the results and the tables."""
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--rehearse", "--json", str(tmp_path / "gpu.json"),
         "--limit=2000", "--parts", *parts],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    results = json.loads((tmp_path / "gpu.json").read_text())
    return results, (tmp_path / "gpu.md").read_text()


def found(results, part):
    record = results["parts"][part]
    assert record["status"] == "done", record
    return record["results"]


def test_rehearsal_of_the_steps(tmp_path):
    """The parts of the other sizes run the same code."""
    results, text = rehearse(tmp_path, "b16", "variants", "torch", "XLA: latency hiding")
    steps = found(results, "b16")["steps"]
    assert not any("failed" in row for row in steps), steps
    assert [(row["replicas"], row["batch"]) for row in steps][:2] == [("vmap", 4), ("vmap", 8)]
    assert [row["replicas"] for row in steps][2:] == ["one", "map"]
    profile = found(results, "b16")["profile"]
    assert profile["kinds"] and 0 <= profile["idle"] <= profile["seconds"], profile
    assert [row["remat"] for row in found(results, "variants")["steps"]] == ["on", "on"]
    assert len(found(results, "XLA: latency hiding")["steps"]) == 1
    assert results["parts"]["torch"]["status"] in ("skipped", "done")
    assert "device" in results["parts"] and results["rehearsal"]
    for heading in ("Device", "Training step", "Time by kind of kernel", "Parts"):
        assert f"\n## {heading}\n" in text
    assert "| XLA: latency hiding | done |" in text


def test_rehearsal_of_the_checks(tmp_path):
    results, text = rehearse(tmp_path, "correct")
    checks = found(results, "correct")["checks"]
    assert len(checks) > 15 and all(row["ok"] for row in checks), checks
    assert "| model_stock against float64, relative to the update |" in text
    assert "| resize and Pillow's, gray levels |" in text


def test_rehearsal_of_the_merge_and_the_input(tmp_path):
    results, text = rehearse(tmp_path, "merge", "input")
    assert len(found(results, "merge")["merges"]) == 3 * 2
    sources = [(row["source"], row["resize_on"]) for row in found(results, "input")["sources"]]
    assert sources == [(s, r) for s in ("decoded cache", "JPEG") for r in ("host", "device")]
    assert "\n## Merge\n" in text and "\n## Input\n" in text


@pytest.mark.slow
def test_rehearsal_of_a_training_run(tmp_path):
    results, _ = rehearse(tmp_path, "glyphs")
    assert set(found(results, "glyphs")["accuracy"]) >= {"zero_shot", "periodic_model_stock"}


@pytest.fixture
def measurement(tmp_path):
    args = gpu.parse(["--rehearse", "--json", str(tmp_path / "gpu.json")])
    return gpu.Measurement(args, tmp_path)


def test_only_a_rehearsal_uses_programs_of_earlier_runs(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "earlier")
    for arguments, directory in (["--rehearse"], "earlier"), ([], str(tmp_path / "programs")):
        environment = gpu.part_environment(gpu.parse(arguments), tmp_path)
        assert environment["JAX_COMPILATION_CACHE_DIR"] == directory


def test_the_checks_have_a_cpu_to_compare_with(monkeypatch, tmp_path):
    for platforms, expected in ("cuda", "cuda,cpu"), ("cuda,cpu", "cuda,cpu"), ("", ""):
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
        environment = gpu.part_environment(gpu.parse([]), tmp_path)
        assert environment["JAX_PLATFORMS"] == expected


def test_a_part_over_its_limit_is_reported_with_its_results(measurement, monkeypatch, tmp_path):
    monkeypatch.setattr(
        measurement, "command",
        lambda part, limit: [sys.executable, "-c", SLOW, str(tmp_path / f"{part.name}.json")],
    )  # fmt: skip
    record = measurement.run(gpu.Part("b16", 2.0), os.environ)
    measurement.save()
    assert record["status"] == "cut off" and record["seconds"] < 10
    assert record["results"] == {"seconds": 1}
    assert record["error"] == "stopped at its limit of 2 s"
    stored = json.loads((tmp_path / "gpu.json").read_text())
    assert stored["parts"] == {"b16": record}


def test_all_processes_of_a_part_are_stopped(measurement, monkeypatch, tmp_path):
    code = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
time.sleep(60)
"""
    file = tmp_path / "child"
    monkeypatch.setattr(
        measurement, "command", lambda part, limit: [sys.executable, "-c", code, str(file)]
    )
    measurement.run(gpu.Part("b16", 2.0), os.environ)
    # A killed process ends when it is next scheduled.
    deadline, child = time.monotonic() + 20, int(file.read_text())
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except FileNotFoundError:
        return False


def test_a_part_that_fails_is_reported_with_its_last_line(measurement, monkeypatch):
    monkeypatch.setattr(
        measurement, "command", lambda part, limit: [sys.executable, "-c", "print(1); 1 / 0"]
    )
    record = measurement.run(gpu.Part("b16", 20), os.environ)
    assert record["status"] == "failed"
    assert record["error"] == "ZeroDivisionError: division by zero"
    assert gpu_tables.problems(measurement.results) == ["part b16 failed"]


def test_the_last_line_of_an_error_of_jax_is_its_message(measurement, monkeypatch, tmp_path):
    code = "import jax; jax.jit(lambda x: x @ x)(jax.numpy.ones((2, 3)))"
    monkeypatch.setattr(measurement, "command", lambda part, limit: [sys.executable, "-c", code])
    environment = gpu.part_environment(gpu.parse(["--rehearse"]), tmp_path)
    record = measurement.run(gpu.Part("b16", 60), environment)
    assert record["error"].startswith("TypeError: dot_general"), record["output"]


def test_the_limit_of_a_part_includes_its_imports(monkeypatch, tmp_path):
    args = argparse.Namespace(rehearse=True, torch="", json=tmp_path, seconds=60.0)
    monkeypatch.setattr(gpu_parts, "START", time.monotonic() - 50)
    run = gpu_parts.Run(args)
    assert run.has_time(5) and not run.has_time(15)


def test_a_part_without_time_is_skipped(measurement):
    measurement._start -= gpu.LIMIT
    record = measurement.run(gpu.Part("b16", 80), os.environ)
    assert record == {"status": "skipped", "error": "no time left"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_measurement_that_is_stopped_keeps_its_results(number, tmp_path):
    with subprocess.Popen(
        [sys.executable, "benchmarks/gpu.py", "--rehearse", "--json", str(tmp_path / "gpu.json")],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        assert process.stdout.readline().startswith("device: done")
        process.send_signal(number)
        output, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + number and "Traceback" not in output
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert found(results, "device")["device"] == "cpu"


def test_without_a_gpu_it_says_how_to_rehearse(tmp_path):
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--json", str(tmp_path / "gpu.json")],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and not (tmp_path / "gpu.json").exists()
    assert done.stderr == "error: JAX found no GPU; pass --rehearse to run tiny sizes on the CPU\n"


@pytest.mark.parametrize("limit", [7, 3])
def test_steps_are_measured_in_order_of_importance_while_there_is_time(
    limit, monkeypatch, tmp_path
):
    args = ["--json", str(tmp_path / "b16.json"), "--seconds", "60", "b16"]
    measured = []
    rates = {("xla", 256): 1.0, ("cudnn", 256): 2.0, ("cudnn", 512): 3.0, ("cudnn", 128): 1.0}

    def measure_step(run, size, batch, variant):
        measured.append((variant.replicas, variant.attention, batch))
        rate = rates[variant.attention, batch] if variant.replicas == "vmap" else 1.5
        return {"size": size, "batch": batch, "images_per_second": rate, **variant._asdict()}

    def init(run, args, init=gpu_parts.Run.__init__):
        init(run, args)
        run.attentions = ("xla", "cudnn")

    monkeypatch.setattr(gpu_parts.Run, "__init__", init)
    monkeypatch.setattr(gpu_parts.Run, "has_time", lambda run, seconds: len(measured) < limit)
    monkeypatch.setattr(gpu_parts, "measure_step", measure_step)
    monkeypatch.setattr(gpu_parts, "profile_step", lambda run, size, row: {"batch": row["batch"]})
    gpu_parts.main(args)
    expected = [
        ("vmap", "xla", 256), ("vmap", "cudnn", 256), ("vmap", "cudnn", 512),
        ("one", "cudnn", 512), ("vmap", "cudnn", 128), ("map", "cudnn", 512),
    ]  # fmt: skip
    assert measured == expected[:limit]
    stored = json.loads((tmp_path / "b16.json").read_text())
    assert len(stored["steps"]) == len(measured)
    assert stored.get("profile") == ({"batch": 512} if limit > 3 else None)


def test_a_check_outside_its_tolerance_fails():
    assert gpu_checks.row("a", 0.5, 0.5, "")["ok"]
    assert not gpu_checks.row("a", 0.6, 0.5, "")["ok"]
    assert not gpu_checks.row("a", float("nan"), 0.5, "")["ok"]
    results = {"parts": {"correct": {"status": "done", "results": {"checks": [
        {"check": "a", "ok": False}, {"check": "b", "ok": True},
    ]}}}}  # fmt: skip
    assert gpu_tables.problems(results) == ["a: wrong"]


def test_checks_that_were_not_made_are_a_problem():
    parts = {"correct": {"status": "cut off"}, "glyphs": {"status": "cut off"}}
    assert gpu_tables.problems({"parts": parts}) == ["part correct cut off"]


def test_a_resize_in_tf32_is_found(monkeypatch):
    """Its largest difference can be as small as that of float32."""
    exact = device_resize.resize_matrix

    def in_tf32(*args, **options):
        bits = jax.lax.bitcast_convert_type(exact(*args, **options), jnp.uint32)
        bits = (bits + jnp.uint32(1 << 12)) & jnp.uint32(0xFFFFE000)  # 10 bits of mantissa
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    device_resize.make_resize.cache_clear()
    monkeypatch.setattr(device_resize, "resize_matrix", in_tf32)
    _, different, randaugment = gpu_checks.resize_equals_pillow()
    device_resize.make_resize.cache_clear()
    assert not different["ok"] and randaugment["ok"]


def test_a_wrong_attention_is_found(monkeypatch):
    compute = gpu_checks.attention

    def wrong(q, k, v, causal, kind):
        return compute(q, k, v, causal, "xla") * (1.02 if kind == "cudnn" else 1)

    monkeypatch.setattr(gpu_checks, "attention", wrong)
    assert [row["ok"] for row in gpu_checks.attentions_agree(4, "cudnn", False)] == [False] * 2
    assert [row["ok"] for row in gpu_checks.attentions_agree(4, "xla", False)] == [True] * 2


def test_a_state_that_is_copied_is_found(monkeypatch):
    make_programs = models.make_programs

    def without_donation(*args):
        programs = make_programs(*args)
        programs.train_step = jax.jit(programs.train_step.__wrapped__)
        return programs

    monkeypatch.setattr(models, "make_programs", without_donation)
    *donation, checkpoint = gpu_checks.state_is_donated("tiny", 2)
    assert len(donation) == 3 and not any(row["ok"] for row in donation) and checkpoint["ok"]


def test_a_checkpoint_that_differs_is_found(monkeypatch, tmp_path):
    state = TrainState(jnp.int32(1), None, {"w": jnp.ones(3)}, None, None)
    assert gpu_checks.is_restored_bitwise(tmp_path / "1", state, {"w": jnp.zeros(3)})
    restore = Checkpoints.restore
    monkeypatch.setattr(
        Checkpoints, "restore", lambda *args: jax.tree.map(lambda x: x + 1, restore(*args))
    )
    assert not gpu_checks.is_restored_bitwise(tmp_path / "2", state, {"w": jnp.zeros(3)})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_low_precision_operations_of_a_compiled_program_are_found(dtype):
    x = jnp.ones((64, 64), dtype)
    text = jax.jit(jnp.matmul).lower(x, x).compile().as_text()
    assert gpu_checks.LOW_PRECISION.search(text)
    text = jax.jit(jnp.add).lower(*[jnp.ones(8)] * 2).compile().as_text()
    assert not gpu_checks.LOW_PRECISION.search(text)


@pytest.mark.parametrize(
    "line",
    [
        'custom-call(%a, %b), custom_call_target="__cublas$gemm"',
        'custom-call(%q, %k), custom_call_target="__cudnn$fmhaSoftmax"',
        "%dot.1 = f32[8,8]{1,0} dot(%a, %b), lhs_contracting_dims={1}",
        "%fusion = bf16[8]{0} fusion(%a), kind=kLoop",
    ],
)
def test_low_precision_operations_of_a_gpu_are_found(line):
    assert gpu_checks.LOW_PRECISION.search(line)


def test_the_merge_of_the_reference_is_equation_2():
    w0, w = np.zeros(2, np.float32), np.eye(2, dtype=np.float32)
    np.testing.assert_array_equal(gpu_checks.float64_merge(w0, w), [0, 0])  # orthogonal: t = 0
    w = np.array([[3.0, 0.0], [3.0, 0.0]], np.float32)
    np.testing.assert_allclose(gpu_checks.float64_merge(w0, w), [3, 0])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_hsh_256x128_64x4_2x1_v_bz_coopA_NTT", "matrix product"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix product"),
        ("gemm_fusion_dot_1234_0", "matrix product"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", "attention"),
        ("triton_softmax_12_0", "reduction"),
        ("input_reduce_fusion_3", "reduction"),
        ("MemcpyD2D", "copy and layout"),
        ("wrapped_pad_2", "copy and layout"),
        ("input_transpose_fusion_1", "copy and layout"),
        ("loop_convert_fusion_9", "elementwise"),
        ("void foo<int>", "other"),
    ],
)
def test_kinds_of_kernels(name, kind):
    assert kernels.kind_of(name) == kind


def test_breakdown_counts_streams_of_the_gpu(monkeypatch, tmp_path):
    class Namespace(dict):
        __getattr__ = dict.__getitem__

    def event(name, start, end):
        return Namespace(name=name, start_ns=start, end_ns=end)

    stream = Namespace(name="Stream #13(Compute)", events=[
        event("gemm_1", 0, 4e9), event("loop_add_fusion", 6e9, 7e9), event("gemm_2", 9e9, 10e9),
    ])  # fmt: skip
    other = Namespace(name="Steps", events=[event("1", 0, 100e9)])
    host = Namespace(name="/host:CPU", lines=[other])
    gpu_plane = Namespace(name="/device:GPU:0", lines=[stream, other])
    profile = Namespace(planes=[host, gpu_plane])
    monkeypatch.setattr(kernels.jax.profiler.ProfileData, "from_file", lambda path: profile)
    (tmp_path / "host.xplane.pb").touch()
    with pytest.raises(ValueError, match="no kernels"):
        kernels.breakdown(tmp_path, steps=2)
    monkeypatch.setattr(kernels.jax, "default_backend", lambda: "gpu")
    result = kernels.breakdown(tmp_path, steps=2)
    assert result["kinds"] == {"matrix product": 2.5, "elementwise": 0.5}
    assert (result["seconds"], result["idle"]) == (5.0, 2.0)
    assert result["slowest"]["matrix product"] == "gemm_1"


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H200", 989), ("NVIDIA H200 NVL", 835), ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756), ("NVIDIA GH200 480GB", 989), ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA L4", 121), ("NVIDIA L40S", 362),
    ],
)  # fmt: skip
def test_peaks_of_the_data_sheet_by_the_name_of_the_device(name, teraflops):
    assert limits.data_sheet(name).flops == teraflops * 1e12


def test_a_part_of_a_device_has_no_data_sheet():
    assert limits.data_sheet("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None


def test_peers_are_compared_by_images_per_second():
    def row(replicas, rate):
        return {"size": "b16", "replicas": replicas, "images_per_second": rate}

    parts = {
        "b16": {"results": {"steps": [row("vmap", 90.0), row("vmap", 100.0), row("one", 80.0)]}},
        "torch": {"results": {"steps": [row("PyTorch", 50.0)]}},
    }
    assert gpu_tables.peer_rows({"parts": parts}) == [{
        "model": "b16", "pair by vmap, images/s": "100", "relative to the pair by map": "",
        "relative to one replica": "1.25", "relative to PyTorch": "2",
    }]  # fmt: skip


def test_missing_wheels_are_a_warning(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_wheels, "missing", lambda: ["absent==1.0"])
    monkeypatch.setattr(gpu_wheels, "FOLDER", tmp_path / "wheels")
    gpu_wheels.install_missing(tmp_path / "packages")
    assert "cannot install absent==1.0: " in (error := capsys.readouterr().err)
    assert "make gpu-wheels" in error
    (tmp_path / "wheels").mkdir()
    gpu_wheels.install_missing(tmp_path / "packages")
    assert "No matching distribution found for absent==1.0" in capsys.readouterr().err


# Direct requirements that the machine has, and those that `make gpu` does not import.
PRESENT = {"jax", "flax", "optax", "orbax-checkpoint", "numpy", "ml_dtypes", "safetensors",
           "absl-py", "rich", "PyYAML"}  # fmt: skip
NOT_IMPORTED = {"chex", "sentencepiece", "tensorflow-datasets", "scikit-learn"}


def test_an_environment_with_all_imported_packages_needs_no_wheels(monkeypatch):
    """Also if the requirements of a newer version of them differ."""
    monkeypatch.setattr(gpu_wheels, "requirements", lambda: ["absent==1.0", "grain==0.2.18"])
    assert gpu_wheels.missing() == []
    monkeypatch.setattr(gpu_wheels, "IMPORTED", ("grain", "simplejpeg-absent"))
    assert gpu_wheels.missing() == ["absent==1.0"]


def test_wheels_are_the_other_requirements_of_the_package():
    lines = [Requirement(line) for line in gpu_wheels.requirements()]
    versions = {line.name: line.specifier for line in lines}
    text = (ROOT / "requirements-cpu.txt").read_text().splitlines()
    required = [Requirement(line) for line in text if line and not line.startswith("#")]
    carried = [r for r in required if r.name not in PRESENT | NOT_IMPORTED]
    assert len(carried) == len(required) - len(PRESENT | NOT_IMPORTED)
    for requirement in carried:
        (version,) = versions[requirement.name]
        assert version.operator == "==" and requirement.specifier.contains(version.version)
