"""Token ids of SigLIP 1 and SigLIP 2 equal those of transformers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
from transformers import AutoTokenizer, SiglipProcessor

from modelstock_jax.errors import UserError
from modelstock_jax.models import checkpoint_io
from modelstock_jax.models.tokenizer import tokenize, tokenizer_checksum
from tests.models import siglip_tokenizers, small
from tests.models.siglip_tokenizers import LENGTH, TEXTS

LONG = "two large dogs on the grass " * 20


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("siglip")
    siglip_tokenizers.siglip(root / "siglip")
    siglip_tokenizers.siglip(root / "siglip_cased", lower_case=False)
    for kind, write in (
        ("gemma", siglip_tokenizers.siglip2),
        ("gemma_model", siglip_tokenizers.gemma_model),
    ):
        write(root / kind, "GemmaTokenizer")
        write(root / f"{kind}_lower", "Siglip2Tokenizer")
    return root


def reference(directory, texts, **options):
    """Return the ids of transformers' own class."""
    theirs = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    return theirs(texts, padding="max_length", max_length=LENGTH, return_tensors="np", **options)[
        "input_ids"
    ]


# With `lower_case`, GemmaTokenizer, which the released checkpoints name, equals Siglip2Tokenizer.
@pytest.mark.parametrize(
    ("directory", "lower_case", "same_as"),
    [
        ("siglip", False, "siglip"),
        ("siglip", True, "siglip"),
        ("siglip_cased", False, "siglip_cased"),
        ("siglip_cased", True, "siglip"),
        ("gemma", False, "gemma"),
        ("gemma", True, "gemma_lower"),
        ("gemma_lower", False, "gemma_lower"),
        ("gemma_lower", True, "gemma_lower"),
        ("gemma_model", False, "gemma_model"),
        ("gemma_model", True, "gemma_model_lower"),
    ],
)
def test_ids_equal_those_of_transformers(root, directory, lower_case, same_as):
    ours = tokenize(root / directory, TEXTS, LENGTH, lower_case=lower_case)
    assert ours.shape == (len(TEXTS), LENGTH) and ours.dtype == np.int32
    np.testing.assert_array_equal(ours, reference(root / same_as, TEXTS))


@pytest.mark.parametrize("directory", ["siglip", "gemma_lower"])
def test_ids_equal_those_of_the_processor(root, directory):
    processor = SiglipProcessor.from_pretrained(root / directory)
    theirs = processor(text=TEXTS, padding="max_length", max_length=LENGTH, return_tensors="np")
    ours = tokenize(root / directory, TEXTS, LENGTH, lower_case=True)
    np.testing.assert_array_equal(ours, theirs["input_ids"])


def test_siglip_1_is_sentencepiece_on_lower_case_without_punctuation(root):
    model = sentencepiece.SentencePieceProcessor(model_file=str(root / "siglip/spiece.model"))
    for text, canonical in (("The  CITY's, red\tbus!", "the citys red bus"), ("?", ""), ("", "")):
        pieces = model.encode(canonical)
        # </s> ends the text and fills the rest.
        expected = pieces + [1] * (LENGTH - len(pieces))
        assert tokenize(root / "siglip", [text], LENGTH)[0].tolist() == expected


def test_siglip_2_keeps_punctuation_and_pads_with_pad_on_the_right(root):
    vocabulary = json.loads((root / "gemma/tokenizer.json").read_text())["model"]["vocab"]
    names = {i: token for token, i in vocabulary.items()}
    for text in ("A CAT?", "a cat?"):
        ids = tokenize(root / "gemma", [text], LENGTH, lower_case=True)[0].tolist()
        end = ids.index(vocabulary["<eos>"])
        assert "".join(names[i] for i in ids[:end]) == "a▁cat?"
        assert set(ids[end + 1 :]) == {vocabulary["<pad>"]} == {0}
    # Lower-casing is not remembered.
    kept = tokenize(root / "gemma", ["A CAT?"], LENGTH)[0].tolist()
    assert "".join(names[i] for i in kept).startswith("A▁CAT?<eos>")


@pytest.mark.parametrize("directory", ["siglip", "gemma_lower", "gemma_model_lower"])
def test_long_texts_are_an_error_or_cut(root, directory):
    with pytest.raises(UserError, match=f"tokens.* context length .*{LENGTH}"):
        tokenize(root / directory, ["a cat", LONG], LENGTH)
    cut = tokenize(root / directory, ["a cat", LONG], LENGTH, truncate=True)
    assert cut[1, -1] == 1 and (cut[1, :-1] != 1).all()
    np.testing.assert_array_equal(
        cut, reference(root / directory, ["a cat", LONG], truncation=True)
    )


@pytest.mark.parametrize("directory", ["siglip", "gemma"])
def test_padding_ends_at_the_context_length(root, directory):
    # Not at the 64 tokens that SigLIP 2's tokenizer.json stores.
    whole = tokenize(root / directory, ["a cat"], LENGTH)
    np.testing.assert_array_equal(tokenize(root / directory, ["a cat"], 9), whole[:, :9])
    assert tokenize(root / directory, ["a cat"], 99)[0, LENGTH:].tolist() == [whole[0, -1]] * 35


