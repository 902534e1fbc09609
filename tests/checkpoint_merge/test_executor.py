"""Output directory of a merge: complete and correct, or absent; inputs stay unchanged."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from modelstock_jax.checkpoint_merge import output
from modelstock_jax.checkpoint_merge.executor import measure, run
from modelstock_jax.errors import UserError
from modelstock_jax.tensor_files.reader import INDEX, TensorFiles
from tests.checkpoint_merge.engine import SHAPES, merge, models, plan, save, total


def contents(directory: Path) -> dict[str, bytes]:
    return {
        p.relative_to(directory).as_posix(): p.read_bytes()
        for p in sorted(directory.rglob("*"))
        if p.is_file()
    }


def test_the_output_directory_is_complete_and_correct(tmp_path):
    paths = save(tmp_path, models(), shard=2000)
    for name, text in {
        "tokenizer.json": "{}",
        "merges.txt": "a b",
        "spiece.model": "\0",
        "chat.jinja": "",
        "LICENSE": "free",
    }.items():
        (paths[0] / name).write_text(text)
    for name in ("modeling.py", "pytorch_model.bin", "README.md", "optimizer.pt", ".hidden.json"):
        (paths[0] / name).write_text("x")
    before = [contents(path) for path in paths]
    calls, finished = [], []

    def finish(directory, report):
        assert not (tmp_path / "out").exists()
        finished.append(report)
        (directory / "README.md").write_text("card")

    planned = plan(paths, max_shard_bytes=3000)
    report = run(planned, tmp_path / "out", progress=lambda *x: calls.append(x), finish=finish)
    assert finished == [report] and [contents(path) for path in paths] == before
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {
        *planned.files,
        INDEX,
        "config.json",
        "tokenizer.json",
        "merges.txt",
        "spiece.model",
        "chat.jinja",
        "LICENSE",
        "README.md",
    }
    index = json.loads((out / INDEX).read_text())
    assert index["metadata"]["total_size"] == 4 * total() and len(planned.files) > 2
    assert sorted(index["weight_map"]) == sorted(SHAPES) == sorted(TensorFiles(out))
    for file in planned.files:
        assert f"crc32:{zlib.crc32((out / file).read_bytes()):08x}" == report.checksums[file]
    # Three models are read twice, and one is written.
    assert calls[-1] == (28 * total(), 28 * total()) and calls == sorted(calls)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["base", "ft1", "ft2", "out"]
    assert oct(out.stat().st_mode) == oct(paths[0].stat().st_mode)


def test_one_file_needs_no_index(tmp_path):
    merge(tmp_path, models())
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"model.safetensors", "config.json"}


def test_measuring_writes_nothing(tmp_path):
    planned = plan(save(tmp_path, models()))
    before = sorted(tmp_path.rglob("*"))
    report = measure(planned)
    assert sorted(tmp_path.rglob("*")) == before and report.bytes_written == 0
    assert report.rows == run(planned, tmp_path / "out").rows


@pytest.mark.parametrize("out", ["base", "base/inside", ".", "ft2"])
def test_an_output_that_is_inside_or_contains_an_input_is_an_error(tmp_path, out):
    planned = plan(save(tmp_path / "in", models()))
    before = contents(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path}/in.*: .* {tmp_path}/in/(base|ft2)"):
        run(planned, tmp_path / "in" / out, overwrite=True)
    assert contents(tmp_path) == before


def test_a_link_to_an_input_is_an_error(tmp_path):
    planned = plan(save(tmp_path / "in", models()))
    (tmp_path / "link").symlink_to(tmp_path / "in" / "base")
    with pytest.raises(UserError, match=f"{tmp_path}/in/base: "):
        run(planned, tmp_path / "link", overwrite=True)


def test_an_existing_directory_is_an_error_or_replaced_completely(tmp_path):
    planned = plan(save(tmp_path / "in", models()))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(UserError, match="out: .*--overwrite"):
        run(planned, tmp_path / "out")
    assert contents(tmp_path / "out") == {"mine": b"x"}
    run(planned, tmp_path / "out", overwrite=True)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"model.safetensors", "config.json"}
    assert {p.name for p in tmp_path.iterdir()} == {"in", "out"}


@pytest.mark.parametrize("model", [0, 2])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("options", [{}, {"window_bytes": 1}])
def test_the_error_for_a_non_finite_weight_names_it_and_nothing_is_written(
    tmp_path, model, value, options
):
    tensors = [{n: w.copy() for n, w in m.items()} for m in models()]
    tensors[model]["model.norm.weight"][3] = value
    with pytest.raises(UserError) as caught:
        merge(tmp_path, tensors, max_shard_bytes=1000, threads=2, **options)
    label = "base" if model == 0 else "ft2"
    assert re.search(rf"{label}: .*'model.norm.weight' .*NaN .*\[3\]", str(caught.value))
    assert {p.name for p in tmp_path.iterdir()} == {"base", "ft1", "ft2"}


@pytest.mark.parametrize("model", [0, 2])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_an_excluded_tensor_is_copied_unchecked(tmp_path, model, value):
    """A mask may contain -inf, and the error for NaN suggests to exclude the tensor."""
    tensors = [{n: w.copy() for n, w in m.items()} for m in models()]
    tensors[model]["model.norm.weight"][3] = value
    out, _ = merge(
        tmp_path,
        tensors,
        exclude=("model.norm*",),
        unmerged_from=f"model:{model}" if model else "base",
    )
    np.testing.assert_array_equal(out["model.norm.weight"], tensors[model]["model.norm.weight"])


def test_a_full_disk_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="out: .* 0.02 GB.* 0.00 GB"):
        merge(tmp_path, models())
    assert {p.name for p in tmp_path.iterdir()} == {"base", "ft1", "ft2"}


def test_complete_files_are_kept_if_the_disk_fills_up(tmp_path, monkeypatch):
    planned = plan(save(tmp_path, models()), max_shard_bytes=2000, threads=1)
    remaining, pwrite = [6], os.pwrite

    def filling(*args):
        remaining[0] -= 1
        if remaining[0] < 0:
            raise OSError(28, "No space left on device")
        return pwrite(*args)

    monkeypatch.setattr(os, "pwrite", filling)
    with pytest.raises(UserError, match="No space left on device.*same command"):
        run(planned, tmp_path / "out")
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    report = run(planned, tmp_path / "out")
    assert report.resumed and len(report.resumed) < len(planned.files)
    fresh = run(planned, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh") and fresh.resumed == ()
    assert report.rows == fresh.rows and report.outcomes == fresh.outcomes


def test_an_error_in_finish_leaves_no_incomplete_directory(tmp_path):
    planned = plan(save(tmp_path, models()))
    with pytest.raises(ZeroDivisionError):
        run(planned, tmp_path / "out", finish=lambda *_: 1 / 0)
    assert not (tmp_path / "out").exists()
    assert run(planned, tmp_path / "out").resumed == ("model.safetensors",)


def test_a_merge_imports_no_jax():
    code = (
        "import sys, modelstock_jax.checkpoint_merge.executor\n"
        "assert not {'jax', 'flax', 'torch', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
