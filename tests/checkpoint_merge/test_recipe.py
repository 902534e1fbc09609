"""Recipes of mergekit run unchanged; unsupported settings are errors, never ignored."""

from __future__ import annotations

import re

import pytest
import yaml

from modelstock_jax.checkpoint_merge.recipe import parse, read_recipe, schedule
from modelstock_jax.errors import UserError

STOCK = """
models:
  - model: org/a
  - model: org/b+org/lora
merge_method: model_stock
base_model: org/base@v1
dtype: bfloat16
"""
TIES = """
models:
  - model: org/base   # no parameters for the base
  - model: org/a
    parameters: {density: 0.5, weight: 0.5}
  - model: org/b
    parameters: {density: 0.25, weight: 0.3}
merge_method: ties
base_model: org/base
parameters: {normalize: false, int8_mask: true, lambda: 0.9}
dtype: float16
out_dtype: bfloat16
tokenizer_source: base
"""
SLERP = """
slices:
  - sources:
      - model: org/base
        layer_range: [0, 4]
      - model: org/b
        layer_range: [0, 4]
merge_method: slerp
base_model: org/base
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: bfloat16
"""


def read(text: str):
    return parse(yaml.safe_load(text))


def test_model_stock(tmp_path):
    (tmp_path / "r.yml").write_text(STOCK)
    recipe = read_recipe(tmp_path / "r.yml")
    assert recipe[:3] == (
        "org/base@v1",
        ("org/a", "org/b+org/lora"),
        {"method": "model_stock", "dtype": "bfloat16"},
    )
    assert recipe.layers is None and recipe.notes == ()


def test_model_stock_by_filter():
    assert read(STOCK + "parameters: {filter_wise: true}").options["unit"] == "filter"
    assert "unit" not in read(STOCK + "parameters: {filter_wise: false}").options


def test_ties():
    recipe = read(TIES)
    assert (recipe.base, recipe.models) == ("org/base", ("org/a", "org/b"))
    assert recipe.options == {
        "method": "ties", "weights": (0.5, 0.3), "density": (0.5, 0.25), "scale": 0.9,
        "density_rounding": "down", "normalize": False, "dtype": "bfloat16",
    }  # fmt: skip
    assert "int8_mask" in recipe.notes[0]


def test_task_arithmetic_with_one_weight_for_all():
    recipe = parse({
        "merge_method": "task_arithmetic", "base_model": "b",
        "models": [{"model": "x"}, {"model": "y", "parameters": {"weight": 0.2}}],
        "parameters": {"weight": [{"value": 0.7}], "lambda": 0.5},
    })  # fmt: skip
    assert recipe.options == {"method": "task_arithmetic", "weights": (0.7, 0.2), "scale": 0.5}


def test_linear_requires_no_base_and_includes_a_base_that_is_listed():
    models = [{"model": m, "parameters": {"weight": w}} for m, w in (("x", 1), ("y", 3))]
    recipe = parse({"merge_method": "linear", "models": models})
    assert recipe[:3] == (None, ("x", "y"), {"method": "linear", "weights": (1.0, 3.0)})
    assert parse({"merge_method": "linear", "models": models, "base_model": "y"}).models == (
        "x", "y")  # fmt: skip


def test_slerp_over_layers_and_filters():
    recipe = read(SLERP)
    assert (recipe.base, recipe.models, recipe.layers) == ("org/base", ("org/b",), 4)
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    for i in range(5):
        names += [f"model.layers.{i}.self_attn.q_proj.weight", f"model.layers.{i}.mlp.up.weight"]
    values = schedule(recipe.t, names)
    assert {values[name] for name in names[:3]} == {0.5}
    attention = [values[f"model.layers.{i}.self_attn.q_proj.weight"] for i in range(5)]
    assert attention == [0, 0.5, 0.3, 0.7, 1]
    assert [values[f"model.layers.{i}.mlp.up.weight"] for i in range(5)] == [1, 0.5, 0.7, 0.3, 0]


def test_a_list_is_interpolated_and_its_ends_apply_outside_the_blocks():
    names = ["embed.w", *(f"layers.{i}.w" for i in range(5)), "norm.w"]
    values = schedule([0.0, 1.0], names)
    assert list(values.values()) == pytest.approx([0, 0, 0.25, 0.5, 0.75, 1, 1])
    assert schedule(0.3, names) == 0.3
    with pytest.raises(UserError, match="t .*embed.w"):
        schedule([{"filter": "layers", "value": 1}], names)


@pytest.mark.parametrize(("model", "text"), [
    ("a", "a"),
    ({"model": "a", "lora": "l"}, "a+l"),
    ({"model": {"path": "a", "revision": "v2"}}, "a@v2"),
    ({"model": {"path": "a"}, "lora": {"path": "l"}}, "a+l"),
])  # fmt: skip
def test_ways_to_write_a_model(model, text):
    recipe = parse({"merge_method": "model_stock", "base_model": "b",
                    "models": [{"model": model}, {"model": "z"}]})  # fmt: skip
    assert recipe.models == (text, "z")


def test_slices_of_the_complete_model():
    halves = yaml.safe_load(SLERP)
    first = halves["slices"][0]["sources"]
    halves["slices"] = [
        {"sources": [{**source, "layer_range": r} for source in first]} for r in ([0, 3], [3, 4])
    ]
    assert parse(halves).layers == 4


