"""Every layer compared with torch; an error names the first layer that differs."""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path

import flax.nnx as nnx
import jax.numpy as jnp
import numpy as np
import pytest

from modelstock_jax.models import clip, convnext, model, positions, resnet, transformer, vit
from tests.models import small, small_models
from tests.models.small_models import CASES, Case
from tests.parity.layers import first_difference, our_layers, torch_layers
from tests.parity.reference import pair

# Float32 on both sides, sums in another order: 1.3e-6 of a layer's maximum was measured.
TOLERANCE = 3e-6
PAGE = Path(__file__).parents[2] / "docs" / "parity.md"
CLIP = "clip, first end of text"
# One of each kind, and what the others do not have.
NAMES = (
    *("siglip", "vit", "deit, two classifiers", "dinov2", "dinov2, SwiGLU, classifier"),
    *("dinov2_with_registers, classifier", "convnext, layer scale, classifier"),
    *("convnextv2", "resnet, bottleneck", "resnet, basic, classifier"),
    "resnet, stride first, classifier",
)
# transformers has no module for the first product of the pooling, nor for all of a downsampling.
NOT_COMPARED = re.compile(r"image_tower\.(pool\.in_proj|downsample_\d\d)")


@pytest.fixture(scope="session")
def sides(small_pair, tmp_path_factory):
    """Name -> our checkpoint, its inputs, and the output of each layer of transformers' model."""

    @functools.cache
    def opened(name):
        if name == CLIP:
            case = Case(small.config(), ((30, 24),))
            ours, theirs = pair(case, tmp_path_factory.mktemp("clip") / "model")
            inputs = small_models.images(case, case.sides[0]), small.ids(8)
        else:
            case, (ours, theirs) = CASES[name], small_pair(name)
            inputs = small_models.images(case, case.sides[-1]), small_models.ids(case)
        return ours, inputs, torch_layers(case.config, theirs, *inputs)

    return opened


@pytest.mark.parametrize("name", (CLIP, *NAMES))
def test_every_layer(sides, name):
    ours, inputs, theirs = sides(name)
    layers = our_layers(ours, *inputs)
    assert first_difference(theirs, layers, TOLERANCE) is None
    assert all(NOT_COMPARED.fullmatch(layer) for layer in layers.keys() - theirs.keys())
    order = [layer for layer in theirs if layer in layers]
    # Each block is complete after its layers and before the next block.
    blocks = [layer for layer in order if re.fullmatch(r"image_tower\.blocks\.block_\d\d", layer)]
    assert blocks == sorted(blocks) and len(blocks) >= 2
    for block in blocks:
        inner = [order.index(layer) for layer in order if layer.startswith(f"{block}.")]
        assert inner and max(inner) < order.index(block)
    first, last = order.index("image_tower.embed"), order.index(blocks[0])
    assert first < last and (ours.head is None) == ("head" not in order)


def moved(params, path: str, value) -> dict:
    """The tree with the leaf at a dotted path replaced by `value(leaf)`."""
    name, _, rest = path.partition(".")
    return {**params, name: moved(params[name], rest, value) if rest else value(params[name])}


def leaf(path: str, value):
    """A change of one leaf of a checkpoint."""
    return lambda patch, ours: dataclasses.replace(ours, params=moved(ours.params, path, value))


def config(**values):
    """A change of the config; `vision` and `text` are changes of the towers."""

    def change(patch, ours):
        new = {
            name: dataclasses.replace(getattr(ours.config, name), **value)
            if name in ("vision", "text")
            else value
            for name, value in values.items()
        }
        return dataclasses.replace(ours, config=dataclasses.replace(ours.config, **new))

    return change


def code(owner, name: str, value):
    """A change of our code; `value` may be a function of the old attribute."""

    def change(patch, ours):
        old = getattr(owner, name)
        patch.setattr(owner, name, value(old) if callable(value) else value)
        return ours

    return change


def swap_queries_and_keys(params):
    return {**params, "q_proj": params["k_proj"], "k_proj": params["q_proj"]}


def swap_tokens(patch, ours):
    tower = ours.params["image_tower"]
    names = ("class_embedding", "distillation_embedding")
    swapped = dict(zip(names, (tower[names[1]], tower[names[0]]), strict=True))
    params = {**ours.params, "image_tower": {**tower, **swapped}}
    return dataclasses.replace(ours, params=params)


