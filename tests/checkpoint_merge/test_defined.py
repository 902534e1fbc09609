"""Values that a method does not define are null; scalars, negative weights and files not copied."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest

from modelstock_jax.checkpoint_merge import commands
from modelstock_jax.reporting.figures import angle_by_block
from tests.checkpoint_merge.typed import SHAPES, load, tensors, trio, weights, write

TWO = {
    "model_stock": [],
    "weighted_model_stock": [],
    "uniform_mean": [],
    "linear": ["--weights", "1,3"],
    "wise_ft": ["--alpha", "0.5"],
    "task_arithmetic": ["--scale", "0.5"],
    "ties": ["--density", "0.5"],
    "slerp": ["--t", "0.3"],
}
NO_RATIO = ("ties", "slerp")
DISTANCES = ("replica", "mean", "merged")
Q = "model.layers.0.self_attn.q_proj.weight"


def merged(say, paths, out, *options):
    result = say("merge", *paths, "--out", out, *options)
    assert result.status == 0, result.err
    return load(out / "merge_report.json"), (out / "README.md").read_text(), result.out


def vectors(paths, name=Q):
    base, *tuned = (tensors(path)[name].astype(np.float64).ravel() for path in paths)
    return base, np.array([w - base for w in tuned])


@pytest.mark.parametrize("method", TWO)
def test_what_a_method_defines_of_two_fine_tunes(say, tmp_path, method):
    paths = trio(tmp_path, shapes=SHAPES | {"logit_scale": ()})
    report, card, out = merged(say, paths, tmp_path / "out", "--method", method, *TWO[method])
    row = next(row for row in report["units"] if row["name"] == Q)
    _, d = vectors(paths)
    cosine = d[0] @ d[1] / math.prod(np.linalg.norm(d, axis=1))
    # Angles and norms are those of the fine-tunes for every method.
    assert row["cosine"] == pytest.approx(cosine, rel=1e-6)
    assert row["cosines"][0][0] == 1 and row["cosines"][0][1] == pytest.approx(cosine, rel=1e-6)
    assert row["norms"] == pytest.approx(np.linalg.norm(d, axis=1), rel=1e-6)
    mean = row["predicted_distance"]["mean"]
    assert row["predicted_distance"]["replica"] > mean > 0
    for unit in (row, *report["units"]):
        assert (unit["ratio"] is None) == (method in NO_RATIO)
        assert (unit["predicted_distance"]["merged"] is None) == (method in NO_RATIO)
    assert (report["predicted_distance"]["merged"] is None) == (method in NO_RATIO)
    assert bool(report["ratios"]) == (method not in NO_RATIO)
    assert ("This method has no ratio." in card) == (method in NO_RATIO)
    assert ("ratios " in out) == ("to the center (predicted)" in out) == (method not in NO_RATIO)
    # A scalar has no angle.
    (scalar,) = [row for row in report["units"] if row["name"] == "logit_scale"]
    assert scalar["angle"] is None and scalar["cosine"] is None


def test_the_ratio_matches_the_merged_weights(say, tmp_path):
    paths = trio(tmp_path)
    base, d = vectors(paths)
    for method, options in TWO.items():
        if method in NO_RATIO or method == "linear" or method == "weighted_model_stock":
            continue
        report, *_ = merged(say, paths, tmp_path / method, "--method", method, *options)
        ratio = next(row["ratio"] for row in report["units"] if row["name"] == Q)
        update = tensors(tmp_path / method)[Q].ravel() - base
        assert update == pytest.approx(ratio * d.mean(axis=0), abs=1e-6), method


@pytest.mark.parametrize("weights_", ["1,-1", "-1,1", "-0.5,-0.5"])
def test_negative_weights_have_no_ratio(say, tmp_path, weights_):
    paths = trio(tmp_path)
    report, card, out = (
        merged(say, paths, tmp_path / "out", "--method", "task_arithmetic", "--weights", weights_)
        if weights_[0] != "-"
        else merged(
            say, paths, tmp_path / "out", "--method", "task_arithmetic", f"--weights={weights_}"
        )
    )
    base, d = vectors(paths)
    a, b = map(float, weights_.split(","))
    weights_out = tensors(tmp_path / "out")[Q].ravel()
    np.testing.assert_allclose(weights_out, base + a * d[0] + b * d[1], atol=1e-6)
    assert all(row["ratio"] is None for row in report["units"]) and not report["ratios"]
    assert "ratios" not in out and "This method has no ratio." in card


def test_weights_with_a_sum_of_0_cannot_be_normalized(say, tmp_path):
    paths = trio(tmp_path)
    for method in ("linear", "ties"):
        result = say(
            "merge", *paths, "--out", tmp_path / "out", "--method", method, "--weights", "1,-1"
        )
        assert result.status == 1 and re.search("weights .* 0", result.err)
    result = say(
        "merge",
        *paths,
        "--out",
        tmp_path / "out",
        "--method",
        "task_arithmetic",
        "--weights",
        "1,-1",
        "--normalize",
    )
    assert result.status == 1 and re.search("weights .* 0", result.err)


ONE = {
    "wise_ft": ["--alpha", "0.5"],
    "uniform_mean": [],
    "task_arithmetic": [],
    "ties": [],
    "slerp": ["--t", "0.3"],
    "linear": [],
}


@pytest.mark.parametrize("method", ONE)
def test_one_fine_tune_has_a_norm_and_no_angle(say, tmp_path, method):
    paths = trio(tmp_path)[:2]
    report, card, out = merged(say, paths, tmp_path / "out", "--method", method, *ONE[method])
    _, d = vectors(paths)
    for row in report["units"]:
        assert row["angle"] is None and row["cosine"] is None and row["cosines"] == [[1.0]]
        assert row["predicted_distance"] == dict.fromkeys(DISTANCES)
        assert (row["ratio"] is None) == (method in NO_RATIO) and len(row["norms"]) == 1
    row = next(row for row in report["units"] if row["name"] == Q)
    assert row["norms"] == pytest.approx(np.linalg.norm(d, axis=1), rel=1e-6)
    assert report["predicted_distance"] == dict.fromkeys(DISTANCES) and report["ratios"] == {}
    assert "to the center" not in out and "ratios" not in out and "nan" not in out.lower()
    assert "1 fine-tune of" in card and "![Norm of" in card and "Angle and norm" not in card
    assert ("t = 0.5 for every tensor" in card) == (method == "wise_ft")


def test_the_figure_of_one_fine_tune_has_no_empty_panel(tmp_path):
    rows = [
        {
            "name": f"model.layers.{i}.{kind}.weight",
            "shape": [8, 8],
            "angle": None,
            "norms": [0.1 + i / 10],
        }
        for i in range(4)
        for kind in ("self_attn.q", "mlp.up")
    ]
    for angle, panels in ((None, 1), (60.0, 2)):
        figure = angle_by_block(
            [row | {"angle": angle} for row in rows], tmp_path / f"{panels}.png"
        )
        assert len(figure.axes) == panels
        assert all(axes.has_data() for axes in figure.axes)
    # Without updates the figure is empty, but there is no error.
    angle_by_block([row | {"norms": [0.0]} for row in rows], tmp_path / "still.png")


@pytest.fixture
def recipe(tmp_path):
    """Return the recipe of a weighted mean of models without a base."""
    paths = trio(tmp_path)[1:]
    models = "".join(
        f"  - {{model: {p}, parameters: {{weight: {w}}}}}\n"
        for p, w in zip(paths, (1, 3), strict=True)
    )
    (tmp_path / "r.yml").write_text(f"merge_method: linear\nmodels:\n{models}")
    return tmp_path / "r.yml"


def test_a_mean_of_models_without_a_base(say, tmp_path, recipe, monkeypatch):
    monkeypatch.setattr(commands.PlotProcess, "begin", lambda *_: pytest.fail("nothing to draw"))
    out = tmp_path / "out"
    report, card, result = merged(say, ["--recipe", recipe], out)
    names = [str(tmp_path / "ft1"), str(tmp_path / "ft2")]
    assert report["base"] is None and [m["model"] for m in report["models"]] == names
    for row in report["units"]:
        assert row["norms"] == [] and row["cosines"] == []
        assert [row[key] for key in ("angle", "cosine", "ratio")] == [None] * 3
        assert row["predicted_distance"] == dict.fromkeys(DISTANCES)
    assert report["predicted_distance"] == dict.fromkeys(DISTANCES) and report["ratios"] == {}
    assert not (out / "angles.png").exists() and "angles.png" not in card and "![" not in card
    assert "2 models, merged by a weighted mean of the models" in card
    assert "fine-tune" not in card and "base" not in card and "angle" not in card
    assert "2 models, linear" in result and "ratios" not in result and "center" not in result
    first, second = map(tensors, names)
    for name, value in tensors(out).items():
        np.testing.assert_allclose(
            value, (first[name] + 3.0 * second[name]) / 4, rtol=1e-5, atol=1e-6
        )


def test_the_plan_of_a_recipe_without_a_base_names_no_base(say, recipe):
    result = say("merge", "--recipe", recipe, "--dry-run")
    first = [line.split()[0] for line in result.out.splitlines()]
    assert result.status == 0 and first[:2] == ["model", "model"] and "base" not in first
    assert "fine-tune" not in result.out
    result = say("merge", "--recipe", recipe, "--dry-run", "--json")
    assert json.loads(result.out)["base"] is None


def test_undefined_values_are_null_in_json(say, tmp_path):
    """A frozen tensor has no angle (null in JSON, a dash in the table) and distances of 0."""
    paths = trio(tmp_path)
    frozen = tensors(paths[0])["model.norm.weight"]
    for path in paths[1:]:
        write(path, {"model.safetensors": tensors(path) | {"model.norm.weight": frozen}})
    result = say("compare", *paths, "--json")
    row = next(r for r in json.loads(result.out)["units"] if r["name"] == "model.norm.weight")
    assert row["angle"] is None and row["cosines"] == [[None, None]] * 2
    assert row["predicted_distance"] == dict.fromkeys(DISTANCES, 0.0)
    assert "NaN" not in result.out and "Infinity" not in result.out
    result = say("compare", *paths)
    (line,) = [line for line in result.out.splitlines() if line.strip().startswith("model.norm")]
    assert line.count("–") >= 2 and "nan" not in result.out
    # If all tensors are frozen, there are no ratios.
    for path in paths[1:]:
        write(path, {"model.safetensors": tensors(paths[0])})
    shown = json.loads(say("compare", *paths, "--json").out)
    assert shown["predicted_distance"] == dict.fromkeys(DISTANCES, 0.0) and shown["ratios"] == {}


@pytest.mark.parametrize("shapes", [((), (1,), (1,)), ((1,), (), ()), ((1,), (1, 1), ())])
def test_a_scalar_may_have_two_shapes(say, tmp_path, shapes):
    """`logit_scale` has shape [] in transformers and [1] in other libraries."""
    base = weights(SHAPES)
    paths = []
    for i, (shape, value) in enumerate(zip(shapes, (2.0, 3.0, 5.0), strict=True)):
        model = weights(SHAPES, i, base) if i else base
        paths.append(
            write(
                tmp_path / f"m{i}",
                {"model.safetensors": {**model, "logit_scale": np.full(shape, value, np.float32)}},
            )
        )
    merged(say, paths, tmp_path / "out")
    scale = tensors(tmp_path / "out")["logit_scale"]
    assert scale.shape == shapes[0] and scale.item() == 4.0
    assert say("compare", *paths).status == 0


@pytest.mark.parametrize(
    ("config", "files", "words"),
    [
        (
            {"config.json": {"auto_map": {"AutoModel": "modeling_x.Model"}}},
            ["modeling_x.py", "configuration_x.py"],
            ["auto_map", "config.json", "configuration_x.py, modeling_x.py"],
        ),
        (
            {"config.json": {"auto_map": {"AutoModel": "org/other--modeling_x.Model"}}},
            [],
            ["auto_map", "config.json"],
        ),
        (
            {
                "config.json": {},
                "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["t.T", None]}},
            },
            ["tokenization_t.py"],
            ["auto_map", "tokenizer_config.json", "tokenization_t.py"],
        ),
        ({"config.json": {}}, ["bpe.codes"], ["bpe.codes"]),
        (
            {"config.json": {}},
            ["dict.fairseq", "lang.map", "vocab.bpe"],
            ["dict.fairseq, lang.map, vocab.bpe"],
        ),
        (
            {"modules.json": [{"path": "", "type": "custom_st.Transformer"}]},
            ["custom_st.py"],
            ["modules.json", "custom_st.py"],
        ),
    ],
)
def test_a_note_names_files_that_are_not_copied(say, tmp_path, config, files, words):
    paths = trio(tmp_path, config)
    for path in paths:
        write(path, dict.fromkeys(files, "x"))
    result = say("merge", *paths, "--out", tmp_path / "out")
    (note,) = result.notes
    assert result.status == 0 and str(paths[0]) in note
    for word in words:
        assert word in note, note
    assert not any((tmp_path / "out" / file).exists() for file in files)
    assert note.removeprefix("note: ") in (tmp_path / "out/README.md").read_text()


def test_a_note_names_the_code_of_a_pipeline(say, tmp_path):
    index = {"_class_name": "P", "unet": ["my_unet", "MyUNet"]}
    config = {"model_index.json": index, "unet/my_unet.py": "raise SystemExit"}
    paths = trio(tmp_path, config, file="unet/model.safetensors")
    (note,) = say("merge", *paths, "--out", tmp_path / "out").notes
    assert "model_index.json" in note and "copy unet/my_unet.py" in note


def test_no_note_names_files_of_training(say, tmp_path):
    paths = trio(tmp_path, {"config.json": {}})
    for path in paths:
        write(
            path,
            dict.fromkeys(
                (
                    "README.md",
                    ".gitattributes",
                    "training_args.bin",
                    "optimizer.pt",
                    "scheduler.pt",
                    "rng_state_0.pth",
                    "trainer_state.json",
                    "pytorch_model.bin",
                    "model.onnx",
                    "tf_model.h5",
                    "flax_model.msgpack",
                    "events.out.tfevents.1",
                    "run.log",
                    "a.png",
                    "train.py",
                ),
                "{}",
            ),
        )
    assert not say("merge", *paths, "--out", tmp_path / "out").notes
