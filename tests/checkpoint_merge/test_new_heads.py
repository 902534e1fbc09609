"""Fine-tunes whose classifier differs from that of the base, or is missing in the base."""

from __future__ import annotations

import numpy as np
import pytest

from tests.checkpoint_merge.typed import load, stock, tensors, trio, weights, write

BODY = {"vit.encoder.layer.0.attention.query.weight": (8, 8), "vit.layernorm.weight": (8,)}
OLD = {
    "model_type": "vit",
    "hidden_size": 8,
    "architectures": ["ViTModel"],
    "id2label": {"0": "tench", "1": "goldfish"},
    "label2id": {"tench": 0, "goldfish": 1},
    "hidden_act": "gelu",
}
NEW = OLD | {
    "architectures": ["ViTForImageClassification"],
    "id2label": {"0": "cat"},
    "label2id": {"cat": 0},
    "num_labels": 1,
    "problem_type": "regression",
}


def models(root, old, new, base_config=OLD, config=NEW):
    """Write a base with a head of shapes `old` and fine-tunes of its body with heads `new`."""
    body = weights(BODY)
    paths = [
        write(
            root / "base",
            {"model.safetensors": {**body, **weights(old, 7)}, "config.json": base_config},
        )
    ]
    for i in (1, 2):
        tuned = {**weights(BODY, i, body), **weights(new, 10 + i)}
        paths.append(write(root / f"ft{i}", {"model.safetensors": tuned, "config.json": config}))
    return paths


# Heads by names of libraries -> shapes in the base, shapes in the fine-tunes.
HEADS = {
    "classifier": (
        {"classifier.weight": (1000, 8), "classifier.bias": (1000,)},
        {"classifier.weight": (10, 8), "classifier.bias": (10,)},
    ),
    "score": ({"lm_head.weight": (12, 8)}, {"score.weight": (3, 8)}),
    "roberta": (
        {},
        {
            "classifier.dense.weight": (8, 8),
            "classifier.dense.bias": (8,),
            "classifier.out_proj.weight": (2, 8),
            "classifier.out_proj.bias": (2,),
        },
    ),
    "qa": ({"cls.predictions.bias": (12,)}, {"qa_outputs.weight": (2, 8), "qa_outputs.bias": (2,)}),
    "timm": (
        {"head.weight": (1000, 8), "head.bias": (1000,)},
        {"head.weight": (10, 8), "head.bias": (10,)},
    ),
    "timm fc": ({"head.fc.weight": (1000, 8)}, {"head.fc.weight": (10, 8)}),
    "resnet": (
        {"fc.weight": (1000, 8), "fc.bias": (1000,)},
        {"fc.weight": (10, 8), "fc.bias": (10,)},
    ),
    "transformers resnet": ({"classifier.1.weight": (1000, 8)}, {"classifier.1.weight": (10, 8)}),
    "deit": (
        {"cls_classifier.weight": (1000, 8), "distillation_classifier.weight": (1000, 8)},
        {"cls_classifier.weight": (10, 8), "distillation_classifier.weight": (10, 8)},
    ),
    "wav2vec2": (
        {"lm_head.weight": (32, 8), "lm_head.bias": (32,)},
        {"lm_head.weight": (40, 8), "lm_head.bias": (40,)},
    ),
    "none": ({}, {"score.weight": (3, 8)}),
}


@pytest.mark.parametrize("kind", HEADS)
def test_the_error_names_the_option_and_the_option_writes_the_heads_of_the_fine_tunes(
    say, tmp_path, kind
):
    old, new = HEADS[kind]
    paths = models(tmp_path, old, new)
    result = say("merge", *paths, "--out", tmp_path / "out")
    assert result.status == 1 and "--head finetuned" in result.err and result.err.count("\n") == 1
    assert next(iter(new)) in result.err
    out = tmp_path / "out"
    result = say("merge", *paths, "--out", out, "--head", "finetuned")
    assert result.status == 0, result.err
    base, *tuned = map(tensors, paths)
    merged = tensors(out)
    assert merged.keys() == BODY.keys() | new.keys()
    for name in new:
        expected = np.mean([model[name] for model in tuned], axis=0, dtype=np.float64)
        np.testing.assert_array_max_ulp(merged[name], expected.astype(np.float32), maxulp=1)
    for name in BODY:
        expected = stock(base[name], *(model[name] for model in tuned)).astype(np.float32)
        np.testing.assert_array_max_ulp(merged[name], expected, maxulp=1)
    assert load(out / "config.json") == NEW
    report = load(out / "merge_report.json")
    assert {row["name"] for row in report["units"]} == BODY.keys()
    assert all(row["source"] == "mean" for row in report["not_merged"])
    left_out = old.keys() - new.keys()
    notes = [note for note in result.notes if "%" in note]
    assert bool(left_out) == bool(notes) and all(name in notes[0] for name in left_out)
    if left_out:
        fraction = sum(base[n].size for n in left_out) / sum(x.size for x in base.values())
        assert f"{100 * fraction:.0f} %" in notes[0]


