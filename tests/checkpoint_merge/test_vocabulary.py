"""Added tokens: every axis of a vocabulary, what config.json says of it, and whose tokenizer."""

from __future__ import annotations

import json

import numpy as np
import pytest

from modelstock_jax.checkpoint_merge.cli import main
from modelstock_jax.tensor_files.reader import TensorFiles
from modelstock_jax.tensor_files.writer import write_directory_tensors
from tests.checkpoint_merge.engine import deltas, models, stock_ratio
from tests.checkpoint_merge.small import adapter, factors

ROWS, MORE, WIDTH = 65, 67, 8
BODY = {"layers.0.mlp.weight": (WIDTH, WIDTH)}
# Tensors with an axis of the vocabulary, as transformers names them; R stands for its rows.
R = -1
FAMILIES = {
    "bert": {"bert.embeddings.word_embeddings.weight": (R, WIDTH), "cls.predictions.bias": (R,),
             "cls.predictions.decoder.weight": (R, WIDTH), "cls.predictions.decoder.bias": (R,)},
    "distilbert": {"distilbert.embeddings.word_embeddings.weight": (R, WIDTH),
                   "vocab_projector.weight": (R, WIDTH), "vocab_projector.bias": (R,)},
    "modernbert": {"model.embeddings.tok_embeddings.weight": (R, WIDTH), "decoder.bias": (R,),
                   "decoder.weight": (R, WIDTH)},
    "deberta": {"deberta.embeddings.word_embeddings.weight": (R, WIDTH),
                "lm_predictions.lm_head.bias": (R,), "cls.predictions.bias": (R,)},
    "electra": {"electra.embeddings.word_embeddings.weight": (R, WIDTH),
                "generator_lm_head.weight": (R, WIDTH), "generator_lm_head.bias": (R,)},
    "albert": {"albert.embeddings.word_embeddings.weight": (R, 4), "predictions.bias": (R,),
               "predictions.decoder.weight": (R, 4), "predictions.decoder.bias": (R,)},
    "bart": {"model.shared.weight": (R, WIDTH), "final_logits_bias": (1, R),
             "model.encoder.embed_tokens.weight": (R, WIDTH), "lm_head.weight": (R, WIDTH)},
    "marian": {"model.shared.weight": (R, WIDTH), "final_logits_bias": (1, R)},
    "mamba": {"backbone.embeddings.weight": (R, WIDTH), "lm_head.weight": (R, WIDTH)},
    "gpt2": {"transformer.wte.weight": (R, WIDTH)},
    "neox": {"gpt_neox.embed_in.weight": (R, WIDTH), "embed_out.weight": (R, WIDTH)},
    "bloom": {"transformer.word_embeddings.weight": (R, WIDTH)},
    "llama": {"model.embed_tokens.weight": (R, WIDTH), "lm_head.weight": (R, WIDTH)},
    "clip": {"text_model.embeddings.token_embedding.weight": (R, WIDTH)},
    "t5": {"shared.weight": (R, WIDTH), "lm_head.weight": (R, WIDTH)},
}


def given(family, rows=(ROWS, MORE, ROWS), seed=0):
    shapes = {n: tuple(max(rows) if axis == R else axis for axis in shape)
              for n, shape in FAMILIES[family].items()}
    whole = models(shapes | BODY, seed=seed)
    cut = []
    for model, length in zip(whole, rows, strict=True):
        cut.append({n: w[tuple(slice(length) if axis == R else slice(None)
                               for axis in FAMILIES[family].get(n, w.shape))]
                    for n, w in model.items()})
    return cut


def save(root, cut, rows):
    places = []
    for k, (model, length) in enumerate(zip(cut, rows, strict=True)):
        place = root / (f"ft{k}" if k else "base")
        place.mkdir(parents=True)
        write_directory_tensors(place, model)
        (place / "config.json").write_text(json.dumps(
            {"model_type": "x", "vocab_size": length, "type_vocab_size": 2, "pad_token_id": k}))
        (place / "tokenizer.json").write_text(json.dumps({"of": place.name}))
        (place / "tokenizer_config.json").write_text("{}")
        places.append(place)
    return places


def run(places, out, *typed):
    return main(["merge", *map(str, places), "--out", str(out), *typed])


