"""ViT-B/32 at its true size: steps, a merge and a save of two replicas, in a process of its own."""

from __future__ import annotations

import json

import pytest

from tests.experiment import small_run

GIB = 1024**3


@pytest.mark.slow
def test_vitb32_trains_merges_and_saves_within_24_gib(tmp_path):
    code, output = small_run.finish(
        "--config=configs/vitb32.py",
        "--config.compute.dtype=float32",
        "--config.batch_size=4",
        "--steps=1",
        f"--workdir={tmp_path}",
        program=("benchmarks/memory.py",),
    )
    assert code == 0, output
    report = json.loads(output.splitlines()[-1])
    assert report["batch"] == [2, 4, 224, 224, 3]
    assert report["restored_bit_for_bit"] is True
    peak = report["peak_resident"]
    assert peak < 24 * GIB, f"{peak / GIB:.1f} GiB"
    # Allocators round up, and a CPU's kernels have scratch space of their own.
    assert report["ratio"].keys() == {"step", "merge"}
    for ratio in report["ratio"].values():
        assert abs(ratio - 1) < 0.1, report