def test_dtype_is_the_dtype_of_the_output(say, tmp_path):
    paths = models(tmp_path, *HEADS["classifier"])
    out = tmp_path / "out"
    assert say("merge", *paths, "--out", out, "--head", "finetuned", "--dtype", "bf16").status == 0
    assert {str(x.dtype) for x in tensors(out).values()} == {"bfloat16"}
    assert load(out / "config.json")["torch_dtype"] == "bfloat16"


def test_a_new_head_is_written_in_its_own_dtype(say, tmp_path):
    """The head was trained in float32, on a base in float16."""
    body = {n: x.astype("float16") for n, x in weights(BODY).items()}
    paths = [write(tmp_path / "base", {"model.safetensors": body, "config.json": OLD})]
    for i in (1, 2):
        tuned = {n: x.astype("float16") for n, x in weights(BODY, i, weights(BODY)).items()}
        paths.append(
            write(
                tmp_path / f"ft{i}",
                {
                    "model.safetensors": {**tuned, **weights({"score.weight": (3, 8)}, i)},
                    "config.json": NEW,
                },
            )
        )
    assert say("merge", *paths, "--out", tmp_path / "out", "--head", "finetuned").status == 0
    found = tensors(tmp_path / "out")
    assert (
        found["score.weight"].dtype == np.float32
        and found["vit.layernorm.weight"].dtype == np.float16
    )


@pytest.mark.parametrize(
    "shapes",
    [
        ({"score.weight": (3, 8)}, {"score.weight": (4, 8)}),
        ({"score.weight": (3, 8)}, {"score.weight": (3, 8), "score.bias": (3,)}),
        ({"score.weight": (3, 8)}, {"classifier.weight": (3, 8)}),
    ],
)
def test_heads_of_the_fine_tunes_that_differ_have_no_mean(say, tmp_path, shapes):
    paths = models(tmp_path, {}, {})
    for path, new in zip(paths[1:], shapes, strict=True):
        write(path, {"model.safetensors": {**tensors(path), **weights(new, 3)}})
    for options in ([], ["--head", "finetuned"]):
        result = say("merge", *paths, "--out", tmp_path / "out", *options)
        assert result.status == 1 and not (tmp_path / "out").exists()
        assert "score" in result.err or "classifier" in result.err


HEAD = {"classifier.weight": (2, 8), "classifier.bias": (2,)}
NEG_POS, POS_NEG = (
    {"id2label": dict(zip("01", names, strict=True))} for names in (("neg", "pos"), ("pos", "neg"))
)


def labeled(root, old, labels, new=HEAD):
    """Write a base with head shapes `old` and fine-tunes with `new`; `labels` has one per model."""
    paths = models(root, old, new)
    for path, label in zip(paths, labels, strict=True):
        write(path, {"config.json": {"model_type": "vit", "hidden_act": "gelu"} | label})
    return paths


