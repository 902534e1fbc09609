"""Recipes of the kinds that people publish: they run unchanged, or the error names the key."""

from __future__ import annotations

import json

import numpy as np
import pytest

from modelstock_jax.tensor_files.reader import TensorFiles
from tests.checkpoint_merge.small import LLAMA, adapter, factors, llama_shapes, moved, save, weights

# BASE, A, B, C, D are models of four layers with one tokenizer; WIDE has two more tokens; LORA is
# an adapter of BASE.
LAYERS = 4
RUN = {
    "slerp of two models, by layer and filter": """
slices:
  - sources:
      - model: A
        layer_range: [0, 4]
      - model: B
        layer_range: [0, 4]
merge_method: slerp
base_model: A
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: bfloat16
""",
    "slerp of models without slices": """
models:
  - model: A
  - model: B
merge_method: slerp
base_model: A
dtype: bfloat16
parameters: {t: [0, 0.5, 1, 0.5, 0]}
""",
    "ties of two, the base without parameters": """
models:
  - model: BASE
  - model: A
    parameters: {density: 0.5, weight: 0.5}
  - model: B
    parameters: {density: 0.5, weight: 0.3}
merge_method: ties
base_model: BASE
parameters: {normalize: true, int8_mask: true}
dtype: float16
""",
    "ties with gradients of density and weight": """
models:
  - model: A
    parameters:
      density: [1, 0.7, 0.1]
      weight: 1.0
  - model: B
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1]
  - model: C
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: BASE
parameters: {normalize: true, int8_mask: true}
dtype: float16
""",
    "dare_ties of three": """
models:
  - model: BASE
  - model: A
    parameters: {density: 0.53, weight: 0.4}
  - model: B
    parameters: {density: 0.53, weight: 0.3}
  - model: C
    parameters: {density: 0.53, weight: 0.3}
merge_method: dare_ties
base_model: BASE
parameters: {int8_mask: true}
dtype: bfloat16
""",
    "dare_ties with lists of weights": """
merge_method: dare_ties
base_model: BASE
models:
  - model: A
    parameters: {weight: [0.2, 0.35, 0.4, 0.35], density: [0.6]}
  - model: B
    parameters: {weight: [0.8, 0.65, 0.6, 0.65], density: 0.35}
parameters: {normalize: false, rescale: true}
dtype: bfloat16
""",
    "dare_linear": """
models:
  - {model: A, parameters: {weight: 0.7, density: 0.8}}
  - {model: B, parameters: {weight: 0.3, density: 0.8}}
merge_method: dare_linear
base_model: BASE
dtype: float32
""",
    "model_stock of four": """
models:
  - model: A
  - model: B
  - model: C
  - model: D
base_model: BASE
merge_method: model_stock
dtype: bfloat16
""",
    "model_stock by filter, with adapters": """
models:
  - model: A
  - model: B+LORA
  - model: BASE+LORA
merge_method: model_stock
base_model: BASE
parameters: {filter_wise: true}
out_dtype: bfloat16
""",
    "a frankenmerge": """
slices:
  - sources:
      - model: A
        layer_range: [0, 3]
  - sources:
      - model: B
        layer_range: [1, 3]
  - sources:
      - model: A
        layer_range: [2, 4]
merge_method: passthrough
dtype: float16
""",
    "a model with its layers repeated, new ones silent at first": """
slices:
  - sources:
      - model: A
        layer_range: [0, 2]
  - sources:
      - model: A
        layer_range: [1, 2]
        parameters:
          scale:
            - filter: o_proj
              value: 0.0
            - filter: down_proj
              value: 0.0
            - value: 1.0
  - sources:
      - model: A
        layer_range: [2, 4]
merge_method: passthrough
dtype: bfloat16
""",
    "a model without its last layers": """
slices:
  - sources: [{model: A, layer_range: [0, 3]}]
merge_method: passthrough
dtype: bfloat16
""",
    "an adapter merged into its model": """
base_model: BASE
dtype: bfloat16
merge_method: passthrough
models:
  - model: BASE+LORA
""",
    "linear of two": """
models:
  - model: A
    parameters: {weight: 1.0}
  - model: B
    parameters: {weight: 0.5}
merge_method: linear
dtype: float16
""",
    "linear by slices": """
slices:
  - sources:
      - {model: A, layer_range: [0, 2], parameters: {weight: 0.8}}
      - {model: B, layer_range: [0, 2], parameters: {weight: 0.2}}
  - sources:
      - {model: A, layer_range: [2, 4], parameters: {weight: 0.3}}
      - {model: C, layer_range: [2, 4], parameters: {weight: 0.7}}
merge_method: linear
tokenizer_source: A
dtype: bfloat16
""",
    "task_arithmetic that subtracts a model": """
models:
  - model: A
    parameters: {weight: 1.0}
  - model: B
    parameters: {weight: -0.4}
merge_method: task_arithmetic
base_model: BASE
parameters: {lambda: 0.9, normalize: false}
dtype: float32
""",
    "breadcrumbs": """
models:
  - {model: A, parameters: {weight: 0.5}}
  - {model: B, parameters: {weight: 0.5}}
merge_method: breadcrumbs
base_model: BASE
parameters: {density: 0.9, gamma: 0.01}
dtype: bfloat16
""",
    "breadcrumbs_ties": """
models:
  - model: A
    parameters: {weight: 0.6, density: 0.4, gamma: 0.02}
  - model: B
    parameters: {weight: 0.4, density: 0.4, gamma: 0.02}
merge_method: breadcrumbs_ties
base_model: BASE
parameters: {int8_mask: true, normalize: true}
dtype: bfloat16
""",
    "della": """
models:
  - model: A
    parameters: {weight: 1, density: 0.5}
  - model: B
    parameters: {weight: 1, density: 0.55}
merge_method: della
base_model: BASE
parameters: {epsilon: 0.05, lambda: 1.0, int8_mask: true, normalize: true}
dtype: bfloat16
""",
    "della_linear": """
merge_method: della_linear
base_model: BASE
models:
  - {model: A, parameters: {weight: 0.4, density: 0.5, epsilon: 0.2}}
  - {model: B, parameters: {weight: 0.6, density: 0.7, epsilon: 0.1}}
dtype: bfloat16
""",
    "sce": """
models: [{model: A}, {model: B}, {model: C}]
merge_method: sce
base_model: BASE
parameters: {select_topk: 0.8}
dtype: bfloat16
""",
    "karcher": """
models: [{model: A}, {model: B}, {model: C}]
merge_method: karcher
parameters: {max_iter: 100, tol: 1e-9}
dtype: bfloat16
""",
    "nuslerp": """
models:
  - {model: A, parameters: {weight: 0.25}}
  - {model: B, parameters: {weight: 0.75}}
merge_method: nuslerp
base_model: BASE
dtype: float32
""",
    "multislerp": """
models:
  - {model: A, parameters: {weight: [0.2, 0.8]}}
  - {model: B, parameters: {weight: 0.3}}
  - {model: C, parameters: {weight: 0.3}}
base_model: BASE
merge_method: multislerp
parameters: {normalize_weights: true, eps: 1e-8}
dtype: bfloat16
""",
    "arcee_fusion": """
models: [{model: A}, {model: B}]
merge_method: arcee_fusion
base_model: A
dtype: bfloat16
""",
    "nearswap": """
models: [{model: A}]
merge_method: nearswap
base_model: BASE
parameters: {t: 0.0001}
dtype: float32
""",
    "ram": """
models: [{model: A}, {model: B}]
merge_method: ramplus_tl
base_model: BASE
parameters: {epsilon: 1e-5, r: 0.1, alpha: 0.2}
""",
    "model_stock with the union of the tokens": """
models: [{model: A}, {model: WIDE}]
merge_method: model_stock
base_model: BASE
tokenizer: {source: union, pad_to_multiple_of: 8}
dtype: bfloat16
""",
    "ties with tokens of one model": """
models:
  - {model: A, parameters: {weight: 0.5, density: 0.5}}
  - {model: WIDE, parameters: {weight: 0.5, density: 0.5}}
merge_method: ties
base_model: BASE
tokenizer:
  source: base
  tokens:
    "<w20>": {source: WIDE, force: true}
    "<new>": {source: {kind: zero}}
chat_template: "{% for message in messages %}{{ message['content'] }}{% endfor %}"
dtype: bfloat16
""",
}  # fmt: skip
# Recipe -> what the error names.
REFUSED = {
    "a mixture of experts": ("""
base_model: BASE
gate_mode: hidden
dtype: bfloat16
experts:
  - source_model: A
    positive_prompts: ["chat"]
""", "gate_mode"),
    "a parameter of an old version": ("""
slices: [{sources: [{model: A, layer_range: [0, 4]}, {model: B, layer_range: [0, 4]}]}]
merge_method: slerp
base_model: A
parameters: {t: 0.5, embed_slerp: true}
""", "embed_slerp"),
    "two recipes in one file": ("""
name: first
merge_method: linear
models: [{model: A, parameters: {weight: 1}}]
---
name: second
merge_method: linear
models: [{model: B, parameters: {weight: 1}}]
""", "YAML"),
    "modules": ("""
merge_method: slerp
base_model: A
modules: {text_decoder: {slices: [{sources: [{model: A, layer_range: [0, 4]}]}]}}
""", "modules"),
    "a template by name": ("""
models: [{model: A}, {model: B}]
merge_method: model_stock
base_model: BASE
chat_template: chatml
""", "chat_template"),
    "an unknown method": ("""
models: [{model: A}, {model: B}]
merge_method: task_swapping
base_model: BASE
""", "task_swapping"),
    "a misspelled parameter": ("""
models: [{model: A, parameters: {weight: 1, densty: 0.5}}]
merge_method: ties
base_model: BASE
""", "densty"),
    "a tokenizer of a model that is not merged": ("""
models: [{model: A}, {model: B}]
merge_method: model_stock
base_model: BASE
tokenizer_source: WIDE
""", "tokenizer_source"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All models, written once."""
    root = tmp_path_factory.mktemp("models")
    shapes = {n: s for n, s in llama_shapes().items() if ".layers." not in n}
    for name, shape in llama_shapes().items():
        if ".layers.0." in name:
            shapes |= {name.replace(".0.", f".{i}."): shape for i in range(LAYERS)}
    base = weights(shapes)
    tensors = {"BASE": base} | {m: moved(base, seed) for seed, m in enumerate("ABCD", 1)}
    wide = moved(base, 9)
    tensors["WIDE"] = {
        n: np.concatenate([w, w[:2] + 1]) if n in ("model.embed_tokens.weight", "lm_head.weight")
        else w for n, w in wide.items()
    }  # fmt: skip
    for name, model in tensors.items():
        rows = len(model["lm_head.weight"])
        save(root / name, model, LLAMA | {"num_hidden_layers": LAYERS, "vocab_size": rows})
        words = {f"<w{i}>": i for i in range(rows)}
        (root / name / "tokenizer.json").write_text(
            json.dumps({"model": {"type": "WordLevel", "vocab": words}, "added_tokens": []})
        )
    adapter(root / "LORA", factors("model.layers.0.self_attn.q_proj", 16, 16))
    return root


def merge(say, folder, tmp_path, recipe):
    for name in ("BASE", "WIDE", "LORA", *"ABCD"):
        recipe = recipe.replace(f" {name}\n", f" {folder / name}\n")
        for end in (",", "}", "+"):
            recipe = recipe.replace(f" {name}{end}", f" {folder / name}{end}")
        recipe = recipe.replace(f"+{name}\n", f"+{folder / name}\n")
    path = tmp_path / "recipe.yml"
    path.write_text(recipe)
    return say("merge", path, tmp_path / "out")


@pytest.mark.parametrize("name", RUN)
def test_it_runs_unchanged(say, folder, tmp_path, name):
    result = merge(say, folder, tmp_path, RUN[name])
    assert result.status == 0, result.err
    out = TensorFiles(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    layers = {int(n.split(".")[2]) for n in out if ".layers." in n}
    assert layers == set(range(config["num_hidden_layers"]))
    assert len(out["model.embed_tokens.weight"]) == config["vocab_size"]
    assert all(np.isfinite(out[n].astype(np.float32)).all() for n in out)
    wanted = "dtype: bfloat16" in RUN[name]
    assert (out["lm_head.weight"].dtype.name == "bfloat16") == wanted
    changed = [n for n in out if n not in (base := TensorFiles(folder / "BASE"))
               or out[n].shape != base[n].shape or (out[n] != base[n]).any()]  # fmt: skip
    assert changed


@pytest.mark.parametrize("name", REFUSED)
def test_the_error_names_the_key(say, folder, tmp_path, name):
    recipe, key = REFUSED[name]
    result = merge(say, folder, tmp_path, recipe)
    assert result.status == 1 and key in result.err and result.err.count("\n") == 1, result.err
    assert not (tmp_path / "out").exists()
