"""PyTorch's step of the benchmarks runs; tests/test_gpu_benchmark.py has the rest."""

from __future__ import annotations

import argparse
import sys

from benchmarks import step


def test_eager_step_of_pytorch():
    settings = argparse.Namespace(
        torch=sys.executable, dtype="float32", side=64, rounds=2, seconds=1e-3
    )
    row = step.measure_torch("tiny", 2, settings, eager=True)
    assert "failed" not in row, row
    assert row["way"] == "PyTorch, one replica, eager" and len(row["seconds"]) == 2
