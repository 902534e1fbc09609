"""A base on the hub: fetched, merged and recorded in the report; or a one-line error."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np

from modelstock_jax.tensor_files.reader import TensorFiles
from modelstock_jax.tensor_files.writer import write_tensors
from tests.tensor_files.test_hub import COMMIT, environment, hub  # noqa: F401

RUN = """
import json, sys
from modelstock_jax.checkpoint_merge.cli import main
from modelstock_jax.checkpoint_merge.commands import PlotProcess
PlotProcess.finish = lambda plot: None
for base in sys.argv[2:]:
    print(main(["merge", base, "ft1.safetensors", "ft2.safetensors", "--out", sys.argv[1]]))
"""


def merge(tmp_path, endpoint, out, *bases):
    """Return the exit status of a merge with each base, and the lines of standard error."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, out, *bases],
        cwd=tmp_path,
        env=environment(tmp_path / "hub", endpoint),
        capture_output=True,
        text=True,
        timeout=120,
    )
    return [line for line in done.stdout.splitlines() if line in "01"], done.stderr.splitlines()


def test_base_on_the_hub(hub, tmp_path):  # noqa: F811
    endpoint, requested = hub
    base = np.arange(6.0)
    updates = [np.array([1.0, 1, 0, 0, 1, 0]), np.array([1.0, 0, 1, 0, 1, 0])]
    for i, update in enumerate(updates, 1):
        write_tensors(tmp_path / f"ft{i}.safetensors", {"w": base + update})
    names = ("org/model@v1.0", "org/gone", "org/model@gone")
    statuses, stderr = merge(tmp_path, endpoint, "out", *names)
    assert statuses == ["0", "1", "1"]
    # The cosine of the updates is 2/3, so t is 4/5.
    merged = TensorFiles(tmp_path / "out")["w"]
    np.testing.assert_allclose(merged, base + 0.4 * (updates[0] + updates[1]), rtol=1e-12)
    assert any("/revision/v1.0" in path for path in requested)
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["base"]["model"] == "org/model@v1.0"
    assert report["base"]["notes"] == [f"org/model@v1.0 is commit {COMMIT} on the hub"]
    (checksum,) = report["base"]["files"].values()
    assert (
        checksum.startswith("sha256:")
        and 'base_model: ["org/model"]' in (tmp_path / "out" / "README.md").read_text()
    )
    assert (tmp_path / "out" / "config.json").is_file()
    errors = [line for line in stderr if line.startswith("error:")]
    assert "org/gone" in errors[0] and "revision 'gone'" in errors[1]
    assert len(errors) == 2
    # Nothing listens on local port 9.
    statuses, stderr = merge(tmp_path, "http://127.0.0.1:9", "other", "org/unknown")
    assert statuses == ["1"] and len(stderr) == 1
    assert "org/unknown" in stderr[0] and "network" in stderr[0]
