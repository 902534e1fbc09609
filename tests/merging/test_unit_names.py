"""Tensors that the units `layer`, `head` and `block` join, in the names of other libraries."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from modelstock_jax.errors import UserError
from modelstock_jax.merging import assign, init_noise, joined, model_stock, norms, report, ties
from modelstock_jax.merging.trees import named_leaves
from modelstock_jax.merging.units import unit_name
from tests.merging.trees import TRANSFORMER, flat, nested, replicas

# Per library: an attention's query, key and value, its block, and a tensor of the same block.
LIBRARIES = {
    "nnx": ("blocks.0.self_attn.{query,key,value}.kernel", "blocks.0", "blocks.0.mlp.kernel"),
    "nnx names": ("layers.1.{query,key,value}.kernel", "layers.1", "layers.1.norm.scale"),
    "linen": (
        "params.Block_0.MultiHeadDotProductAttention_0.{query,key,value}.kernel",
        "params.Block_0",
        "params.Block_0.Dense_0.kernel",
    ),
    "big_vision": (
        "img.Transformer.encoderblock_0.MultiHeadDotProductAttention_0.{query,key,value}.bias",
        "img.Transformer.encoderblock_0",
        "img.Transformer.encoderblock_0.MlpBlock_0.Dense_0.kernel",
    ),
    "flat big_vision": (
        "Transformer/encoderblock_0/MultiHeadDotProductAttention_0/{query,key,value}/kernel",
        "Transformer/encoderblock_0",
        "Transformer/encoderblock_0/LayerNorm_0/scale",
    ),
    "linen lists": ("blocks_3.attn.{query,key,value}.kernel", "blocks_3", "blocks_3.mlp.kernel"),
    "BERT": (
        "bert.encoder.layer.0.attention.self.{query,key,value}.weight",
        "bert.encoder.layer.0",
        "bert.encoder.layer.0.output.dense.weight",
    ),
    "Flax BERT": (
        "encoder.layer.0.attention.self.{query,key,value}.kernel",
        "encoder.layer.0",
        "encoder.layer.0.output.dense.kernel",
    ),
    "ViT": (
        "vit.encoder.layer.0.attention.attention.{query,key,value}.bias",
        "vit.encoder.layer.0",
        "vit.encoder.layer.0.intermediate.dense.weight",
    ),
    "Swin": (
        "encoder.layers.0.blocks.1.attention.self.{query,key,value}.weight",
        "encoder.layers.0.blocks.1",
        "encoder.layers.0.blocks.1.intermediate.dense.weight",
    ),
    "T5": (
        "decoder.block.0.layer.1.EncDecAttention.{q,k,v}.weight",
        "decoder.block.0",
        "decoder.block.0.layer.2.DenseReluDense.wi.weight",
    ),
    "t5x": (
        "decoder.layers_0.encoder_decoder_attention.{query,key,value}.kernel",
        "decoder.layers_0",
        "decoder.layers_0.mlp.wi.kernel",
    ),
    "equinox": (
        "layers.0.attention.{query_proj,key_proj,value_proj}.weight",
        "layers.0",
        "layers.0.mlp.layers.0.weight",
    ),
    "MaxText": (
        "params.decoder.layers_0.self_attention.{query,key,value}.kernel",
        "params.decoder.layers_0",
        "params.decoder.layers_0.mlp.wi_0.kernel",
    ),
    "HF CLIP": (
        "text_model.encoder.layers.0.self_attn.{q_proj,k_proj,v_proj}.weight",
        "text_model.encoder.layers.0",
        "text_model.encoder.layers.0.mlp.fc1.weight",
    ),
    "diffusers": (
        "transformer_blocks.0.attn1.{to_q,to_k,to_v}.weight",
        "transformer_blocks.0",
        "transformer_blocks.0.ff.net.2.weight",
    ),
    "DistilBERT": (
        "distilbert.transformer.layer.0.attention.{q_lin,k_lin,v_lin}.weight",
        "distilbert.transformer.layer.0",
        "distilbert.transformer.layer.0.ffn.lin1.weight",
    ),
    "Llama": (
        "layers.0.attention.{wq,wk,wv}.weight",
        "layers.0",
        "layers.0.feed_forward.w1.weight",
    ),
}


def _expand(pattern):
    start, names, end = pattern.replace("}", "{").split("{")
    return [start + name + end for name in names.split(",")]


def _keys(names, unit, shape=(8, 8), **options):
    return [view.key for view in assign([(name, shape) for name in names], unit, **options)]


@pytest.mark.parametrize("library", LIBRARIES)
def test_layer_joins_query_key_and_value(library):
    pattern, block, other = LIBRARIES[library]
    names = [*_expand(pattern), other, "embed.weight"]
    q, k, v, *rest = _keys(names, "layer")
    assert q == k == v and rest == names[3:] and q not in names
    assert joined(assign([(name, (8, 8)) for name in names], "layer")) == 1
    assert _keys(names, "block") == [block] * 4 + ["embed.weight"]


def test_attentions_are_separate():
    names = [
        f"layers.{layer}.{attention}.{name}.kernel"
        for layer in (0, 1)
        for attention in ("self_attn", "cross_attn")
        for name in ("query", "key", "value")
    ]
    keys = _keys(names, "layer")
    assert len(set(keys)) == 4 and all(len(set(keys[i : i + 3])) == 1 for i in range(0, 12, 3))
    # Two attentions in one module, and their outputs.
    names = [f"attn.{n}.weight" for n in ("q", "k", "v", "to_q", "to_k", "to_v")]
    assert len(set(_keys(names, "layer"))) == 2


@pytest.mark.parametrize(
    "names",
    [
        ["query_tokens", "key_embedding.weight", "value_embedding.weight"],
        ["memory.query", "memory.key.kernel", "memory.value.kernel"],
        ["memory.query.kernel", "attn.query.weight", "attn.value.weight"],
        ["attn.query.kernel", "attn.key.kernel", "attn.value.bias"],  # not of one kind
        ["a.query.kernel", "b.key.kernel", "c.value.kernel"],
        ["attn.query_norm.weight", "attn.key_norm.weight", "attn.value_norm.weight"],
    ],
)
def test_layer_joins_only_complete_attentions(names):
    notes = []
    assert _keys(names, "layer", on_note=notes.append) == names
    assert len(notes) == 1 and "'layer'" in notes[0] and "query, key, value" in notes[0]


def test_layer_joins_only_equal_numbers_of_axes():
    shapes = [("attn.query.kernel", (8, 2, 4)), ("attn.key.kernel", (8, 8))]
    shapes.append(("attn.value.kernel", (8, 2, 4)))
    assert not joined(assign(shapes, "layer", on_note=lambda note: None))
    grouped = [(f"attn.{n}.kernel", (8, h, 4)) for n, h in (("query", 4), ("key", 2), ("value", 2))]
    assert joined(assign(grouped, "layer")) == 1


@pytest.mark.parametrize(
    "name",
    [
        "h.0.attn.c_attn.weight",
        "blocks.0.attn.qkv.weight",
        "transformer.h.0.self_attention.query_key_value.weight",
        "encoder.layers.encoder_layer_0.self_attention.in_proj_weight",
    ],
)
def test_fused_tensors_need_no_joining(name):
    notes = []
    assert _keys([name, "norm.weight"], "layer", on_note=notes.append) == [name, "norm.weight"]
    assert not notes
    assert _keys([name, "norm.weight"], "block")[0] in name


def test_convolutional_blocks_are_not_blocks():
    names = ["stages.0.blocks.1.conv.weight", "layers_0.query.weight", "block_0.kernel"]
    with pytest.raises(UserError, match="'block'"):
        _keys(names, "block")


class _NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.anything = nnx.MultiHeadAttention(4, 8, 12, decode=False, rngs=rngs)
        self.mlp = nnx.Linear(8, 8, rngs=rngs)


class _LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.MultiHeadDotProductAttention(4, qkv_features=12)(x, x)
        return linen.Dense(8)(x)


def _nnx_shapes():
    state = nnx.eval_shape(lambda: nnx.state(_NNXBlock(nnx.Rngs(0)), nnx.Param))
    return {name: leaf.shape for name, leaf in named_leaves(state).items()}


def _linen_shapes():
    init = jax.eval_shape(_LinenBlock().init, jax.random.key(0), jnp.zeros((1, 3, 8)))
    return {name: leaf.shape for name, leaf in named_leaves(init).items()}


@pytest.mark.parametrize("shapes", [_nnx_shapes, _linen_shapes])
def test_heads_are_an_axis_in_flax(shapes):
    shapes = shapes()
    by_filter, by_head, by_layer = (
        dict(zip(shapes, assign(list(shapes.items()), unit), strict=True))
        for unit in ("filter", "head", "layer")
    )
    assert joined(by_layer.values()) == 2
    query = next(name for name in shapes if name.endswith("query.kernel"))
    module = query.removesuffix("query.kernel")
    assert shapes[query] == (8, 4, 3)
    for name in shapes:
        if not name.startswith(module):
            continue
        role, kind = name.removeprefix(module).split(".")
        qkv = role != "out"
        filters = 4 if qkv else 8
        assert by_filter[name].unit_shape == (() if not qkv and kind == "bias" else (filters,))
        assert by_head[name].unit_shape == (() if not qkv and kind == "bias" else (4,)), name
        group = "head_kernels" if kind == "kernel" else "head_biases"
        assert by_head[name].key == (f"{module}{group}" if qkv or kind == "kernel" else name)
    assert assign(list(shapes.items()), "head", num_heads=4) == list(by_head.values())
    assert assign(list(shapes.items()), "head", num_heads={"x": 3}) == list(by_head.values())
    with pytest.raises(UserError, match=r"num_heads = 2.*query.*4 query heads|num_heads = 2.*4"):
        assign(list(shapes.items()), "head", num_heads=2)


def test_kernels_of_convolutions_have_no_head_axis():
    # An attention of convolutions: [width, inputs, outputs].
    conv = {"query": (1, 8, 2), "key": (1, 8, 2), "value": (1, 8, 8), "out": (1, 8, 8)}
    shapes = [(f"attn.{name}.kernel", shape) for name, shape in conv.items()]
    assert [view.unit_shape for view in assign(shapes, "filter")] == [(2,), (2,), (8,), (8,)]
    torch = [(f"attn.{name}.weight", (6, 2, 1)) for name in ("query", "key", "value")]
    views = assign(torch, "filter", filter_axis=0)
    assert [view.unit_shape for view in views] == [(6,)] * 3


@pytest.mark.parametrize("unit", ["head", "filter"])
def test_grouped_queries_with_a_head_axis_equal_joined_heads(unit):
    heads, key_value, width, size = 4, 2, 6, 3
    flax = {
        "self_attn.query.kernel": (width, heads, size),
        "self_attn.query.bias": (heads, size),
        "self_attn.key.kernel": (width, key_value, size),
        "self_attn.key.bias": (key_value, size),
        "self_attn.value.kernel": (width, key_value, size),
        "self_attn.value.bias": (key_value, size),
        "self_attn.out.kernel": (heads, size, width),
    }
    w0, w = replicas(flax, 2)
    merged, stats = model_stock(w0, w, unit=unit)
    if unit == "filter":
        for h in range(heads):
            name = "self_attn.query.kernel"
            one = model_stock({"a": w0[name][:, h]}, {"a": w[name][:, :, h]})
            assert float(stats.ratio[name][h]) == float(one[1].ratio["a"])
            np.testing.assert_array_equal(merged[name][:, h], one[0]["a"])
        return

    def joined_names(tree, lead):
        out = {}
        for name, x in tree.items():
            new = name.replace("query", "q_proj").replace("key", "k_proj")
            new = new.replace("value", "v_proj").replace("out.", "out_proj.")
            shape = (-1, width) if "out" in new else ((-1,) if "bias" in new else (width, -1))
            out[new] = x.reshape(x.shape[:lead] + shape)
        return out

    two_axes, two_stats = model_stock(
        joined_names(w0, 0), joined_names(w, 1), unit="head", num_heads=heads
    )
    assert stats.ratio["self_attn.query.kernel"].shape == (key_value,)
    for (name, x), y in zip(joined_names(merged, 0).items(), two_axes.values(), strict=True):
        np.testing.assert_array_max_ulp(np.asarray(x), np.asarray(y), 1)
        assert stats.units.keys[0] == two_stats.units.keys[0], name


def test_warns_once_per_model_that_nothing_is_joined():
    w0, w = replicas({"once.conv.kernel": (3, 4)}, 2)
    with pytest.warns(
        UserWarning, match=r"^unit 'layer' .* unit 'tensor'; .*q_proj.*once"
    ) as found:
        model_stock(w0, w, unit="layer")
    assert len(found) == 1 and "\n" not in str(found[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model_stock(w0, w, unit="layer")
        jax.jit(lambda a, b: model_stock(a, b, unit="layer"))(w0, w)
        model_stock(*map(nested, replicas(TRANSFORMER, 2)), unit="layer")


def _by_role(name, shape):
    assert all(isinstance(n, int) for n in shape)
    if "bias" in name:
        return ("biases", len(shape))
    return None if "embedding" in name else name.split(".")[-1]


def test_a_function_is_a_unit():
    w0, w = map(nested, replicas(TRANSFORMER, 2))
    merged, stats = model_stock(w0, w, unit=_by_role)
    keys = dict(zip(stats.units.names, stats.units.keys, strict=True))
    assert set(keys.values()) == {"('biases', 1)", "kernel", "scale", "position_embedding"}
    assert {row["unit"] for row in report(stats) if "bias" in row["name"]} == {"('biases', 1)"}
    # Independent reference: all biases as one vector.
    biases = [name for name in keys if "bias" in name]
    a0 = np.concatenate([flat(w0)[n].ravel() for n in biases])
    a = np.concatenate([flat(w)[n].reshape(2, -1) for n in biases], axis=1)
    alone, alone_stats = model_stock({"a": a0}, {"a": a})
    assert float(flat(stats.ratio)["head.bias"]) == pytest.approx(
        float(alone_stats.ratio["a"]), abs=1e-7
    )
    traced, traced_stats = jax.jit(model_stock, static_argnames="unit")(w0, w, unit=_by_role)
    assert traced_stats.units == stats.units
    jax.tree.map(np.testing.assert_array_equal, traced, merged)
    assert jax.tree.map(jnp.shape, init_noise(w0, unit=_by_role)) == jax.tree.map(lambda x: (), w0)
    lengths = flat(norms(w0, w, unit=_by_role))
    np.testing.assert_allclose(
        lengths["head.bias"], np.linalg.norm(a - a0, axis=1), rtol=1e-6, atol=0
    )
    ties(w0, w, unit=_by_role)
    assert unit_name(_by_role) == "_by_role"


def test_different_keys_are_different_units():
    keys = {"a": 1, "b": "1", "c": None, "d": "c", "e": True}
    views = assign([(name, (2,)) for name in keys], lambda name, shape: keys[name])
    a, b, c, d, e = (view.key for view in views)
    assert len({a, b, c, d}) == 4 and a == e and c == "c"  # 1 == True in Python


@pytest.mark.parametrize(
    "function,message",
    [
        (lambda name, shape: [name], "list .*'a.b'.*not hashable"),
        (lambda name, shape: {}[name], r"KeyError .*'a.b' of shape \(2,\)"),
        (lambda name: name, "TypeError .*'a.b'"),
    ],
)
def test_errors_of_a_function(function, message):
    with pytest.raises(UserError, match=message):
        assign([("a.b", (2,))], function)
