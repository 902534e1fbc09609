"""What lies beside a model is copied, or the mistake names the place."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from types import SimpleNamespace

import pytest

from modelstock_jax.checkpoint_merge.auxiliary_files import AuxiliaryFiles, copy_auxiliary_files
from modelstock_jax.checkpoint_merge.sources import PATTERNS
from modelstock_jax.errors import UserError


def model_at(directory):
    return SimpleNamespace(directory=directory, tokenizer_directory=directory)


def test_a_folder_that_is_gone_is_named(tmp_path):
    gone = tmp_path / "gone"
    with pytest.raises(UserError, match=str(gone)):
        copy_auxiliary_files([model_at(gone)], AuxiliaryFiles(), tmp_path)


def test_what_is_copied_from_a_folder_is_fetched_from_the_hub(tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    names = [
        "LICENSE",
        "LICENCE.md",
        "NOTICE",
        "USE_POLICY.md",
        "config.json",
        "merges.txt",
        "tokenizer.model",
        "chat_template.jinja",
        "vocab.tiktoken",
        "spiece.spm",
    ]
    for place in (base, out):
        place.mkdir()
    for name in (*names, "modeling.py", "notes.md"):
        (base / name).write_text("{}")
    copy_auxiliary_files([model_at(base)], AuxiliaryFiles(), out)
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    assert [n for n in names if not any(fnmatch(n, pattern) for pattern in PATTERNS)] == []


def test_a_config_that_is_no_object_is_copied_as_it_is(tmp_path):
    """It says nothing of heads or dtypes, and says so only when the merge is done."""
    base, out = tmp_path / "base", tmp_path / "out"
    for place in (base, out):
        place.mkdir()
    companions = AuxiliaryFiles(changes={"": {"tie_word_embeddings": False}})
    for said, kept in (([1], [1]), ({}, {"tie_word_embeddings": False})):
        (base / "config.json").write_text(json.dumps(said))
        copy_auxiliary_files([model_at(base)], companions, out)
        assert json.loads((out / "config.json").read_text()) == kept
