"""Every layer compared with torch; an error names the first layer that differs."""

from __future__ import annotations

import numpy as np
import pytest

from tests.models import small
from tests.parity.reference import first_difference, our_layers, pair, torch_layers

# Float32 on both sides, sums in another order: 9e-7 of a layer's maximum was measured.
TOLERANCE = 3e-6
CONFIG = small.config(layers=4)
IMAGES = np.random.default_rng(0).standard_normal((3, 30, 24, 3)).astype(np.float32)
IDS = small.ids(8)


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """Our checkpoint, and the output of each layer of transformers' model."""
    ours, theirs = pair(CONFIG, tmp_path_factory.mktemp("clip") / "model")
    return ours, torch_layers(theirs, IMAGES, IDS)


def test_every_layer_of_both_towers(sides):
    ours, theirs = sides
    layers = our_layers(ours.config, ours.params, IMAGES, IDS)
    assert layers.keys() == theirs.keys()
    assert first_difference(theirs, layers, TOLERANCE) is None
    # Both towers, in the order of computation.
    order = list(theirs)
    for tower in ("image_tower", "text_tower"):
        inner = ("blocks.block_00.self_attn", "blocks.block_00.mlp", "blocks.block_01")
        at = [order.index(f"{tower}.{x}") for x in ("embed", *inner, "projection")]
        assert at == sorted(at)


def moved(params, path: str, value) -> dict:
    """The tree with the leaf at a dotted path replaced by `value(leaf)`."""
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
