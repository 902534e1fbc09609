"""Merge units: they depend on names and shapes, and are the same in every checkpoint format."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modelstock_jax.errors import UserError
from modelstock_jax.merging import assign, model_stock, output_axis
from modelstock_jax.merging.tensor_roles import ROLES, block_position, role
from tests.merging.trees import TRANSFORMER, flat, nested, replicas


def _b32_tower(width=768, layers=12, positions=50, embed=512, classes=1000):
    """Return names and shapes of the ViT-B/32 image tower and head, as in this project."""
    norm = {"scale": (width,), "bias": (width,)}
    dense = {"kernel": (width, width), "bias": (width,)}
    block = {
        "layer_norm1": norm,
        "layer_norm2": norm,
        "self_attn": {f"{role}_proj": dense for role in ("q", "k", "v", "out")},
        "mlp": {
            "fc1": {"kernel": (width, 4 * width), "bias": (4 * width,)},
            "fc2": {"kernel": (4 * width, width), "bias": (width,)},
        },
    }
    tower = {
        "class_embedding": (width,),
        "patch_embedding": {"kernel": (32 * 32 * 3, width)},
        "position_embedding": (positions, width),
        "pre_layernorm": norm,
        "blocks": {f"block_{k:02d}": block for k in range(layers)},
        "post_layernorm": norm,
        "projection": {"kernel": (width, embed)},
    }
    return {"image_tower": tower, "head": {"kernel": (embed, classes), "bias": (classes,)}}


def _torch_shapes(shapes):
    """Return the shapes of the same tensors in a Hugging Face state dict (kernels transposed)."""
    out = {}
    for name, shape in shapes.items():
        name = re.sub(r"blocks\.block_0*(\d+)", r"layers.\1", name)
        kernel = name.endswith(".kernel")
        name = re.sub(r"\.(kernel|scale)$", ".weight", name)
        if name == "position_embedding":
            name = "embeddings.position_embedding.weight"
        out[name] = shape[::-1] if kernel else shape
    return out


def test_layer_gives_the_papers_154_units():
    shapes = list(flat(_b32_tower()).items())
    assert len({view.key for view in assign(shapes, "layer")}) == 154
    assert len({view.key for view in assign(shapes, "tensor")}) == 154 + 12 * 4  # q, k, v apart
    tree = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32),
        _b32_tower(),
        is_leaf=lambda x: isinstance(x, tuple),
    )
    stacked = jax.tree.map(lambda s: jax.ShapeDtypeStruct((2, *s.shape), s.dtype), tree)
    stats = jax.eval_shape(lambda a, b: model_stock(a, b, unit="layer"), tree, stacked)[1]
    assert len(set(stats.units.keys)) == 154


@pytest.mark.parametrize(
    "unit,num_heads",
    [
        ("tensor", None),
        ("layer", None),
        ("filter", None),
        ("head", 2),
        ("block", None),
        ("global", None),
    ],
)
def test_pytorch_layout_gives_the_same_merge(unit, num_heads):
    w0, w = replicas(TRANSFORMER, 2)
    torch0, torch = {}, {}
    for name, new in zip(TRANSFORMER, _torch_shapes(TRANSFORMER), strict=True):
        flip = name.endswith(".kernel")
        torch0[new] = w0[name].T if flip else w0[name]
        torch[new] = w[name].swapaxes(1, 2) if flip else w[name]
    merged, _ = model_stock(nested(w0), nested(w), unit=unit, num_heads=num_heads)
    torch_merged, _ = model_stock(torch0, torch, unit=unit, num_heads=num_heads, filter_axis=0)
    merged = flat(merged)
    for name, new in zip(TRANSFORMER, _torch_shapes(TRANSFORMER), strict=True):
        back = torch_merged[new].T if name.endswith(".kernel") else torch_merged[new]
        # Sums in another order change a ratio by 1e-16: visible only at ties of float32 rounding.
        np.testing.assert_array_max_ulp(np.asarray(merged[name]), np.asarray(back), 1)


def test_openai_and_openclip_names():
    width, heads = 8, 2
    shapes = [
        (f"visual.transformer.resblocks.0.{n}", s)
        for n, s in {
            "attn.in_proj_weight": (3 * width, width),
            "attn.in_proj_bias": (3 * width,),
            "attn.out_proj.weight": (width, width),
            "attn.out_proj.bias": (width,),
            "mlp.c_fc.weight": (32, width),
        }.items()
    ] + [("visual.proj", (width, 4))]
    views = assign(shapes, "head", num_heads=heads, filter_axis=0)
    assert [v.unit_shape for v in views] == [(2,), (2,), (2,), (), (), ()]
    assert views[0].view == (3, 2, 4, 8) and views[2].view == (8, 2, 4)
    assert views[0].key == views[2].key != views[1].key
    assert len({v.key for v in assign(shapes, "layer", filter_axis=0)}) == 6
    assert len({v.key for v in assign(shapes, "block", filter_axis=0)}) == 2
    assert output_axis("visual.proj", (width, 4), 0) == 1
    assert output_axis("visual.conv1.weight", (8, 3, 4, 4), 0) == 0  # not the last axis


def test_grouped_queries_share_a_key_value_head():
    name = "model.layers.0.self_attn."
    shapes = [
        (name + "q_proj.weight", (16, 16)),
        (name + "k_proj.weight", (8, 16)),
        (name + "v_proj.weight", (8, 16)),
        (name + "o_proj.weight", (16, 16)),
    ]
    views = assign(shapes, "head", num_heads=4, filter_axis=0)
    assert [v.view for v in views] == [(2, 8, 16), (2, 4, 16), (2, 4, 16), (16, 2, 8)]
    assert {v.key for v in views} == {"model.layers.0.self_attn.head_kernels"}


def test_heads_by_tower():
    shapes = [
        (f"{tower}.blocks.block_00.self_attn.q_proj.kernel", (12, 12))
        for tower in ("image_tower", "text_tower")
    ]
    views = assign(shapes, "head", num_heads={"image_tower": 3, "text_tower": 2})
    assert [v.unit_shape for v in views] == [(3,), (2,)]


@pytest.mark.parametrize(
    "unit,options,message",
    [
        ("layers", {}, "'layers'.*tensor, layer"),
        ("head", {}, "num_heads"),
        ("head", {"num_heads": 3}, "num_heads = 3"),
        ("head", {"num_heads": {"text": 2}}, "num_heads .* entry"),
        ("head", {"num_heads": 2.0}, "num_heads .*integer"),
        ("filter", {"filter_axis": 1}, "filter_axis .*0"),
    ],
)
def test_errors(unit, options, message):
    with pytest.raises(UserError, match=message):
        assign(list(TRANSFORMER.items()), unit, **options)


@pytest.mark.parametrize("unit", ["head", "block"])
def test_unknown_architecture(unit):
    shapes = [("stages.0.blocks.1.conv.weight", (8, 8, 3, 3)), ("fc.weight", (8, 8))]
    with pytest.raises(UserError, match=f"'{unit}'.*name"):
        assign(shapes, unit, num_heads=2)
    by_layer = assign(shapes, "layer", on_note=lambda note: None)
    assert by_layer == assign(shapes, "tensor")


def test_filters_of_a_pytorch_convolution_are_its_first_axis():
    # Other implementations use the last axis and get ratios of -2333 here.
    w0, w = replicas({"visual.conv1.weight": (8, 3, 4, 4)}, 2)
    ratio = model_stock(w0, w, unit="filter", filter_axis=0)[1].ratio["visual.conv1.weight"]
    assert ratio.shape == (8,)
    for f in range(8):
        expected = model_stock(
            {"w": w0["visual.conv1.weight"][f]}, {"w": w["visual.conv1.weight"][:, f]}
        )[1].ratio["w"]
        assert float(ratio[f]) == float(expected)


def test_units_and_geometry_need_no_jax():
    code = (
        "import sys, modelstock_jax.merging.units, modelstock_jax.merging.geometry; "
        "sys.exit('jax' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


def test_flax_variables_have_the_names_of_their_arrays():
    # As returned by `nnx.split`: the wrapper must not be part of the name.
    w0, w = replicas({f"self_attn.{role}_proj.kernel": (8, 8) for role in "qkv"}, 2)
    wrapped = [jax.tree.map(nnx.Param, nested(tree)) for tree in (w0, w)]
    merged, stats = model_stock(*wrapped, unit="layer")
    assert set(stats.units.names) == set(w0)
    assert set(stats.units.keys) == {"self_attn.in_proj.kernel"}
    plain, _ = model_stock(nested(w0), nested(w), unit="layer")
    for letter in "qkv":
        found = merged["self_attn"][f"{letter}_proj"]["kernel"]
        np.testing.assert_array_equal(found[...], plain["self_attn"][f"{letter}_proj"]["kernel"])


# Some names of each library, with tower (counted in order), depth and role.
NAMED = {
    "this project": """
        image_tower.class_embedding  0  -1  embeddings and head
        image_tower.patch_embedding.kernel  0  -1  embeddings and head
        image_tower.position_embedding  0  -1  embeddings and head
        image_tower.pre_layernorm.scale  0  -1  norms
        image_tower.blocks.block_00.layer_norm1.bias  0  0  norms
        image_tower.blocks.block_00.self_attn.k_proj.bias  0  0  biases
        image_tower.blocks.block_11.self_attn.out_proj.kernel  0  11  attention
        image_tower.blocks.block_11.mlp.fc1.kernel  0  11  MLP
        image_tower.post_layernorm.bias  0  inf  norms
        image_tower.projection.kernel  0  inf  embeddings and head
        text_tower.token_embedding  1  -1  embeddings and head
        text_tower.blocks.block_00.mlp.fc2.bias  1  0  biases
        text_tower.blocks.block_01.mlp.fc2.kernel  1  1  MLP
        logit_scale  0  inf  other
        head.kernel  0  inf  embeddings and head
        head.bias  0  inf  biases
    """,
    "hf clip": """
        vision_model.embeddings.class_embedding  0  -1  embeddings and head
        vision_model.embeddings.patch_embedding.weight  0  -1  embeddings and head
        vision_model.pre_layrnorm.weight  0  -1  norms
        vision_model.encoder.layers.0.self_attn.q_proj.weight  0  0  attention
        vision_model.encoder.layers.1.layer_norm2.weight  0  1  norms
        vision_model.post_layernorm.bias  0  inf  norms
        visual_projection.weight  0  inf  embeddings and head
        text_model.embeddings.token_embedding.weight  1  -1  embeddings and head
        text_model.encoder.layers.0.mlp.fc1.weight  1  0  MLP
        text_model.encoder.layers.1.mlp.fc1.bias  1  1  biases
        text_model.final_layer_norm.weight  1  inf  norms
        text_projection.weight  1  inf  embeddings and head
        logit_scale  0  inf  other
    """,
    "openai": """
        visual.class_embedding  0  -1  embeddings and head
        visual.positional_embedding  0  -1  embeddings and head
        visual.proj  0  inf  embeddings and head
        visual.conv1.weight  0  -1  other
        visual.ln_pre.weight  0  -1  norms
        visual.transformer.resblocks.0.attn.in_proj_weight  0  0  attention
        visual.transformer.resblocks.1.attn.in_proj_bias  0  1  biases
        visual.ln_post.bias  0  inf  norms
        transformer.resblocks.0.mlp.c_fc.weight  1  0  MLP
        transformer.resblocks.1.ln_2.weight  1  1  norms
        token_embedding.weight  1  -1  embeddings and head
        ln_final.weight  0  inf  norms
        text_projection  1  inf  embeddings and head
    """,
    "llama": """
        model.embed_tokens.weight  0  -1  embeddings and head
        model.layers.0.self_attn.o_proj.weight  0  0  attention
        model.layers.0.mlp.gate_proj.weight  0  0  MLP
        model.layers.1.input_layernorm.weight  0  1  norms
        model.norm.weight  0  inf  norms
        lm_head.weight  0  inf  embeddings and head
    """,
    "bert": """
        bert.embeddings.word_embeddings.weight  0  -1  embeddings and head
        bert.embeddings.LayerNorm.weight  0  -1  norms
        bert.encoder.layer.0.attention.self.query.weight  0  0  attention
        bert.encoder.layer.0.attention.output.dense.weight  0  0  attention
        bert.encoder.layer.0.attention.output.LayerNorm.weight  0  0  norms
        bert.encoder.layer.0.attention.output.LayerNorm.bias  0  0  norms
        bert.encoder.layer.1.intermediate.dense.weight  0  1  MLP
        bert.encoder.layer.1.output.dense.bias  0  1  biases
        bert.encoder.layer.1.output.LayerNorm.weight  0  1  norms
        bert.pooler.dense.weight  0  inf  MLP
        classifier.weight  0  inf  embeddings and head
    """,
    "gpt2": """
        wte.weight  0  -1  embeddings and head
        h.0.attn.c_attn.weight  0  0  attention
        h.1.mlp.c_proj.weight  0  1  MLP
        ln_f.weight  0  inf  norms
    """,
}


@pytest.mark.parametrize("library", NAMED)
def test_roles_and_positions_by_name(library):
    rows = [re.split(r" {2,}", line.strip()) for line in NAMED[library].strip().splitlines()]
    names = [name for name, *_ in rows]
    positions = block_position(names)
    towers = list(dict.fromkeys(p.tower for p in positions))
    found = [
        [name, str(towers.index(p.tower)), f"{p.depth:g}", role(name)]
        for name, p in zip(names, positions, strict=True)
    ]
    assert found == rows
    assert {what for *_, what in rows} <= set(ROLES)


@pytest.mark.parametrize("integer", [int, np.int32, np.int64, np.array])
def test_integers_of_numpy(integer):
    tensors = [(f"self_attn.{role}_proj.kernel", (8, 8)) for role in ("q", "k", "v", "out")]
    for heads in (integer(2), {"self_attn": integer(2)}):
        assert assign(tensors, "head", num_heads=heads)[0].unit_shape == (2,)
    stacked = [("layers.kernel", (3, 4, 4))]
    assert assign(stacked, scan_axes={"layers": integer(0)})[0].unit_shape == (3,)
    assert assign(tensors, "filter", filter_axis=integer(-1))[0].unit_shape == (8,)
    for wrong in (True, 2.0, np.bool_(True), "2"):
        with pytest.raises(UserError, match="num_heads"):
            assign(tensors, "head", num_heads=wrong)
        with pytest.raises(UserError, match="scan_axes"):
            assign(stacked, scan_axes={"layers": wrong})