@pytest.mark.parametrize("choice", [(), ("--config-from", "model:1"), ("--config-from", "base")])
@pytest.mark.parametrize(
    ("old", "labels", "options"),
    [
        (HEAD, ({}, NEG_POS, POS_NEG), ()),
        (HEAD, ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, NEG_POS, POS_NEG), ()),
        (HEAD, (POS_NEG, NEG_POS, NEG_POS), ()),
        (HEAD, (NEG_POS, NEG_POS, POS_NEG), ()),
        (HEAD, ({}, {"label_names": ["a", "b"]}, {"label_names": ["b", "a"]}), ()),
        ({}, ({}, NEG_POS, POS_NEG), ("--head", "finetuned")),
        (
            {"classifier.weight": (9, 8), "classifier.bias": (9,)},
            ({}, NEG_POS, POS_NEG),
            ("--head", "finetuned"),
        ),
        (HEAD, ({}, NEG_POS, POS_NEG), ("--exclude", "classifier.*", "--unmerged-from", "mean")),
    ],
)
def test_rows_of_different_classes_are_an_error(say, tmp_path, old, labels, options, choice):
    paths = labeled(tmp_path, old, labels)
    result = say("merge", *paths, "--out", tmp_path / "out", *options, *choice)
    assert result.status == 1 and not (tmp_path / "out").exists()
    for part in ("id2label: class 0 ", "classifier.weight", "--config-from"):
        assert part in result.err, result.err
    assert any("class 0 " in note for note in say("compare", *paths).notes) == (old == HEAD)


@pytest.mark.parametrize(
    "head",
    [
        "class_labels_classifier.weight",
        "class_labels_classifier.layers.2.weight",
        "class_predictor.weight",
        "model.decoder.class_embed.0.weight",
        "decode_head.classifier.weight",
        "score.weight",
        "classifier.1.weight",
        "head.fc.weight",
    ],
)
@pytest.mark.parametrize("rows", [2, 3])
def test_heads_of_detection_have_classes_too(say, tmp_path, head, rows):
    """Some of them have one more row, for no object."""
    shape = {head: (rows, 8)}
    paths = labeled(tmp_path, shape, ({}, NEG_POS, POS_NEG), shape)
    result = say("merge", *paths, "--out", tmp_path / "out")
    assert result.status == 1 and "id2label: class 0 " in result.err and f" {head} " in result.err


@pytest.mark.parametrize(
    ("labels", "options", "written"),
    [
        ((POS_NEG, NEG_POS, NEG_POS), ("--unmerged-from", "mean"), NEG_POS),
        ((POS_NEG, NEG_POS, POS_NEG), ("--unmerged-from", "model:1"), NEG_POS),
        ((POS_NEG, NEG_POS, POS_NEG), (), POS_NEG),
    ],
)
def test_the_error_about_classes_names_the_option_that_resolves_it(
    say, tmp_path, labels, options, written
):
    paths = labeled(tmp_path, HEAD, labels)
    result = say("merge", *paths, "--out", tmp_path / "out")
    if options != ("--unmerged-from", "model:1"):
        assert " ".join(("--exclude 'classifier.*'", *options)) in result.err
    out = tmp_path / "out"
    result = say("merge", *paths, "--out", out, "--exclude", "classifier.*", *options)
    assert result.status == 0, result.err
    assert load(out / "config.json")["id2label"] == written["id2label"]


def test_the_error_about_classes_names_the_option_that_writes_no_classifier(say, tmp_path):
    paths = labeled(tmp_path, {}, ({}, NEG_POS, POS_NEG))
    result = say("merge", *paths, "--out", tmp_path / "out", "--head", "finetuned")
    assert "--missing-tensors base" in result.err
    assert say("merge", *paths, "--out", tmp_path / "out", "--missing-tensors", "base").status == 0


@pytest.mark.parametrize(
    "labels",
    [
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, NEG_POS, NEG_POS),
        ({}, NEG_POS, {"id2label": {"0": "NEG", "1": "Pos"}}),
        ({"id2label": {"0": "0", "1": "1"}}, NEG_POS, NEG_POS),
    ],
)
def test_names_of_the_same_classes_are_no_error(say, tmp_path, labels):
    paths = labeled(tmp_path, HEAD, labels)
    assert say("merge", *paths, "--out", tmp_path / "out").status == 0


def test_labels_of_a_model_without_a_classifier_are_a_note(say, tmp_path):
    paths = labeled(tmp_path, {}, (POS_NEG, NEG_POS, NEG_POS), {})
    result = say("merge", *paths, "--out", tmp_path / "out")
    assert result.status == 0 and "id2label" in result.notes[0]
    assert load(tmp_path / "out/config.json")["id2label"] == POS_NEG["id2label"]


