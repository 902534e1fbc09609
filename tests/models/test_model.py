"""Towers: shapes, causality, pooling, dtypes, vmapped replicas."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modelstock_jax.errors import UserError
from modelstock_jax.models.clip import CLIPConfig
from modelstock_jax.models.compute import Compute
from modelstock_jax.models.model import (
    abstract_params,
    classifier,
    encode_image,
    encode_text,
    image_activations,
    init,
    text_activations,
)
from modelstock_jax.models.transformer import _ACTIVATIONS, end_of_text, patches
from tests.models import by_numpy, small

# Compiled once per config: without jit a tower takes seconds.
image_features = jax.jit(encode_image, static_argnums=(0, 3))
text_features = jax.jit(encode_text, static_argnums=(0, 3))
CONFIG = small.config()
PARAMS = small.perturbed(CONFIG)
image_layers = jax.jit(image_activations, static_argnums=0)
classify = jax.jit(classifier(CONFIG))


def replica(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    head = {"kernel": rng.standard_normal((64, 5)), "bias": rng.standard_normal(5)}
    tower = small.perturbed(CONFIG, seed)["image_tower"]
    return {"image_tower": tower, "head": jax.tree.map(np.float32, head)}


def names(tree) -> dict:
    return {
        ".".join(str(k.key) for k in path): leaf.shape
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def block(prefix: str, width: int, inner: int) -> dict:
    shapes = {}
    for norm in ("layer_norm1", "layer_norm2"):
        shapes |= {f"{prefix}.{norm}.scale": (width,), f"{prefix}.{norm}.bias": (width,)}
    for proj in ("q_proj", "k_proj", "v_proj", "out_proj"):
        shapes[f"{prefix}.self_attn.{proj}.kernel"] = (width, width)
        shapes[f"{prefix}.self_attn.{proj}.bias"] = (width,)
    shapes |= {f"{prefix}.mlp.fc1.kernel": (width, inner), f"{prefix}.mlp.fc1.bias": (inner,)}
    return shapes | {f"{prefix}.mlp.fc2.kernel": (inner, width), f"{prefix}.mlp.fc2.bias": (width,)}


def test_init_draws_the_agreed_tree():
    expected = {
        "image_tower.class_embedding": (96,),
        "image_tower.patch_embedding.kernel": (108, 96),
        "image_tower.position_embedding": (17, 96),
        "image_tower.pre_layernorm.scale": (96,),
        "image_tower.pre_layernorm.bias": (96,),
        "image_tower.post_layernorm.scale": (96,),
        "image_tower.post_layernorm.bias": (96,),
        "image_tower.projection.kernel": (96, 64),
        "text_tower.token_embedding": (60, 96),
        "text_tower.position_embedding": (16, 96),
        "text_tower.final_layernorm.scale": (96,),
        "text_tower.final_layernorm.bias": (96,),
        "text_tower.projection.kernel": (96, 64),
        "logit_scale": (),
    }
    expected |= block("text_tower.blocks.block_00", 96, 384)
    expected |= block("image_tower.blocks.block_00", 96, 384)
    second = block("image_tower.blocks.block_01", 96, 384)
    assert names(abstract_params(CONFIG)) == expected | second
    # Few layers, because every draw is compiled.
    params = init(small.replaced(CONFIG, "vision", num_hidden_layers=1), jax.random.key(0))
    assert names(params) == expected
    assert type(params["image_tower"]["blocks"]) is dict
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    # The standard deviations of CLIP's released code.
    first = params["image_tower"]["blocks"]["block_00"]
    for name, std in (("q_proj", 96**-0.5), ("out_proj", 96**-0.5 * 2**-0.5)):
        # 9,216 draws: the standard error of a standard deviation is 0.7 %; tolerance: four of them.
        np.testing.assert_allclose(first["self_attn"][name]["kernel"].std(), std, rtol=0.03)
    assert float(params["logit_scale"]) == pytest.approx(2.6592)
    assert not first["mlp"]["fc1"]["bias"].any()
    assert not np.array_equal(
        first["self_attn"]["q_proj"]["kernel"], first["self_attn"]["k_proj"]["kernel"]
    )


def test_patches_are_flattened_row_column_channel():
    # One pixel of one channel in patch (1, 2) reaches one row of the kernel.
    tower = jax.tree.map(np.zeros_like, PARAMS["image_tower"])
    x = np.zeros((1, 24, 24, 3), np.float32)
    x[0, 6 + 4, 12 + 5, 2] = 1.0
    flat = np.asarray(patches(jnp.asarray(x), 6))
    assert flat.shape == (1, 16, tower["patch_embedding"]["kernel"].shape[0])
    assert np.argwhere(flat[0]).tolist() == [[1 * 4 + 2, (4 * 6 + 5) * 3 + 2]]


def test_text_before_the_end_is_causal():
    # Tokens after the end of text have no effect; tokens before it do.
    ids = small.ids()
    end = np.asarray(end_of_text(ids, small.EOS))
    encode = functools.partial(text_features, CONFIG, PARAMS["text_tower"])
    base = np.asarray(encode(ids))
    after, before = ids.copy(), ids.copy()
    for i, e in enumerate(end):
        after[i, e + 1 :] = np.random.default_rng(i).integers(8, 60, ids.shape[1] - e - 1)
        before[i, 1] = 8 + (before[i, 1] - 8 + 1) % 52
    np.testing.assert_array_equal(encode(after), base)
    assert (np.abs(np.asarray(encode(before)) - base).max(axis=1) > 1e-3).all()


def test_both_rules_of_the_end_of_text():
    ids = jnp.array([[0, 9, 30, 7, 7], [0, 7, 50, 7, 59], [0, 3, 4, 5, 6]])
    assert end_of_text(ids, 7).tolist() == [3, 1, 0]
    assert end_of_text(ids, 2).tolist() == [2, 4, 4]


def test_the_config_chooses_the_rule_of_the_end_of_text():
    ids = small.ids()  # Every text has ids above the end's, so the rules differ.
    legacy = small.replaced(CONFIG, "text", eos_token_id=2)
    new = text_features(CONFIG, PARAMS["text_tower"], ids)
    old = text_features(legacy, PARAMS["text_tower"], ids)
    assert (np.abs(new - old).max(axis=1) > 1e-3).all()


def test_shorter_texts_need_no_padding():
    ids = small.ids()
    ids[:, 9:] = small.EOS
    whole = text_features(CONFIG, PARAMS["text_tower"], ids)
    short = text_features(CONFIG, PARAMS["text_tower"], ids[:, :10])
    # Sums of another length are ordered differently: some float32 rounding of values near 1.
    np.testing.assert_allclose(short, whole, atol=5e-6, rtol=0)


def faint(tower: dict) -> dict:
    """The tower with small embeddings, as after training: epsilon of the first norm matters."""
    scale = {"class_embedding", "patch_embedding", "position_embedding", "token_embedding"}
    return {
        name: jax.tree.map(lambda a: np.float32(0.03) * a, x) if name in scale else x
        for name, x in tower.items()
    }


def test_towers_by_numpy():
    tower, x = faint(PARAMS["image_tower"]), small.images()
    expected = by_numpy.image_features(CONFIG, tower, x)
    # Two float32 blocks, features near 1. Flax's epsilon or the other gelu changes them by > 1e-3.
    np.testing.assert_allclose(
        image_layers(CONFIG, tower, x)["projection"], expected, atol=1e-5, rtol=0
    )
    tower, ids = faint(PARAMS["text_tower"]), small.ids()
    expected = by_numpy.text_features(CONFIG, tower, ids)
    np.testing.assert_allclose(text_features(CONFIG, tower, ids), expected, atol=1e-5, rtol=0)


def test_head_by_numpy():
    params, x = replica(0), small.images()
    features = by_numpy.image_features(CONFIG, params["image_tower"], x)
    unit = features / np.sqrt((features**2).sum(1))[:, None]
    expected = unit @ params["head"]["kernel"] + params["head"]["bias"][None]
    # Float32 towers, and 64 products of size 1.
    np.testing.assert_allclose(classify(params, x), expected, atol=1e-5, rtol=0)


def test_vmapped_replicas_equal_separate_ones():
    replicas = [replica(0), replica(1)]
    x = np.stack([small.images(seed=4), small.images(seed=5)])
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *replicas)
    together = jax.jit(jax.vmap(classifier(CONFIG)))(stacked, x)
    for i, params in enumerate(replicas):
        # Batched products are rounded in another order; logits are of order 1.
        np.testing.assert_allclose(together[i], classify(params, x[i]), atol=2e-5, rtol=0)


def test_vmapped_replicas_use_products_not_convolutions():
    # A convolution with vmapped kernels becomes a grouped one, which is several times slower.
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), replica(0), replica(1))
    x = np.zeros((2, 3, 18, 30, 3), np.float32)  # Another size: positions are interpolated.
    program = str(jax.make_jaxpr(jax.vmap(classifier(CONFIG)))(stacked, x))
    assert "dot_general" in program and "conv" not in program


def test_compute_options_change_values_only_by_rounding():
    tower, x = PARAMS["image_tower"], small.images()
    full = np.asarray(image_layers(CONFIG, tower, x)["projection"])
    # The same products, fused differently: float32 rounding of values near 1.
    remat = image_features(CONFIG, tower, x, Compute(remat=True))
    np.testing.assert_allclose(remat, full, atol=1e-5, rtol=0)
    half = image_features(CONFIG, tower, x, Compute(dtype="bfloat16"))
    assert half.dtype == jnp.float32
    # bfloat16 has 8 bits: a relative error of 0.4 %, about a dozen times in each of two blocks.
    error = np.linalg.norm(half - full) / np.linalg.norm(full)
    assert 1e-4 < error < 0.03


def test_remat_recomputes():
    def residuals(compute):
        def loss(tower):
            return encode_image(CONFIG, tower, small.images(), compute).sum()

        return str(jax.make_jaxpr(jax.grad(loss))(PARAMS["image_tower"])).count("remat")

    assert residuals(Compute()) == 0
    assert residuals(Compute(remat=True)) > 0


def test_float64_computes_in_float64(x64):
    tower = jax.tree.map(lambda a: np.asarray(a, np.float64), PARAMS["image_tower"])
    wide = image_features(CONFIG, tower, small.images().astype(np.float64), Compute(jnp.float64))
    assert wide.dtype == jnp.float64
    moved = jax.tree.map(lambda a: a * (1 + 1e-12), tower)
    other = image_features(CONFIG, moved, small.images().astype(np.float64), Compute(jnp.float64))
    # A change of 1e-12 is visible only if nothing is rounded to float32 on the way.
    assert 0 < np.abs(wide - other).max() < 1e-9


def test_gradients_agree_with_differences(x64):
    tower = jax.tree.map(lambda a: np.asarray(a, np.float64), PARAMS["text_tower"])
    ids = small.ids(2)
    rng = np.random.default_rng(0)
    along = jax.tree.map(lambda a: rng.standard_normal(a.shape), tower)

    @jax.jit
    @jax.value_and_grad
    def loss(step, tower, along):
        moved = jax.tree.map(lambda a, d: a + step * d, tower, along)
        return (encode_text(CONFIG, moved, ids, Compute(jnp.float64)) ** 2).mean()

    slope = (loss(1e-6, tower, along)[0] - loss(-1e-6, tower, along)[0]) / 2e-6
    # Central differences at 1e-6 have errors of 1e-10 (rounding) and 1e-12 (curvature).
    np.testing.assert_allclose(loss(0.0, tower, along)[1], slope, rtol=1e-6)


@pytest.mark.parametrize(
    ("act", "value"), [("quick_gelu", 1 / (1 + np.exp(-1.702))), ("gelu", 0.8413447460685429)]
)
def test_activations(act, value):
    # One at x = 1, in float32.
    np.testing.assert_allclose(_ACTIVATIONS[act](jnp.float32(1)), value, rtol=3e-7)


@pytest.mark.parametrize("compute", [Compute(), Compute(remat=True)])
def test_every_layer_has_an_activation_of_its_name(compute):
    towers = {
        "image_tower": (image_activations, small.images()),
        "text_tower": (text_activations, small.ids(3)),
    }
    for tower, (activations, inputs) in towers.items():
        shapes = jax.eval_shape(
            functools.partial(activations, CONFIG, compute=compute), PARAMS[tower], inputs
        )
        leaves = {name for name in names(PARAMS[tower]) if "embedding" not in name}
        layers = {name.rpartition(".")[0] for name in leaves}
        inner = {"blocks.block_00", "blocks.block_00.self_attn", "blocks.block_00.mlp", "embed"}
        assert layers | inner <= shapes.keys()
        length = shapes["embed"].shape[1]
        assert shapes["blocks.block_00.self_attn"].shape == (3, length, 96)
        assert shapes["projection"].shape == (3, 64)


def test_wrong_inputs_are_named():
    for shape in [(1, 32, 24, 3), (1, 24, 25, 3), (1, 24, 24, 4), (24, 24, 3), (1, 0, 24, 3)]:
        named = rf"{re.escape(str(shape))}.*\[B, H, W, 3\].*multiples .*patch size 6"
        with pytest.raises(UserError, match=named):
            image_features(CONFIG, PARAMS["image_tower"], jnp.zeros(shape))
    with pytest.raises(UserError, match=r"\(1, 17\).*L <= 16"):
        text_features(CONFIG, PARAMS["text_tower"], jnp.zeros((1, 17), jnp.int32))
    with pytest.raises(UserError, match="'flash': .*xla, cudnn"):
        Compute(attention_impl="flash")
    for dtype in ("bf16", "int32", object()):
        with pytest.raises(UserError, match="dtype=.*float32, bfloat16, float16"):
            Compute(dtype=dtype)
    with pytest.raises(UserError, match="dtype bfloat16 or float16.* float32"):
        Compute(attention_impl="cudnn")


def test_large_shapes_follow_the_config():
    # Published number of parameters of CLIP ViT-L/14: 427,616,513.
    raw = {
        "model_type": "clip",
        "projection_dim": 768,
        "vision_config": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "patch_size": 14,
        },
        "text_config": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
        },
    }
    params = abstract_params(CLIPConfig.from_dict(raw))
    assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params)) == 427_616_513