def changed(text: str, **keys):
    return yaml.safe_load(text) | keys


def sliced(*ranges, **source):
    return {"slices": [
        {"sources": [{"model": m, "layer_range": list(r), **source} for m in ("org/base", "org/b")]}
        for r in ranges
    ]}  # fmt: skip


@pytest.mark.parametrize(("raw", "pattern"), [
    (changed(STOCK, merge_methd="x"), "'merge_methd' .*'merge_method'"),
    (changed(STOCK, parameters={"filterwise": True}), "'filterwise' .*'filter_wise'"),
    (changed(STOCK, parameters={"t": 0.5}), "parameters.*: .*model_stock .*'t'"),
    (changed(STOCK, parameters={"int8_mask": True}), "model_stock .*'int8_mask'"),
    (changed(STOCK, merge_method=None), "merge_method is missing; .*model_stock, linear"),
    (changed(STOCK, merge_method="dare_ties"), "'dare_ties' .*model_stock, linear"),
    (changed(STOCK, merge_method="model-stock"), "'model-stock' .*'model_stock'"),
    (changed(STOCK, modules={}), "modules "),
    (changed(STOCK, tokenizer_source="union"), "tokenizer_source 'union'"),
    (changed(STOCK, tokenizer={"source": "org/other"}), "'org/other'"),
    (changed(STOCK, tokenizer={"source": "base", "tokens": {}}), "'tokens'"),
    (changed(STOCK, chat_template="chatml"), "chat_template "),
    (changed(STOCK, base_model=None), "base_model "),
    (changed(STOCK, models=[]), "models: "),
    (changed(STOCK, models=[{"modl": "x"}]), "'modl'"),
    (changed(STOCK, models=[{"model": "x", "parameters": {"weight": 1}}]),
     "parameters of x: .*model_stock .*'weight'"),
    (changed(STOCK, models=[{"model": "x", "parameters": {"filter_wise": True}}]),
     "parameters of x: 'filter_wise' .*of the recipe"),
    (changed(STOCK, slices=[]), "models .*slices"),
    (changed(TIES, parameters={"density": [0.1, 0.9]}, models=[
        {"model": "x", "parameters": {"weight": 1}}]), "density .*slerp"),
    (changed(TIES, models=[{"model": "org/a"}]), "weight .*org/a; .*parameters"),
    ({"merge_method": "linear", "parameters": {"normalize": False, "weight": 1},
      "models": [{"model": "x"}, {"model": "y"}]}, "weights? .* 2"),
    (changed(SLERP, parameters={}), "parameters.t "),
    (changed(SLERP, **sliced((0, 2), (4, 6))), "layer 2"),
    (changed(SLERP, **sliced((1, 4))), "layer 0"),
    (changed(SLERP, **sliced((0, "4"))), "layer 0"),
    (changed(SLERP, **sliced((0, 4), parameters={"t": 1})), "parameters.*: .*'t'"),
    (changed(SLERP, slices=[{"sources": [{"model": "a"}]}]), "layer_range"),
    (changed(SLERP, slices=[{"sources": [
        {"model": "org/base", "layer_range": [0, 4]}, {"model": "org/b", "layer_range": [4, 8]},
    ]}]), "layer_range "),
    ([1, 2], "the recipe: "),
    (None, "the recipe: "),
])  # fmt: skip
def test_unsupported_settings_are_errors(raw, pattern):
    with pytest.raises(UserError) as error:
        parse(raw)
    assert re.search(pattern, str(error.value)) and "\n" not in str(error.value)


def test_a_gradient_by_pattern_is_an_error():
    """An example of mergekit has the key `pattern`, which mergekit ignores without a message."""
    with pytest.raises(UserError, match="t: .*'pattern'"):
        schedule([{"pattern": "mlp", "value": 1}, {"value": 0}], ["layers.0.mlp.w"])


@pytest.mark.parametrize(("text", "pattern"), [
    ("a: [1", "YAML.* line"),
    ("!!python/object/apply:os.system ['true']", "YAML"),
    ("\x00", "YAML"),
    ("- " * 5000 + "1", "YAML"),
    (STOCK.replace("model_stock", "[model_stock]"), r"merge_method \['model_stock'\]"),
    (TIES.replace("lambda: 0.9", "lambda: &a [*a]"), "anchors"),
    (STOCK.replace("org/base@v1", "&a {model: *a}"), "anchors"),
    ("a0: &0 [1, 1]\n" + "".join(f"a{i}: &{i} [*{i - 1}, *{i - 1}]\n" for i in range(1, 40)),
     "anchors"),
    ("a0: &0 {x: 1}\n" + "".join(
        f"a{i}: &{i} {{<<: [*{i - 1}, *{i - 1}]}}\n" for i in range(1, 40)), "anchors"),
    ("#" * 2**20 + "\n", "too large"),
    (TIES.replace("lambda: 0.9", f"lambda: {10**400}"), "lambda .*number"),
    (STOCK + "dtyp: x", "recipe.yml: unknown key 'dtyp' .*'dtype'"),
])  # fmt: skip
def test_the_error_for_a_broken_file_is_one_line_with_its_name(tmp_path, text, pattern):
    path = tmp_path / "recipe.yml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_recipe(path)
    assert re.search(pattern, str(error.value)) and str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_recipe_is_an_error(tmp_path):
    with pytest.raises(UserError, match="none.yml: .*No such file"):
        read_recipe(tmp_path / "none.yml")
