"""Train, open and use tokenizers."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from modelstock_jax.errors import UserError
from modelstock_jax.models.tokenizer import build, main, tokenize, tokenizer_checksum
from tests.models.prompts import BOS, CAPTIONS, EOS, UNKNOWN


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer") / "t"
    build(CAPTIONS, directory, context_length=16)
    return directory


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


def test_other_words_are_spelled_and_other_scripts_unknown(tokenizer):
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
    with pytest.raises(UserError, match="'the cat .* 22 tokens.* context length .*8"):
        tokenize(tokenizer, ["the cat", long], 8)
    cut = tokenize(tokenizer, [long], 8, truncate=True)[0]
    assert cut[-1] == EOS and (cut[:-1] != EOS).all()
    # Truncation is not remembered.
    assert tokenize(tokenizer, [long], 22).shape == (1, 22)


def test_a_tokenizer_that_changes_on_disk_is_read_again(tokenizer, tmp_path):
    copy = shutil.copytree(tokenizer, tmp_path / "t")
    before = tokenize(copy, ["the cat"], 8)
    shutil.rmtree(copy)
    build(["quite other words"] * 2, copy)
    assert not np.array_equal(tokenize(copy, ["the cat"], 8), before)


def test_command_line(tmp_path, monkeypatch, capsys):
    captions = tmp_path / "captions.txt"
    captions.write_text("\n".join(CAPTIONS) + "\n\n")
    monkeypatch.setattr("sys.argv", ["build_tokenizer", str(captions), str(tmp_path / "out")])
    main()
    assert "tokens" in capsys.readouterr().out
    assert tokenize(tmp_path / "out", ["the cat"], 8).shape == (1, 8)
    for arguments, message in (
        ([str(captions), str(tmp_path / "out")], "out: "),
        ([str(tmp_path / "gone"), str(tmp_path / "new")], "gone: "),
    ):
        monkeypatch.setattr("sys.argv", ["build_tokenizer", *arguments])
        with pytest.raises(SystemExit, match=message):
            main()


def test_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json.*vocab\.json"):
        tokenize(tmp_path, ["a"], 4)
    for broken, said in (("{", "Expecting property name"), ('{"added_tokens": []}', "Model miss")):
        (tmp_path / "tokenizer.json").write_text(broken)
        with pytest.raises(UserError, match=f"tokenizer .*{said}"):
            tokenize(tmp_path, ["a"], 4)


def test_a_tokenizer_json_alone_is_enough(tokenizer, tmp_path):
    # As in OpenCLIP's format, which has no config.json.
    shutil.copyfile(tokenizer / "tokenizer.json", tmp_path / "tokenizer.json")
    ids = tokenize(tmp_path, CAPTIONS, 16)
    theirs = tokenize(tokenizer, CAPTIONS, 16)
    # Without a padding token: 0, as in OpenAI's code.
    end = (theirs == EOS).argmax(1)[:, None]
    np.testing.assert_array_equal(ids, np.where(np.arange(16)[None] > end, 0, theirs))


def test_long_lists_are_encoded_in_parts(tokenizer, monkeypatch):
    whole = tokenize(tokenizer, CAPTIONS, 16)
    monkeypatch.setattr("modelstock_jax.models.tokenizer._TEXTS_AT_ONCE", 4)
    np.testing.assert_array_equal(tokenize(tokenizer, CAPTIONS, 16), whole)


def test_the_checksum_is_of_names_and_contents(tokenizer, tmp_path):
    copy = shutil.copytree(tokenizer, tmp_path / "t")
    same = tokenizer_checksum(tokenizer)
    assert tokenizer_checksum(copy) == same and len(same) == 64
    (copy / "README.md").write_text("not a tokenizer's file")
    assert tokenizer_checksum(copy) == same
    (copy / "vocab.json").rename(copy / "added_tokens.json")
    assert tokenizer_checksum(copy) != same


def test_code_of_a_checkpoint_is_never_run(tokenizer, tmp_path):
    copy = shutil.copytree(tokenizer, tmp_path / "t")
    config = json.loads((copy / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": [None, "hostile.Tokenizer"]}
    config["tokenizer_class"] = "HostileTokenizer"
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    (copy / "hostile.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    try:
        tokenize(copy, ["the cat"], 8)
    except UserError as error:
        assert "tokenizer" in str(error)
    assert not (tmp_path / "ran").exists()
