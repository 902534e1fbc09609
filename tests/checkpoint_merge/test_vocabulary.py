"""Added tokens: all axes of the vocabulary, the sizes in config.json, and the tokenizer."""

from __future__ import annotations

import json

import numpy as np
import pytest

from modelstock_jax.checkpoint_merge.cli import main
from modelstock_jax.tensor_files.reader import TensorFiles
from modelstock_jax.tensor_files.writer import write_directory_tensors
from tests.checkpoint_merge.engine import deltas, models, stock_ratio
from tests.checkpoint_merge.small import adapter, factors
from tests.checkpoint_merge.typed import write

ROWS, MORE, WIDTH = 65, 67, 8
BODY = {"layers.0.mlp.weight": (WIDTH, WIDTH)}
# Tensors with an axis of the vocabulary, by names of transformers; R marks that axis.
R = -1
FAMILIES = {
    "bert": {
        "bert.embeddings.word_embeddings.weight": (R, WIDTH),
        "cls.predictions.bias": (R,),
        "cls.predictions.decoder.weight": (R, WIDTH),
        "cls.predictions.decoder.bias": (R,),
    },
    "distilbert": {
        "distilbert.embeddings.word_embeddings.weight": (R, WIDTH),
        "vocab_projector.weight": (R, WIDTH),
        "vocab_projector.bias": (R,),
    },
    "modernbert": {
        "model.embeddings.tok_embeddings.weight": (R, WIDTH),
        "decoder.bias": (R,),
        "decoder.weight": (R, WIDTH),
    },
    "deberta": {
        "deberta.embeddings.word_embeddings.weight": (R, WIDTH),
        "lm_predictions.lm_head.bias": (R,),
        "cls.predictions.bias": (R,),
    },
    "electra": {
        "electra.embeddings.word_embeddings.weight": (R, WIDTH),
        "generator_lm_head.weight": (R, WIDTH),
        "generator_lm_head.bias": (R,),
    },
    "albert": {
        "albert.embeddings.word_embeddings.weight": (R, 4),
        "predictions.bias": (R,),
        "predictions.decoder.weight": (R, 4),
        "predictions.decoder.bias": (R,),
    },
    "bart": {
        "model.shared.weight": (R, WIDTH),
        "final_logits_bias": (1, R),
        "model.encoder.embed_tokens.weight": (R, WIDTH),
        "lm_head.weight": (R, WIDTH),
    },
    "marian": {"model.shared.weight": (R, WIDTH), "final_logits_bias": (1, R)},
    "mamba": {"backbone.embeddings.weight": (R, WIDTH), "lm_head.weight": (R, WIDTH)},
    "gpt2": {"transformer.wte.weight": (R, WIDTH)},
    "neox": {"gpt_neox.embed_in.weight": (R, WIDTH), "embed_out.weight": (R, WIDTH)},
    "bloom": {"transformer.word_embeddings.weight": (R, WIDTH)},
    "llama": {"model.embed_tokens.weight": (R, WIDTH), "lm_head.weight": (R, WIDTH)},
    "clip": {"text_model.embeddings.token_embedding.weight": (R, WIDTH)},
    "t5": {"shared.weight": (R, WIDTH), "lm_head.weight": (R, WIDTH)},
}


def resized_models(family, rows=(ROWS, MORE, ROWS), seed=0):
    shapes = {
        n: tuple(max(rows) if axis == R else axis for axis in shape)
        for n, shape in FAMILIES[family].items()
    }
    full = models(shapes | BODY, seed=seed)
    cut = []
    for model, length in zip(full, rows, strict=True):
        cut.append(
            {
                n: w[
                    tuple(
                        slice(length) if axis == R else slice(None)
                        for axis in FAMILIES[family].get(n, w.shape)
                    )
                ]
                for n, w in model.items()
            }
        )
    return cut


def save(root, cut, rows):
    paths = []
    for k, (model, length) in enumerate(zip(cut, rows, strict=True)):
        path = root / (f"ft{k}" if k else "base")
        path.mkdir(parents=True)
        write_directory_tensors(path, model)
        (path / "config.json").write_text(
            json.dumps(
                {"model_type": "x", "vocab_size": length, "type_vocab_size": 2, "pad_token_id": k}
            )
        )
        (path / "tokenizer.json").write_text(json.dumps({"of": path.name}))
        (path / "tokenizer_config.json").write_text("{}")
        paths.append(path)
    return paths