def test_a_tokenizer_in_python_is_used_in_parts_too(root, monkeypatch):
    whole = tokenize(root / "siglip", TEXTS, LENGTH)
    monkeypatch.setattr("modelstock_jax.models.tokenizer._TEXTS_AT_ONCE", 4)
    np.testing.assert_array_equal(tokenize(root / "siglip", TEXTS, LENGTH), whole)
    assert tokenize(root / "siglip", [], LENGTH).shape == (0, LENGTH)


def test_an_export_has_the_tokenizer(root, tmp_path):
    config = small.config()
    for name in ("siglip", "gemma_model"):
        checkpoint = small.checkpoint(config, root / name)
        exported = checkpoint_io.save(tmp_path / name, checkpoint)
        (exported / "config.json").write_text((root / name / "config.json").read_text())
        np.testing.assert_array_equal(
            tokenize(exported, TEXTS, LENGTH), tokenize(root / name, TEXTS, LENGTH)
        )


def test_the_checksum_includes_sentencepiece_models_and_keeps_that_of_clip(tmp_path):
    names = ("merges.txt", "vocab.json", "tokenizer.json")
    for name in names:
        (tmp_path / name).write_text(name)
    # From a version without sentencepiece: computed heads are stored under it.
    clip = "58ec8f42a2222b2a9ef2a96c0d785a83eb9e1cacfa1d440f44fbe1e173ef9082"
    assert tokenizer_checksum(tmp_path) == clip
    seen = {clip}
    for name in ("spiece.model", "tokenizer.model"):
        (tmp_path / name).write_bytes(b"a")
        seen.add(tokenizer_checksum(tmp_path))
        (tmp_path / name).write_bytes(b"b")
        seen.add(tokenizer_checksum(tmp_path))
    assert len(seen) == 5 and {len(checksum) for checksum in seen} == {64}


def broken(root, tmp_path, name, **files):
    """Copy a tokenizer, with files replaced, or removed if None."""
    copy = shutil.copytree(root / name, tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}")
    for file, content in files.items():
        path = next(copy.glob(f"{file}.*"))
        path.unlink()
        if content is not None:
            path.write_bytes(content)
    return copy


def test_files_that_are_broken_or_missing(root, tmp_path):
    other = (root / "gemma/tokenizer_config.json").read_bytes()
    siglip = (root / "siglip/tokenizer_config.json").read_bytes()
    for name, files, message in (
        ("siglip", {"spiece": b"not a model"}, r"spiece\.model is not"),
        ("siglip", {"spiece": b""}, r"spiece\.model is not"),
        ("siglip", {"tokenizer_config": other}, r"GemmaTokenizer .* spiece\.model"),
        (
            "siglip",
            {"tokenizer_config": None, "config": None},
            r"tokenizer_config\.json is missing",
        ),
        ("gemma", {"tokenizer_config": siglip}, r"spiece\.model is missing"),
        ("gemma", {"tokenizer_config": None}, r"tokenizer_config\.json is missing"),
        ("gemma_model", {"tokenizer": b"not a model"}, r"tokenizer\.model is not"),
        # transformers opens it as SigLIP 1's.
        ("gemma_model", {"tokenizer_config": None}, r"SiglipTokenizer .* tokenizer\.model"),
    ):
        copy = broken(root, tmp_path, name, **files)
        with pytest.raises(UserError, match=message) as raised:
            tokenize(copy, ["a cat"], LENGTH)
        assert len(str(raised.value).splitlines()) == 1 and str(copy) in str(raised.value)


WITHOUT = """
import sys
sys.modules["sentencepiece"] = None
from modelstock_jax.errors import UserError
from modelstock_jax.models.tokenizer import tokenize
for directory in sys.argv[1:]:
    try:
        print(tokenize(directory, ["a cat"], 64).shape)
    except UserError as error:
        print(error)
"""
# A text of more than 64 tokens, next to a config.json that transformers warns about.
QUIET = """
import sys
from modelstock_jax.models.tokenizer import tokenize
tokenize(sys.argv[1], ["a cat " * 40], 500)
from transformers.utils import logging
print(logging.get_verbosity() == logging.WARNING)
"""


def python(code, *directories):
    """Run in a new process, which has not imported transformers yet."""
    command = [sys.executable, "-c", code, *map(str, directories)]
    return subprocess.run(command, capture_output=True, text=True, check=True)


def test_without_sentencepiece_only_tokenizer_json_opens(root):
    run = python(WITHOUT, *(root / name for name in ("siglip", "gemma_model", "gemma")))
    siglip, model, gemma = run.stdout.splitlines()
    for line in (siglip, model):
        assert line.endswith("pip install sentencepiece)")
    assert (gemma, run.stderr) == ("(1, 64)", "")


def test_transformers_prints_nothing_and_stays_as_it_was(root):
    run = python(QUIET, root / "siglip")
    assert (run.stdout, run.stderr) == ("True\n", "")
