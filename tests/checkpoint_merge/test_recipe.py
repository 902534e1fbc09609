"""Recipes of mergekit run unchanged; unsupported settings are errors, never ignored."""

from __future__ import annotations

import re

import pytest
import yaml

from modelstock_jax.checkpoint_merge.recipe import options_of, parse, read_recipe
from modelstock_jax.checkpoint_merge.recipe_settings import by_tensor
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
    assert recipe.slices is None and recipe.notes == ()


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


LAYERS = [f"model.layers.{i}.{kind}.weight" for i in range(5) for kind in ("self_attn.q", "mlp.up")]
NAMES = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", *LAYERS]


def test_slerp_over_layers_and_filters():
    recipe = read(SLERP)
    assert (recipe.base, recipe.models) == ("org/base", ("org/b",))
    assert recipe.slices == ((("org/base", 0, 4), ("org/b", 0, 4)),)
    values = options_of(recipe, NAMES)["t"]
    assert {values[name] for name in NAMES[:3]} == {0.5}
    assert [values[name] for name in LAYERS[:8:2]] == pytest.approx([0, 1.3 / 3, 1.7 / 3, 1])
    assert [values[name] for name in LAYERS[1:8:2]] == pytest.approx([1, 1.7 / 3, 1.3 / 3, 0])


def test_a_list_is_interpolated_and_tensors_outside_the_layers_have_its_first_value():
    names = ["embed.w", *(f"layers.{i}.w" for i in range(5)), "norm.w"]
    assert list(by_tensor("t", [[[0.2, 1.0]]], names).values()) == pytest.approx(
        [0.2, 0.2, 0.4, 0.6, 0.8, 1, 0.2]
    )
    assert by_tensor("t", [[0.3]], names) == 0.3
    assert by_tensor("t", [[[0, 1]]], ["embed.w", "layers.0.w"]) == {"embed.w": 0, "layers.0.w": 1}
    assert list(by_tensor("rescale", [[[True, False]]], names).values()) == [True] * 5 + [
        False,
        True,
    ]


def test_a_model_without_a_matching_filter_has_the_value_of_the_recipe():
    mlp = [{"filter": "mlp", "value": [0, 1]}]
    recipe = parse({
        "merge_method": "dare_ties", "base_model": "b",
        "models": [{"model": "x", "parameters": {"weight": mlp, "density": 0.3}},
                   {"model": "y", "parameters": {"weight": 0.7}}],
        "parameters": {"weight": 0.4, "lambda": [{"filter": "norm", "value": 0}, {"value": 0.9}]},
    })  # fmt: skip
    assert recipe.options == {"method": "dare_ties", "density": (0.3, 1.0)}
    options = options_of(recipe, NAMES)
    assert [options["weights"][name] for name in LAYERS[1::2]] == [
        (x, 0.7) for x in (0, 0.25, 0.5, 0.75, 1)
    ]
    assert {options["weights"][name] for name in NAMES[:4]} == {(0.4, 0.7)}
    assert options["scale"]["model.norm.weight"] == 0 and options["scale"]["lm_head.weight"] == 0.9
    with pytest.raises(UserError, match="t .*embed.w"):
        by_tensor("t", [[[{"filter": "layers", "value": 1}]]], ["embed.w", "layers.0.w"])


def test_numbers_that_yaml_reads_as_text():
    recipe = read("""
merge_method: ram
base_model: b
models: [{model: x}, {model: y}]
parameters: {epsilon: 1e-4}
""")
    assert recipe.options["parameters"] == {"epsilon": 1e-4}


def test_methods_that_need_no_base():
    models = [{"model": "x", "parameters": {"weight": 1}}, {"model": "y"}]
    shared = {"parameters": {"weight": 0.5}}
    for method, base in (("multislerp", None), ("nuslerp", None), ("nuslerp", "b")):
        recipe = parse({"merge_method": method, "base_model": base, "models": models, **shared})
        assert recipe[:2] == (base, ("x", "y")) and recipe.options["weights"] == (1, 0.5)
    models = [{"model": "x"}, {"model": "y"}]
    for base, names in ((None, ("x", "y")), ("y", ("y", "x")), ("b", ("b", "x", "y"))):
        recipe = parse({"merge_method": "karcher", "base_model": base, "models": models})
        assert recipe[:2] == (None, names), "the base is one of the models"
    recipe = parse({"merge_method": "passthrough",
                    "models": [{"model": "x", "parameters": {"scale": 0.5}}]})  # fmt: skip
    assert recipe[:3] == (None, ("x",), {"method": "passthrough", "scale": 0.5})


def test_a_sum_of_weights_has_no_base():
    models = [{"model": m, "parameters": {"weight": w}} for m, w in (("x", 0.7), ("y", 0.4))]
    raw = {"merge_method": "linear", "base_model": "x", "models": models}
    assert parse(raw).base == "x"
    recipe = parse(raw | {"parameters": {"normalize": False}})
    assert recipe[:2] == (None, ("x", "y")) and recipe.options["normalize"] is False


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
    ends = [[(x.start, x.stop) for x in piece] for piece in parse(halves).slices]
    assert ends == [[(0, 3)] * 2, [(3, 4)] * 2]


