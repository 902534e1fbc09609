"""Chat templates, special tokens and generation settings: which are written, and the notes."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import yaml

from modelstock_jax.checkpoint_merge import token_ids
from modelstock_jax.checkpoint_merge.recipe import parse
from modelstock_jax.errors import UserError
from tests.checkpoint_merge.small import adapter, factors
from tests.checkpoint_merge.typed import load, trio, weights, write

CONFIG = {"model_type": "llama", "eos_token_id": 2, "forced_bos_token_id": 5, "hidden_size": 8}
BASE = {
    "config.json": CONFIG,
    "tokenizer_config.json": {"eos_token": "</s>", "model_max_length": 32},
    "tokenizer.json": {"version": "base"},
    "generation_config.json": {"max_length": 32},
}
CHATML = "{{ '<|im_start|>' }}"
# Files that fine-tunes change, the name in the note, and the files that contain the change.
CHANGES = {
    "jinja": ({"chat_template.jinja": CHATML}, "chat template", ("chat_template.jinja",)),
    "key": (
        {"tokenizer_config.json": {"eos_token": "</s>", "chat_template": CHATML}},
        "chat template",
        ("tokenizer_config.json",),
    ),
    "list": (
        {
            "tokenizer_config.json": {
                "eos_token": "</s>",
                "chat_template": [
                    {"name": "default", "template": CHATML},
                    {"name": "rag", "template": "r"},
                ],
            }
        },
        "chat template",
        ("tokenizer_config.json",),
    ),
    "processor": (
        {"chat_template.json": {"chat_template": CHATML}},
        "chat template",
        ("chat_template.json",),
    ),
    "more": (
        {"additional_chat_templates/rag.jinja": "rag"},
        "chat template rag",
        ("additional_chat_templates/rag.jinja",),
    ),
    "token": (
        {"tokenizer_config.json": {"eos_token": "<|im_end|>"}},
        "eos_token",
        ("tokenizer_config.json",),
    ),
    "object": (
        {"tokenizer_config.json": {"eos_token": {"content": "<|im_end|>"}}},
        "eos_token",
        ("tokenizer_config.json",),
    ),
    "map": (
        {"special_tokens_map.json": {"pad_token": "<pad>"}},
        "pad_token",
        ("special_tokens_map.json",),
    ),
    "added": (
        {
            "tokenizer_config.json": {
                "eos_token": "</s>",
                "added_tokens_decoder": {"9": {"content": "<|im_start|>"}},
            }
        },
        "added tokens",
        ("tokenizer_config.json",),
    ),
    "generation": (
        {"generation_config.json": {"max_length": 32, "eos_token_id": [2, 7]}},
        "generation_config eos_token_id",
        ("generation_config.json",),
    ),
    "sampling": (
        {"generation_config.json": {"max_length": 32, "temperature": 0.6}},
        "generation_config temperature",
        ("generation_config.json",),
    ),
    "config": ({"config.json": CONFIG | {"eos_token_id": 7}}, "eos_token_id", ()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_fine_tunes_that_agree_are_a_note_and_an_option(say, tmp_path, change):
    files, named, written = CHANGES[change]
    paths = trio(tmp_path, BASE, BASE | files)
    result = say("merge", *paths, "--out", tmp_path / "out")
    assert result.status == 0
    (note,) = result.notes
    assert named in note and "agree" in note and "--tokenizer-from model:1" in note
    for name in written:
        source, copy = paths[0] / name, tmp_path / "out" / name
        assert copy.is_file() == source.is_file()
        assert not source.is_file() or source.read_bytes() == copy.read_bytes()
    out = tmp_path / "tuned"
    result = say("merge", *paths, "--out", out, "--tokenizer-from", "model:1")
    assert result.status == 0 and not result.notes
    for name in written:
        assert (out / name).read_bytes() == (paths[1] / name).read_bytes()
    expected = (BASE | files)["config.json"]
    assert load(out / "config.json") == expected


def test_everything_of_the_tokenizer_comes_from_one_model(say, tmp_path):
    """No tokenizer file of the base remains if another tokenizer is written."""
    base = BASE | {
        "merges.txt": "m",
        "tokenizer.model": "b",
        "chat_template.jinja": "b",
        "additional_chat_templates/old.jinja": "b",
        "vocab.json": {"b": 1},
        "preprocessor_config.json": {"size": 1},
        "processor_config.json": {"chat_template": "b", "patch": 4},
    }
    tuned = {
        "tokenizer_config.json": {"chat_template": "t"},
        "tokenizer.json": {"version": "t"},
        "additional_chat_templates/new.jinja": "t",
        "spiece.model": "t",
        "config.json": {"model_type": "llama", "eos_token_id": 7, "hidden_size": 8},
        "processor_config.json": {"patch": 4},
        "preprocessor_config.json": {"size": 1},
    }
    paths = trio(tmp_path, base, tuned)
    out = tmp_path / "out"
    assert say("merge", *paths, "--out", out, "--tokenizer-from", "model:1").status == 0
    found = {str(p.relative_to(out)) for p in out.rglob("*.*") if p.is_file()}
    made = {"model.safetensors", "merge_report.json", "README.md", "angles.png"}
    assert found - made == tuned.keys()
    for name in (
        "tokenizer_config.json",
        "tokenizer.json",
        "spiece.model",
        "additional_chat_templates/new.jinja",
    ):
        assert (out / name).read_bytes() == (paths[1] / name).read_bytes()
    assert load(out / "processor_config.json") == {"patch": 4}
    # The end token of the fine-tunes, and no token that only the base has.
    assert load(out / "config.json") == tuned["config.json"]


def test_tokens_of_a_text_tower(say, tmp_path):
    flat = {"model_type": "x", "eos_token_id": 2}
    nested = {"model_type": "x", "text_config": {"eos_token_id": 7}}
    for name, base, tuned, expected in (
        (
            "nested",
            nested,
            {"model_type": "x", "text_config": {"eos_token_id": 9}},
            {"model_type": "x", "text_config": {"eos_token_id": 9}},
        ),
        ("flat", flat, nested, {"model_type": "x", "eos_token_id": 7}),
    ):
        tokenizer = {"tokenizer.json": {}}
        paths = trio(
            tmp_path / name, tokenizer | {"config.json": base}, tokenizer | {"config.json": tuned}
        )
        out = tmp_path / name / "out"
        assert say("merge", *paths, "--out", out, "--tokenizer-from", "model:1").status == 0
        assert load(out / "config.json") == expected


def test_fine_tunes_that_do_not_agree(say, tmp_path):
    paths = trio(tmp_path, *({**BASE, "chat_template.jinja": text} for text in "abc"))
    result = say("merge", *paths, "--out", tmp_path / "out")
    assert result.status == 0 and "each other" in result.notes[0]
    assert (tmp_path / "out/chat_template.jinja").read_text() == "a"
    # One fine-tune agrees with the base and the other does not: also a note.
    paths = trio(tmp_path / "b", *({**BASE, "chat_template.jinja": text} for text in "aab"))
    assert "chat template" in say("merge", *paths, "--out", tmp_path / "b/out").notes[0]


def test_no_note_if_all_agree(say, tmp_path):
    paths = trio(
        tmp_path,
        BASE | {"chat_template.jinja": "a"},
        BASE | {"tokenizer_config.json": BASE["tokenizer_config.json"] | {"chat_template": "a\n"}},
    )
    result = say("merge", *paths, "--out", tmp_path / "out")
    assert result.status == 0 and not result.notes


def ids(kind, names, first=3):
    """Return the files of a tokenizer with `names` from id `first`, after three common tokens."""
    vocabulary = {
        **{text: i for i, text in enumerate("abc")},
        **{text: first + i for i, text in enumerate(names)},
    }
    added = [{"id": i, "content": text, "special": True} for text, i in vocabulary.items() if i > 2]
    plain = {text: i for text, i in vocabulary.items() if i < 3}
    return {
        "added_tokens": {
            "tokenizer.json": {"added_tokens": added, "model": {"type": "BPE", "vocab": plain}}
        },
        "model.vocab": {"tokenizer.json": {"added_tokens": [], "model": {"vocab": vocabulary}}},
        "unigram": {
            "tokenizer.json": {
                "model": {"type": "Unigram", "vocab": [[text, -1.0] for text in vocabulary]}
            }
        },
        "vocab.json": {"vocab.json": vocabulary},
        "vocab.txt": {"vocab.txt": "\n".join(vocabulary)},
        "added_tokens.json": {
            "vocab.json": plain,
            "added_tokens.json": {text: i for text, i in vocabulary.items() if i > 2},
        },
        "added_tokens_decoder": {
            "tokenizer.json": {},
            "tokenizer_config.json": {
                "added_tokens_decoder": {str(token["id"]): token for token in added}
            },
        },
    }[kind]


KINDS = (
    "added_tokens",
    "model.vocab",
    "unigram",
    "vocab.json",
    "vocab.txt",
    "added_tokens.json",
    "added_tokens_decoder",
)


@pytest.mark.parametrize("kind", KINDS)
def test_one_id_for_different_tokens_is_an_error(say, tmp_path, kind):
    """Rows of an embedding are averaged by id: an id must be the same token in all models."""
    files = [
        {"config.json": CONFIG, "tokenizer_config.json": {}, **ids(kind, names)}
        for names in ((), ("<u>", "<v>"), ("<v>", "<u>"))
    ]
    for name, order in (("tuned", (0, 1, 2)), ("base", (1, 2, 2)), ("one", (1, 1, 2))):
        paths = trio(tmp_path / name, *(files[i] for i in order))
        out = tmp_path / name / "out"
        result = say("merge", *paths, "--out", out)
        assert result.status == 1 and not out.exists(), (name, result)
        for part in (" id 3 ", "'<u>'", "'<v>'", "--tokenizer-from model:1"):
            assert part in result.err, result.err
        result = say("merge", *paths, "--out", out, "--tokenizer-from", "model:1")
        assert result.status == 0 and any(
            " id 3 " in note and "'<u>'" in note for note in result.notes
        )
        for file in ids(kind, ()):
            assert (out / file).read_bytes() == (paths[1] / file).read_bytes()
        assert any(" id 3 " in note for note in say("compare", *paths).notes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("order", "word"), [((0, 1, 1), "agree"), ((0, 1, 0), "each other"), ((1, 1, 1), None)]
)
def test_a_token_that_only_some_models_have_is_a_note(say, tmp_path, kind, order, word):
    files = [
        {"config.json": CONFIG, "tokenizer_config.json": {}, **ids(kind, names)}
        for names in ((), ("<u>",))
    ]
    found = say("merge", *trio(tmp_path, *(files[i] for i in order)), "--out", tmp_path / "out")
    assert found.status == 0, found.err
    assert len(found.notes) == (word is not None)
    assert word is None or ("added tokens" in found.notes[0] and word in found.notes[0])


def test_ids_of_rows_that_are_not_averaged_may_differ(say, tmp_path):
    """Rows after those in common, and all rows if no embedding is merged."""
    for first, options, status in ((9, (), 1), (12, (), 0), (9, ("--exclude", "*embed*"), 0)):
        files = [
            {"config.json": CONFIG, **ids("vocab.json", names, first)}
            for names in ((), ("<u>", "<v>"), ("<v>", "<u>"))
        ]
        paths = trio(tmp_path / f"{first}{len(options)}", *files)
        result = say("merge", *paths, "--out", paths[0].parent / "out", *options)
        assert result.status == status, result.err


@pytest.mark.parametrize(
    "free",
    [
        "<unused0>",
        "[unused7]",
        "<|reserved_special_token_0|>",
        "<|placeholder1|>",
        "[control_8]",
        "<|extra_0|>",
    ],
)
def test_a_free_row_of_the_base_may_be_assigned_to_a_token(say, tmp_path, free):
    files = [
        {"config.json": CONFIG, **ids("vocab.json", names)}
        for names in ((free,), ("<u>",), ("<v>",))
    ]
    result = say(
        "merge", *trio(tmp_path / "a", *(files[i] for i in (0, 1, 1))), "--out", tmp_path / "out"
    )
    assert result.status == 0 and any("added tokens" in note for note in result.notes)
    result = say("merge", *trio(tmp_path / "b", *files), "--out", tmp_path / "no")
    assert result.status == 1 and "'<u>'" in result.err and free not in result.err


def test_the_tokenizers_of_a_pipeline_belong_to_their_encoders(say, tmp_path):
    index = {
        "_class_name": "P",
        "text_encoder": ["t", "T"],
        "text_encoder_2": ["t", "T"],
        "tokenizer": ["t", "T"],
        "tokenizer_2": ["t", "T"],
    }
    for name, folder, status in (("a", "tokenizer", 0), ("b", "tokenizer_2", 1)):
        paths = []
        for k, names in enumerate(((), ("<u>", "<v>"), ("<v>", "<u>"))):
            parts = {"tokenizer": ids("vocab.json", ()), "tokenizer_2": ids("vocab.json", ())}
            parts[folder] = ids("vocab.json", names)
            paths.append(
                write(
                    tmp_path / name / str(k),
                    {
                        "model_index.json": index,
                        **{
                            f"{part}/{file}": text
                            for part, files in parts.items()
                            for file, text in files.items()
                        },
                        "text_encoder/model.safetensors": weights({"shared.weight": (3, 8)}, k),
                        "text_encoder_2/model.safetensors": weights({"shared.weight": (6, 8)}, k),
                    },
                )
            )
        result = say("merge", *paths, "--out", tmp_path / name / "out")
        assert result.status == status, result.err
        assert not status or re.search("tokenizer_2 .* id 3 ", result.err)


def test_tokenizers_in_different_folders_are_compared(say, tmp_path):
    folder = "0_Transformer"
    files = [ids("vocab.json", names) for names in ((), ("<u>", "<v>"), ("<v>", "<u>"))]
    modules = [{"path": folder, "type": "sentence_transformers.models.Transformer"}]
    paths = []
    for k, own in enumerate(files):
        prefix = f"{folder}/" if not k else ""
        index = {"modules.json": modules if not k else [modules[0] | {"path": ""}]}
        paths.append(
            write(
                tmp_path / str(k),
                index
                | {f"{prefix}{file}": text for file, text in own.items()}
                | {
                    f"{prefix}config.json": {"model_type": "bert"},
                    f"{prefix}model.safetensors": weights(
                        {"embeddings.word_embeddings.weight": (6, 8)}, k
                    ),
                },
            )
        )
    result = say("merge", *paths, "--out", tmp_path / "out")
    assert result.status == 1 and " id 3 " in result.err and "'<u>'" in result.err


def test_equal_files_are_not_parsed_and_different_files_once(tmp_path, monkeypatch):
    """A tokenizer.json of 250,000 tokens takes half a second."""
    parsed = []
    monkeypatch.setattr(token_ids, "_vocabulary", lambda path: parsed.append(path) or {})
    files = [ids("model.vocab", names) for names in (("<u>",), ("<v>",))]
    for order, times in (((0, 0, 0), 0), ((0, 1, 1), 2)):
        paths = [write(tmp_path / f"{order}{i}", files[k]) for i, k in enumerate(order)]
        token_ids.read_tokens([SimpleNamespace(tokenizer_directory=path) for path in paths])
        assert len(parsed) == times


def test_a_model_without_a_tokenizer_cannot_be_chosen(say, tmp_path):
    paths = trio(tmp_path, BASE, {"config.json": CONFIG, "generation_config.json": {}})
    for choice, why in (
        ("model:1", f"model:1: {paths[1]} "),
        ("model:3", "model:3: .*2"),
        ("ft1", "base .*'ft1'"),
    ):
        result = say("merge", *paths, "--out", tmp_path / "out", "--tokenizer-from", choice)
        assert (
            result.status in (1, 2) and re.search(why, result.err) and result.err.count("\n") == 1
        )
    assert say("merge", *paths, "--out", tmp_path / "out", "--tokenizer-from", "base").status == 0


def test_a_tokenizer_that_was_saved_with_an_adapter(say, tmp_path):
    base = trio(tmp_path, BASE)[0]
    q = "model.layers.0.self_attn.q_proj"
    for i in (1, 2):
        adapter(tmp_path / f"lora{i}", factors(q, 8, 8, seed=i))
        write(
            tmp_path / f"lora{i}",
            {"tokenizer_config.json": {"eos_token": "<|im_end|>"}, "chat_template.jinja": CHATML},
        )
    models = (base, tmp_path / "lora1", tmp_path / "lora2")
    result = say("merge", *models, "--out", tmp_path / "out")
    assert any("chat template, eos_token: " in note for note in result.notes)
    out = tmp_path / "tuned"
    assert say("merge", *models, "--out", out, "--tokenizer-from", "model:2").status == 0
    assert (out / "chat_template.jinja").read_text() == CHATML
    assert load(out / "config.json")["model_type"] == "llama"


def test_tokenizers_of_a_pipeline(say, tmp_path):
    index = {
        "_class_name": "P",
        "unet": ["diffusers", "U"],
        "tokenizer": ["transformers", "T"],
        "tokenizer_2": ["transformers", "T"],
        "scheduler": ["diffusers", "S"],
    }
    base = {
        "model_index.json": index,
        "tokenizer/tokenizer_config.json": {"pad_token": "!"},
        "tokenizer/merges.txt": "b",
        "tokenizer_2/tokenizer.json": {"b": 1},
        "scheduler/scheduler_config.json": {"steps_offset": 1},
    }
    tuned = base | {
        "tokenizer/tokenizer_config.json": {"pad_token": "<pad>"},
        "tokenizer/merges.txt": "t",
        "tokenizer_2/tokenizer.json": {"t": 1},
        "scheduler/scheduler_config.json": {"steps_offset": 0},
    }
    paths = trio(tmp_path, base, tuned, file="unet/model.safetensors")
    result = say("merge", *paths, "--out", tmp_path / "out")
    assert "tokenizer pad_token" in result.notes[0]
    out = tmp_path / "tuned"
    assert say("merge", *paths, "--out", out, "--tokenizer-from", "model:1").status == 0
    assert load(out / "tokenizer/tokenizer_config.json") == {"pad_token": "<pad>"}
    assert (out / "tokenizer/merges.txt").read_text() == "t"
    assert load(out / "tokenizer_2/tokenizer.json") == {"t": 1}
    assert load(out / "scheduler/scheduler_config.json") == {"steps_offset": 1}


def test_the_tokenizer_of_a_sentence_transformer_in_a_folder(say, tmp_path):
    modules = [{"path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}]
    base = {
        "modules.json": modules,
        "0_Transformer/config.json": {"model_type": "bert"},
        "0_Transformer/tokenizer.json": {"b": 1},
        "0_Transformer/vocab.txt": "b",
        "0_Transformer/tokenizer_config.json": {"pad_token": "[PAD]"},
    }
    tuned = base | {
        "0_Transformer/tokenizer.json": {"t": 1},
        "0_Transformer/vocab.txt": "t",
        "0_Transformer/tokenizer_config.json": {"pad_token": "<pad>"},
    }
    paths = trio(tmp_path, base, tuned, file="0_Transformer/model.safetensors")
    assert "pad_token" in say("merge", *paths, "--out", tmp_path / "out").notes[0]
    out = tmp_path / "tuned"
    assert say("merge", *paths, "--out", out, "--tokenizer-from", "model:1").status == 0
    assert load(out / "0_Transformer/tokenizer.json") == {"t": 1}
    assert (out / "0_Transformer/vocab.txt").read_text() == "t"
    assert load(out / "0_Transformer/config.json") == {"model_type": "bert"}


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("key", ["tokenizer_source: {}", "tokenizer: {{source: {}}}"])
def test_recipes_of_mergekit(say, tmp_path, key, base):
    paths = trio(tmp_path, BASE, BASE | {"chat_template.jinja": CHATML})
    models = "".join(f"  - {{model: {p}, parameters: {{weight: 0.5}}}}\n" for p in paths[1:])
    recipe = f"merge_method: linear\nmodels:\n{models}" + (
        f"base_model: {paths[0]}\n" if base else ""
    )
    for source, from_tuned in ((paths[2], True), ("base", not base)):
        (tmp_path / "r.yml").write_text(recipe + key.format(source) + "\n")
        out = tmp_path / f"out{from_tuned}{source == 'base'}"
        result = say("merge", "--recipe", tmp_path / "r.yml", "--out", out)
        assert result.status == 0, result.err
        assert (out / "chat_template.jinja").is_file() == from_tuned
    parsed = parse(yaml.safe_load(recipe + key.format(paths[2])))
    assert parsed.options["tokenizer_from"] == "model:2"
    assert "tokenizer_from" not in parse(yaml.safe_load(recipe + key.format("base"))).options


UNSUPPORTED = {
    "tokenizer_source: org/other": "tokenizer_source 'org/other' .*union",
    "tokenizer: {source: org/other}": "source 'org/other' .*union",
    "tokenizer: {source: base, token: {}}": "tokenizer: .*'token' .*'tokens'",
    "tokenizer: {source: a, pad_to_multiple_of: 0.5}": "pad_to_multiple_of: .*0.5",
    "tokenizer: {tokens: {x: {force: true}}}": "tokens: 'x': source is missing",
    "tokenizer: {tokens: {x: {sorce: a}}}": "tokens: 'x': .*'sorce' .*'source'",
    "tokenizer: {tokens: {x: {source: {kind: zeros}}}}": "tokens: 'x': kind .*'zeros'",
    "tokenizer: {tokens: {x: {source: {kind: model_token, model: a}}}}": "token or token_id",
    "tokenizer: {tokens: {x: {source: a, force: 'no'}}}": "tokens: 'x': force .*'no'",
    "tokenizer: {tokens: {x: {source: {kind: model_token, model: a, token_id: b}}}}": "token_id",
    "tokenizer_source: base\ntokenizer: {source: base}": "either tokenizer_source or tokenizer",
    "chat_template: chatml": "chat_template 'chatml' .*Jinja",
}


@pytest.mark.parametrize("text", UNSUPPORTED)
def test_unsupported_keys_of_a_tokenizer_are_named(text):
    recipe = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n"
    with pytest.raises(UserError, match=UNSUPPORTED[text]):
        parse(yaml.safe_load(recipe + text))
