"""Auxiliary files of a model are copied; an error names the path."""

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


def test_a_missing_folder_is_named(tmp_path):
    gone = tmp_path / "gone"
    with pytest.raises(UserError, match=str(gone)):
        copy_auxiliary_files([model_at(gone)], AuxiliaryFiles(), tmp_path)


def test_files_that_are_copied_from_a_folder_are_fetched_from_the_hub(tmp_path):
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
    for directory in (base, out):
        directory.mkdir()
    for name in (*names, "modeling.py", "notes.md"):
        (base / name).write_text("{}")
    copy_auxiliary_files([model_at(base)], AuxiliaryFiles(), out)
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    assert [n for n in names if not any(fnmatch(n, pattern) for pattern in PATTERNS)] == []


def test_a_config_that_is_no_object_is_copied_unchanged(tmp_path):
    """Such a config has no keys to change; an object gets the change."""
    base, out = tmp_path / "base", tmp_path / "out"
    for directory in (base, out):
        directory.mkdir()
    auxiliary_files = AuxiliaryFiles(changes={"": {"tie_word_embeddings": False}})
    for content, written in (([1], [1]), ({}, {"tie_word_embeddings": False})):
        (base / "config.json").write_text(json.dumps(content))
        copy_auxiliary_files([model_at(base)], auxiliary_files, out)
        assert json.loads((out / "config.json").read_text()) == written
