"""benchmarks/verify_models.py on stand-ins: the expected logits are those of transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    CLIPModel,
    CLIPTokenizer,
)

from benchmarks import verify_models
from modelstock_jax.models import checkpoint_io
from tests.data.photographs import photograph
from tests.models import small
from tests.models.small_models import CASES
from tests.parity.test_export import CONFIG, fine_tuned


@pytest.fixture
def image(tmp_path):
    """A photograph, 640 x 427 pixels."""
    path = tmp_path / "photograph.jpg"
    path.write_bytes(photograph())
    return path


def clip_logits(directory, image, texts):
    processor = AutoImageProcessor.from_pretrained(directory, backend="pil")
    tokens = CLIPTokenizer.from_pretrained(directory)(
        texts, padding="max_length", max_length=26, return_tensors="pt"
    )
    model = CLIPModel.from_pretrained(directory, attn_implementation="eager").eval()
    with torch.no_grad():
        pixels = processor(Image.open(image), return_tensors="pt")
        return model(**tokens, **pixels).logits_per_image[0].tolist()


def class_logits(directory, image):
    processor = AutoImageProcessor.from_pretrained(directory, backend="pil")
    model = AutoModelForImageClassification.from_pretrained(directory).eval()
    with torch.no_grad():
        return model(**processor(Image.open(image), return_tensors="pt")).logits[0, :3].tolist()


def run(name, directory, image):
    with pytest.raises(SystemExit) as error:
        verify_models.main(["--models", name, "--weights", str(directory), "--image", str(image)])
    return error.value.code


def check(name, directory, image, logits, monkeypatch):
    """Exit status 0 with transformers' logits, 1 when one differs by twice the tolerance."""
    expected = verify_models.EXPECTED[name]._replace(logits=tuple(logits))
    monkeypatch.setitem(verify_models.EXPECTED, name, expected)
    assert run(name, directory, image) == 0
    wrong = np.array(logits)
    wrong[-1] += 2 * expected.tolerance * (1 + abs(wrong[-1]))
    monkeypatch.setitem(verify_models.EXPECTED, name, expected._replace(logits=tuple(wrong)))
    assert run(name, directory, image) == 1


def test_clip(tmp_path, image, monkeypatch):
    clip = small.checkpoint(CONFIG, fine_tuned().directory)
    directory = checkpoint_io.save(tmp_path / "clip", clip)
    expected = verify_models.EXPECTED["clip"]
    texts = [expected.template.replace("{}", name) for name in expected.class_names]
    assert texts == ["a photo of a cat", "a photo of a dog"]  # Those of transformers' test.
    logits = clip_logits(directory, image, texts)
    assert abs(logits[0] - logits[1]) > 0.1
    check("clip", directory, image, logits, monkeypatch)


@pytest.mark.parametrize("kind", ["vit", "convnext", "resnet"])
def test_classifiers(small_pair, tmp_path, image, monkeypatch, kind):
    name = next(n for n, c in CASES.items() if c.config.model_type == kind and c.classes >= 3)
    ours, _ = small_pair(name)
    directory = checkpoint_io.save(tmp_path / kind, ours)
    check(kind, directory, image, class_logits(directory, image), monkeypatch)