def run(paths, out, *options):
    return main(["merge", *map(str, paths), "--out", str(out), *options])


@pytest.mark.parametrize("vocabulary", ["base", "longest"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_axis_of_the_vocabulary(tmp_path, capsys, family, vocabulary):
    rows = (ROWS, MORE, ROWS)
    cut = resized_models(family, rows)
    paths = save(tmp_path, cut, rows)
    assert run(paths, tmp_path / "no") == 1
    err = capsys.readouterr().err
    assert "--vocab-mismatch base" in err and all(f"{name} " in err for name in FAMILIES[family])
    assert run(paths, tmp_path / "out", "--vocab-mismatch", vocabulary) == 0
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
            np.testing.assert_array_equal(
                np.take(found, range(ROWS, MORE), axis),
                np.take(cut[1][name], range(ROWS, MORE), axis),
            )
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["vocab_size"] == length and config["type_vocab_size"] == 2
    model = "ft1" if vocabulary == "longest" else "base"
    assert json.loads((tmp_path / "out/tokenizer.json").read_text()) == {"of": model}
    assert config["pad_token_id"] == (1 if vocabulary == "longest" else 0)


def test_another_axis_that_differs_is_no_vocabulary(tmp_path, capsys):
    cut = resized_models("bert")
    cut[1]["bert.embeddings.position_embeddings.weight"] = np.ones((6, WIDTH), np.float32)
    for k in (0, 2):
        cut[k]["bert.embeddings.position_embeddings.weight"] = np.ones((4, WIDTH), np.float32)
    paths = save(tmp_path, cut, (ROWS, MORE, ROWS))
    assert run(paths, tmp_path / "out", "--vocab-mismatch", "longest") == 1
    assert "position_embeddings.weight " in capsys.readouterr().err


def test_a_vocabulary_in_a_tower(tmp_path):
    cut = resized_models("llama")
    paths = save(tmp_path, cut, (ROWS, MORE, ROWS))
    for path, length in zip(paths, (ROWS, MORE, ROWS), strict=True):
        (path / "config.json").write_text(
            json.dumps(
                {"vision_config": {"vocab_size": ROWS - 1}, "text_config": {"vocab_size": length}}
            )
        )
    assert run(paths, tmp_path / "out", "--vocab-mismatch", "longest") == 0
    assert json.loads((tmp_path / "out/config.json").read_text()) == {
        "vision_config": {"vocab_size": ROWS - 1},
        "text_config": {"vocab_size": MORE},
    }


def doubtful(notes):
    """Return the notes that name a key whose number of rows may be wrong."""
    return [note for note in notes if "config.json: " in note and " rows" in note]


def resized(say, root, tables, configs, options=()):
    """Merge models whose embeddings have `tables` rows; return the output's config and notes."""
    rng = np.random.default_rng(0)
    longest = {
        n: rng.standard_normal((max(rows), WIDTH)).astype(np.float32) for n, rows in tables.items()
    }
    paths = []
    for k in range(3):
        moved = {
            n: w + k * np.float32(0.01) * rng.standard_normal(w.shape).astype(np.float32)
            for n, w in (longest | {"x.weight": np.ones((WIDTH, WIDTH), np.float32)}).items()
        }
        cut = {n: w[: tables[n][k]] if n in tables else w for n, w in moved.items()}
        paths.append(
            write(
                root / str(k),
                {"model.safetensors": cut, "config.json": configs[min(k, len(configs) - 1)]},
            )
        )
    out = root / "out"
    result = say("merge", *paths, "--out", out, "--vocab-mismatch", "longest", *options)
    assert result.status == 0, result.err
    return json.loads((out / "config.json").read_text()), result.notes


SPLIT = {
    "model.encoder.embed_tokens.weight": (50, 50, 50),
    "model.decoder.embed_tokens.weight": (50, 53, 53),
    "lm_head.weight": (50, 53, 53),
}
BOTH = {
    "encoder.embeddings.word_embeddings.weight": (50, 52, 52),
    "decoder.transformer.wte.weight": (50, 55, 55),
}


@pytest.mark.parametrize(
    ("tables", "config", "expected"),
    [
        (
            SPLIT,
            {"vocab_size": 50, "decoder_vocab_size": 50},
            {"vocab_size": 50, "decoder_vocab_size": 53},
        ),
        (
            SPLIT | {"model.encoder.embed_tokens.weight": (50, 51, 50)},
            {"src_vocab_size": 50, "tgt_vocab_size": 50},
            {"src_vocab_size": 51, "tgt_vocab_size": 53},
        ),
        (
            BOTH,
            {"encoder": {"vocab_size": 50}, "decoder": {"vocab_size": 50}},
            {"encoder": {"vocab_size": 52}, "decoder": {"vocab_size": 55}},
        ),
        (
            BOTH | {"decoder.transformer.wte.weight": (60, 60, 60)},
            {"encoder": {"vocab_size": 50}, "decoder": {"vocab_size": 60}},
            {"encoder": {"vocab_size": 52}, "decoder": {"vocab_size": 60}},
        ),
        (
            {"shared.weight": (50, 52, 52)},
            {"vocab_size": 50, "text_config": {"vocab_size": 50}},
            {"vocab_size": 52, "text_config": {"vocab_size": 52}},
        ),
    ],
)
def test_each_side_has_its_own_key(say, tmp_path, tables, config, expected):
    written, notes = resized(say, tmp_path, tables, [config])
    assert written == expected
    assert not doubtful(notes)


def test_the_config_of_a_fine_tune_has_the_rows_that_are_written(say, tmp_path):
    configs = [{"vocab_size": 50, "decoder_vocab_size": n} for n in (50, 53, 53)]
    written, notes = resized(say, tmp_path, SPLIT, configs, options=("--config-from", "model:1"))
    assert written == configs[1] and not doubtful(notes)


@pytest.mark.parametrize(
    ("tables", "config", "key"),
    [
        (SPLIT, {"vocab_size": 50}, "vocab_size"),
        (
            {"shared.weight": (50, 52, 52)},
            {"vocab_size": 50, "char_vocab_size": 50},
            "char_vocab_size",
        ),
        (
            {"shared.weight": (50, 52, 52)},
            {"vocab_size": 50, "vision_config": {"vocab_size": 50}},
            "vision_config.vocab_size",
        ),
        (BOTH, {"vocab_size": 50}, "vocab_size"),
    ],
)
def test_a_key_that_is_not_certain_is_a_note(say, tmp_path, tables, config, key):
    value, notes = resized(say, tmp_path, tables, [config])
    (note,) = doubtful(notes)
    assert f" {key}," in note or f" {key} " in note
    for part in key.split("."):
        value = value[part]
    assert value == 50


@pytest.mark.parametrize("config", [{"a": 1}, {"type_vocab_size": 2}])
def test_a_config_without_a_vocabulary_size_gets_no_note(say, tmp_path, config):
    for name, tables in (("shared", {"shared.weight": (50, 52, 52)}), ("split", SPLIT)):
        written, notes = resized(say, tmp_path / name, tables, [config])
        assert written == config and not doubtful(notes)


def test_no_note_claims_the_size_of_the_base(say, tmp_path):
    configs = [{"vocab_size": n} for n in (50, 52, 52)]
    _, notes = resized(say, tmp_path, {"shared.weight": (50, 52, 52)}, configs)
    assert not any("vocab_size" in note for note in notes)


def test_components_with_own_vocabularies(say, tmp_path):
    """Textual inversion in two text encoders that have the same vocabulary in BASE, and a T5."""
    names = {
        "text_encoder": "text_model.embeddings.token_embedding.weight",
        "text_encoder_2": "text_model.embeddings.token_embedding.weight",
        "text_encoder_3": "shared.weight",
    }
    index = {"_class_name": "P", **{part: ["transformers", "T"] for part in names}}
    rng, paths = np.random.default_rng(0), []
    full = {part: rng.standard_normal((60, WIDTH)).astype(np.float32) for part in names}
    for k, sizes in enumerate(((50, 50, 58), (52, 55, 58), (52, 55, 58))):
        files = {"model_index.json": index}
        for (part, name), rows in zip(names.items(), sizes, strict=True):
            moved = full[part] + k * np.float32(0.01) * rng.standard_normal(
                full[part].shape
            ).astype(np.float32)
            files |= {
                f"{part}/model.safetensors": {name: moved[:rows]},
                f"{part}/config.json": {"model_type": "t", "vocab_size": rows},
            }
        paths.append(write(tmp_path / str(k), files))
    out = tmp_path / "out"
    result = say("merge", *paths, "--out", out, "--vocab-mismatch", "longest")
    assert result.status == 0, result.err
    for (part, name), rows in zip(names.items(), (52, 55, 58), strict=True):
        assert TensorFiles(out / part).shape(name) == (rows, WIDTH)
        assert json.loads((out / part / "config.json").read_text())["vocab_size"] == rows
    assert not any("vocab_size" in note for note in result.notes)


def test_vocabularies_that_are_longest_in_two_models(say, tmp_path):
    """Only the tokenizers of one model can be written."""
    tables = {
        "encoder.embed_tokens.weight": (50, 52, 50),
        "decoder.embed_tokens.weight": (50, 50, 53),
    }
    configs = [{"encoder_vocab_size": 50, "decoder_vocab_size": 50}]
    problem = "encoder.embed_tokens.weight .*decoder.embed_tokens.weight .*--tokenizer-from"
    with pytest.raises(AssertionError, match=problem):
        resized(say, tmp_path / "a", tables, configs)
    written, _ = resized(say, tmp_path / "b", tables, configs, options=("--tokenizer-from", "base"))
    assert written == {"encoder_vocab_size": 52, "decoder_vocab_size": 53}


@pytest.mark.parametrize("tokenizer", [True, False])
def test_an_adapter_with_a_longer_embedding(tmp_path, capsys, tokenizer):
    """PEFT saves a resized embedding in full, and its trainer saves the tokenizer with it."""
    cut = resized_models("llama", (MORE, MORE, MORE))
    base = {n: w[:ROWS] if w.shape[0] == MORE else w for n, w in cut[0].items()}
    path, *_ = save(tmp_path, [base, base, base], (ROWS, ROWS, ROWS))
    adapters = []
    for k in (1, 2):
        embeddings = {
            f"base_model.model.{n}": cut[k][n][: MORE if k == 1 else ROWS]
            for n in FAMILIES["llama"]
        }
        adapters.append(
            adapter(
                tmp_path / f"lora{k}", embeddings | factors("layers.0.mlp", WIDTH, WIDTH, seed=k)
            )
        )
        if tokenizer:
            (adapters[-1] / "tokenizer.json").write_text(json.dumps({"of": f"lora{k}"}))
            (adapters[-1] / "tokenizer_config.json").write_text("{}")
    assert run([path, *adapters], tmp_path / "out", "--vocab-mismatch", "longest") == 0
    merged = TensorFiles(tmp_path / "out")
    for name in FAMILIES["llama"]:
        assert merged.shape(name) == (MORE, WIDTH)
        np.testing.assert_array_equal(merged[name][ROWS:], cut[1][name][ROWS:])
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == MORE
    written = json.loads((tmp_path / "out/tokenizer.json").read_text())
    assert written == {"of": "lora1" if tokenizer else "base"}
    # Without a tokenizer, the rows have no tokens: a note warns the user.
    assert ("tokenizer" in capsys.readouterr().err) is not tokenizer


def test_a_tokenizer_that_an_option_chooses(tmp_path):
    rows = (ROWS, ROWS, ROWS)
    paths = save(tmp_path, resized_models("llama", rows), rows)
    assert run(paths, tmp_path / "out", "--tokenizer-from", "model:2") == 0
    assert json.loads((tmp_path / "out/tokenizer.json").read_text()) == {"of": "ft2"}
    assert json.loads((tmp_path / "out/config.json").read_text())["pad_token_id"] == 2
