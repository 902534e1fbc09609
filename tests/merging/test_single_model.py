"""MonoSoup and LiNeS against float64 NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelstock_jax import lines, model_stock, monosoup, stack_replicas
from modelstock_jax.errors import UserError
from modelstock_jax.merging.update_scaling import layer_positions, monosoup_factors, singular_values

RNG = np.random.default_rng(5)


def soup_of_matrix(d):
    """Return the scaled update of one matrix, by the SVD and the formulas of the paper."""
    u, s, vt = np.linalg.svd(d, full_matrices=False)
    p = s[s > 1e-12 * s[0]] / s.sum()
    k = min(int(np.ceil(np.exp(-(p * np.log(p)).sum()))), len(s))
    energy = (s[:k] ** 2).sum() / (s**2).sum()
    rho = (s[k] / s[0]) ** 2 if k < len(s) else 0.0
    low = rho + (1 - rho) * np.sqrt(max(1 - energy, 0.0))
    factors = np.where(np.arange(len(s)) < k, 1 - low, low)
    return (u * factors * s) @ vt


def update(shape, decay=0.6):
    """Return an update whose singular values fall, so that its effective rank is not full."""
    a, b = shape
    u, s, vt = np.linalg.svd(RNG.standard_normal((a, b)), full_matrices=False)
    return (u * s[0] * decay ** np.arange(len(s))) @ vt


def merged_update(shape, d, **options):
    """Return the update that `monosoup` merges for one tensor "w" with the update d, in float32."""
    w0 = RNG.standard_normal(shape)
    found, stats = monosoup({"w": jnp.asarray(w0)}, {"w": jnp.asarray(w0 + d)[None]}, **options)
    assert float(np.ravel(stats.ratio["w"])[0]) == 1.0
    return np.asarray(found["w"], np.float64) - np.float32(w0)


@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (3, 8), (1, 5), (5, 1)])
def test_a_matrix_of_any_shape(shape):
    d = update(shape)
    # Weights are float32: their rounding is 1e-7, of updates of order 1.
    np.testing.assert_allclose(merged_update(shape, d), soup_of_matrix(d), atol=1e-6)


def test_kernels_of_convolutions_in_both_layouts():
    d = update((5, 18)).reshape(5, 2, 3, 3)  # PyTorch: [out, in, height, width]
    want = soup_of_matrix(d.reshape(5, 18)).reshape(d.shape)
    np.testing.assert_allclose(merged_update(d.shape, d, filter_axis=0), want, atol=1e-6)
    of_jax = d.transpose(2, 3, 1, 0)  # [height, width, in, out]
    found = merged_update(of_jax.shape, of_jax)
    np.testing.assert_allclose(found, want.transpose(2, 3, 1, 0), atol=1e-6)


def test_kernels_with_an_axis_of_heads_are_matrices():
    d = {name: update((6, 8)) for name in ("query", "key", "value")} | {"out": update((8, 6))}
    shapes = dict.fromkeys(d, (6, 2, 4)) | {"out": (2, 4, 6)}
    w = {"attn": {name: {"kernel": x.reshape(1, *shapes[name])} for name, x in d.items()}}
    w0 = jax.tree.map(lambda x: np.zeros(x.shape[1:], np.float32), w)
    merged, _ = monosoup(w0, jax.tree.map(jnp.asarray, w))
    for name, x in d.items():
        found = np.asarray(merged["attn"][name]["kernel"]).reshape(x.shape)
        np.testing.assert_allclose(found, soup_of_matrix(x), atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_each_stacked_layer_is_a_matrix(axis):
    layers = np.stack([update((5, 4), decay) for decay in (0.3, 0.5, 0.8)])
    want = np.moveaxis(np.stack([soup_of_matrix(x) for x in layers]), 0, axis)
    d = np.moveaxis(layers, 0, axis)
    found = merged_update(d.shape, d, scan_axes={"w": axis})
    np.testing.assert_allclose(found, want, atol=1e-6)


def test_what_stays_as_fine_tuned():
    full = np.linalg.qr(RNG.standard_normal((6, 6)))[0]  # equal singular values: r = n
    rank_1 = np.outer(RNG.standard_normal(6), RNG.standard_normal(4))
    for d in (full, rank_1, RNG.standard_normal(7)):
        np.testing.assert_allclose(merged_update(d.shape, d), d, atol=1e-6)
    # A matrix that moved by less than 1e-6 of its norm.
    w0, d = np.ones((8, 8)), 1e-9 * update((8, 8))
    with jax.enable_x64(True):
        merged, _ = monosoup({"w": jnp.asarray(w0)}, {"w": jnp.asarray(w0 + d)[None]})
        np.testing.assert_allclose(merged["w"], w0 + d, rtol=0, atol=1e-15)
        moved, _ = monosoup({"w": jnp.asarray(w0)}, {"w": jnp.asarray(w0 + 1e6 * d)[None]})
        assert np.abs(np.asarray(moved["w"]) - (w0 + 1e6 * d)).max() > 1e-6


def test_several_replicas_are_their_mean_and_a_merged_model_is_one():
    d = np.stack([update((6, 5)) for _ in range(3)])
    w0 = {"w": jnp.zeros((6, 5))}
    merged, _ = monosoup(w0, {"w": jnp.asarray(d)})
    np.testing.assert_allclose(merged["w"], soup_of_matrix(d.mean(axis=0)), atol=1e-6)
    stock, _ = model_stock(w0, {"w": jnp.asarray(d)})
    on_top, _ = monosoup(w0, stack_replicas([stock]))
    np.testing.assert_allclose(on_top["w"], soup_of_matrix(np.float64(stock["w"])), atol=1e-6)


def test_the_update_may_be_differentiated():
    d = jnp.asarray(update((5, 4)))
    value = lambda d: monosoup({"w": jnp.zeros((5, 4))}, {"w": d[None]})[0]["w"].sum()  # noqa: E731
    grad = np.asarray(jax.grad(value)(d))
    assert np.isfinite(grad).all()
    # Linear in the update, with its directions fixed: the value is <grad, d>.
    np.testing.assert_allclose((grad * d).sum(), value(d), rtol=1e-5)


def test_an_eigenvalue_that_is_a_rounding_error_is_0():
    assert singular_values(np.array([-1e-17, 1e-15, 4.0])).tolist() == [0.0, 0.0, 2.0]
    assert singular_values(np.array([1e-14, 4.0]))[0] == 1e-7


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12))
def test_the_factors_are_between_0_and_1_and_add_up_to_1(values):
    factors = monosoup_factors(np.sort(np.array(values)))
    assert 0 <= factors.low <= 1 and factors.high == 1 - factors.low
    assert 1 <= factors.is_high.sum() <= len(values) and factors.is_high[-1]


NAMES = ["embed.w", "tower.layers.0.w", "tower.layers.1.w", "tower.layers.3.w", "tower.norm.w"]


def test_lines_by_layer():
    w0 = dict.fromkeys(NAMES, jnp.ones(3))
    w = dict.fromkeys(NAMES, jnp.stack([jnp.full(3, 2.0), jnp.full(3, 4.0)]))
    merged, stats = lines(w0, w, 0.25, beta=0.6)
    ratios = [0.25, 0.25, 0.25 + 0.2, 0.85, 0.85]
    for name, ratio in zip(NAMES, ratios, strict=True):
        np.testing.assert_allclose(merged[name], 1 + 2 * ratio, rtol=1e-7)
        assert float(stats.ratio[name]) == pytest.approx(ratio, rel=1e-6)
    by_default, _ = lines(w0, w, 0.25)
    assert float(by_default["tower.norm.w"][0]) == 3.0
    traced, _ = jax.jit(lines)(w0, w, 0.25, beta=jnp.asarray(0.6))
    jax.tree.map(np.testing.assert_array_equal, traced, merged)


def factors(*names):
    """Return (l - 1) / (L - 1) of each tensor."""
    places = layer_positions([(name, (8, 8)) for name in names])
    return [round(place.index / place.last, 3) for place in places]


def test_each_tower_has_its_own_layers():
    vision, text = (
        [f"{x}.layers.{i}.w" for i in range(n)] for x, n in (("vision", 3), ("text", 5))
    )
    assert factors(*vision, *text) == [0, 0.5, 1, 0, 0.25, 0.5, 0.75, 1]
    assert factors("embed.w", "blocks.0.w", "norm.w") == [0, 1, 1]


# Blocks with an attention, as each library names them, and tensors outside of the blocks.
MODELS = {
    "T5": (
        "shared.weight 0; encoder.block.{}.layer.0.SelfAttention.{q,k,v}.weight; "
        "encoder.final_layer_norm.weight 1; lm_head.weight 1"
    ),
    "Llama": (
        "model.embed_tokens.weight 0; model.layers.{}.self_attn.{q_proj,k_proj,v_proj}.weight; "
        "model.norm.weight 1; lm_head.weight 1"
    ),
    "GPT-NeoX": (
        "gpt_neox.embed_in.weight 0; gpt_neox.layers.{}.attention.query_key_value.weight; "
        "gpt_neox.final_layer_norm.weight 1; embed_out.weight 1"
    ),
    "timm ViT": (
        "cls_token 0; reg_token 0; pos_embed 0; patch_embed.proj.weight 0; "
        "blocks.{}.attn.qkv.weight; norm.weight 1; head.weight 1"
    ),
    "Whisper": (
        "model.encoder.conv1.weight 0; model.encoder.conv2.weight 0; "
        "model.encoder.layers.{}.self_attn.{q_proj,k_proj,v_proj}.weight; "
        "model.encoder.layer_norm.weight 1"
    ),
    "Qwen2-VL": (
        "visual.patch_embed.proj.weight 0; visual.blocks.{}.attn.qkv.weight; "
        "visual.merger.mlp.0.weight 1; visual.merger.mlp.2.weight 1"
    ),
    "classifier of several layers": (
        "embed.weight 0; layers.{}.self_attn.{q_proj,k_proj,v_proj}.weight; "
        "classifier.0.weight 1; classifier.3.weight 1"
    ),
    "wav2vec2": (
        "wav2vec2.feature_extractor.conv_layers.0.conv.weight 0; "
        "wav2vec2.feature_extractor.conv_layers.1.conv.weight 0; "
        "wav2vec2.feature_projection.projection.weight 0; "
        "wav2vec2.encoder.layers.{}.attention.{q_proj,k_proj,v_proj}.weight; lm_head.weight 1"
    ),
    "experts": (
        "embed.weight 0; layers.{}.self_attn.{q_proj,k_proj,v_proj}.weight; "
        "layers.1.mlp.experts.7.w1.weight 0.5"
    ),
}


@pytest.mark.parametrize("model", MODELS)
def test_tensors_outside_of_the_blocks(model):
    expected = {}
    for text in MODELS[model].split("; "):
        name, *factor = text.split(" ")
        if factor:
            expected[name] = float(factor[0])
            continue
        for i in range(3):
            before, _, after = name.replace("{}", str(i)).partition("{")
            names, _, after = after.partition("}")
            each = [f"{before}{x}{after}" for x in names.split(",")] if names else [before]
            expected |= dict.fromkeys(each, i / 2)
    assert dict(zip(expected, factors(*expected), strict=True)) == expected


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("unit", ["tensor", "filter"])
def test_lines_of_stacked_layers(axis, unit):
    shape = (3, 4) if axis == 0 else (4, 3)
    w0 = {"embed": jnp.zeros(2), "layers": {"w": jnp.zeros((*shape, 2))}, "norm": jnp.zeros(2)}
    w = jax.tree.map(lambda x: jnp.ones((1, *x.shape)), w0)
    merged, _ = lines(w0, w, 0.5, unit=unit, scan_axes={"layers": axis})
    found = np.moveaxis(np.asarray(merged["layers"]["w"]), axis, 0)[:, 0, 0]
    np.testing.assert_allclose(found, [0.5, 0.75, 1.0])
    assert float(merged["embed"][0]) == 0.5 and float(merged["norm"][0]) == 1.0


def test_layers_by_a_function():
    w0 = {"first": jnp.zeros(2), "middle": jnp.zeros(2), "last": jnp.zeros(2)}
    w = jax.tree.map(lambda x: jnp.ones((1, 2)), w0)
    merged, _ = lines(w0, w, 0.0, layer_of={"first": 1, "middle": 2, "last": 5}.get)
    assert [float(merged[name][0]) for name in w0] == [0.0, 0.25, 1.0]
    with pytest.raises(UserError, match="number of a block.*layer_of"):
        lines(w0, w, 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit": "global"}, "unit 'global' joins tensors of different layers.*unit='tensor'"),
        ({"alpha": np.inf}, "alpha must be finite"),
        ({"beta": np.nan}, "beta must be finite"),
        ({"beta": (0.1, 0.2)}, "beta must be a number"),
        ({"alpha": None}, "alpha must be a number"),
        ({"layer_of": lambda name: "a"}, r"layer_of\('embed.w'\) returned 'a'"),
    ],
)
def test_lines_errors(options, message):
    w0 = dict.fromkeys(NAMES, jnp.ones(3))
    with pytest.raises(UserError, match=message):
        lines(w0, stack_replicas([w0]), **{"alpha": 0.5, **options})
