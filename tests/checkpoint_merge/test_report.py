"""Report, model card and figure of an invented merge."""

from __future__ import annotations

import math

import numpy as np
import pytest
import yaml
from matplotlib.image import imread

from modelstock_jax.checkpoint_merge.display import MIN_PROCESS_BYTES, PlotProcess
from modelstock_jax.checkpoint_merge.options import Options
from modelstock_jax.checkpoint_merge.report import (
    hub_id,
    model_card,
    outcome_counts,
    outcome_label,
    ratio_summary,
    result_options,
)
from modelstock_jax.merging.rules import UnitOutcome
from modelstock_jax.merging.tensor_roles import block_position, role
from modelstock_jax.reporting.figures import ROLE_COLORS, angle_by_block

CHECKSUM = "0" * 64


def row(name, shape=(8, 8), angle=60.0):
    cosine = None if angle is None else math.cos(math.radians(angle))
    return {"name": name, "shape": list(shape), "angle": angle, "cosine": cosine, "ratio": 0.5,
            "norms": [0.1, 0.2], "outcome": "interpolated"}  # fmt: skip


def example(**changes):
    source = {"model": "org/base@main", "files": {"model.safetensors": CHECKSUM}, "notes": []}
    return {
        "base": source,
        "models": [source | {"model": "org/base+org/lora", "notes": ["made for another"]},
                   source | {"model": "./run2"}],
        "options": {"method": "model_stock", "unit": "layer", "dtype": "bfloat16"},
        "ratios": ratio_summary([row("layers.0.mlp.weight"), row("logit_scale", (), None)]),
        "outcomes": {"interpolated": 20, "scalar": 1},
        "not_merged": [{"name": "a", "source": "base", "reason": "excluded"}],
        "notes": ["the head is tied"],
        "outputs": {"model.safetensors": CHECKSUM},
        "command": "modelstock merge org/base@main ...",
        "versions": {"numpy": "2"},
    } | changes  # fmt: skip


def test_the_card_has_the_metadata_of_the_hub():
    _, front, body = model_card(example(), name="merged", library="transformers").split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers", "base_model": ["org/base"], "base_model_relation": "merge",
        "tags": ["merge", "model-stock", "modelstock-jax"],
    }  # fmt: skip
    for text in ("each layer", "| dtype | `\"bfloat16\"` |", "| | tensors | min | median | max |",
                 "Units by outcome: 20 interpolated, 1 scalar. Not merged: 1 tensor.",
                 "- the head is tied", "- made for another", CHECKSUM):  # fmt: skip
        assert text in body, text


def test_a_card_without_angles():
    options = {"method": "uniform_mean", "unit": "tensor"}
    text = model_card(example(ratios={}, options=options), name="m", library=None)
    assert "No tensor has an angle." in text and "the uniform mean" in text
    assert "model-stock" not in text.split("---")[1]


