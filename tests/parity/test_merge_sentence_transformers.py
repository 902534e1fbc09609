"""Models of sentence-transformers, merged by `modelstock merge` and opened again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    Normalize,
    Pooling,
    Transformer,
)

from tests.parity.merge_inputs import (
    assert_merged,
    edit_config,
    family,
    fine_tuned,
    merge,
    tensors,
    tokenizer,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # Warnings of other libraries.
SENTENCES = ["w5 w6 w7", "w8", "w9 w10 w11 w12"]


def embedder(root: Path, dense: bool) -> SentenceTransformer:
    """Return a tiny BERT with mean pooling, and a dense layer to 8 dimensions if `dense`."""
    torch.manual_seed(0)
    family("bert").bert.save_pretrained(root)
    tokenizer().save_pretrained(root)
    modules = [Transformer(str(root), max_seq_length=16), Pooling(16)]
    modules += [Dense(16, 8), Normalize()] if dense else []
    return SentenceTransformer(modules=modules, device="cpu")


def saved(root: Path, dense: bool) -> tuple[SentenceTransformer, list[Path]]:
    model = embedder(root / "start", dense)
    paths = [root / "base", root / "ft1", root / "ft2"]
    for i, path in enumerate(paths):
        (fine_tuned(model, i) if i else model).save(str(path))
    return model, paths


@pytest.mark.parametrize("dense", [False, True], ids=["pooling", "dense"])
def test_a_sentence_transformer(tmp_path, dense):
    model, paths = saved(tmp_path, dense)
    out = tmp_path / "out"
    assert merge(paths, out) == 0
    assert_merged(out, paths)
    for name in (
        "modules.json",
        "1_Pooling/config.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
        "tokenizer.json",
    ):
        assert (out / name).read_bytes() == (paths[0] / name).read_bytes(), name
    if dense:
        assert_merged(out / "2_Dense", [path / "2_Dense" for path in paths])
        assert json.loads((out / "2_Dense/config.json").read_text())["out_features"] == 8
        assert (out / "3_Normalize").is_dir()
    again = SentenceTransformer(str(out), device="cpu")
    assert [type(module) for module in again] == [type(module) for module in model]
    embeddings = again.encode(SENTENCES)
    assert embeddings.shape == (3, 8 if dense else 16) and np.isfinite(embeddings).all()
    # Every parameter is merged: none was initialized when the model was opened.
    read = again.state_dict()
    for folder in [".", "2_Dense"][: 1 + dense]:
        for name, value in tensors(out / folder).items():
            (same,) = [
                x
                for n, x in read.items()
                if n.endswith(name)
                and x.shape == value.shape
                and (("linear" in n) == (folder != "."))
            ]
            np.testing.assert_array_equal(same.numpy(), value, name)
    base, tuned = model.encode(SENTENCES), SentenceTransformer(str(paths[1])).encode(SENTENCES)
    assert 0 < np.linalg.norm(embeddings - base) < 2 * np.linalg.norm(tuned - base)


def test_fine_tunes_that_are_a_plain_encoder(tmp_path):
    """A fine-tune without modules, as transformers saves it, contains only the encoder."""
    model, paths = saved(tmp_path, dense=False)
    for i in (1, 2):
        plain = tmp_path / f"plain{i}"
        fine_tuned(model, i)[0].auto_model.save_pretrained(plain)
        assert not (plain / "modules.json").exists()
    plain = [paths[0], tmp_path / "plain1", tmp_path / "plain2"]
    assert merge(plain, tmp_path / "out") == 0
    assert_merged(tmp_path / "out", paths)
    assert np.isfinite(SentenceTransformer(str(tmp_path / "out")).encode(SENTENCES)).all()


def test_an_encoder_in_a_folder(tmp_path):
    """Older releases saved the encoder in 0_Transformer, next to 1_Pooling."""
    _, paths = saved(tmp_path, dense=True)
    for path in paths:
        (path / "0_Transformer").mkdir()
        for name in (
            "model.safetensors",
            "config.json",
            "sentence_bert_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
        ):
            (path / name).rename(path / "0_Transformer" / name)
        modules = json.loads((path / "modules.json").read_text())
        modules[0]["path"] = "0_Transformer"
        (path / "modules.json").write_text(json.dumps(modules))
    out = tmp_path / "out"
    assert merge(paths, out) == 0
    for folder in ("0_Transformer", "2_Dense"):
        assert_merged(out / folder, [path / folder for path in paths])
    assert np.isfinite(SentenceTransformer(str(out), device="cpu").encode(SENTENCES)).all()


def test_dense_layers_of_other_sizes_are_an_error(tmp_path, capsys):
    _, paths = saved(tmp_path, dense=True)
    wrong = Dense(16, 6)
    wrong.save(str(paths[2] / "2_Dense"))
    edit_config(paths[2] / "2_Dense", out_features=6)
    assert merge(paths, tmp_path / "out") == 1
    assert "linear.weight" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