def test_no_note_claims_the_labels_of_the_base_if_they_are_replaced(say, tmp_path):
    paths = models(tmp_path, *HEADS["classifier"])
    result = say("merge", *paths, "--out", tmp_path / "out", "--head", "finetuned")
    assert result.status == 0
    assert not any("id2label" in note or "architectures" in note for note in result.notes)


def test_the_labels_of_the_fine_tunes_are_written_with_their_head(say, tmp_path):
    """With the head of the fine-tunes, their id2label is written in spite of --config-from."""
    paths = models(tmp_path, *HEADS["classifier"])
    out = tmp_path / "out"
    assert (
        say("merge", *paths, "--out", out, "--head", "finetuned", "--config-from", "base").status
        == 0
    )
    assert load(out / "config.json")["id2label"] == {"0": "cat"}


def test_labels_of_timm(say, tmp_path):
    old = {
        "architecture": "vit",
        "num_classes": 1000,
        "label_names": ["a"],
        "pretrained_cfg": {"tag": "in1k", "num_classes": 1000},
    }
    new = {
        "architecture": "vit",
        "num_classes": 10,
        "label_names": ["b"],
        "pretrained_cfg": {"tag": "in1k", "num_classes": 10},
    }
    paths = models(tmp_path, *HEADS["timm"], old, new)
    out = tmp_path / "out"
    assert say("merge", *paths, "--out", out, "--head", "finetuned").status == 0
    assert load(out / "config.json") == new
    assert 'library_name: "timm"' in (out / "README.md").read_text()


def test_the_head_of_a_fine_tuned_clip(say, tmp_path):
    """The head is in head.safetensors; the base has a head of other classes, or none."""
    body = weights(BODY)
    for kind, old in (("other", {"weight": (1000, 8), "bias": (1000,)}), ("none", {})):
        root = tmp_path / kind
        paths = [write(root / "base", {"model.safetensors": body})]
        if old:
            write(paths[0], {"head.safetensors": weights(old)})
        for i in (1, 2):
            paths.append(
                write(
                    root / f"ft{i}",
                    {
                        "model.safetensors": weights(BODY, i, body),
                        "head.safetensors": weights({"weight": (10, 8), "bias": (10,)}, i),
                    },
                )
            )
        result = say("merge", *paths, "--out", root / "out")
        assert result.status == 1 and "--head finetuned" in result.err
        assert say("merge", *paths, "--out", root / "out", "--head", "finetuned").status == 0
        written = tensors(root / "out/head.safetensors")
        heads = [tensors(path / "head.safetensors") for path in paths[1:]]
        for name, value in written.items():
            np.testing.assert_allclose(value, np.mean([x[name] for x in heads], axis=0), rtol=1e-6)
        assert tensors(root / "out/model.safetensors").keys() == BODY.keys()


def test_a_head_that_no_fine_tune_has(say, tmp_path):
    """The fine-tunes are feature extractors: the base's head is copied or left out."""
    paths = models(tmp_path, {"classifier.weight": (40, 8)}, {}, config=OLD)
    result = say("merge", *paths, "--out", tmp_path / "out")
    assert result.status == 1 and "classifier.weight" in result.err
    out = tmp_path / "out"
    result = say("merge", *paths, "--out", out, "--head", "finetuned")
    assert result.status == 0 and tensors(out).keys() == BODY.keys()
    assert any("classifier.weight: " in note and "%" in note for note in result.notes)
    out = tmp_path / "copied"
    assert say("merge", *paths, "--out", out, "--missing-tensors", "base").status == 0
    assert "classifier.weight" in tensors(out)


def test_a_body_of_another_width_is_no_head(say, tmp_path):
    paths = trio(tmp_path)
    for path in paths[1:]:
        wide = {
            n: np.concatenate([x, x]) if "up_proj" in n else x for n, x in tensors(path).items()
        }
        write(path, {"model.safetensors": wide})
    for options in ([], ["--head", "finetuned"]):
        result = say("merge", *paths, "--out", tmp_path / "out", *options)
        assert (
            result.status == 1 and "up_proj" in result.err and "--head" not in result.errors[0]
        ), (
            options,
            result,
        )


def test_a_comparison_of_models_with_other_heads(say, tmp_path):
    for kind, (old, new) in HEADS.items():
        paths = models(tmp_path / kind, old, new)
        result = say("compare", *paths)
        assert result.status == 0 and "query" in result.out, (kind, result.err)
