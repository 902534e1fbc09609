"""The program in the model card of an export, run unchanged, prints the class of our classifier."""

from __future__ import annotations

import dataclasses
import re

import jax
import numpy as np
import pytest
from PIL import Image

from configs import default
from modelstock_jax.experiment import export
from modelstock_jax.models.config import DualEncoderConfig
from modelstock_jax.models.model import MODELS, classifier
from modelstock_jax.reporting.tables import make_row
from tests.models.small_models import CASES
from tests.parity.reference import QUICK

# One case of every model type: with a classifier, or with texts, whose head is a separate file.
NAMES = {
    case.config.model_type: name
    for name, case in CASES.items()
    if case.classes or isinstance(case.config, DualEncoderConfig)
}
IMAGES = 3


def centered(checkpoint, pixels):
    """The checkpoint with a head whose mean logits are zero, so that classes differ, and labels."""
    rng, shape = np.random.default_rng(0), (checkpoint.config.feature_size, 5)
    weights = {"kernel": rng.standard_normal(shape), "bias": np.zeros(5)}
    head = checkpoint.head or {k: np.float32(x) for k, x in weights.items()}
    checkpoint = dataclasses.replace(checkpoint, head=head)
    mean = logits_of(checkpoint, pixels).mean(0)
    head = jax.tree.map_with_path(
        lambda path, x: x - mean if path[-1].key == "bias" else x, dict(head)
    )
    labels = tuple(f"name {i}" for i in range(len(mean)))
    return dataclasses.replace(checkpoint, head=head, labels=labels)


def logits_of(checkpoint, pixels):
    apply = jax.jit(classifier(checkpoint.config), compiler_options=QUICK)
    return np.asarray(apply(checkpoint.replica(), checkpoint.preprocessor(pixels)))


def test_every_model_type_is_tested():
    assert NAMES.keys() == MODELS.keys()


@pytest.mark.parametrize("name", NAMES.values())
def test_program_of_the_model_card(small_pair, tmp_path, monkeypatch, capsys, name):
    side = small_pair(name)[0].preprocessor.image_size
    pixels = np.random.default_rng(1).integers(0, 256, (IMAGES, side, side, 3), np.uint8)
    checkpoint = centered(small_pair(name)[0], pixels)
    config, row = default.get_config(), make_row("model_stock", id=1.0, shifts={}, seed=0)
    arguments = (checkpoint.replica(), checkpoint.labels, [row, row], {}, "command")
    export.export(tmp_path, config, checkpoint, *arguments)
    card = (tmp_path / "model" / "README.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```\n", card, re.DOTALL)
    monkeypatch.chdir(tmp_path / "model")
    for image in pixels:
        Image.fromarray(image).save("image.png")
        exec(compile(program, "model card", "exec"), {})
    expected = [checkpoint.labels[i] for i in logits_of(checkpoint, pixels).argmax(-1)]
    assert capsys.readouterr().out.split("\n")[:-1] == expected
    assert len(set(expected)) > 1, "all images have the same class: the test shows nothing"
