"""Every kind of model compared with transformers' torch model, on the same directory."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from modelstock_jax.models import checkpoint_io
from modelstock_jax.models.model import MODELS
from modelstock_jax.models.param_mapping import flatten
from tests.models.small_models import CASES, ids, images
from tests.parity.reference import QUICK, errors, our_outputs, torch_outputs

# Embeddings of norm 1, or the largest logit: a dozen float32 rounding errors per block.
TOLERANCE = 2e-6
RUNS = [(name, sides) for name, case in CASES.items() for sides in case.sides]


def test_two_configs_of_every_model():
    # CLIP has its own files; here it has the activation that its releases do not use.
    kinds = [case.config.model_type for case in CASES.values()]
    assert set(kinds) == set(MODELS)
    assert all(kinds.count(kind) >= 2 for kind in MODELS if kind != "clip")


@pytest.mark.parametrize(("name", "sides"), RUNS)
def test_embeddings_and_logits(small_pair, name, sides):
    case, (ours, theirs) = CASES[name], small_pair(name)
    inputs = images(case, sides), ids(case)
    expected = torch_outputs(case.config, theirs, *inputs)
    found = errors(expected, our_outputs(ours, *inputs, QUICK))
    outputs = {"logits"} if case.classes else {"image"}
    assert found.keys() == (outputs if ids(case) is None else {"image", "text", "logits"})
    assert max(found.values()) <= TOLERANCE, found


def test_every_parameter_and_buffer_is_drawn(small_pair):
    for name, case in CASES.items():
        ours, _ = small_pair(name)
        assert (ours.head is not None) == (case.classes > 0)
        for path, leaf in flatten({**ours.params, "head": ours.head or {}}):
            assert not np.isin(leaf, (0, 1)).any(), (name, path)


@pytest.mark.parametrize("name", CASES)
def test_transformers_opens_the_export(small_pair, tmp_path, name):
    case, (ours, theirs) = CASES[name], small_pair(name)
    directory = checkpoint_io.save(tmp_path / "export", ours)
    again = checkpoint_io.load(directory)
    assert (again.config, again.preprocessor, again.labels, again.checksum) == (
        *(ours.config, ours.preprocessor, ours.labels, ours.checksum),
    )
    # Its class is chosen by config.json alone.
    auto = transformers.AutoModelForImageClassification if case.classes else transformers.AutoModel
    opened, report = auto.from_pretrained(
        directory, attn_implementation="eager", output_loading_info=True
    )
    assert type(opened) is type(theirs) and not any(report.values()), report
    expected = theirs.state_dict()
    assert opened.state_dict().keys() == expected.keys()
    for key, tensor in opened.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    inputs = images(case, case.sides[0]), ids(case)
    found, expected = (torch_outputs(case.config, m.eval(), *inputs) for m in (opened, theirs))
    for key, output in found.items():
        np.testing.assert_array_equal(output, expected[key], err_msg=key)


def test_the_pipeline_of_transformers_gives_our_probabilities(small_pair, tmp_path):
    name = "vit, classifier, no qkv bias"
    ours = dataclasses.replace(small_pair(name)[0], labels=CASES[name].labels)
    directory = checkpoint_io.save(tmp_path / "export", ours)
    classify = transformers.pipeline(
        "image-classification",
        str(directory),
        image_processor=transformers.AutoImageProcessor.from_pretrained(directory, backend="pil"),
    )
    image = np.random.default_rng(0).integers(0, 256, (23, 23, 3), np.uint8)
    found = {row["label"]: row["score"] for row in classify(Image.fromarray(image), top_k=5)}
    pixels = np.asarray(ours.preprocessor(image[None]))
    logits = our_outputs(ours, pixels, compiler_options=QUICK)["logits"][0]
    expected = np.exp(logits) / np.exp(logits).sum()
    # Probabilities of float32 logits of size 3.
    np.testing.assert_allclose([found[label] for label in ours.labels], expected, atol=1e-5)