@pytest.mark.parametrize("vocabulary", ["base", "longest"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_axis_of_the_vocabulary(tmp_path, capsys, family, vocabulary):
    rows = (ROWS, MORE, ROWS)
    cut = given(family, rows)
    places = save(tmp_path, cut, rows)
    assert run(places, tmp_path / "no") == 1
    said = capsys.readouterr().err
    assert all(f"{name} differs in its number of rows" in said for name in FAMILIES[family])
    assert run(places, tmp_path / "out", "--vocabulary", vocabulary) == 0
    merged = TensorFiles(tmp_path / "out")
    length = MORE if vocabulary == "longest" else ROWS
    for name, shape in FAMILIES[family].items():
        axis = shape.index(R)
        common = [{name: np.take(m[name], range(ROWS), axis)} for m in cut]
        base, d = common[0][name].astype(np.float64), deltas(common, name)
        expected = base + stock_ratio(d) * d.mean(axis=0).reshape(base.shape)
        found = merged[name]
        assert found.shape == tuple(length if n == R else n for n in shape)
        np.testing.assert_allclose(np.take(found, range(ROWS), axis), expected, rtol=0, atol=4e-7)
        if vocabulary == "longest":
            np.testing.assert_array_equal(np.take(found, range(ROWS, MORE), axis),
                                          np.take(cut[1][name], range(ROWS, MORE), axis))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["vocab_size"] == length and config["type_vocab_size"] == 2
    whose = "ft1" if vocabulary == "longest" else "base"
    assert json.loads((tmp_path / "out/tokenizer.json").read_text()) == {"of": whose}
    assert config["pad_token_id"] == (1 if vocabulary == "longest" else 0)


def test_another_axis_that_grew_is_no_vocabulary(tmp_path, capsys):
    cut = given("bert")
    cut[1]["bert.embeddings.position_embeddings.weight"] = np.ones((6, WIDTH), np.float32)
    for k in (0, 2):
        cut[k]["bert.embeddings.position_embeddings.weight"] = np.ones((4, WIDTH), np.float32)
    places = save(tmp_path, cut, (ROWS, MORE, ROWS))
    assert run(places, tmp_path / "out", "--vocabulary", "longest") == 1
    assert "position_embeddings.weight differs in shape" in capsys.readouterr().err


def test_a_vocabulary_in_a_tower(tmp_path):
    cut = given("llama")
    places = save(tmp_path, cut, (ROWS, MORE, ROWS))
    for place, length in zip(places, (ROWS, MORE, ROWS), strict=True):
        (place / "config.json").write_text(json.dumps(
            {"vision_config": {"vocab_size": ROWS - 1}, "text_config": {"vocab_size": length}}))
    assert run(places, tmp_path / "out", "--vocabulary", "longest") == 0
    assert json.loads((tmp_path / "out/config.json").read_text()) == {
        "vision_config": {"vocab_size": ROWS - 1}, "text_config": {"vocab_size": MORE}}


@pytest.mark.parametrize("tokenizer", [True, False])
def test_an_adapter_with_a_longer_embedding(tmp_path, capsys, tokenizer):
    """PEFT saves a resized embedding whole; its trainer saves the tokenizer next to the adapter."""
    cut = given("llama", (MORE, MORE, MORE))
    base = {n: w[:ROWS] if w.shape[0] == MORE else w for n, w in cut[0].items()}
    place, *_ = save(tmp_path, [base, base, base], (ROWS, ROWS, ROWS))
    adapters = []
    for k in (1, 2):
        whole = {f"base_model.model.{n}": cut[k][n][: MORE if k == 1 else ROWS]
                 for n in FAMILIES["llama"]}
        adapters.append(adapter(tmp_path / f"lora{k}", whole | factors(
            "layers.0.mlp", WIDTH, WIDTH, seed=k)))
        if tokenizer:
            (adapters[-1] / "tokenizer.json").write_text(json.dumps({"of": f"lora{k}"}))
            (adapters[-1] / "tokenizer_config.json").write_text("{}")
    assert run([place, *adapters], tmp_path / "out", "--vocabulary", "longest") == 0
    merged = TensorFiles(tmp_path / "out")
    for name in FAMILIES["llama"]:
        assert merged.shape(name) == (MORE, WIDTH)
        np.testing.assert_array_equal(merged[name][ROWS:], cut[1][name][ROWS:])
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == MORE
    said = json.loads((tmp_path / "out/tokenizer.json").read_text())
    assert said == {"of": "lora1" if tokenizer else "base"}
    # Without one, the rows have no tokens: the user is told.
    assert ("tokenizer" in capsys.readouterr().err) is not tokenizer


def test_a_tokenizer_that_is_asked_for(tmp_path):
    rows = (ROWS, ROWS, ROWS)
    places = save(tmp_path, given("llama", rows), rows)
    assert run(places, tmp_path / "out", "--tokenizer-from", "model:2") == 0
    assert json.loads((tmp_path / "out/tokenizer.json").read_text()) == {"of": "ft2"}
    assert json.loads((tmp_path / "out/config.json").read_text())["pad_token_id"] == 2
