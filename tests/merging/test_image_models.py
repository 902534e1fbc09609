"""Merge units, roles and depths of SigLIP, ViT, DeiT, DINOv2, ConvNeXt and ResNet."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from modelstock_jax.errors import UserError
from modelstock_jax.merging import assign, joined, model_stock
from modelstock_jax.merging.tensor_roles import ROLES, block_position, role
from tests.merging.image_models import BODIES, OURS, classified
from tests.merging.trees import flat, nested, replicas

THEIRS = {**BODIES, **{f"{name} classifier": classified(name) for name in BODIES}}
MODELS = {**{name: (shapes, 0) for name, shapes in THEIRS.items()}} | {
    f"our {name}": (shapes, -1) for name, shapes in OURS.items()
}


def is_convolutional(model):
    return "convnext" in model or "resnet" in model


def has_two_towers(model):
    return model in ("siglip", "our siglip")


def views(model, unit, **options):
    shapes, axis = MODELS[model]
    assigned = assign(
        list(shapes.items()), unit, filter_axis=axis, on_note=lambda note: None, **options
    )
    return dict(zip(shapes, assigned, strict=True))


@pytest.mark.parametrize("model", MODELS)
def test_layer_joins_query_key_and_value_of_each_attention(model):
    found = views(model, "layer")
    keys = {name: view.key for name, view in found.items()}
    moved = {name for name, key in keys.items() if key != name}
    qkv = re.compile(r".*\.(?:query|key|value|[qkv]_proj)\.(?:weight|bias|kernel)")
    assert moved == set(filter(qkv.fullmatch, keys))
    # Two layers of each tower, kernels and biases; the pooling attention of SigLIP is fused.
    towers = 2 if has_two_towers(model) else 1
    assert joined(found.values()) == (0 if is_convolutional(model) else 4 * towers)


@pytest.mark.parametrize("model", MODELS)
def test_block_joins_each_block_and_nothing_else(model):
    block = re.compile(
        r"(?P<block>(?:.*?\.)?(?:stages\.\d+\.layers\.\d+|encoder\.layers?\.\d+|block_\d+))\..*"
    )
    for name, view in views(model, "block").items():
        match = block.fullmatch(name)
        assert view.key == (match["block"] if match else name)
    keys = {view.key for view in views(model, "block").values()}
    outside = [n for n in MODELS[model][0] if not block.fullmatch(n)]
    deep = is_convolutional(model) or has_two_towers(model)  # Two stages, or towers, of two.
    assert len(keys) == len(outside) + (4 if deep else 2)


@pytest.mark.parametrize("model", [name for name in MODELS if not is_convolutional(name)])
def test_head_splits_every_attention(model):
    found = views(model, "head", num_heads=2)
    attention = re.compile(
        r"(?P<module>.*\.(?:attention\.attention|self_attn|head\.attention|pool))\."
        r"(?:o|query|key|value|(?:q|k|v|in|out)_proj)[._](?P<kind>weight|bias|kernel)"
    )
    for name, view in found.items():
        match = attention.fullmatch(name.replace("output.dense", "attention.o"))
        if match is None or re.search(r"\.(?:out_proj|dense)\.bias$", name):
            assert (view.key, view.unit_shape) == (name, ()), name
            continue
        kind = "biases" if match["kind"] == "bias" else "kernels"
        assert (view.key, view.unit_shape) == (f"{match['module']}.head_{kind}", (2,)), name
    if "siglip" in model:  # [q, k, v] of all heads, in one tensor.
        fused = "pool.in_proj.kernel" if "our" in model else "head.attention.in_proj_weight"
        (view,) = (v for n, v in found.items() if n.endswith(fused))
        assert view.view == ((16, 3, 2, 8) if "our" in model else (3, 2, 8, 16))


@pytest.mark.parametrize("model", [name for name in MODELS if is_convolutional(name)])
def test_head_says_that_there_is_no_attention(model):
    for options in ({}, {"num_heads": 2}):
        with pytest.raises(UserError, match=r"'head'.*no attention"):
            views(model, "head", **options)


@pytest.mark.parametrize("model", MODELS)
def test_filter_is_an_output_channel(model):
    """A vector is one unit, however many axes of length 1 it is stored with."""
    for name, view in views(model, "filter").items():
        shape = MODELS[model][0][name]
        vector = sum(n > 1 for n in shape) < 2
        last = MODELS[model][1] or re.search(
            r"(?:position|token)_embeddings?(?:\.weight)?$|register_tokens$", name
        )
        expected = () if vector else (shape[-1] if last else shape[0],)
        assert view.unit_shape == expected, name


def test_units_do_not_depend_on_axes_of_length_1():
    for name in ("pool.probe", "grn.gamma", "mask_token"):
        assert assign([(name, (1, 8))], "filter")[0].unit_shape == ()
    assert assign([("mlp.kernel", (1, 8))], "filter")[0].unit_shape == (8,)


@pytest.mark.parametrize("unit", ["tensor", "layer", "filter", "head", "block"])
def test_both_layouts_of_a_pooling_attention_give_the_same_merge(unit):
    ours = {n: s for n, s in OURS["siglip"].items() if ".pool." in n or ".block_00." in n}
    w0, w = replicas(ours, 2)
    rename = (
        ("image_tower.pool", "vision_model.head.attention"),
        ("in_proj.", "in_proj_"),
        ("kernel", "weight"),
    )
    w0_theirs, w_theirs = {}, {}
    for name in ours:
        new = name
        for a, b in rename:
            new = new.replace(a, b)
        transposed = name.endswith(".kernel")
        w0_theirs[new] = w0[name].T if transposed else w0[name]
        w_theirs[new] = w[name].swapaxes(1, 2) if transposed else w[name]
    heads = {"num_heads": 2} if unit == "head" else {}
    merged = flat(model_stock(nested(w0), nested(w), unit=unit, **heads)[0])
    theirs, _ = model_stock(w0_theirs, w_theirs, unit=unit, filter_axis=0, **heads)
    for new, name in zip(w0_theirs, ours, strict=True):
        back = theirs[new].T if name.endswith(".kernel") else theirs[new]
        # Sums in another order change a ratio by 1e-16: visible only at ties of float32 rounding.
        np.testing.assert_array_max_ulp(np.asarray(merged[name]), np.asarray(back), 1)


# Names, with depth and role. The blocks before these are in `MODELS`.
NAMED = {
    "siglip": """
        vision_model.embeddings.patch_embedding.weight  -1  embeddings and head
        vision_model.encoder.layers.1.self_attn.q_proj.weight  1  attention
        vision_model.post_layernorm.weight  inf  norms
        vision_model.head.probe  inf  embeddings and head
        vision_model.head.attention.in_proj_weight  inf  attention
        vision_model.head.mlp.fc1.weight  inf  MLP
        text_model.head.weight  inf  embeddings and head
    """,
    "vit classifier": """
        vit.embeddings.cls_token  -1  embeddings and head
        vit.encoder.layer.1.attention.attention.query.weight  1  attention
        vit.encoder.layer.0.layernorm_before.bias  0  norms
        vit.encoder.layer.0.intermediate.dense.weight  0  MLP
        vit.layernorm.weight  inf  norms
        classifier.weight  inf  embeddings and head
    """,
    "dinov2_with_registers": """
        embeddings.mask_token  -1  embeddings and head
        embeddings.register_tokens  -1  embeddings and head
        encoder.layer.1.layer_scale1.lambda1  1  norms
    """,
    "dinov2 swiglu": """
        encoder.layer.1.mlp.weights_in.weight  1  MLP
    """,
    "convnext classifier": """
        convnext.embeddings.patch_embeddings.weight  -1  embeddings and head
        convnext.embeddings.layernorm.weight  -1  norms
        convnext.encoder.stages.0.layers.0.dwconv.weight  0  convolutions
        convnext.encoder.stages.0.layers.1.pwconv1.weight  1  MLP
        convnext.encoder.stages.1.downsampling_layer.0.weight  2  norms
        convnext.encoder.stages.1.downsampling_layer.0.bias  2  norms
        convnext.encoder.stages.1.downsampling_layer.1.weight  2  convolutions
        convnext.encoder.stages.1.downsampling_layer.1.bias  2  biases
        convnext.encoder.stages.1.layers.0.layer_scale_parameter  2  norms
        convnext.encoder.stages.1.layers.1.dwconv.bias  3  biases
        convnext.layernorm.weight  inf  norms
        classifier.weight  inf  embeddings and head
    """,
    "convnextv2": """
        encoder.stages.1.layers.1.grn.weight  3  norms
        encoder.stages.1.layers.1.grn.bias  3  norms
    """,
    "resnet bottleneck classifier": """
        resnet.embedder.embedder.convolution.weight  -1  embeddings and head
        resnet.embedder.embedder.normalization.running_var  -1  norms
        resnet.encoder.stages.0.layers.1.layer.2.convolution.weight  1  convolutions
        resnet.encoder.stages.1.layers.0.layer.0.convolution.weight  2  convolutions
        resnet.encoder.stages.1.layers.0.shortcut.convolution.weight  2  convolutions
        resnet.encoder.stages.1.layers.0.shortcut.normalization.weight  2  norms
        resnet.encoder.stages.1.layers.1.layer.0.normalization.running_mean  3  norms
        classifier.1.weight  inf  embeddings and head
    """,
    "our siglip": """
        image_tower.pool.probe  inf  embeddings and head
        image_tower.pool.in_proj.kernel  inf  attention
        image_tower.pool.out_proj.kernel  inf  attention
        image_tower.pool.mlp.fc1.kernel  inf  MLP
    """,
    "our dinov2_with_registers": """
        image_tower.register_tokens  -1  embeddings and head
        image_tower.blocks.block_01.layer_scale1  1  norms
    """,
    "our dinov2 swiglu": """
        image_tower.blocks.block_01.mlp.weights_in.kernel  1  MLP
    """,
    "our convnextv2": """
        image_tower.patch_embedding.kernel  -1  embeddings and head
        image_tower.patch_norm.scale  -1  norms
        image_tower.blocks.block_01.depthwise.kernel  1  convolutions
        image_tower.blocks.block_02.grn.scale  2  norms
        image_tower.blocks.block_02.grn.bias  2  norms
        image_tower.blocks.block_03.fc1.kernel  3  MLP
        image_tower.post_layernorm.scale  inf  norms
    """,
    "our resnet bottleneck": """
        image_tower.stem.kernel  -1  embeddings and head
        image_tower.stem_norm.mean  -1  norms
        image_tower.blocks.block_02.conv1.kernel  2  convolutions
        image_tower.blocks.block_02.norm1.var  2  norms
        image_tower.blocks.block_02.shortcut.kernel  2  convolutions
        image_tower.blocks.block_03.conv3.kernel  3  convolutions
    """,
}


@pytest.mark.parametrize("model", NAMED)
def test_roles_and_depths(model):
    names = list(MODELS[model][0])
    depths = dict(zip(names, block_position(names), strict=True))
    rows = [re.split(r" {2,}", line.strip()) for line in NAMED[model].strip().splitlines()]
    assert [[name, f"{depths[name].depth:g}", role(name)] for name, *_ in rows] == rows
    assert {what for *_, what in rows} <= set(ROLES)
    assert len({position.tower for position in depths.values()}) == 1 + has_two_towers(model)


def test_a_downsampling_layer_has_the_depth_of_the_block_after_it():
    names = [f"image_tower.blocks.block_{k:02d}.depthwise.kernel" for k in range(4)]
    names += ["image_tower.downsample_02.norm.scale", "image_tower.downsample_02.conv.kernel"]
    *_, norm, kernel = block_position(names)
    assert norm == kernel == ("image_tower.blocks", 2.0)
    assert [role(name) for name in names[-2:]] == ["norms", "convolutions"]


def test_every_depth_of_the_stages_occurs_once():
    names = [
        f"encoder.stages.{stage}.layers.{layer}.dwconv.weight"
        for stage, depth in enumerate((3, 3, 27, 3))
        for layer in range(depth)
    ]
    assert [position.depth for position in block_position(names)] == list(map(float, range(36)))
    # The order of the names, and names of one stage only, do not matter.
    assert [position.depth for position in block_position(names[:1] + names[:0:-1])] == [
        0.0, *map(float, range(35, 0, -1))
    ]  # fmt: skip
    assert [p.depth for p in block_position(["stages.1.w", "stages.2.w"])] == [1.0, 2.0]


@pytest.mark.parametrize(
    "name",
    [
        "visual.conv1.weight",
        "down_blocks.0.resnets.0.conv1.weight",
        "down_blocks.0.resnets.0.conv_shortcut.weight",
        "layer1.0.downsample.0.weight",
        "model.encoder.conv1.weight",
        "decoder.mask_token",
        "stem.0.weight",
        "mixer.out_proj.weight",
    ],
)
def test_roles_of_other_models_are_unchanged(name):
    assert role(name) == "other"
    depth = next(p.depth for p in block_position([name, "layers.0.w", "layers.1.w"]))
    assert depth in (-1.0, 0.0, math.inf)
