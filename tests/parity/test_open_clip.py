"""OpenCLIP opens our exports and we open its checkpoints: names, shapes and features.

Its wheel is fetched and installed beside the tests, without what it depends on.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from modelstock_jax.models import checkpoint_io
from modelstock_jax.models.checkpoint import param_shapes
from modelstock_jax.models.model import encode_image, encode_text
from modelstock_jax.models.open_clip_format import read_model, write_model
from tests.models import small
from tests.models.all_formats import CHECKPOINT, CONFIG

pytestmark = pytest.mark.slow
READER = Path(__file__).with_name("open_clip_reader.py")
# Without dependencies: regex is a dependency of transformers, torchvision is replaced.
PACKAGES = ("open_clip_torch==3.3.0", "ftfy==6.3.1", "wcwidth==0.2.14")


def replaced(vision: dict, text: dict):
    return small.replaced(small.replaced(CONFIG, "vision", **vision), "text", **text)


VARIANTS = {
    "quick_gelu": CONFIG,
    "gelu": replaced({"hidden_act": "gelu"}, {"hidden_act": "gelu"}),
    "first_end": replaced({}, {"eos_token_id": small.EOS}),
    "sizes": replaced(
        {"layer_norm_eps": 1e-3, "intermediate_size": 300, "num_attention_heads": 4},
        {"layer_norm_eps": 1e-3, "num_attention_heads": 2},
    ),
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Our exports, saved again by OpenCLIP."""
    work = tmp_path_factory.mktemp("work")
    for name, config in VARIANTS.items():
        checkpoint_io.save(work / f"open_clip_{name}", small.checkpoint(config), format="open_clip")
    checkpoint_io.save(work / "openai", CHECKPOINT, format="openai")
    images = np.random.default_rng(0).standard_normal((4, 12, 12, 3)).astype(np.float32)
    # The highest id ends every text; earlier ids would end it by the other rule.
    ids = small.ids(6, 16).astype(np.int64)
    ids[:, -2:] = 59
    np.savez(work / "inputs.npz", images=images, ids=ids)
    site = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site)]
    for command in ([*pip, *PACKAGES], [sys.executable, str(READER), str(site), str(work)]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    return work


def unit(features) -> np.ndarray:
    x = np.asarray(features, np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def assert_features(work, name, config, params):
    inputs, theirs = np.load(work / "inputs.npz"), np.load(work / "features.npz")
    image = jax.jit(encode_image, static_argnums=0)(config, params["image_tower"], inputs["images"])
    ids = inputs["ids"].astype(np.int32)
    text = jax.jit(encode_text, static_argnums=0)(config, params["text_tower"], ids)
    # Float32 towers that differ in the order of their sums only.
    np.testing.assert_allclose(unit(image), unit(theirs[f"{name}/image"]), atol=2e-6, rtol=0)
    np.testing.assert_allclose(unit(text), unit(theirs[f"{name}/text"]), atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_open_clip_opens_an_export(work, name):
    checkpoint = small.checkpoint(VARIANTS[name])
    assert_features(work, f"open_clip_{name}", VARIANTS[name], checkpoint.params)
    directory = work / f"open_clip_{name}"
    (work / f"open_clip_{name}.safetensors").replace(directory / "open_clip_model.safetensors")
    assert checkpoint_io.load(directory).checksum == checkpoint.checksum


def test_half_precision_in_openais_names(work):
    loaded = checkpoint_io.load(work / "half.safetensors")
    assert loaded.format == "openai" and loaded.config.vision == CONFIG.vision
    assert_features(work, "half", loaded.config, loaded.params)


def test_published_sizes(work):
    published = json.loads((work / "shapes.json").read_text())
    assert len(published) == 7
    for name, theirs in published.items():
        config = read_model(theirs["config"])
        shapes = param_shapes(config)
        ours = {row.name: list(row.shape(shapes)) for row in config.rows("openai")}
        assert ours == theirs["shapes"], name
        written = write_model(config)
        # bigG's published ratio is rounded to four digits.
        if written["vision_cfg"].pop("mlp_ratio", None) is not None:
            del theirs["config"]["vision_cfg"]["mlp_ratio"]
        assert written == theirs["config"], name
