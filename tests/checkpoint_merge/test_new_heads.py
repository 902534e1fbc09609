"""Fine-tunes with another classifier than the base, or with one that it lacks."""

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
    """A base with a head of shapes `old` and fine-tunes with `new`, all on one body."""
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


# Heads as libraries name them: the base's shapes, the fine-tunes'.
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
def test_the_error_offers_the_option_and_the_option_takes_the_heads_of_the_fine_tunes(
    say, tmp_path, kind
):
    old, new = HEADS[kind]
    paths = models(tmp_path, old, new)
    said = say("merge", *paths, "--out", tmp_path / "out")
    assert said.status == 1 and "--head finetuned" in said.err and said.err.count("\n") == 1
    assert next(iter(new)) in said.err
    out = tmp_path / "out"
    said = say("merge", *paths, "--out", out, "--head", "finetuned")
    assert said.status == 0, said.err
    base, *tuned = map(tensors, paths)
    merged = tensors(out)
    assert merged.keys() == BODY.keys() | new.keys()
    for name in new:
        wanted = np.mean([model[name] for model in tuned], axis=0, dtype=np.float64)
        np.testing.assert_array_max_ulp(merged[name], wanted.astype(np.float32), maxulp=1)
    for name in BODY:
        wanted = stock(base[name], *(model[name] for model in tuned)).astype(np.float32)
        np.testing.assert_array_max_ulp(merged[name], wanted, maxulp=1)
    assert load(out / "config.json") == NEW
    report = load(out / "merge_report.json")
    assert {row["name"] for row in report["units"]} == BODY.keys()
    assert all(row["source"] == "mean" for row in report["not_merged"])
    gone = old.keys() - new.keys()
    notes = [note for note in said.notes if "%" in note]
    assert bool(gone) == bool(notes) and all(name in notes[0] for name in gone)
    if gone:
        share = sum(base[n].size for n in gone) / sum(x.size for x in base.values())
        assert f"{100 * share:.0f} %" in notes[0]


def test_dtype_is_that_of_the_output(say, tmp_path):
    paths = models(tmp_path, *HEADS["classifier"])
    out = tmp_path / "out"
    assert say("merge", *paths, "--out", out, "--head", "finetuned", "--dtype", "bf16").status == 0
    assert {str(x.dtype) for x in tensors(out).values()} == {"bfloat16"}
    assert load(out / "config.json")["torch_dtype"] == "bfloat16"


def test_a_new_head_has_the_dtype_of_the_base(say, tmp_path):
    """A head trained in float32 on a base in bfloat16."""
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
        said = say("merge", *paths, "--out", tmp_path / "out", *options)
        assert said.status == 1 and not (tmp_path / "out").exists()
        assert "score" in said.err or "classifier" in said.err


HEAD = {"classifier.weight": (2, 8), "classifier.bias": (2,)}
NEG_POS, POS_NEG = (
    {"id2label": dict(zip("01", names, strict=True))} for names in (("neg", "pos"), ("pos", "neg"))
)


def labeled(root, old, labels, new=HEAD):
    """A base with a head of shapes `old`, fine-tunes with one of `new`; labels for each model."""
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
    said = say("merge", *paths, "--out", tmp_path / "out", *options, *choice)
    assert said.status == 1 and not (tmp_path / "out").exists()
    for part in ("id2label: class 0 ", "classifier.weight", "--config-from"):
        assert part in said.err, said.err
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
    """Some have a row for no object."""
    shape = {head: (rows, 8)}
    paths = labeled(tmp_path, shape, ({}, NEG_POS, POS_NEG), shape)
    said = say("merge", *paths, "--out", tmp_path / "out")
    assert said.status == 1 and "id2label: class 0 " in said.err and f" {head} " in said.err


@pytest.mark.parametrize(
    ("labels", "options", "written"),
    [
        ((POS_NEG, NEG_POS, NEG_POS), ("--unmerged-from", "mean"), NEG_POS),
        ((POS_NEG, NEG_POS, POS_NEG), ("--unmerged-from", "model:1"), NEG_POS),
        ((POS_NEG, NEG_POS, POS_NEG), (), POS_NEG),
    ],
)
def test_the_error_of_classes_says_which_option_resolves_it(
    say, tmp_path, labels, options, written
):
    paths = labeled(tmp_path, HEAD, labels)
    said = say("merge", *paths, "--out", tmp_path / "out")
    if options != ("--unmerged-from", "model:1"):
        assert " ".join(("--exclude 'classifier.*'", *options)) in said.err
    out = tmp_path / "out"
    said = say("merge", *paths, "--out", out, "--exclude", "classifier.*", *options)
    assert said.status == 0, said.err
    assert load(out / "config.json")["id2label"] == written["id2label"]


def test_no_classifier_is_written_where_the_error_of_classes_says_so(say, tmp_path):
    paths = labeled(tmp_path, {}, ({}, NEG_POS, POS_NEG))
    said = say("merge", *paths, "--out", tmp_path / "out", "--head", "finetuned")
    assert "--missing base" in said.err
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
    said = say("merge", *paths, "--out", tmp_path / "out")
    assert said.status == 0 and "id2label" in said.notes[0]
    assert load(tmp_path / "out/config.json")["id2label"] == POS_NEG["id2label"]


def test_no_note_says_that_labels_are_the_bases_where_they_are_not(say, tmp_path):
    paths = models(tmp_path, *HEADS["classifier"])
    said = say("merge", *paths, "--out", tmp_path / "out", "--head", "finetuned")
    assert said.status == 0
    assert not any("id2label" in note or "architectures" in note for note in said.notes)


def test_the_labels_of_the_fine_tunes_are_asked_for(say, tmp_path):
    """Their head and the config of a model: id2label of the fine-tunes wins, not --config-from."""
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
    """head.safetensors next to the model; the base has one of other classes, or none."""
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
        said = say("merge", *paths, "--out", root / "out")
        assert said.status == 1 and "--head finetuned" in said.err
        assert say("merge", *paths, "--out", root / "out", "--head", "finetuned").status == 0
        made = tensors(root / "out/head.safetensors")
        theirs = [tensors(path / "head.safetensors") for path in paths[1:]]
        for name, value in made.items():
            np.testing.assert_allclose(value, np.mean([x[name] for x in theirs], axis=0), rtol=1e-6)
        assert tensors(root / "out/model.safetensors").keys() == BODY.keys()


def test_a_head_that_no_fine_tune_has(say, tmp_path):
    """Feature extractors of a classifier: the base's head stays, or is left out."""
    paths = models(tmp_path, {"classifier.weight": (40, 8)}, {}, config=OLD)
    said = say("merge", *paths, "--out", tmp_path / "out")
    assert said.status == 1 and "classifier.weight" in said.err
    out = tmp_path / "out"
    said = say("merge", *paths, "--out", out, "--head", "finetuned")
    assert said.status == 0 and tensors(out).keys() == BODY.keys()
    assert any("classifier.weight: " in note and "%" in note for note in said.notes)
    out = tmp_path / "kept"
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
        said = say("merge", *paths, "--out", tmp_path / "out", *options)
        assert said.status == 1 and "up_proj" in said.err and "--head" not in said.errors[0], (
            options,
            said,
        )


def test_a_comparison_of_models_with_other_heads(say, tmp_path):
    for kind, (old, new) in HEADS.items():
        paths = models(tmp_path / kind, old, new)
        said = say("compare", *paths)
        assert said.status == 0 and "query" in said.out, (kind, said.err)
