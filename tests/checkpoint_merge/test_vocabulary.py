"""Embeddings merged by token string: against a loop over the tokens, and with real tokenizers."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modelstock_jax.checkpoint_merge.sources import open_source
from modelstock_jax.checkpoint_merge.vocabulary import Tokenizer as Wanted
from modelstock_jax.checkpoint_merge.vocabulary import align
from modelstock_jax.tensor_files.reader import TensorFiles
from modelstock_jax.tensor_files.writer import write_tensors
from tests.checkpoint_merge.engine import numbers

WORDS = {
    "base": ["<unk>", "</s>", "the", "cat", "sat", "on"],
    "ft1": ["<unk>", "</s>", "cat", "the", "sat", "on", "dog"],
    "ft2": ["<unk>", "</s>", "the", "cat", "mat", "sat"],
}
ADDED = {"base": ["<pad>"], "ft1": ["<user>"], "ft2": ["<user>", "<tool>"]}
WIDTH, SPARE = 5, 2
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def save(path, words, added, *, dtype=np.float32, seed=0, extra=SPARE):
    """Write a model with a tokenizer of words, and with rows that no token has."""
    path.mkdir(parents=True)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    fast.add_tokens(added, special_tokens=True)
    fast.save_pretrained(path)
    rng, rows = np.random.default_rng(seed), len(words) + len(added) + extra
    config = {
        "model_type": "llama",
        "vocab_size": rows,
        "num_hidden_layers": 1,
        "hidden_size": WIDTH,
    }
    (path / "config.json").write_text(json.dumps(config))
    write_tensors(path / "model.safetensors", {
        EMBED: rng.standard_normal((rows, WIDTH)).astype(dtype),
        HEAD: rng.standard_normal((rows, WIDTH)).astype(dtype),
        "model.layers.0.w": rng.standard_normal((3, WIDTH)).astype(dtype),
    })  # fmt: skip
    return path


@pytest.fixture
def paths(tmp_path):
    return {
        name: save(tmp_path / name, WORDS[name], ADDED[name], seed=seed)
        for seed, name in enumerate(WORDS)
    }


def rows_of(path, tensor):
    """token -> row of a model."""
    name = path.name
    values = numbers(TensorFiles(path)[tensor])
    return dict(zip([*WORDS[name], *ADDED[name]], values, strict=False))


def tokens_of(path):
    vocabulary = PreTrainedTokenizerFast.from_pretrained(path).get_vocab()
    return [token for token, _ in sorted(vocabulary.items(), key=lambda item: item[1])]


def merge(say, tmp_path, paths, **recipe):
    fine_tunes = [
        {"model": str(paths[name]), "parameters": {"weight": 0.5}} for name in ("ft1", "ft2")
    ]
    recipe = {"merge_method": "task_arithmetic", "base_model": str(paths["base"]),
              "models": fine_tunes} | recipe  # fmt: skip
    (tmp_path / "r.yml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return say("merge", tmp_path / "r.yml", tmp_path / "out", "--overwrite")


def aligned(paths, token, tensor):
    """Return the rows of a token in all models, by the rules of mergekit."""
    rows = [rows_of(path, tensor) for path in paths.values()]
    having = [r[token] for r in rows if token in r]
    if len(having) == 1:
        default = having[0]
    elif token in rows[0]:
        default = rows[0][token]
    else:
        default = np.mean(having, axis=0) if having else 0 * next(iter(rows[0].values()))
    return [r.get(token, default) for r in rows]


def expected(paths, token, tensor):
    base, first, second = aligned(paths, token, tensor)
    return base + 0.5 * (first - base) + 0.5 * (second - base)


SOURCES = {
    "base": [*WORDS["base"], *ADDED["base"]],
    "ft1": [*WORDS["ft1"], *ADDED["ft1"]],
    "union": [*WORDS["base"], *ADDED["base"], "dog", "mat", "<user>", "<tool>"],
}


@pytest.mark.parametrize("source", SOURCES)
def test_rows_are_merged_by_token(say, tmp_path, paths, source):
    result = merge(say, tmp_path, paths, tokenizer_source=str(paths.get(source, source)))
    assert result.status == 0, result.err
    out, tokens = TensorFiles(tmp_path / "out"), tokens_of(tmp_path / "out")
    assert tokens == SOURCES[source]
    for tensor in (EMBED, HEAD):
        assert out[tensor].shape == (len(tokens), WIDTH)
        for row, token in zip(out[tensor], tokens, strict=True):
            np.testing.assert_allclose(row, expected(paths, token, tensor), rtol=1e-6, atol=1e-7)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == len(tokens)
    base, first, second = (numbers(TensorFiles(p)["model.layers.0.w"]) for p in paths.values())
    wanted = base + 0.5 * (first - base) + 0.5 * (second - base)
    np.testing.assert_allclose(out["model.layers.0.w"], wanted, rtol=1e-6, atol=1e-7)


def test_the_union_tokenizer_splits_text(say, tmp_path, paths):
    assert merge(say, tmp_path, paths, tokenizer={"source": "union"}).status == 0
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    text = "the dog sat <user> on mat <tool>"
    assert tokenizer.tokenize(text) == ["the", "dog", "sat", "<user>", "on", "mat", "<tool>"]
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True).split() == "the dog sat on mat".split()
    assert max(ids) == len(tokenizer) - 1


def test_rules_of_single_tokens(say, tmp_path, paths):
    tokens = {
        "dog": {"source": {"kind": "model_token", "model": str(paths["ft2"]), "token": "mat"}},
        "the": {"source": str(paths["ft1"]), "force": True},
        "<new>": {"source": {"kind": "model_token", "model": str(paths["ft1"]), "token_id": 4}},
        "<zero>": {"source": {"kind": "zero"}},
    }
    tokenizer = {"source": "base", "tokens": tokens, "pad_to_multiple_of": 8}
    result = merge(say, tmp_path, paths, tokenizer=tokenizer)
    assert result.status == 0, result.err
    out, names = TensorFiles(tmp_path / "out"), tokens_of(tmp_path / "out")
    assert names == [*SOURCES["base"], "dog", "<new>", "<zero>"] and out[EMBED].shape == (16, WIDTH)
    first, second = (rows_of(paths[name], EMBED) for name in ("ft1", "ft2"))
    row = dict(zip(names, out[EMBED], strict=False))
    np.testing.assert_allclose(row["the"], first["the"], rtol=1e-6)
    np.testing.assert_allclose(row["<new>"], first["sat"], rtol=1e-6)
    np.testing.assert_array_equal(row["<zero>"], 0)
    # ft1 has its own row of this token; the base and ft2 have that of the rule.
    wanted = second["mat"] + 0.5 * (first["dog"] - second["mat"])
    np.testing.assert_allclose(row["dog"], wanted, rtol=1e-6, atol=1e-7)
    # Rows that no token has are the mean of the rows of all tokens.
    np.testing.assert_allclose(out[EMBED][10:], np.tile(out[EMBED][:10].mean(0), (6, 1)), atol=1e-6)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == 16


def test_equal_tokenizers_keep_their_rows(say, tmp_path):
    paths = {
        name: save(tmp_path / name, WORDS["base"], ADDED["base"], seed=seed)
        for seed, name in enumerate(WORDS)
    }
    for more in ({"tokenizer_source": "base"}, {"tokenizer_source": "union"}, {}):
        result = merge(say, tmp_path, paths, **more)
        assert result.status == 0 and "rows in the order" not in result.err
        out = TensorFiles(tmp_path / "out")
        assert out[EMBED].shape == (len(SOURCES["base"]) + SPARE, WIDTH)


def test_without_the_key_tokenizers_that_disagree_are_an_error(say, tmp_path, paths):
    result = merge(say, tmp_path, {n: paths[n] for n in paths} | {"ft1": paths["base"]})
    assert result.status == 1
    result = merge(say, tmp_path, paths)
    assert result.status == 1 and "tokenizer" in result.err


def test_a_model_without_a_tokenizer_has_that_of_the_base(say, tmp_path, paths):
    path = save(tmp_path / "more" / "ft2", WORDS["base"], ADDED["base"], seed=9)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (path / name).unlink(missing_ok=True)
    result = merge(say, tmp_path, paths | {"ft2": path}, tokenizer_source="union")
    assert result.status == 0, result.err
    tokens = tokens_of(tmp_path / "out")
    assert tokens == [*SOURCES["base"], "dog", "<user>"]
    first = rows_of(paths["ft1"], EMBED)
    second = dict(zip(SOURCES["base"], numbers(TensorFiles(path)[EMBED]), strict=False))
    row = TensorFiles(tmp_path / "out")[EMBED][SOURCES["base"].index("cat")]
    wanted = 0.5 * first["cat"] + 0.5 * second["cat"]
    np.testing.assert_allclose(row, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("tokens", "pattern"), [
    ({"x": {"source": "other/model"}}, "'x': 'other/model' is not one of the models"),
    ({"x": {"source": {"kind": "model_token", "model": "FT1", "token": "bird"}}}, "has no 'bird'"),
    ({"x": {"source": {"kind": "model_token", "model": "FT1", "token_id": 99}}}, "has no row 99"),
])  # fmt: skip
def test_rules_that_do_not_apply(say, tmp_path, paths, tokens, pattern):
    tokens = json.loads(json.dumps(tokens).replace("FT1", str(paths["ft1"])))
    result = merge(say, tmp_path, paths, tokenizer={"source": "base", "tokens": tokens})
    assert result.status == 1 and pattern in result.err and result.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_cannot_be_extended(say, tmp_path, paths):
    vocabulary = {w: i for i, w in enumerate(SOURCES["base"])}
    (paths["base"] / "tokenizer.json").unlink()
    (paths["base"] / "vocab.json").write_text(json.dumps(vocabulary))
    result = merge(say, tmp_path, paths, tokenizer_source="union")
    assert (
        result.status == 1 and "tokenizer.json" in result.err and str(paths["base"]) in result.err
    )


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("length", [1, 3, 7, 1000])
def test_any_range_of_elements(tmp_path, dtype, length):
    names = {n: save(tmp_path / n, WORDS[n], ADDED[n], dtype=dtype, seed=i)
             for i, n in enumerate(WORDS)}  # fmt: skip
    base = open_source(str(names["base"]))
    sources = [base, *(open_source(str(names[n]), base) for n in ("ft1", "ft2"))]
    for source in align(sources, Wanted("union", multiple=16)):
        size = int(np.prod(source.tensors[EMBED].shape))
        whole = source.read(EMBED, 0, size)
        parts = [source.read(EMBED, a, min(a + length, size)) for a in range(0, size, length)]
        assert whole.dtype == dtype and size == 16 * WIDTH
        np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_chat_template(say, tmp_path, paths):
    template = "{% for m in messages %}{{ m['content'] }}|{% endfor %}"
    assert merge(say, tmp_path, paths, tokenizer_source="base", chat_template=template).status == 0
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == template
    assert (
        json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["chat_template"]
        == template
    )


def test_a_change_of_the_rules_does_not_resume(tmp_path, paths):
    """Names, shapes and files are the same; only the rows differ."""
    from modelstock_jax.checkpoint_merge.options import Options
    from modelstock_jax.checkpoint_merge.plan import make_plan

    def checksum(multiple, source):
        base = open_source(str(paths["base"]))
        sources = [base, *(open_source(str(paths[n]), base) for n in ("ft1", "ft2"))]
        base, *tuned = align(sources, Wanted(source, multiple=multiple))
        return make_plan(base, tuned, Options(method="uniform_mean")).checksum

    found = [checksum(32, source) for source in ("base", "union", str(paths["ft1"]))]
    assert len(set(found)) == 3 and checksum(32, "union") == found[1]


def test_files_of_an_aligned_merge_are_complete(tmp_path, paths, say):
    assert merge(say, tmp_path, paths, tokenizer_source="union").status == 0
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert all(model["files"] for model in (report["base"], *report["models"]))
    assert any("rows in the order" in note for model in report["models"] for note in model["notes"])


def test_ids_with_gaps_and_models_with_other_spare_rows(say, tmp_path, paths):
    """A row that no token has is the mean of the others, whatever the models have there."""
    config = json.loads((paths["base"] / "tokenizer.json").read_text())
    config["added_tokens"][-1]["id"] += 1  # Row 6 has no token; <pad> is row 7.
    (paths["base"] / "tokenizer.json").write_text(json.dumps(config))
    decoder = json.loads((paths["base"] / "tokenizer_config.json").read_text())
    decoder.pop("added_tokens_decoder", None)
    (paths["base"] / "tokenizer_config.json").write_text(json.dumps(decoder))
    result = merge(say, tmp_path, paths, tokenizer_source="base")
    assert result.status == 0, result.err
    rows = TensorFiles(tmp_path / "out")[EMBED]
    others = np.delete(rows, 6, axis=0)
    np.testing.assert_allclose(rows[6], others.mean(axis=0), rtol=1e-6, atol=1e-7)


def test_equal_tokens_but_other_numbers_of_rows(say, tmp_path):
    paths = {
        name: save(tmp_path / name, WORDS["base"], ADDED["base"], seed=k, extra=k)
        for k, name in enumerate(WORDS)
    }
    assert merge(say, tmp_path, paths).status == 1
    result = merge(say, tmp_path, paths, tokenizer_source="base")
    assert result.status == 0, result.err
    assert len(TensorFiles(tmp_path / "out")[EMBED]) == len(SOURCES["base"])


def test_a_tokenizer_with_tokens_beyond_the_rows(say, tmp_path, paths):
    path = save(tmp_path / "more" / "base", WORDS["base"], ADDED["base"], extra=-1)
    result = merge(say, tmp_path, paths | {"base": path}, tokenizer_source="union")
    assert result.status == 1 and "<pad>" in result.err and "row" in result.err
    result = merge(say, tmp_path, paths | {"base": path}, tokenizer_source="base")
    assert result.status == 0, result.err
    assert len(TensorFiles(tmp_path / "out")[EMBED]) == len(WORDS["base"])


def test_biases_of_heads(say, tmp_path, paths):
    """A bias has one element per token; one that cannot be aligned is an error."""
    for name, path in paths.items():
        tensors = dict(TensorFiles(path))
        rows = len(tensors[HEAD])
        tensors["lm_head.bias"] = np.arange(rows, dtype=np.float32) * (1 + len(name))
        write_tensors(path / "model.safetensors", tensors)
    assert merge(say, tmp_path, paths, tokenizer_source="union").status == 0
    out, tokens = TensorFiles(tmp_path / "out"), tokens_of(tmp_path / "out")
    bias = {n: dict(zip([*WORDS[n], *ADDED[n]], TensorFiles(p)["lm_head.bias"], strict=False))
            for n, p in paths.items()}  # fmt: skip
    for token, value in zip(tokens, out["lm_head.bias"], strict=True):
        having = [b[token] for b in bias.values() if token in b]
        default = having[0] if len(having) == 1 or token in bias["base"] else np.mean(having)
        first, second, third = (b.get(token, default) for b in bias.values())
        assert value == pytest.approx(first + 0.5 * (second - first) + 0.5 * (third - first))
    for path in paths.values():
        tensors = dict(TensorFiles(path))
        tensors["final_logits_bias"] = tensors.pop("lm_head.bias")[None]
        write_tensors(path / "model.safetensors", tensors)
    result = merge(say, tmp_path, paths, tokenizer_source="union")
    assert result.status == 1 and "final_logits_bias" in result.err


def test_slices_with_a_tokenizer(say, tmp_path, paths):
    """The embedding of a model of layers is that of its first model."""
    slices = [{"sources": [{"model": str(paths[name]), "layer_range": [0, 1]}]}
              for name in ("base", "base")]  # fmt: skip
    recipe = {"merge_method": "passthrough", "slices": slices, "base_model": None,
              "tokenizer": {"source": str(paths["base"]), "pad_to_multiple_of": 4}}  # fmt: skip
    (tmp_path / "r.yml").write_text(yaml.safe_dump(recipe))
    result = say("merge", tmp_path / "r.yml", tmp_path / "out")
    assert result.status == 0, result.err
    out = TensorFiles(tmp_path / "out")
    assert len(out[EMBED]) == 8 and "model.layers.1.w" in out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == 8


def test_without_a_base_a_missing_token_has_the_mean_of_the_models_that_have_it(
    say, tmp_path, paths
):
    """The first model counts once, although it is also opened as the base."""
    models_of_recipe = [{"model": str(paths[n]), "parameters": {"weight": 1}}
                        for n in ("ft1", "ft2", "base")]  # fmt: skip
    result = merge(say, tmp_path, paths, merge_method="linear", base_model=None, parameters={},
                   models=models_of_recipe, tokenizer_source="union")  # fmt: skip
    assert result.status == 0, result.err
    tokens = tokens_of(tmp_path / "out")
    first, second = (rows_of(paths[n], EMBED)["<user>"] for n in ("ft1", "ft2"))
    row = TensorFiles(tmp_path / "out")[EMBED][tokens.index("<user>")]
    np.testing.assert_allclose(row, (first + second) / 2, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("recipe", [
    {"merge_method": "karcher", "parameters": {}},
    {"merge_method": "linear", "parameters": {"normalize": False, "weight": 0.7}},
])  # fmt: skip
@pytest.mark.parametrize("source", ["base", None])
def test_the_files_are_those_of_base_model_where_it_is_one_of_the_models(
    say, tmp_path, paths, recipe, source
):
    for name in ("ft1", "base"):
        config = json.loads((paths[name] / "config.json").read_text())
        (paths[name] / "config.json").write_text(json.dumps(config | {"eos_token_id": len(name)}))
    models_of_recipe = [{"model": str(paths[n])} for n in ("ft1", "base")]
    tokenizer = {} if source is None else {"tokenizer_source": source}
    if source is None:  # The rows of all models must have one order.
        (paths["ft1"] / "tokenizer.json").unlink()
        (paths["ft1"] / "tokenizer_config.json").unlink()
        tensors = dict(TensorFiles(paths["base"]))
        write_tensors(paths["ft1"] / "model.safetensors", {n: x + 1 for n, x in tensors.items()})
    result = merge(say, tmp_path, paths, models=models_of_recipe, **recipe, **tokenizer)
    assert result.status == 0, result.err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eos_token_id"] == len("base")
    assert tokens_of(tmp_path / "out") == SOURCES["base"]


def test_a_tied_head_is_the_embedding(say, tmp_path, paths):
    """A model without lm_head, among others with one."""
    for name in ("base", "ft2"):
        tensors = dict(TensorFiles(paths[name]))
        del tensors[HEAD]
        write_tensors(paths[name] / "model.safetensors", tensors)
        config = json.loads((paths[name] / "config.json").read_text())
        (paths[name] / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    (tmp_path / "r.yml").write_text(yaml.safe_dump({
        "merge_method": "task_arithmetic", "base_model": str(paths["base"]),
        "models": [{"model": str(paths[n])} for n in ("ft1", "ft2")],
        "parameters": {"weight": 0.5}, "tokenizer_source": "union",
    }))  # fmt: skip
    result = say("merge", tmp_path / "r.yml", tmp_path / "out", "--tied-head", "untie")
    assert result.status == 0, result.err
    tokens, out = tokens_of(tmp_path / "out"), TensorFiles(tmp_path / "out")
    base, second = (rows_of(paths[n], EMBED) for n in ("base", "ft2"))
    wanted = base["the"] + 0.5 * (rows_of(paths["ft1"], HEAD)["the"] - base["the"])
    wanted += 0.5 * (second["the"] - base["the"])
    np.testing.assert_allclose(out[HEAD][tokens.index("the")], wanted, rtol=1e-6, atol=1e-7)


def test_the_head_of_a_masked_language_model(say, tmp_path, paths):
    """Its weight and its bias do not have the name of an embedding; layers may have any size."""
    for path in paths.values():
        tensors = dict(TensorFiles(path))
        rows = len(tensors[HEAD])
        tensors["cls.predictions.decoder.weight"] = tensors.pop(HEAD)
        tensors["cls.predictions.bias"] = np.arange(rows, dtype=np.float32)
        tensors["model.layers.0.v"] = np.ones((2, 3), np.float32)
        write_tensors(path / "model.safetensors", tensors)
    result = merge(say, tmp_path, paths, tokenizer_source="union")
    assert result.status == 0, result.err
    out, tokens = TensorFiles(tmp_path / "out"), tokens_of(tmp_path / "out")
    for tensor in ("cls.predictions.decoder.weight", "cls.predictions.bias"):
        for row, token in zip(out[tensor], tokens, strict=True):
            wanted = expected(paths, token, tensor)
            np.testing.assert_allclose(row, wanted, rtol=1e-6, atol=1e-6)
