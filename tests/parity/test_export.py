"""Exports opened by transformers: the same tokens, pixels, embeddings and logits."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, CLIPVisionModelWithProjection

from modelstock_jax.experiment.setup import BUNDLED
from modelstock_jax.models import checkpoint_io
from modelstock_jax.models.clip import CLIPConfig
from modelstock_jax.models.config import TextConfig, VisionConfig
from modelstock_jax.models.model import encode_image, encode_text, l2_normalize
from modelstock_jax.models.zero_shot import tokenize
from tests.models import small

TEXTS = ["a cat", "a photo of the letter é.", "seven small squares"]
SIZES = dict(num_hidden_layers=2, hidden_act="quick_gelu")
CONFIG = CLIPConfig(
    VisionConfig(
        **SIZES,
        hidden_size=128,
        intermediate_size=512,
        num_attention_heads=2,
        image_size=24,
        patch_size=6,
    ),
    TextConfig(
        **SIZES,
        hidden_size=64,
        intermediate_size=256,
        num_attention_heads=1,
        vocab_size=272,
        max_position_embeddings=26,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    ),
    projection_dim=32,
)


def fine_tuned():
    """Random weights with the synthetic benchmark's tokenizer, a head and its labels."""
    rng = np.random.default_rng(5)
    checkpoint = small.checkpoint(CONFIG, BUNDLED["glyph-clip"])
    head = {
        "kernel": rng.standard_normal((32, 3)).astype(np.float32),
        "bias": rng.standard_normal(3).astype(np.float32),
    }
    replica = {"image_tower": checkpoint.params["image_tower"], "head": head}
    return checkpoint.with_replica(replica, ("cat", "dog", "gull é"))


@pytest.fixture(scope="module", params=["hugging_face", "open_clip"])
def exported(request, tmp_path_factory):
    """A directory for transformers, written directly or converted from another format."""
    root = tmp_path_factory.mktemp("export")
    first = checkpoint_io.save(root / request.param, fine_tuned(), format=request.param)
    return checkpoint_io.load(checkpoint_io.save(root / "export", checkpoint_io.load(first)))


def test_clip_model_gives_the_same_logits(exported):
    model, report = CLIPModel.from_pretrained(
        exported.directory, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    tokenizer = AutoTokenizer.from_pretrained(exported.directory)
    processor = AutoImageProcessor.from_pretrained(exported.directory, backend="pil")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 24, 24, 3), np.uint8)
    with torch.no_grad():
        out = model.eval()(
            **tokenizer(TEXTS, padding="max_length", max_length=26, return_tensors="pt"),
            **processor([Image.fromarray(x) for x in pixels], return_tensors="pt"),
        )
    ids = tokenize(exported.directory, TEXTS, 26)

    @jax.jit
    def logits(params, images, ids):
        image = l2_normalize(encode_image(exported.config, params["image_tower"], images))
        text = l2_normalize(encode_text(exported.config, params["text_tower"], ids))
        return image @ text.T

    ours = np.asarray(logits(exported.params, exported.preprocessor(pixels), ids), np.float64)
    scale = np.exp(np.float64(exported.params["logit_scale"]))
    # Embeddings of norm 1 that differ only in the order of float32 sums.
    np.testing.assert_allclose(
        scale * ours, out.logits_per_image.numpy(), atol=2e-6 * scale, rtol=0
    )
    assert np.abs(ours[0] - ours[1]).max() > 1e-3


def test_the_image_tower_alone_feeds_the_head(exported):
    model, report = CLIPVisionModelWithProjection.from_pretrained(
        exported.directory, attn_implementation="eager", output_loading_info=True
    )
    # The file also has the text tower; nothing that the model needs is missing.
    assert not report["missing_keys"] and not report["mismatched_keys"], report
    images = small.images(4)
    with torch.no_grad():
        theirs = model.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).image_embeds
    ours = jax.jit(encode_image, static_argnums=0)(
        exported.config, exported.params["image_tower"], images
    )
    unit = [np.float64(x) / np.linalg.norm(x, axis=1, keepdims=True) for x in (ours, theirs)]
    np.testing.assert_allclose(*unit, atol=2e-6, rtol=0)
    tuned = fine_tuned()
    np.testing.assert_array_equal(exported.head["kernel"], tuned.head["kernel"])
    assert model.config.id2label is not None
    raw = json.loads((exported.directory / "config.json").read_text())
    assert raw["id2label"] == {"0": "cat", "1": "dog", "2": "gull é"}
    assert CLIPModel.from_pretrained(exported.directory).config.id2label[2] == "gull é"


def test_the_comparison_sees_tokens_and_weights(exported, tmp_path):
    other = dataclasses.replace(exported, params=small.perturbed(CONFIG, seed=9), head=None)
    directory = checkpoint_io.save(tmp_path / "other", dataclasses.replace(other, labels=None))
    model = CLIPVisionModelWithProjection.from_pretrained(directory).eval()
    images = small.images(4)
    with torch.no_grad():
        theirs = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).image_embeds
    ours = jax.jit(encode_image, static_argnums=0)(
        exported.config, exported.params["image_tower"], images
    )
    assert np.abs(np.asarray(ours) - theirs.numpy()).max() > 1e-2
    ids = tokenize(exported.directory, TEXTS, 26)
    expected = AutoTokenizer.from_pretrained(exported.directory)(TEXTS)["input_ids"]
    assert [row[: len(e)].tolist() for row, e in zip(ids, expected, strict=True)] == expected
