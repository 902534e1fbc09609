"""Our CLIP compared with transformers' torch CLIPModel, on the same directory."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from transformers import CLIPModel

from modelstock_jax.models import checkpoint_io
from modelstock_jax.models.model import encode_image, encode_text, l2_normalize
from tests.models import small
from tests.parity.reference import run_torch, unit

VARIANTS = {
    "quick_gelu, first end of text": small.config(),
    "gelu, highest id, another epsilon": small.replaced(
        small.config(hidden_act="gelu", eos_token_id=2, layer_norm_eps=1e-3),
        "vision",
        layer_norm_eps=1e-4,
    ),
}


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS.keys())
def pair(request, tmp_path_factory):
    """A directory written by us, opened by both."""
    directory = tmp_path_factory.mktemp("clip") / "model"
    checkpoint_io.save(directory, small.checkpoint(request.param))
    theirs, report = CLIPModel.from_pretrained(
        directory, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    return checkpoint_io.load(directory), theirs.eval(), small.images(8), small.ids(8)


def test_embeddings_and_logits(pair):
    ours, theirs, images, ids = pair
    out = run_torch(theirs, images, ids)

    @jax.jit
    def embed(params, images, ids):
        image = l2_normalize(encode_image(ours.config, params["image_tower"], images))
        return image, l2_normalize(encode_text(ours.config, params["text_tower"], ids))

    image, text = (np.asarray(x, np.float64) for x in embed(ours.params, images, ids))
    # Float32 towers that differ in the order of their sums only.
    np.testing.assert_allclose(image, unit(out.image_embeds), atol=2e-6, rtol=0)
    np.testing.assert_allclose(text, unit(out.text_embeds), atol=2e-6, rtol=0)
    scale = np.exp(np.float64(ours.params["logit_scale"]))
    np.testing.assert_allclose(
        scale * image @ text.T, out.logits_per_image.numpy(), atol=2e-6 * scale, rtol=0
    )
    # The rows differ, so the comparison can fail.
    assert np.abs(image[0] - image[1]).max() > 1e-2 and np.abs(text[0] - text[1]).max() > 1e-2


def test_transformers_saves_what_we_load(pair, tmp_path):
    ours, theirs, _, _ = pair
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="200KB")
    name = "preprocessor_config.json"
    (tmp_path / "theirs" / name).write_bytes((ours.directory / name).read_bytes())
    loaded = checkpoint_io.load(tmp_path / "theirs")
    assert loaded.config == ours.config
    assert loaded.checksum == ours.checksum


def test_the_image_processor_opens_and_agrees(pair):
    from PIL import Image
    from transformers import AutoImageProcessor

    ours = pair[0]
    processor = AutoImageProcessor.from_pretrained(ours.directory, backend="pil")
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    theirs = processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]
    # Two float32 rounding errors of values up to 2.7.
    np.testing.assert_allclose(ours.preprocessor(pixels), theirs.transpose(1, 2, 0), atol=1e-6)
