"""Layer by layer against torch: where a tower goes wrong, the first layer that differs is named."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modelstock_jax.models import clip, transformer
from tests.models import small
from tests.parity.reference import first_difference, our_layers, pair, torch_layers, unit

# Float32 on both sides, sums in another order: 9e-7 of a layer's largest number were measured.
TOLERANCE = 3e-6
CONFIG = small.config(layers=4)
IMAGES = np.random.default_rng(0).standard_normal((3, 30, 24, 3)).astype(np.float32)
IDS = small.ids(8)


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """Our checkpoint, and what each layer of transformers' model gives."""
    ours, theirs = pair(CONFIG, tmp_path_factory.mktemp("clip") / "model")
    return ours, torch_layers(theirs, IMAGES, IDS)


def test_every_layer_of_both_towers(sides):
    ours, theirs = sides
    layers = our_layers(ours.config, ours.params, IMAGES, IDS)
    assert layers.keys() == theirs.keys()
    assert first_difference(theirs, layers, TOLERANCE) is None
    # Both towers are there, in the order of computing.
    order = list(theirs)
    for tower in ("image_tower", "text_tower"):
        inner = ("blocks.block_00.self_attn", "blocks.block_00.mlp", "blocks.block_01")
        at = [order.index(f"{tower}.{x}") for x in ("embed", *inner, "projection")]
        assert at == sorted(at)


def moved(params, path: str, value) -> dict:
    """The tree with another leaf at a dotted path; `value` is a function of the old one."""
    name, _, rest = path.partition(".")
    return {**params, name: moved(params[name], rest, value) if rest else value(params[name])}


def swap_queries_and_keys(params):
    attn = params["image_tower"]["blocks"]["block_01"]["self_attn"]
    swapped = {**attn, "q_proj": attn["k_proj"], "k_proj": attn["q_proj"]}
    return moved(params, "image_tower.blocks.block_01.self_attn", lambda _: swapped)


@pytest.mark.parametrize(
    ("change", "first"),
    [
        (swap_queries_and_keys, "image_tower.blocks.block_01.self_attn.q_proj"),
        (
            lambda p: moved(p, "text_tower.blocks.block_01.mlp.fc2.bias", lambda b: b + 1e-4),
            "text_tower.blocks.block_01.mlp.fc2",
        ),
        (
            lambda p: moved(p, "image_tower.class_embedding", lambda b: b + 1e-4),
            "image_tower.embed",
        ),
        (
            lambda p: moved(
                p, "image_tower.blocks.block_03.layer_norm2.scale", lambda b: b * 1.0001
            ),
            "image_tower.blocks.block_03.layer_norm2",
        ),
    ],
    ids=["q and k swapped", "a bias", "the class token", "a norm"],
)
def test_a_broken_tensor_is_found(sides, change, first):
    ours, theirs = sides
    assert (
        first_difference(theirs, our_layers(CONFIG, change(ours.params), IMAGES, IDS), TOLERANCE)
        == first
    )


def both(**values):
    """The config with other values in both towers."""
    return small.replaced(small.replaced(CONFIG, "vision", **values), "text", **values)


@pytest.mark.parametrize(
    ("config", "image", "text"),
    [
        (both(hidden_act="gelu"), "blocks.block_00.mlp.fc2", "blocks.block_00.mlp.fc2"),
        (both(layer_norm_eps=1e-6), "pre_layernorm", "blocks.block_00.layer_norm1"),
        (small.replaced(CONFIG, "text", eos_token_id=2), None, "final_layernorm"),
    ],
    ids=["gelu", "Flax's epsilon", "the other end of text"],
)
def test_a_wrong_config_is_found(sides, config, image, text):
    ours, theirs = sides
    layers = our_layers(config, ours.params, IMAGES, IDS)
    check_first(theirs, layers, image, text)


def mean_pooled(tower, images):
    x = transformer.run_blocks(tower.blocks, tower.pre_layernorm(tower.embed(images)), False)
    return tower.projection(tower.post_layernorm(x.mean(1)))


def without_post_norm(tower, images):
    x = transformer.run_blocks(tower.blocks, tower.pre_layernorm(tower.embed(images)), False)
    tower.post_layernorm(x[:, 0])
    return tower.projection(x[:, 0])


@pytest.mark.parametrize(
    ("where", "name", "value", "image", "text"),
    [
        (transformer, "A", -0.5, "embed", None),
        (clip.ImageTower, "__call__", mean_pooled, "post_layernorm", None),
        (clip.ImageTower, "__call__", without_post_norm, "projection", None),
        (
            jnp,
            "tril",
            jnp.triu,
            None,
            "blocks.block_00.self_attn.out_proj",
        ),
    ],
    ids=["jax.image's bicubic", "mean of the tokens", "no last norm", "the wrong triangle"],
)
def test_a_wrong_program_is_found(sides, monkeypatch, where, name, value, image, text):
    ours, theirs = sides
    monkeypatch.setattr(where, name, value)
    transformer.bicubic.cache_clear()
    jax.clear_caches()
    try:
        layers = our_layers(CONFIG, ours.params, IMAGES, IDS)
    finally:
        transformer.bicubic.cache_clear()
    check_first(theirs, layers, image, text)


def check_first(theirs, ours, image: str | None, text: str | None) -> None:
    """The first difference of each tower by itself, and that the features show it too."""
    for tower, first in (("image_tower", image), ("text_tower", text)):
        layers = {name: x for name, x in theirs.items() if name.startswith(tower)}
        found = first_difference(layers, ours, TOLERANCE)
        assert found == (first and f"{tower}.{first}")
        if first:
            out = f"{tower}.projection"
            # Ten times what the comparison of the features allows.
            assert np.abs(unit(ours[out]) - unit(theirs[out])).max() > 2e-5