def without_mean(self, x):
    """Global response norm, not divided by the mean over the channels."""
    norm = jnp.sqrt(jnp.square(x).sum((1, 2), keepdims=True))
    scale, bias = (p[...][None, None, None] for p in (self.scale, self.bias))
    return x + scale * (x * norm) + bias


def another_grn_epsilon(self, x):
    norm = jnp.sqrt(jnp.square(x).sum((1, 2), keepdims=True))
    norm = norm / (norm.mean(-1, keepdims=True) + 1e-3)
    scale, bias = (p[...][None, None, None] for p in (self.scale, self.bias))
    return x + scale * (x * norm) + bias


def registers_in_the_mean(self, images):
    x = self.post_layernorm(self.encode(images))
    return jnp.concatenate([x[:, 0], x[:, 1:].mean(1)], axis=-1)


def mean_of_tokens(self, images):
    return self.projection(self.post_layernorm(self.encode(images).mean(1)))


def without_last_norm(self, images):
    return self.projection(self.encode(images)[:, 0])


def another_bicubic(patch, ours):
    patch.setattr(positions, "A", -0.5)
    patch.setattr(positions, "bicubic", positions.bicubic.__wrapped__)  # It is cached.
    return ours


BATCH_NORM = functools.partial(
    nnx.BatchNorm, use_running_average=True, epsilon=1e-3, dtype=jnp.float32
)
TOWER, TEXTS, FIRST = "image_tower", "text_tower", "blocks.block_00"
# Error -> (case, change, first layer that differs). docs/parity.md has the same table.
BROKEN = {
    "q and k swapped in block 1": (
        *(CLIP, leaf(f"{TOWER}.blocks.block_01.self_attn", swap_queries_and_keys)),
        f"{TOWER}.blocks.block_01.self_attn.q_proj",
    ),
    "one element of a bias changed by 0.001": (
        *(CLIP, leaf(f"{TEXTS}.{FIRST}.mlp.fc2.bias", lambda b: b + 1e-3 * (np.arange(96) == 7))),
        f"{TEXTS}.{FIRST}.mlp.fc2",
    ),
    "a scale of the last norm changed by 0.01 %": (
        *(CLIP, leaf(f"{TOWER}.blocks.block_01.layer_norm2.scale", lambda b: b * 1.0001)),
        f"{TOWER}.blocks.block_01.layer_norm2",
    ),
    "gelu instead of quick_gelu": (
        *(CLIP, config(vision={"hidden_act": "gelu"})),
        f"{TOWER}.{FIRST}.mlp.fc2",
    ),
    "layer norm epsilon 1e-6 instead of 1e-5": (
        *(CLIP, config(vision={"layer_norm_eps": 1e-6})),
        f"{TOWER}.pre_layernorm",
    ),
    "bicubic interpolation with a = -0.5 (jax.image) instead of -0.75": (
        *(CLIP, another_bicubic),
        f"{TOWER}.embed",
    ),
    "mean of the tokens instead of the class token": (
        *(CLIP, code(clip.ImageTower, "__call__", lambda old: mean_of_tokens)),
        f"{TOWER}.post_layernorm",
    ),
    "no final layer norm": (
        *(CLIP, code(clip.ImageTower, "__call__", lambda old: without_last_norm)),
        f"{TOWER}.projection",
    ),
    "token with the highest id instead of the first end of text": (
        *(CLIP, config(text={"eos_token_id": 2})),
        f"{TEXTS}.final_layernorm",
    ),
    "exact gelu instead of its tanh approximation": (
        *("siglip", config(vision={"hidden_act": "gelu"})),
        f"{TOWER}.{FIRST}.mlp.fc2",
    ),
    "layer norm epsilon 1e-5 instead of 1e-6": (
        *("siglip", config(text={"layer_norm_eps": 1e-5})),
        f"{TEXTS}.{FIRST}.layer_norm1",
    ),
    "causal mask in the text tower": (
        "siglip",
        code(
            transformer.TextTransformer,
            "__init__",
            lambda old: lambda self, tower, causal, *more: old(self, tower, True, *more),
        ),
        f"{TEXTS}.{FIRST}.self_attn.out_proj",
    ),
    "first instead of last token of a text": (
        "siglip",
        code(
            transformer.TextTransformer,
            "encode",
            lambda old: lambda self, ids: old(self, ids)[:, ::-1],
        ),
        f"{TEXTS}.final_layernorm",
    ),
    "layer norm epsilon 1e-6 instead of 1e-12": (
        *("vit", config(layer_norm_eps=1e-6)),
        f"{TOWER}.{FIRST}.layer_norm1",
    ),
    "distillation token before the class token": (
        *("deit, two classifiers", swap_tokens),
        f"{TOWER}.embed",
    ),
    "interpolation with antialiasing": (
        *("dinov2", code(vit.Dinov2Config, "antialias", True)),
        f"{TOWER}.embed",
    ),
    "layer scale of the attention left out": (
        *("dinov2", leaf(f"{TOWER}.{FIRST}.layer_scale1", jnp.ones_like)),
        f"{TOWER}.{FIRST}.layer_norm2",
    ),
    "halves of the first SwiGLU layer swapped": (
        "dinov2, SwiGLU, classifier",
        leaf(
            f"{TOWER}.{FIRST}.mlp.weights_in.kernel",
            lambda w: np.concatenate(np.split(w, 2, axis=1)[::-1], axis=1),
        ),
        f"{TOWER}.{FIRST}.mlp.weights_in",
    ),
    "interpolation without antialiasing": (
        *(
            "dinov2_with_registers, classifier",
            code(vit.Dinov2WithRegistersConfig, "antialias", False),
        ),
        f"{TOWER}.embed",
    ),
    "register tokens in the mean of the patches": (
        "dinov2_with_registers, classifier",
        code(vit.ClassTokenAndMean, "__call__", lambda old: registers_in_the_mean),
        "head",
    ),
    "layer scale of block 1 left out": (
        "convnext, layer scale, classifier",
        leaf(f"{TOWER}.blocks.block_01.layer_scale", jnp.ones_like),
        f"{TOWER}.blocks.block_01",
    ),
    "layer norm epsilon 1e-5 instead of 1e-6 in the stem and the stages": (
        *("convnext, layer scale, classifier", code(convnext, "_EPS", 1e-5)),
        f"{TOWER}.patch_norm",
    ),
    "response norm not divided by the mean": (
        "convnextv2",
        code(convnext.GlobalResponseNorm, "__call__", lambda old: without_mean),
        f"{TOWER}.{FIRST}.grn",
    ),
    "response norm epsilon 1e-3 instead of 1e-6": (
        "convnextv2",
        code(convnext.GlobalResponseNorm, "__call__", lambda old: another_grn_epsilon),
        f"{TOWER}.{FIRST}.grn",
    ),
    "batch norm epsilon 1e-3 instead of 1e-5": (
        "resnet, bottleneck",
        code(
            resnet,
            "image_norm",
            lambda old: lambda kind, channels, compute, rngs: BATCH_NORM(channels, rngs=rngs),
        ),
        f"{TOWER}.stem_norm",
    ),
    "stride in the first instead of the second convolution": (
        *("resnet, bottleneck", config(downsample_in_bottleneck=True)),
        f"{TOWER}.blocks.block_01.conv1",
    ),
    "max pooling over 2 x 2 instead of 3 x 3 pixels": (
        "resnet, basic, classifier",
        code(
            resnet,
            "max_pool",
            lambda old: lambda x, size, stride: nnx.max_pool(x, (2, 2), (2, 2), padding="SAME"),
        ),
        f"{TOWER}.embed",
    ),
}


@pytest.mark.parametrize("error", BROKEN)
def test_the_first_broken_layer_is_named(sides, monkeypatch, error):
    name, change, first = BROKEN[error]
    ours, inputs, theirs = sides(name)
    changed = change(monkeypatch, ours)
    patched = changed is ours  # The code was changed, not the checkpoint.
    try:
        if patched:
            model._abstract.cache_clear()  # It holds towers of the unchanged code.
        layers = our_layers(changed, *inputs, patched)
    finally:
        if patched:
            model._abstract.cache_clear()
    assert first_difference(theirs, layers, TOLERANCE) == first


def test_the_page_has_the_same_errors(sides):
    rows = [line.split("|")[1:4] for line in PAGE.read_text().splitlines() if line.count("|") == 4]
    found = {tuple(cell.strip().strip("`") for cell in row) for row in rows}
    for error, (name, _, first) in BROKEN.items():
        model_type = sides(name)[0].config.model_type
        assert (model_type, error, first) in found
