"""Tokenizers built, opened and used; heads from prompts."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from modelstock_jax.clip import build_tokenizer, weights
from modelstock_jax.clip.model import encode_text
from modelstock_jax.clip.zero_shot import tokenize, zero_shot_head
from modelstock_jax.errors import UserError
from tests.clip import small

CLASSES = ("uppercase letter a", "digit 7", "small cat")
TEMPLATES = ("a photo of the {}.", "the {} in a {} font", "{}")
CAPTIONS = [t.replace("{}", c) for t in TEMPLATES for c in CLASSES] * 2
BOS, EOS, UNKNOWN = 0, 1, 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer") / "t"
    build_tokenizer.build(CAPTIONS, directory, context_length=16)
    return directory


@pytest.fixture(scope="module")
def checkpoint(tokenizer):
    vocabulary = json.loads((tokenizer / "vocab.json").read_text())
    config = small.config(vocab_size=len(vocabulary), eos_token_id=EOS)
    return small.checkpoint(config, tokenizer)


def pieces(directory, text, length=16):
    vocabulary = json.loads((directory / "vocab.json").read_text())
    names = {i: token for token, i in vocabulary.items()}
    return [names[i] for i in tokenize(directory, [text], length)[0].tolist()]


def test_every_word_is_one_token(tokenizer):
    assert pieces(tokenizer, "The Photo  of\ta CAT.", 9) == [
        "<|startoftext|>",
        *("the</w>", "photo</w>", "of</w>", "a</w>", "cat</w>", ".</w>"),
        *["<|endoftext|>"] * 2,
    ]


def test_other_words_are_spelt_and_other_scripts_unknown(tokenizer):
    assert pieces(tokenizer, "zq", 5)[1:3] == ["z", "q</w>"]
    ids = tokenize(tokenizer, ["é ~"], 8)[0]
    assert UNKNOWN in ids and len(set(ids.tolist()) & {EOS}) == 1
    assert list(ids).index(EOS) > list(ids).index(UNKNOWN)


def test_the_end_of_text_is_neither_the_highest_id_nor_two(tokenizer):
    vocabulary = json.loads((tokenizer / "vocab.json").read_text())
    assert vocabulary["<|endoftext|>"] == EOS < max(vocabulary.values())
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))


def test_transformers_opens_it(tokenizer):
    from transformers import AutoTokenizer, CLIPTokenizer

    ours = tokenize(tokenizer, CAPTIONS, 16)
    assert ours.dtype == np.int32 and ours.shape == (len(CAPTIONS), 16)
    for kind in (AutoTokenizer, CLIPTokenizer):
        theirs = kind.from_pretrained(tokenizer)
        assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (BOS, EOS, EOS)
        encoded = theirs(CAPTIONS, padding="max_length", max_length=16, return_tensors="np")
        np.testing.assert_array_equal(encoded["input_ids"], ours)


def test_long_texts_are_an_error_or_cut(tokenizer):
    long = "the cat " * 10
    with pytest.raises(UserError, match="22 tokens in 'the cat .*, the context length is 8"):
        tokenize(tokenizer, ["the cat", long], 8)
    cut = tokenize(tokenizer, [long], 8, truncate=True)[0]
    assert cut[-1] == EOS and (cut[:-1] != EOS).all()
    # Cutting is not remembered.
    assert tokenize(tokenizer, [long], 22).shape == (1, 22)


def test_a_tokenizer_that_changes_on_disk_is_read_again(tokenizer, tmp_path):
    copy = shutil.copytree(tokenizer, tmp_path / "t")
    before = tokenize(copy, ["the cat"], 8)
    shutil.rmtree(copy)
    build_tokenizer.build(["quite other words"] * 2, copy)
    assert not np.array_equal(tokenize(copy, ["the cat"], 8), before)


def test_command_line(tmp_path, monkeypatch, capsys):
    captions = tmp_path / "captions.txt"
    captions.write_text("\n".join(CAPTIONS) + "\n\n")
    monkeypatch.setattr("sys.argv", ["build_tokenizer", str(captions), str(tmp_path / "out")])
    build_tokenizer.main()
    assert "tokens" in capsys.readouterr().out
    assert tokenize(tmp_path / "out", ["the cat"], 8).shape == (1, 8)
    for arguments, message in (
        ([str(captions), str(tmp_path / "out")], "exists already"),
        ([str(tmp_path / "gone"), str(tmp_path / "new")], "gone: cannot be read"),
    ):
        monkeypatch.setattr("sys.argv", ["build_tokenizer", *arguments])
        with pytest.raises(SystemExit, match=message):
            build_tokenizer.main()


def test_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match="no tokenizer .tokenizer.json or vocab.json. there"):
        tokenize(tmp_path, ["a"], 4)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="its tokenizer cannot be opened"):
        tokenize(tmp_path, ["a"], 4)


def test_head_by_numpy(checkpoint):
    # A batch of 4 leaves a padded tail of 9 prompts.
    head = zero_shot_head(checkpoint, CLASSES, TEMPLATES, batch_size=4)
    encode, columns = jax.jit(encode_text, static_argnums=0), []
    for name in CLASSES:
        prompts = [t.replace("{}", name) for t in TEMPLATES]
        ids = tokenize(checkpoint.directory, prompts, 16)
        f = np.asarray(encode(checkpoint.config, checkpoint.params["text_tower"], ids))
        f = f.astype(np.float64)
        u = np.mean([x / np.linalg.norm(x) for x in f], axis=0)
        columns.append(np.exp(np.float64(checkpoint.params["logit_scale"])) * u / np.linalg.norm(u))
    assert head["kernel"].shape == (64, 3) and head["bias"].shape == (3,)
    # Columns of length exp(logit_scale), about 14; float32 towers agree to some 1e-6 of it.
    np.testing.assert_allclose(head["kernel"], np.stack(columns, 1), atol=5e-5, rtol=0)
    assert not head["bias"].any()


def test_head_of_a_saved_checkpoint(checkpoint, tmp_path):
    loaded = weights.load(weights.save(tmp_path / "m", checkpoint))
    assert loaded.directory != checkpoint.directory
    one = zero_shot_head(loaded, CLASSES, TEMPLATES, batch_size=4)
    other = zero_shot_head(checkpoint, CLASSES, TEMPLATES, batch_size=4)
    np.testing.assert_array_equal(one["kernel"], other["kernel"])


@pytest.mark.parametrize(
    ("classes", "templates", "message"),
    [
        ([], TEMPLATES, "no class names"),
        (CLASSES, [], "no templates"),
        (("cat", "dog", "cat"), TEMPLATES, "more than once: cat"),
        (CLASSES, ("a {}", "a photo"), r"templates without '\{\}': 'a photo'"),
        ("cat", TEMPLATES, "class names must be a list"),
        (("cat", 3), TEMPLATES, "class names must be a list of texts"),
        (("cat " * 16,), TEMPLATES, "the context length is 16"),
    ],
)
def test_refused(checkpoint, classes, templates, message):
    with pytest.raises(UserError, match=message):
        zero_shot_head(checkpoint, classes, templates)


def test_a_tokenizer_of_another_model_is_refused(checkpoint):
    with pytest.raises(UserError, match="has no directory, so no tokenizer"):
        zero_shot_head(dataclasses.replace(checkpoint, directory=None), CLASSES, TEMPLATES)
    for change, message in (
        ({"eos_token_id": 5}, "never gives eos_token_id 5"),
        ({"vocab_size": 20}, "the text tower has 20 tokens"),
    ):
        other = dataclasses.replace(
            checkpoint, config=small.replaced(checkpoint.config, "text", **change)
        )
        with pytest.raises(UserError, match=message):
            zero_shot_head(other, CLASSES, TEMPLATES)
