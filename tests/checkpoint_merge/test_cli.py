"""The command line end to end: output files, printed text and errors."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from modelstock_jax.checkpoint_merge import commands, output
from modelstock_jax.checkpoint_merge.cli import main
from modelstock_jax.reporting.progress import ByteProgress
from modelstock_jax.tensor_files.reader import TensorFiles
from tests.checkpoint_merge.small import (
    LLAMA,
    adapter,
    factors,
    llama,
    llama_shapes,
    moved,
    save,
    weights,
)

ROOT = Path(__file__).parents[2]
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and two fine-tunes; tests do not change them."""
    return [str(path) for path in llama(tmp_path_factory.mktemp("models"))]


@pytest.fixture(scope="module")
def merged(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("merged") / "out"
    assert main(["merge", *models, "--out", str(out)]) == 0
    return out


@pytest.fixture(autouse=True)
def _no_figure(monkeypatch):
    """Replace the figure by a stub, except in `merged`: drawing is the slowest part of a merge."""
    monkeypatch.setattr(
        commands.PlotProcess, "finish", lambda plot: plot._path.write_bytes(b"\x89PNG")
    )


@pytest.fixture
def say(capsys):
    """Run the command; return its exit status, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = main([str(a) for a in arguments])
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()

    return run


def stock(arrays: list[np.ndarray]) -> tuple[float, np.ndarray]:
    """Return the ratio of equation 3 and the merged weights, in float64."""
    w0, *rest = [a.astype(np.float64).ravel() for a in arrays]
    d = np.array([w - w0 for w in rest])
    unit = d / np.linalg.norm(d, axis=1, keepdims=True)
    number = len(d)
    cosine = (unit @ unit.T)[np.triu_indices(number, 1)].mean()
    ratio = number * cosine / (1 + (number - 1) * cosine) if cosine > 0 else 0.0
    return ratio, (w0 + ratio * d.mean(axis=0)).reshape(arrays[0].shape)


def test_merged_weights_are_equation_3(models, merged):
    files = [TensorFiles(path) for path in models]
    out = TensorFiles(merged)
    assert set(out) == set(files[0])
    for name in out:
        _, expected = stock([file[name] for file in files])
        np.testing.assert_array_max_ulp(out[name], expected.astype(np.float32), maxulp=1)


def test_the_directory_is_complete(models, merged):
    base = Path(models[0])
    copied = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.model",
              "chat_template.jinja", "merges.txt")  # fmt: skip
    written = ("model.safetensors", "merge_report.json", "README.md", "angles.png")
    assert sorted(path.name for path in merged.iterdir()) == sorted((*copied, *written))
    for name in copied:
        assert (merged / name).read_bytes() == (base / name).read_bytes()
    assert len((merged / "angles.png").read_bytes()) > 10_000
    assert sorted(p.name for p in merged.parent.iterdir()) == ["out"]


def test_report(models, merged):
    report = json.loads((merged / "merge_report.json").read_text())
    files = [TensorFiles(path) for path in models]
    assert [row["name"] for row in report["units"]] == sorted(llama_shapes())
    for row in report["units"]:
        ratio, _ = stock([file[row["name"]] for file in files])
        assert row["ratio"] == pytest.approx(ratio, abs=1e-6)
        assert tuple(row["shape"]) == llama_shapes()[row["name"]]
        assert row["outcome"] == "interpolated" and len(row["norms"]) == 2
        assert row["angle"] == pytest.approx(np.degrees(np.arccos(row["cosine"])))
        distance = row["predicted_distance"]
        assert distance["replica"] > distance["mean"] > distance["merged"] > 0
    assert report["outcomes"] == {"interpolated": len(report["units"])}
    inputs = [report["base"], *report["models"]]
    assert [i["model"] for i in inputs] == models
    for source in inputs:
        assert set(source["files"]) == {"model.safetensors"}
        content = (Path(source["model"]) / "model.safetensors").read_bytes()
        assert source["files"]["model.safetensors"] == f"crc32:{zlib.crc32(content):08x}"
    crc = zlib.crc32((merged / "model.safetensors").read_bytes())
    assert report["outputs"] == {"model.safetensors": f"crc32:{crc:08x}"}
    assert report["ratios"]["all"]["tensors"] == len(report["units"])
    assert report["command"].startswith("modelstock merge ")
    assert report["options"] == {"method": "model_stock", "unit": "tensor"}
    assert "seconds" not in json.dumps(report)  # Equal merges give equal files.


def test_equal_merges_give_equal_files(models, merged, tmp_path):
    out = tmp_path / "out"
    assert main(["merge", *models, "--out", str(out)]) == 0
    name = "model.safetensors"
    assert (out / name).read_bytes() == (merged / name).read_bytes()
    one, two = ((path / "merge_report.json").read_text() for path in (out, merged))
    assert one.replace(str(out), str(merged)) == two


def test_card(models, merged):
    import yaml

    _, front, body = (merged / "README.md").read_text().split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["library_name"] == "transformers"
    assert front["tags"] == ["merge", "model-stock", "modelstock-jax"]
    assert "base_model" not in front  # Local paths are not models of the hub.
    for text in ("# out", models[0], models[1], "modelstock merge", "| all | 21 |",
                 "2403.19522", "Units by outcome: 21 interpolated.", "angles.png"):  # fmt: skip
        assert text in body, text
    report = json.loads((merged / "merge_report.json").read_text())
    assert report["outputs"]["model.safetensors"] in body


def test_printed_summary(say, models, tmp_path):
    status, out, err = say("merge", *models, "--out", tmp_path / "out")
    assert status == 0
    for text in ("merged", "ratios", "21 interpolated", str(tmp_path / "out"), "B/s"):
        assert text in out, text
    assert "\x1b" not in out + err  # No colors in a pipe.
    assert err.startswith("merging  127.7 kB of 127.7 kB")


def test_json_output(say, models, tmp_path):
    status, out, err = say("merge", *models, "--out", tmp_path / "out", "--json")
    assert status == 0
    printed = json.loads(out)
    written = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert {k: printed[k] for k in written} == written
    assert printed["out"] == str(tmp_path / "out") and printed["seconds"] >= 0


def test_dry_run_writes_nothing(say, models, tmp_path):
    options = ("--out", tmp_path / "out", "--exclude", "lm_head.*", "--dry-run")
    status, out, _ = say("merge", *models, *options)
    assert status == 0 and "lm_head.weight" in out and "20 merged" in out
    status, out, _ = say("merge", *models, *options, "--json")
    plan = json.loads(out)
    size = sum(4 * int(np.prod(shape)) for shape in llama_shapes().values())
    assert plan["bytes_written"] == size and plan["bytes_read"] >= 3 * size - 3 * 20 * 16 * 4
    assert [t["action"] for t in plan["tensors"] if t["name"] == "lm_head.weight"] == ["base"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("options", "shown"), [
    ((), "in 2 passes"),
    (("--method", "ties", "--density", "0.5"), "in 6 passes"),
    (("--method", "ties", "--density", "0.5", "--parameter", "rescale=true"), "in 7 passes"),
])  # fmt: skip
def test_a_dry_run_shows_how_often_tensors_are_read(say, models, tmp_path, options, shown):
    status, out, _ = say("merge", *models, "--out", tmp_path / "out", "--dry-run", *options)
    (line,) = (line for line in out.splitlines() if line.startswith("to read"))
    assert status == 0 and line.endswith(shown)


def test_a_dry_run_shows_passes_that_differ_by_tensor(say, models, tmp_path):
    density = "[{filter: mlp, value: 0.5}, {value: 1}]"
    (tmp_path / "r.yml").write_text(
        f"merge_method: ties\nbase_model: {models[0]}\nparameters: {{weight: 1}}\nmodels:\n"
        f"- {{model: {models[1]}, parameters: {{density: {density}}}}}\n"
    )
    status, out, _ = say("merge", tmp_path / "r.yml", "--dry-run")
    assert status == 0 and "in 2 to 6 passes" in out


@pytest.mark.parametrize(
    "case", ["exists", "file", "input", "inside", "parent", "in a file", "full", "read-only"]
)
def test_a_dry_run_has_the_errors_of_the_merge(say, models, tmp_path, case, monkeypatch):
    out = {
        "input": Path(models[1]),
        "inside": Path(models[0]) / "out",
        "parent": Path(models[0]).parent,
        "in a file": tmp_path / "file/out",
    }.get(case, tmp_path / "out")
    if case == "exists":
        out.mkdir()
        (out / "x").write_text("")
    elif case == "file":
        out.write_text("")
    elif case == "in a file":
        (tmp_path / "file").write_text("")
    elif case == "full":
        monkeypatch.setattr(output.shutil, "disk_usage", lambda path: SimpleNamespace(free=9))
    elif case == "read-only":  # File modes do not apply if the tests run as root.
        monkeypatch.setattr(output.os, "access", lambda path, mode: False)
        monkeypatch.setattr(Path, "mkdir", denied)
    before = sorted(tmp_path.rglob("*"))
    results = [say("merge", *models, "--out", out, *dry) for dry in (["--dry-run"], [])]
    assert [status for status, *_ in results] == [1, 1] and not results[0][1]
    assert results[0][2].splitlines()[-1] == results[1][2].splitlines()[-1]
    assert sorted(tmp_path.rglob("*")) == before


def denied(path, **options):
    raise PermissionError(13, "Permission denied", str(path))


def test_a_dry_run_accepts_the_output_directories_that_the_merge_accepts(say, models, tmp_path):
    (tmp_path / "x").write_text("")
    assert say("merge", *models, "--out", tmp_path, "--dry-run", "--overwrite")[0] == 0
    assert say("merge", *models, "--out", tmp_path / "a/b/c", "--dry-run")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_the_json_of_a_dry_run_contains_the_notes(say, models, tmp_path):
    adapted = save(tmp_path / "ft", weights(llama_shapes(), 3), LLAMA)
    adapter(adapted, {})
    status, out, err = say("merge", models[0], models[1], adapted, "--dry-run", "--json")
    notes = json.loads(out)["notes"]
    assert status == 0 and f"{adapted}+{adapted}" in notes[0]
    assert [f"note: {note}" for note in notes] == err.splitlines()


@pytest.mark.parametrize(("dtype", "key"), [("bfloat16", "BF16"), ("float16", "F16")])
def test_dtype(models, tmp_path, dtype, key):
    out = tmp_path / "out"
    assert main(["merge", *models, "--out", str(out), "--dtype", dtype]) == 0
    files = TensorFiles(out)
    assert {files.code(name) for name in files} == {key}
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == dtype


def test_sha256_checksums(models, merged, tmp_path):
    assert main(["merge", *models, "--out", str(tmp_path / "out"), "--checksum", "sha256"]) == 0
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    for path, files in [
        (tmp_path / "out", report["outputs"]),
        *((Path(s["model"]), s["files"]) for s in (report["base"], *report["models"])),
    ]:
        content = (path / "model.safetensors").read_bytes()
        assert files["model.safetensors"] == f"sha256:{hashlib.sha256(content).hexdigest()}"
    plain = json.loads((merged / "merge_report.json").read_text())
    assert report["options"] == plain["options"] and report["units"] == plain["units"]


def test_shards(models, merged, tmp_path):
    out = tmp_path / "out"
    assert main(["merge", *models, "--out", str(out), "--max-shard-size", "4KB"]) == 0
    assert len(list(out.glob("model-*.safetensors"))) > 1
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {p.name for p in out.glob("model-*.safetensors")}
    single, sharded = TensorFiles(merged), TensorFiles(out)
    for name in single:
        np.testing.assert_array_equal(sharded[name], single[name])


def test_adapters_of_the_base(models, tmp_path):
    loras = [adapter(tmp_path / f"lora{i}", factors(Q, 16, 16, seed=i)) for i in (1, 2)]
    base, out = models[0], tmp_path / "out"
    inputs = [base, str(loras[0]), f"{base}+{loras[1]}"]
    assert main(["merge", *inputs, "--out", str(out)]) == 0
    before, after = TensorFiles(base), TensorFiles(out)
    w0 = before[f"{Q}.weight"].astype(np.float64)
    tuned = []
    for i in (1, 2):
        a, b = (f.astype(np.float64) for f in factors(Q, 16, 16, seed=i).values())
        tuned.append((w0 + 2.0 * b @ a).astype(np.float32))
    _, expected = stock([before[f"{Q}.weight"], *tuned])
    # Each computed weight may differ by one rounding, which changes the ratio by as little.
    np.testing.assert_allclose(after[f"{Q}.weight"], expected, rtol=1e-6, atol=1e-6)
    for name in before:
        if name != f"{Q}.weight":
            np.testing.assert_array_equal(after[name], before[name])
    outcomes = json.loads((out / "merge_report.json").read_text())["outcomes"]
    assert outcomes["unchanged"] == 20


def test_recipes_run_unchanged(models, merged, tmp_path):
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        f"models:\n  - model: {models[1]}\n  - model: {models[2]}\n"
        f"merge_method: model_stock\nbase_model: {models[0]}\ndtype: float32\n"
    )
    assert main(["merge", "--recipe", str(recipe), "--out", str(tmp_path / "out")]) == 0
    one, two = TensorFiles(merged), TensorFiles(tmp_path / "out")
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])


def test_a_slerp_recipe_with_values_over_the_layers(models, tmp_path):
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        f"slices:\n- sources:\n  - {{model: {models[0]}, layer_range: [0, 2]}}\n"
        f"  - {{model: {models[1]}, layer_range: [0, 2]}}\n"
        f"merge_method: slerp\nbase_model: {models[0]}\nparameters:\n  t:\n"
        "  - {filter: mlp, value: [0, 1]}\n  - value: 1\n"
    )
    assert main(["merge", "--recipe", str(recipe), "--out", str(tmp_path / "out")]) == 0
    base, tuned, out = (TensorFiles(p) for p in (*models[:2], tmp_path / "out"))
    for name in out:
        end = base if "layers.0.mlp" in name else tuned
        # The ends of the arc are the models, up to the rounding of sin(theta) / sin(theta).
        np.testing.assert_allclose(out[name], end[name], rtol=1e-6, atol=1e-7)


def test_slices_of_a_part_of_the_model_give_a_model_of_fewer_layers(say, models, tmp_path):
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        f"slices:\n- sources:\n  - {{model: {models[0]}, layer_range: [0, 1]}}\n"
        f"  - {{model: {models[1]}, layer_range: [0, 1]}}\n"
        f"merge_method: slerp\nbase_model: {models[0]}\nparameters: {{t: 0.5}}\n"
    )
    status, _, err = say("merge", "--recipe", recipe, "--out", tmp_path / "out")
    assert status == 0, err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 1
    names = TensorFiles(tmp_path / "out").keys()
    assert names == {n for n in TensorFiles(models[0]) if ".layers.1." not in n}


def test_compare(say, models, merged, tmp_path):
    status, out, _ = say("compare", *models, "--json")
    shown = json.loads(out)
    report = json.loads((merged / "merge_report.json").read_text())
    assert status == 0 and shown["units"] == report["units"]
    assert shown["ratios"] == report["ratios"]
    row = shown["units"][0]
    assert row["cosines"][0][1] == pytest.approx(row["cosine"], abs=1e-12)
    status, out, err = say("compare", *models, "--plot", tmp_path / "angles.png")
    assert f"figure written to {tmp_path / 'angles.png'}" in err
    assert status == 0 and "model.layers.1.mlp.down_proj.weight" in out and "median" in out
    assert (tmp_path / "angles.png").read_bytes().startswith(b"\x89PNG")
    # The name of the figure is checked before the models are read, which may take minutes.
    status, _, err = say("compare", *models[:2], tmp_path / "gone", "--plot", "angles.xyz")
    assert status == 1 and re.search("--plot angles.xyz: .*.png", err)


def test_one_fine_tune_is_singular_in_the_summary(say, models, tmp_path):
    status, out, _ = say(
        "merge", *models[:2], "--out", tmp_path / "out", "--method", "wise_ft", "--alpha", "0.5"
    )
    assert status == 0 and f"1 fine-tune of {models[0]}" in out


def test_compare_prints_the_notes_about_its_models(say, models, tmp_path):
    tensors = factors(Q, 16, 16)
    lora = adapter(tmp_path / "lora", tensors, base_model_name_or_path="org/another")
    status, out, err = say("compare", *models, lora, "--json")
    assert status == 0 and "note: " in err and "'org/another'" in err
    assert any("'org/another'" in note for note in json.loads(out)["notes"])


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_compare_shows_angles_and_ratios_at_every_width(models, monkeypatch, width):
    screen = io.StringIO()
    monkeypatch.setattr(
        commands,
        "Console",
        lambda **_: Console(
            file=screen, width=width, force_terminal=True, no_color=True, legacy_windows=False
        ),
    )
    assert main(["compare", *models]) == 0
    lines = [re.sub("\x1b[^a-zA-Z]*[a-zA-Z]", "", line) for line in screen.getvalue().splitlines()]
    (head,) = [line for line in lines if line.lstrip().startswith("tensor ")]
    # Headings have two lines, aligned at the bottom.
    heading = " ".join(lines[lines.index(head) - 1 : lines.index(head) + 1])
    assert {"angle", "(deg)", "ratio"} <= set(heading.split())
    assert all(len(line) <= width for line in lines[lines.index(head) :])
    row = next(line for line in lines if "embed_tokens.weight" in line)
    assert len(re.findall(r" \d+\.\d(?= )", row)) == 1 and re.search(r" 0\.\d{3}( |$)", row)
    assert ("outcome" in head.split()) != any("outcome" in line for line in lines[-4:])


def test_the_comparison_names_units_and_predicted_distances(say, models):
    _, out, _ = say("compare", *models)
    first, second = out.splitlines()[1:3]
    assert first.count("predicted distance") == 3 and "update" in first and "angle" in first
    for heading in ("norms", "(deg)", "center: single", "center: mean", "center: merged"):
        assert heading in second


def test_names_are_shown_as_they_are(say, models, tmp_path):
    """Brackets are markup in the library that prints the tables."""
    base = tmp_path / "base[bold]"
    shutil.copytree(models[0], base)
    status, out, _ = say("merge", base, *models[1:], "--dry-run", "--out", tmp_path / "o[red]")
    assert status == 0 and "base[bold]" in out and "o[red]" in out


def test_compare_shows_every_pair(say, tmp_path):
    status, out, _ = say("compare", *llama(tmp_path, 3), "--json")
    row = json.loads(out)["units"][0]
    assert status == 0 and np.shape(row["cosines"]) == (3, 3) and len(row["norms"]) == 3
    pairs = [row["cosines"][i][j] for i, j in ((0, 1), (0, 2), (1, 2))]
    assert row["cosine"] == pytest.approx(np.mean(pairs))


def test_units_by_head_read_the_config(models, tmp_path, say):
    out = tmp_path / "out"
    status, _, err = say("merge", *models, "--out", out, "--unit", "head")
    assert status == 0, err
    rows = json.loads((out / "merge_report.json").read_text())["units"]
    # Four query heads and two key-value heads: a unit is a key-value head with two query heads.
    assert {r["num_units"] for r in rows if ".q_proj." in r["name"]} == {2}


def test_units_by_name_are_an_error_for_unknown_names(say, tmp_path):
    base = weights({"a.w": (4, 4), "b.w": (4, 4)})
    paths = [save(tmp_path / str(i), t) for i, t in
             enumerate([base, moved(base, 1), moved(base, 2)])]  # fmt: skip
    for unit in ("head", "block"):
        heads = ("--num-heads", "2") if unit == "head" else ()
        status, _, err = say("merge", *paths, "--out", tmp_path / "out", "--unit", unit, *heads)
        assert status == 1 and "tensor" in err and unit in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("arguments", "status", "pattern"), [
    (["merge", "B", "F", "--methd", "model_stock"], 2, "--methd .*'--method'"),
    (["merge", "B", "F", "--max-shard-sise=1GB"], 2, "-sise .*'--max-shard-size'"),
    (["merge", "B", "F", "--metho", "model_stock"], 2, "--metho "),
    (["merge", "B", "F", "--method", "stok"], 2, "--method: 'stok' .*model-stock"),
    (["merge", "B", "F", "--max-shard-size", "big"], 2, "--max-shard-size: 'big'"),
    (["merge", "B", "F", "--weights", "a,b"], 2, "--weights: 'a,b'"),
    (["merge", "B", "F", "--threads", "x"], 2, "--threads: 'x'"),
    (["merge", "B", "F", "--alpha", "x"], 2, "--alpha: 'x'"),
    (["mrge"], 2, "'mrge'.*'merge'"),
    (["merge", "B", "F1", "F2"], 1, "--out DIR"),
    (["merge", "--out", "o"], 1, "BASE FT1 FT2"),
    (["merge", "B", "F1", "F2", "--out", "o", "--alpha", "0.5"], 1, "--alpha .*model-stock"),
    (["merge", "B", "F1", "F1", "--out", "o"], 1, "F1 .*twice"),
    (["merge", "B", "F1", "./B", "--out", "o"], 1, r"\./B .*base and as a fine-tune"),
    (["merge", "B", "F1", "F1", "--out", "o", "--method", "ties"], 1, "F1 .*twice: give"),
    (["merge", "B", "F1", "F2", "--out"], 2, "--out: expected a directory"),
    (["merge", "B", "F1", "F2", "--unit"], 2, "--unit: expected a value: --unit NAME"),
    (["merge", "B", "F1", "--weights", "-1,1"], 2, "--weights: .*--weights=-1,1"),
    (["merge", "B", "F1", "F2", "--out", "o", "--num-heads", "4"], 1, "--num-heads .*--unit head"),
    (["compare", "B", "F1", "F2", "--num-heads", "4"], 1, "--num-heads .*--unit head"),
    (["merge", "B", "none", "--out", "o"], 1, "none: .*ORG/NAME"),
    (["merge", "B", "F1", "--recipe", "r.yml", "--out", "o"], 1, "--recipe .*BASE FT1 FT2"),
    (["compare", "B"], 1, "BASE FT1 FT2"),
    (["compare", "B", "F1", "F2", "--out", "o"], 2, "--out .*modelstock merge "),
    (["merge", "B", "F1", "--out", "o"], 1, "--method model-stock .*1 .* base"),
    (["merge", "B", "F1", "F2", "--out", "o.safetensors"], 1, "--out o.safetensors"),
    (["merge", "B", "F1", "F2", "--out", "o", "--method", "wise_ft"], 1, "--alpha 0.5"),
    (["merge", "B", "F1", "F2", "--out", "F1/config.json/o"], 1, "config.json"),
])  # fmt: skip
def test_errors_are_one_line(say, models, tmp_path, monkeypatch, arguments, status, pattern):
    for path, name in zip(models, ("B", "F1", "F2"), strict=True):
        (tmp_path / name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    exit_status, out, err = say(*arguments)
    assert (exit_status, out) == (status, "")
    assert re.search(pattern, err) and err.startswith("error: ") and err.count("\n") == 1


def test_an_existing_directory_is_replaced_only_with_overwrite(say, models, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    status, _, err = say("merge", *models, "--out", out)
    assert status == 1 and "--overwrite" in err and (out / "mine.txt").read_text() == "mine"
    assert "overwrite=True" not in err  # That is for callers in Python.
    assert say("merge", *models, "--out", out, "--overwrite")[0] == 0
    assert (out / "model.safetensors").is_file() and not (out / "mine.txt").exists()


def test_interrupted(say, models, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "run", stop)
    status, out, err = say("merge", *models, "--out", tmp_path / "out")
    assert (status, out) == (130, "")
    assert err == "interrupted; run the same command again to resume\n"


def test_inputs_are_not_changed(models, tmp_path):
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for m in models for p in Path(m).iterdir()}
    assert main(["merge", *models, "--out", str(tmp_path / "out")]) == 0
    after = {p: (p.stat().st_mtime_ns, p.read_bytes()) for m in models for p in Path(m).iterdir()}
    assert before == after


def test_single_files_as_inputs(models, tmp_path):
    inputs = []
    for i, path in enumerate(models):
        inputs.append(str(tmp_path / f"{i}.safetensors"))
        shutil.copyfile(Path(path) / "model.safetensors", inputs[-1])
    assert main(["merge", *inputs, "--out", str(tmp_path / "out")]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md", "angles.png", "merge_report.json", "model.safetensors"]  # fmt: skip
    assert "library_name" not in (tmp_path / "out" / "README.md").read_text()


def test_help_imports_no_slow_package():
    code = (
        "import sys\nfrom modelstock_jax.checkpoint_merge.cli import main\n"
        "try:\n    main(['merge', '--help'])\nexcept SystemExit:\n    pass\n"
        "slow = {'numpy', 'jax', 'rich', 'yaml', 'matplotlib', 'huggingface_hub'}\n"
        "assert not slow & set(sys.modules), slow & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: modelstock merge BASE FT1 FT2" in done.stdout


def test_a_merge_imports_no_jax(models, tmp_path):
    code = (
        "import sys\nfrom modelstock_jax.checkpoint_merge.cli import main\n"
        f"assert main(['merge', *{models!r}, '--out', {str(tmp_path / 'out')!r}]) == 0\n"
        "assert 'matplotlib' in sys.modules  # The figure was drawn too.\n"
        "assert not {'jax', 'flax', 'grain', 'orbax', 'torch'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_python_m_and_version():
    command = [sys.executable, "-m", "modelstock_jax", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("modelstock 0.")


def test_progress_prints_rate_and_time_left():
    out, now = io.StringIO(), [0.0]
    with ByteProgress("merging", Console(file=out, width=80), clock=lambda: now[0]) as progress:
        for second in range(0, 41):
            now[0] = float(second)
            progress(second * 10**8, 4 * 10**9)
        progress(4 * 10**9, 4 * 10**9)
    assert out.getvalue().splitlines() == [
        f"merging  {n / 10:.1f} GB of 4.0 GB  100.0 MB/s" + (f"  0:{40 - n} left" if n < 40 else "")
        for n in (10, 20, 30, 40)
    ]


def test_a_wrong_number_of_heads_in_the_config_is_an_error(tmp_path, say):
    paths = llama(tmp_path)
    (paths[0] / "config.json").write_text(json.dumps(LLAMA | {"num_attention_heads": 5}))
    status, _, err = say("merge", *paths, "--out", tmp_path / "out", "--unit", "head")
    assert status == 1 and re.search("num_heads = 5 .*self_attn", err)


def _extra(tensors):
    tensors["score.weight"] = np.ones((2, 16), np.float32)


def _missing(tensors):
    del tensors["model.norm.weight"], tensors[f"{Q}.weight"]


def _other_shape(tensors):
    tensors[f"{Q}.weight"] = np.ones((16, 17), np.float32)


def _non_finite(tensors):
    tensors[f"{Q}.weight"] = tensors[f"{Q}.weight"].copy()
    tensors[f"{Q}.weight"][3, 5] = np.nan


def _quantized(tensors):
    tensors[f"{Q}.weight"] = np.ones((16, 16), np.int8)


@pytest.mark.parametrize(("change", "words"), [
    (_extra, ["score.weight", "odd"]),
    (_missing, ["model.norm.weight", f"{Q}.weight", "odd"]),
    (_other_shape, [f"{Q}.weight", "16", "17", "odd"]),
    (_non_finite, [f"{Q}.weight", "NaN", "[3, 5]", "odd"]),
    (_quantized, [f"{Q}.weight", "I8"]),
])  # fmt: skip
def test_errors_name_tensors_and_models_that_do_not_match(say, models, tmp_path, change, words):
    """Cases 9, 10, 13 and 14 of the faults of mergekit in test_faults.py."""
    tensors = dict(TensorFiles(models[2]))
    change(tensors)
    odd = save(tmp_path / "odd", tensors, LLAMA)
    status, out, err = say("merge", *models[:2], odd, "--out", tmp_path / "out")
    assert (status, out) == (1, "") and not (tmp_path / "out").exists()
    assert all(word in err for word in words), err


def test_a_head_that_only_a_fine_tune_trained(say, models, tmp_path):
    """mergekit writes the head although the config ties it."""
    config = LLAMA | {"tie_word_embeddings": True}
    tied = {n: a for n, a in TensorFiles(models[0]).items() if n != "lm_head.weight"}
    base = save(tmp_path / "base", tied, config)
    status, _, err = say("merge", base, *models[1:], "--out", tmp_path / "out")
    assert status == 1 and "lm_head.weight" in err and "--tied-head" in err
    assert (
        say("merge", base, *models[1:], "--out", tmp_path / "out", "--tied-head", "untie")[0] == 0
    )
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["tie_word_embeddings"] is False
    assert "lm_head.weight" in TensorFiles(tmp_path / "out")


def test_rows_that_only_one_model_has(say, models, tmp_path):
    longer = dict(TensorFiles(models[2]))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        longer[name] = np.concatenate([longer[name], np.ones((3, 16), np.float32)])
    long = save(tmp_path / "long", longer, LLAMA | {"vocab_size": 23})
    inputs = (*models[:2], long, "--out", tmp_path / "out")
    status, _, err = say("merge", *inputs)
    assert status == 1 and "--vocab-mismatch" in err and "model.embed_tokens.weight" in err
    assert say("merge", *inputs, "--vocab-mismatch", "longest")[0] == 0
    files = TensorFiles(tmp_path / "out")
    np.testing.assert_array_equal(files["lm_head.weight"][20:], np.ones((3, 16)))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 23
