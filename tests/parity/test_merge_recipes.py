"""Recipes with slices and tokenizers: transformers opens the result and computes with it."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers as hf

from modelstock_jax.checkpoint_merge.cli import main
from tests.parity.merge_inputs import config_of, family, fine_tuned, inputs_of, opened, outputs

pytestmark = pytest.mark.filterwarnings("ignore")  # Warnings of other libraries.
WORDS = ("the", "cat", "sat", "on", "a", "mat", "dog", "ran", "under", "tree")


def merge(tmp_path, **recipe):
    (tmp_path / "recipe.yml").write_text(json.dumps(recipe))  # JSON is YAML too.
    assert main(["merge", str(tmp_path / "recipe.yml"), str(tmp_path / "out")]) == 0


def layers_of(model):
    """The module that holds the list of layers, and the name of the list."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, torch.nn.ModuleList) and name in ("layers", "h", "layer"):
                return module, name
    raise AssertionError("no layers")


def alternating():
    """A Gemma 3 whose layers alternate between two kinds of attention."""
    torch.manual_seed(0)
    size = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    config = hf.Gemma3TextConfig(
        **size, num_key_value_heads=1, head_dim=8, vocab_size=24, sliding_window=3,
        layer_types=["sliding_attention", "full_attention"], max_position_embeddings=32,
    )  # fmt: skip
    return hf.Gemma3ForCausalLM(config).eval()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "bert", "alternating"])
def test_a_model_of_layers_computes_what_its_layers_compute(tmp_path, name):
    """Against the layers of the torch models, put together by hand."""
    first = alternating() if name == "alternating" else family(name)
    second = fine_tuned(first, 1, size=0.2)
    first.save_pretrained(tmp_path / "a")
    second.save_pretrained(tmp_path / "b")
    count = len(getattr(*layers_of(first)))
    order = [("a", 0), ("b", count - 1), ("a", 0), ("b", 0), ("b", count - 1)]
    slices = [
        {"sources": [{"model": str(tmp_path / m), "layer_range": [i, i + 1]}]} for m, i in order
    ]
    merge(tmp_path, merge_method="passthrough", slices=slices)
    result = opened(type(first), tmp_path / "out")
    assert len(getattr(*layers_of(result))) == len(order)
    # Outside the layers: what is before them is of the first model, what is after of the second.
    expected = copy.deepcopy(first)
    state = {**first.state_dict(), **result.state_dict()}
    module, attribute = layers_of(expected)
    models = {"a": first, "b": second}
    stacked = [copy.deepcopy(getattr(*layers_of(models[m]))[i]) for m, i in order]
    for number, layer in enumerate(stacked):
        for part in layer.modules():
            if hasattr(part, "layer_idx"):
                part.layer_idx = number
    setattr(module, attribute, torch.nn.ModuleList(stacked))
    prefix = next(n for n, m in expected.named_modules() if m is getattr(module, attribute))
    outside = {n: x for n, x in state.items() if not n.startswith(f"{prefix}.")}
    expected.load_state_dict(outside, strict=False)
    kinds = getattr(first.config, "layer_types", None)
    for inner in expected.modules():
        if hasattr(inner, "config"):
            inner.config = copy.deepcopy(inner.config)
            inner.config.num_hidden_layers = len(order)
            if kinds:
                inner.config.layer_types = [kinds[i] for _, i in order]
    for ours, theirs in zip(outputs(result), outputs(expected), strict=False):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def bpe(path, corpus, added):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(corpus, trainer)
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    fast.add_tokens(added, special_tokens=True)
    fast.save_pretrained(path)
    return fast


@pytest.mark.parametrize("source", ["base", "union", "ft2"])
def test_embeddings_of_different_vocabularies_are_merged_by_token(tmp_path, source):
    """Llamas with byte-level tokenizers of different texts: every row, and the logits of a text."""
    corpora = {"base": WORDS[:6], "ft1": WORDS, "ft2": WORDS[3:]}
    added = {"base": ["<pad>"], "ft1": ["<|im_start|>", "<pad>"], "ft2": ["<|im_end|>"]}
    models, tokenizers = {}, {}
    config = family("llama").config.to_dict()
    for seed, name in enumerate(corpora):
        text = [" ".join(corpora[name])] * 20
        tokenizers[name] = bpe(tmp_path / name, text, added[name])
        rows = len(tokenizers[name])
        torch.manual_seed(seed)
        models[name] = hf.LlamaForCausalLM(hf.LlamaConfig(**config | {"vocab_size": rows})).eval()
        models[name].save_pretrained(tmp_path / name)
    which = source if source in ("base", "union") else str(tmp_path / source)
    weights = {"ft1": 0.3, "ft2": 0.7}
    merged = [{"model": str(tmp_path / n), "parameters": {"weight": w}} for n, w in weights.items()]
    base = str(tmp_path / "base")
    merge(tmp_path, merge_method="linear", tokenizer_source=which, base_model=base, models=merged)
    result = opened(hf.LlamaForCausalLM, tmp_path / "out")
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "out")
    vocabulary = tokenizer.get_vocab()
    assert config_of(tmp_path / "out")["vocab_size"] == max(vocabulary.values()) + 1
    ids = {name: t.get_vocab() for name, t in tokenizers.items()}
    if source == "union":
        assert vocabulary.keys() == set().union(*ids.values())
    for read in (lambda m: m.model.embed_tokens.weight, lambda m: m.lm_head.weight):
        rows = {name: read(model).detach().double() for name, model in models.items()}
        for token, i in vocabulary.items():
            having = {n: rows[n][ids[n][token]] for n in corpora if token in ids[n]}
            default = (
                next(iter(having.values())) if len(having) == 1 or "base" in having
                else torch.stack(list(having.values())).mean(0)
            )  # fmt: skip
            wanted = sum(w * having.get(n, default) for n, w in weights.items())
            torch.testing.assert_close(read(result)[i].double(), wanted, rtol=1e-6, atol=1e-7)
    text = "the dog sat under a mat<pad>"
    batch = tokenizer(text, return_tensors="pt")
    assert tokenizer.decode(batch["input_ids"][0]) == text
    assert bool(result(**batch).logits.isfinite().all()) and inputs_of(result)
