"""The towers: shapes, causality, pooling, dtypes, and replicas side by side."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modelstock_jax.clip.config import CLIPConfig
from modelstock_jax.clip.model import (
    Compute,
    abstract_params,
    classifier,
    encode_image,
    encode_text,
    end_of_text,
    init,
)
from modelstock_jax.errors import UserError
from tests.clip import small

# Compiled once a config: run op by op, a tower takes seconds.
image_features = jax.jit(encode_image, static_argnums=(0, 3))
text_features = jax.jit(encode_text, static_argnums=(0, 3))
CONFIG = small.config()
PARAMS = small.perturbed(CONFIG)


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
    for i in range(2):
        expected |= block(f"image_tower.blocks.block_{i:02d}", 96, 384)
    expected |= block("text_tower.blocks.block_00", 96, 384)
    params = init(CONFIG, jax.random.key(0))
    assert names(params) == expected
    assert names(abstract_params(CONFIG)) == expected
    assert type(params["image_tower"]["blocks"]) is dict
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    # The scales of CLIP's released code.
    first = params["image_tower"]["blocks"]["block_00"]
    for name, std in (("q_proj", 96**-0.5), ("out_proj", 96**-0.5 * 4**-0.5)):
        # 9,216 draws: the standard error of a standard deviation is 0.7 %; four of them.
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
    from modelstock_jax.clip.transformer import patches

    flat = np.asarray(patches(jnp.asarray(x), 6))
    assert flat.shape == (1, 16, tower["patch_embedding"]["kernel"].shape[0])
    assert np.argwhere(flat[0]).tolist() == [[1 * 4 + 2, (4 * 6 + 5) * 3 + 2]]


def test_text_before_the_end_is_causal():
    # What follows the end of text changes nothing; what precedes it does.
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
    # Sums of another length are ordered differently: a few float32 roundings of values near 1.
    np.testing.assert_allclose(short, whole, atol=5e-6, rtol=0)


def test_head_by_numpy():
    rng = np.random.default_rng(0)
    head = {"kernel": rng.standard_normal((64, 5)), "bias": rng.standard_normal(5)}
    replica = {"image_tower": PARAMS["image_tower"], "head": jax.tree.map(np.float32, head)}
    x = small.images()
    features = np.asarray(image_features(CONFIG, PARAMS["image_tower"], x), np.float64)
    unit = features / np.sqrt((features**2).sum(1))[:, None]
    expected = unit @ head["kernel"] + head["bias"][None]
    # 64 float32 products of size 1: 64 * 6e-8 at worst.
    np.testing.assert_allclose(jax.jit(classifier(CONFIG))(replica, x), expected, atol=4e-6, rtol=0)


def test_vmapped_replicas_equal_separate_ones():
    rng = np.random.default_rng(3)
    replicas = [
        {
            "image_tower": small.perturbed(CONFIG, seed)["image_tower"],
            "head": {
                "kernel": rng.standard_normal((64, 5)).astype(np.float32),
                "bias": rng.standard_normal(5).astype(np.float32),
            },
        }
        for seed in (0, 1)
    ]
    x = np.stack([small.images(seed=4), small.images(seed=5)])
    apply = classifier(CONFIG)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *replicas)
    together = jax.jit(jax.vmap(apply))(stacked, x)
    for i, replica in enumerate(replicas):
        # Batched products round in another order; logits here are of size 1.
        np.testing.assert_allclose(together[i], jax.jit(apply)(replica, x[i]), atol=2e-5, rtol=0)


def test_compute_changes_no_values_but_by_rounding():
    config = small.replaced(CONFIG, "vision", num_hidden_layers=1)
    tower, x = small.perturbed(config)["image_tower"], small.images()

    def loss(tower, compute):
        return (encode_image(config, tower, x, compute) ** 2).sum()

    plain = jax.jit(jax.grad(loss), static_argnums=1)(tower, Compute())
    remat = jax.jit(jax.grad(loss), static_argnums=1)(tower, Compute(remat=True))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(remat), strict=True):
        # The same products, fused otherwise: float32 rounding of each tensor's largest gradient.
        np.testing.assert_allclose(a, b, atol=1e-5 * float(np.abs(a).max()) + 1e-6, rtol=0)
    full = image_features(config, tower, x)
    half = image_features(config, tower, x, Compute(dtype=jnp.bfloat16))
    assert half.dtype == jnp.float32
    # bfloat16 keeps 8 bits: 0.4 % a rounding, a dozen of them in a block.
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
    # A change of 1e-12 survives only where nothing on the way is rounded to float32.
    assert 0 < np.abs(wide - other).max() < 1e-9


def test_gradients_agree_with_differences(x64):
    tower = jax.tree.map(lambda a: np.asarray(a, np.float64), PARAMS["text_tower"])
    ids = small.ids(2)
    rng = np.random.default_rng(0)
    along = jax.tree.map(lambda a: rng.standard_normal(a.shape), tower)

    @jax.jit
    def loss(step):
        moved = jax.tree.map(lambda a, d: a + step * d, tower, along)
        return (encode_text(CONFIG, moved, ids, Compute(jnp.float64)) ** 2).mean()

    slope = (loss(1e-6) - loss(-1e-6)) / 2e-6
    # Central differences at 1e-6 leave 1e-10 of rounding and 1e-12 of curvature, relative to O(1).
    np.testing.assert_allclose(jax.grad(loss)(0.0), slope, rtol=1e-6)


@pytest.mark.parametrize(
    ("act", "value"), [("quick_gelu", 1 / (1 + np.exp(-1.702))), ("gelu", 0.8413447460685429)]
)
def test_activations(act, value):
    from modelstock_jax.clip.transformer import _ACTIVATIONS

    # One at x = 1, in float32.
    np.testing.assert_allclose(_ACTIVATIONS[act](jnp.float32(1)), value, rtol=3e-7)


def test_wrong_inputs_are_named():
    with pytest.raises(UserError, match=r"\(1, 32, 32, 3\).*\[B, 24, 24, 3\]"):
        image_features(CONFIG, PARAMS["image_tower"], jnp.zeros((1, 32, 32, 3)))
    with pytest.raises(UserError, match=r"\(1, 17\).*L <= 16"):
        text_features(CONFIG, PARAMS["text_tower"], jnp.zeros((1, 17), jnp.int32))
    with pytest.raises(UserError, match="'xla' or 'cudnn', not 'flash'"):
        Compute(attention="flash")
    with pytest.raises(UserError, match="needs dtype bfloat16 or float16, not float32"):
        Compute(attention="cudnn")


def test_large_shapes_follow_the_config():
    # CLIP ViT-L/14's published count of parameters: 427,616,513.
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