@pytest.mark.parametrize(("label", "name"), [
    ("org/name", "org/name"), ("org/name@v1", "org/name"), ("org/name+x/y", "org/name"),
    ("/abs/path", None), ("./a/b", None), ("tests/checkpoint_merge", None), ("one", None),
])  # fmt: skip
def test_hub_ids(label, name, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    assert hub_id(label) == name


def test_options_that_change_the_result():
    options = Options(dtype="float16", threads=3, exclude=("a",))
    assert result_options(options) == {
        "method": "model_stock", "unit": "tensor", "dtype": "float16", "exclude": ("a",)
    }  # fmt: skip


def test_outcomes_have_plain_labels():
    labels = {
        "interpolated": "interpolated",
        "fixed_ratio": "fixed ratio",
        "clamped": "clamped to 0",
        "unchanged": "unchanged",
        "one_model_changed": "one model changed",
        "unchanged_models_left_out": "unchanged models left out",
        "scalar": "scalar",
        "fallback_to_eq3": "fallback to eq. 3",
        "copied": "copied",
        "non_finite": "non-finite",
    }
    assert {outcome.name.lower() for outcome in UnitOutcome} == set(labels)
    assert {name: outcome_label(name) for name in labels} == labels
    assert outcome_counts({"unchanged": 1, "clamped": 2}) == "2 clamped to 0, 1 unchanged"


def test_ratios_omit_tensors_without_an_angle():
    assert ratio_summary([row("logit_scale", (), None)]) == {}
    assert set(ratio_summary([row("layers.0.mlp.w"), row("layers.0.norm.w")])) == {
        "all",
        "MLP",
        "norms",
    }


CLIP = ["vision_model.embeddings.patch_embedding.weight", "vision_model.encoder.layers.1.mlp.fc1.w",
        "vision_model.encoder.layers.0.layer_norm1.w", "vision_model.post_layernorm.weight",
        "text_model.encoder.layers.0.self_attn.q_proj.w", "text_model.encoder.layers.1.w",
        "text_projection.weight", "visual_projection.weight"]  # fmt: skip


def test_positions_and_roles():
    positions = block_position(CLIP)
    image, text = "vision_model.encoder.layers", "text_model.encoder.layers"
    assert [p.tower for p in positions] == [image] * 4 + [text] * 3 + [image]
    assert [p.depth for p in positions] == [-1, 1, 0, math.inf, 0, 1, math.inf, math.inf]
    assert [role(name) for name in CLIP[:5]] == [
        "embeddings and head", "MLP", "norms", "norms", "attention"]  # fmt: skip
    assert [p.depth for p in block_position(["a", "b.c"])] == [math.inf] * 2
    assert role("visual.transformer.resblocks.0.attn.in_proj_bias") == "biases"
    assert role("visual.transformer.resblocks.0.mlp.c_fc.weight") == "MLP"


@pytest.mark.parametrize("names", [CLIP, ["a.weight", "b.weight"], ["logit_scale"]])
def test_figure(names, tmp_path):
    figure = angle_by_block([row(name, (), None) if name == "logit_scale" else row(name)
                      for name in names], tmp_path / "angles.png")  # fmt: skip
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]
    assert titles == list(dict.fromkeys(p.tower or "all tensors" for p in block_position(names)))
    pixels = imread(tmp_path / "angles.png")
    assert pixels.shape[0] > 500 and pixels[..., :3].min() < 0.5


@pytest.mark.parametrize(("angle", "limit"), [(60, 95), (93, 125), (110, 125), (121, 180)])
def test_figures_have_one_of_a_few_ranges_of_angles(angle, limit):
    top = angle_by_block([row("a.0.w") | {"angle": angle}, row("a.1.w")], None).axes[0]
    assert top.get_ylim() == (0, limit)


def test_lines_break_only_at_missing_blocks():
    kinds = ("self_attn.q_proj.w", "mlp.w", "norm.w", "bias")
    names = [f"layers.{block}.{kind}" for block in range(12) for kind in kinds
             if (block, kind) != (5, "mlp.w")]  # fmt: skip
    top = angle_by_block([row(name) for name in names], None).axes[0]
    drawn = [line for line in top.lines if line.get_linestyle() == "-" and line.get_color() in
             ROLE_COLORS.values()]  # fmt: skip
    broken = {line.get_color(): int(np.isnan(line.get_ydata()).sum()) for line in drawn}
    assert broken == {
        ROLE_COLORS[kind]: int(kind == "MLP") for kind in ("attention", "MLP", "norms", "biases")
    }


def test_a_separate_process_draws_the_figure_of_a_long_merge(tmp_path):
    rows = [row(f"layers.{block}.w") for block in range(3)]
    plot = PlotProcess(MIN_PROCESS_BYTES)
    plot.begin(tmp_path / "angles.png", rows)
    plot.finish()
    plot.close()
    angle_by_block(rows, tmp_path / "here.png")
    assert (tmp_path / "angles.png").read_bytes() == (tmp_path / "here.png").read_bytes()
    # If the process was killed, this process draws; if the merge failed, the process ends.
    plot = PlotProcess(MIN_PROCESS_BYTES)
    plot._process.kill()
    plot._process.wait()
    plot.begin(tmp_path / "again.png", rows)
    plot.finish()
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "here.png").read_bytes()
    plot = PlotProcess(MIN_PROCESS_BYTES)
    plot.close()
    assert plot._process.poll() is not None
