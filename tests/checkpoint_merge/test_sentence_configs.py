"""Sentence encoders saved by different releases; frozen tensors next to one that changed."""

from __future__ import annotations

import pytest

from tests.checkpoint_merge.typed import load, tensors, trio, write

OLD = {"word_embedding_dimension": 8, "pooling_mode_cls_token": False,
       "pooling_mode_mean_tokens": True}  # fmt: skip
NEW = {"embedding_dimension": 8, "pooling_mode": "mean", "include_prompt": True}
MODULES = [
    {"path": "", "type": "sentence_transformers.models.Transformer"},
    {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]
SETTINGS = "config_sentence_transformers.json"


def models(root, base, tuned):
    """A base and fine-tunes with two versions of some files of a sentence-transformers model."""
    shared = {"modules.json": MODULES, "config.json": {"model_type": "bert"}}
    shared |= {"1_Pooling/config.json": {}}
    return trio(root, shared | base, shared | tuned)


def notes(result):
    """All notes but the one about tensors, which no test here is about."""
    return [note for note in result.notes if ".json" in note]


# Pooling of the base and of the fine-tunes -> words of the note or error; none if they are equal.
POOLINGS = {
    "another release": (OLD, NEW, 0, ()),
    "a list of one": (OLD, NEW | {"pooling_mode": ["mean"]}, 0, ()),
    "older and newer flag": (OLD, OLD | {"include_prompt": True}, 0, ()),
    "the newer release first": (NEW, OLD, 0, ()),
    "another mode": (OLD, NEW | {"pooling_mode": "cls"}, 1, ("cls_token", "mean_tokens")),
    "two modes": (OLD, NEW | {"pooling_mode": ["mean", "max"]}, 0, ("max_tokens",)),
    "another mode of one release": (NEW, NEW | {"pooling_mode": "max"}, 1, ("max", "mean")),
    "an unknown mode": (OLD, NEW | {"pooling_mode": "median"}, 0, ("pooling_mode", "mean_tokens")),
    "no mode": (OLD, NEW | {"pooling_mode": [["mean"]]}, 0, ("pooling_mode", "mean_tokens")),
    "another width": (OLD, NEW | {"embedding_dimension": 4}, 1, ("embedding_dimension",)),
    "prompts left out": (OLD, OLD | {"include_prompt": False}, 0, ("include_prompt",)),
    "prompts left out by one": (NEW, NEW | {"include_prompt": False}, 1, ("include_prompt",)),
}


@pytest.mark.parametrize("case", POOLINGS)
def test_pooling(say, tmp_path, case):
    base, tuned, status, words = POOLINGS[case]
    paths = models(tmp_path, {"1_Pooling/config.json": base}, {"1_Pooling/config.json": tuned})
    result = say("merge", *paths, "--out", tmp_path / "out")
    assert result.status == status, result.err
    printed = result.errors or notes(result)
    assert len(printed) == bool(words) and all(word in printed[0] for word in words), result.err
    if not status:
        assert load(tmp_path / "out/1_Pooling/config.json") == base


def test_a_config_that_does_not_change_is_copied_as_it_is(say, tmp_path):
    text = '{"word_embedding_dimension":8,   "pooling_mode_mean_tokens": true}'
    same = {"1_Pooling/config.json": text, "config.json": '{"model_type":   "bert"}'}
    paths, out = models(tmp_path, same, same), tmp_path / "out"
    assert say("merge", *paths, "--out", out, "--dtype", "bf16").status == 0
    assert (out / "1_Pooling/config.json").read_text() == text
    assert load(out / "config.json") == {"model_type": "bert", "torch_dtype": "bfloat16"}


# Settings of the fine-tunes, next to a base without them -> word of the note.
PROMPTS = {"query": "", "document": ""}
ADDED = {
    "empty": ({"prompts": PROMPTS, "default_prompt_name": None}, None),
    "defaults": ({"similarity_fn_name": "cosine", "model_type": "SentenceTransformer"}, None),
    "null": ({"similarity_fn_name": None}, None),
    "prompts": ({"prompts": PROMPTS | {"query": "query: "}}, "prompts"),
    "default prompt": ({"prompts": PROMPTS, "default_prompt_name": "query"}, "default_prompt_name"),
    "similarity": ({"similarity_fn_name": "dot"}, "similarity_fn_name"),
}


@pytest.mark.parametrize("with_file", [True, False])
@pytest.mark.parametrize("case", ADDED)
def test_settings_that_only_the_fine_tunes_have(say, tmp_path, case, with_file):
    settings, word = ADDED[case]
    base = {SETTINGS: {"__version__": {"transformers": "4"}}} if with_file else {}
    paths = models(tmp_path, base, {SETTINGS: settings})
    result = say("merge", *paths, "--out", tmp_path / "out")
    assert result.status == 0 and len(notes(result)) == (2 if word else 0), result.err
    if word is None:
        return
    for number, note in enumerate(notes(result), 1):
        assert f"{SETTINGS} {word}" in note and f"--config-from model:{number}" in note
    out = tmp_path / "tuned"
    result = say("merge", *paths, "--out", out, "--config-from", "model:1")
    assert load(out / SETTINGS) == settings
    assert f"{SETTINGS} {word}" in result.err and "--config-from model:1" not in result.err


# The base saved by an older release: length of the model and of its tokenizer -> the length that
# is written with the config of a fine-tune of length 256, if it is another one.
LENGTHS = {512: 512, 256: None, 10**30: 514}


@pytest.mark.parametrize("folder", ["", "0_Transformer/"])
@pytest.mark.parametrize("length", LENGTHS)
def test_the_length_that_a_newer_release_reads_from_the_tokenizer(say, tmp_path, length, folder):
    config = {"model_type": "bert", "max_position_embeddings": 514}
    modules = [{"path": folder.rstrip("/"), "type": "sentence_transformers.models.Transformer"}]
    shared = {"modules.json": modules, f"{folder}config.json": config}
    old, new = (
        shared | {f"{folder}sentence_bert_config.json": settings,
                  f"{folder}tokenizer_config.json": {"model_max_length": number}}
        for settings, number in (({"max_seq_length": 256}, length), ({"task": "f"}, 256))
    )  # fmt: skip
    paths = trio(tmp_path, old, new, file=f"{folder}model.safetensors")

    def lengths(*options):
        result = say("merge", *paths, "--out", tmp_path / "out", "--overwrite", *options)
        assert result.status == 0, result.err
        return [note for note in result.notes if "maximum sequence length" in note]

    assert not lengths()
    written = lengths("--config-from", "model:1")
    if LENGTHS[length] is None:
        assert not written
    else:
        assert all(word in written[0] for word in ("256", f"{LENGTHS[length]}", "model:1"))
        assert len(written) == 1
    assert not lengths("--config-from", "model:1", "--tokenizer-from", "model:1")


# Options, and whether the second fine-tune is the base's copy.
ONE_CHANGED = {
    "wise_ft": (["--method", "wise_ft", "--alpha", "0.5"], False),
    "uniform_mean": (["--method", "uniform_mean"], False),
    "model_stock": ([], True),
    "filter": (["--unit", "filter"], True),
    "global": (["--unit", "global"], True),
}


@pytest.mark.parametrize("case", ONE_CHANGED)
def test_frozen_tensors_do_not_predict_the_distance_of_the_others(say, tmp_path, case):
    options, copied = ONE_CHANGED[case]
    base, tuned, other = trio(tmp_path)
    frozen = tensors(base)
    changed = tensors(tuned) | {"model.norm.weight": frozen["model.norm.weight"]}
    name = "model.embed_tokens.weight"
    changed[name][0] = frozen[name][0]  # An output channel of a tensor that changed.
    write(tuned, {"model.safetensors": changed})
    write(other, {"model.safetensors": frozen})
    paths = [base, tuned, *[other] * copied]
    result = say("merge", *paths, "--out", tmp_path / "out", *options)
    assert result.status == 0 and "center" not in result.out, result.err
    report = load(tmp_path / "out/merge_report.json")
    unknown = dict.fromkeys(("replica", "mean", "merged"))
    assert report["predicted_distance"] == unknown
    rows = {row["name"]: row["predicted_distance"] for row in report["units"]}
    assert rows.pop("model.norm.weight") == (
        unknown if case == "global" else dict.fromkeys(unknown, 0.0)
    )
    assert all(distance == unknown for distance in rows.values())


def test_a_comparison_without_angles_has_no_table_of_ratios(say, tmp_path):
    paths = trio(tmp_path)
    assert "median" in say("compare", *paths).out
    write(paths[2], {"model.safetensors": tensors(paths[0])})
    result = say("compare", *paths)
    assert result.status == 0 and "one model changed" in result.out and "median" not in result.out