def test_parameters_by_slice():
    """A slice's own value is before the recipe's, and a list is spread over each slice."""
    recipe = parse({
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "a", "layer_range": [0, 3], "parameters": {"scale": 0.5}}]},
            {"sources": [{"model": "b", "layer_range": [7, 9]}], "parameters": {"scale": [1, 2]}},
            {"sources": [{"model": "a", "layer_range": [1, 2]}]},
        ],
        "parameters": {"scale": [{"filter": "norm", "value": 3}, {"value": 4}]},
    })  # fmt: skip
    assert (recipe.base, recipe.models, recipe.options) == (None, ("a",), {"method": "passthrough"})
    assert recipe.slices == ((("a", 0, 3),), (("b", 7, 9),), (("a", 1, 2),))
    names = ["embed.w", *(f"layers.{i}.w" for i in range(6)), "final.w", "norm.w"]
    assert list(options_of(recipe, names)["scale"].values()) == [0.5] * 4 + [1, 2, 4, 4, 3]


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
    (changed(STOCK, merge_method="dare_tise"), "'dare_tise' .*model_stock, linear, .*'dare_ties'"),
    (changed(STOCK, merge_method="nearswap", parameters={"t": 0.1}), "nearswap .*exactly 1 model"),
    (changed(STOCK, merge_method="passthrough", base_model=None), "passthrough .*exactly 1 model"),
    (changed(STOCK, merge_method="nuslerp", models=[{"model": "x"}]), "nuslerp .*exactly 2 models"),
    (changed(STOCK, merge_method="nuslerp", parameters={"nuslerp_flatten": False, "weight": 1}),
     "nuslerp_flatten: false"),
    (changed(TIES, parameters={"normalize": [{"filter": "mlp", "value": True}]}), "normalize: "),
    (changed(STOCK, merge_method="model-stock"), "'model-stock' .*'model_stock'"),
    (changed(STOCK, modules={}), "modules "),
    (changed(STOCK, tokenizer_source="org/other"), "tokenizer_source 'org/other'"),
    (changed(STOCK, tokenizer={"source": "org/other"}), "'org/other'"),
    (changed(STOCK, tokenizer={"source": "base", "tokens": [1]}), "tokens: .*\\[1\\]"),
    (changed(STOCK, chat_template="chatml"), "chat_template "),
    (changed(STOCK, base_model=None), "base_model "),
    (changed(STOCK, models=[]), "models: "),
    (changed(STOCK, models=[{"modl": "x"}]), "'modl'"),
    (changed(STOCK, models=[{"model": "x", "parameters": {"weight": 1}}]),
     "parameters of x: .*model_stock .*'weight'"),
    (changed(STOCK, models=[{"model": "x", "parameters": {"filter_wise": True}}]),
     "parameters of x: 'filter_wise' .*of the recipe"),
    (changed(STOCK, slices=[]), "models .*slices"),
    (changed(TIES, models=[{"model": "org/a"}]), "weight .*org/a; .*parameters"),
    (changed(SLERP, parameters={}), "parameters.t "),
    (changed(SLERP, **sliced((2, 2))), r"layer_range of org/base: \[2, 2\]"),
    (changed(SLERP, **sliced((0, "4"))), "layer_range of org/base: "),
    (changed(SLERP, **sliced((0, 4, 8))), "layer_range of org/base: "),
    (changed(SLERP, slices=[{"sources": [
        {"model": "org/b", "layer_range": [0, 4]}]}]), "layer_range of org/base is missing"),
    (changed(SLERP, slices=[sliced((0, 4))["slices"][0] | {"residual_weight": 1}]),
     "residual_weight"),
    (changed(SLERP, slices=[sliced((0, 4))["slices"][0] | {"base_model": "x"}]), "base_model"),
    (changed(SLERP, merge_method="task_arithmetic", parameters={"weight": 1}, slices=[
        sliced((0, 4))["slices"][0], {"sources": [
            {"model": x, "layer_range": [4, 8]} for x in ("org/base", "org/b", "c")]}]),
     "same number of models"),
    (changed(SLERP, **sliced((0, 4), parameters={"t": 1})), "parameters.*: .*'t'"),
    (changed(SLERP, slices=[{"sources": [{"model": "a"}]}]), "layer_range"),
    (changed(SLERP, slices=[{"sources": [
        {"model": "org/base", "layer_range": [0, 4]}, {"model": "org/b", "layer_range": [4, 7]},
    ]}]), "layer_range: .*same number"),
    (changed(SLERP, slices=[{"sources": [
        {"model": "org/base", "layer_range": [0, 4]}, {"model": "org/b"}]}]),
     "layer_range .*missing"),
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
        by_tensor("t", [[[{"pattern": "mlp", "value": 1}, {"value": 0}]]], ["layers.0.mlp.w"])


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
    (TIES.replace("lambda: 0.9", f"lambda: {10**400}"), "lambda: .*number"),
    (TIES.replace("lambda: 0.9", "lambda: {value: [a]}"), "lambda: .*'a'"),
    (TIES.replace("density: 0.5", "density: [{filter: mlp}]"), "density .*'value'"),
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
