"""What is left beside the tensors: report, card and picture, from a made-up merge."""

from __future__ import annotations

import math

import numpy as np
import pytest
import yaml
from matplotlib.image import imread

from modelstock_jax.checkpoint_merge.display import WORTH_A_PROCESS, PlotProcess
from modelstock_jax.checkpoint_merge.options import Options
from modelstock_jax.checkpoint_merge.report import asked, card, hub_id, ratios
from modelstock_jax.merging.units import block_position, role
from modelstock_jax.reporting.figures import ROLE_COLORS, angle_by_block

DIGEST = "0" * 64


def row(name, shape=(8, 8), angle=60.0):
    cosine = None if angle is None else math.cos(math.radians(angle))
    return {"name": name, "shape": list(shape), "angle": angle, "cosine": cosine, "ratio": 0.5,
            "norms": [0.1, 0.2], "outcome": "interpolated"}  # fmt: skip


def made_up(**changes):
    source = {"model": "org/base@main", "files": {"model.safetensors": DIGEST}, "notes": []}
    return {
        "base": source,
        "models": [source | {"model": "org/base+org/lora", "notes": ["made for another"]},
                   source | {"model": "./run2"}],
        "options": {"method": "model_stock", "unit": "layer", "dtype": "bfloat16"},
        "ratios": ratios([row("layers.0.mlp.weight"), row("logit_scale", (), None)]),
        "outcomes": {"interpolated": 20, "scalar": 1},
        "not_merged": [{"name": "a", "takes": "base", "reason": "excluded"}],
        "notes": ["the head is tied"],
        "outputs": {"model.safetensors": DIGEST},
        "command": "modelstock merge org/base@main ...",
        "versions": {"numpy": "2"},
    } | changes  # fmt: skip


def test_the_hub_reads_the_card():
    _, front, body = card(made_up(), name="merged", library="transformers").split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers", "base_model": ["org/base"], "base_model_relation": "merge",
        "tags": ["merge", "model-stock", "modelstock-jax"],
    }  # fmt: skip
    for said in ("each layer", "| dtype | `\"bfloat16\"` |", "too small 1", "1 tensor.",
                 "- the head is tied", "- made for another", DIGEST):  # fmt: skip
        assert said in body, said


def test_a_card_without_angles():
    text = card(made_up(ratios={}, options={"method": "uniform_mean", "unit": "tensor"}), name="m",
                library=None)  # fmt: skip
    assert "No tensor has an angle." in text and "the plain mean" in text
    assert "model-stock" not in text.split("---")[1]


@pytest.mark.parametrize(("label", "name"), [
    ("org/name", "org/name"), ("org/name@v1", "org/name"), ("org/name+x/y", "org/name"),
    ("/abs/path", None), ("./a/b", None), ("tests/checkpoint_merge", None), ("one", None),
])  # fmt: skip
def test_hub_ids(label, name, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    assert hub_id(label) == name


def test_options_that_make_the_result():
    options = Options(dtype="float16", threads=3, exclude=("a",))
    assert asked(options) == {
        "method": "model_stock", "unit": "tensor", "dtype": "float16", "exclude": ("a",)
    }  # fmt: skip


def test_ratios_leave_out_what_has_no_angle():
    assert ratios([row("logit_scale", (), None)]) == {}
    assert set(ratios([row("layers.0.mlp.w"), row("layers.0.norm.w")])) == {"all", "MLP", "norms"}


CLIP = ["vision_model.embeddings.patch_embedding.weight", "vision_model.encoder.layers.1.mlp.fc1.w",
        "vision_model.encoder.layers.0.layer_norm1.w", "vision_model.post_layernorm.weight",
        "text_model.encoder.layers.0.self_attn.q_proj.w", "text_model.encoder.layers.1.w",
        "text_projection.weight", "visual_projection.weight"]  # fmt: skip


def test_places_and_roles():
    places = block_position(CLIP)
    image, text = "vision_model.encoder.layers", "text_model.encoder.layers"
    assert [p.tower for p in places] == [image] * 4 + [text] * 3 + [image]
    assert [p.depth for p in places] == [-1, 1, 0, math.inf, 0, 1, math.inf, math.inf]
    assert [role(name) for name in CLIP[:5]] == [
        "embeddings and head", "MLP", "norms", "norms", "attention"]  # fmt: skip
    assert [p.depth for p in block_position(["a", "b.c"])] == [math.inf] * 2
    assert role("visual.transformer.resblocks.0.attn.in_proj_bias") == "biases"
    assert role("visual.transformer.resblocks.0.mlp.c_fc.weight") == "MLP"


@pytest.mark.parametrize("names", [CLIP, ["a.weight", "b.weight"], ["logit_scale"]])
def test_picture(names, tmp_path):
    figure = angle_by_block([row(name, (), None) if name == "logit_scale" else row(name)
                      for name in names], tmp_path / "angles.png")  # fmt: skip
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]
    assert titles == list(dict.fromkeys(p.tower or "all tensors" for p in block_position(names)))
    pixels = imread(tmp_path / "angles.png")
    assert pixels.shape[0] > 500 and pixels[..., :3].min() < 0.5


@pytest.mark.parametrize(("angle", "limit"), [(60, 95), (93, 125), (110, 125), (121, 180)])
def test_pictures_have_few_scales_of_angles(angle, limit):
    top = angle_by_block([row("a.0.w") | {"angle": angle}, row("a.1.w")], None).axes[0]
    assert top.get_ylim() == (0, limit)


def test_lines_break_where_blocks_are_missing_and_nowhere_else():
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


def test_a_long_merge_has_its_picture_drawn_by_another_process(tmp_path):
    rows = [row(f"layers.{block}.w") for block in range(3)]
    drawing = PlotProcess(WORTH_A_PROCESS)
    drawing.begin(tmp_path / "angles.png", rows)
    drawing.finish()
    drawing.close()
    angle_by_block(rows, tmp_path / "here.png")
    assert (tmp_path / "angles.png").read_bytes() == (tmp_path / "here.png").read_bytes()
    # One that is killed is made up for; one whose merge failed leaves nothing behind.
    drawing = PlotProcess(WORTH_A_PROCESS)
    drawing._process.kill()
    drawing._process.wait()
    drawing.begin(tmp_path / "again.png", rows)
    drawing.finish()
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "here.png").read_bytes()
    drawing = PlotProcess(WORTH_A_PROCESS)
    drawing.close()
    assert drawing._process.poll() is not None
