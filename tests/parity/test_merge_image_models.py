"""Image models of transformers, merged by `modelstock merge` and opened by transformers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import transformers as hf

from tests.merging.image_models import BODIES, classified
from tests.parity.merge_inputs import (
    assert_close,
    assert_merged,
    config_of,
    edit_config,
    fine_tuned,
    merge,
    merged,
    opened,
    save_all,
    save_tensors,
    tensors,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # Warnings of other libraries.
_VISION = dict(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    image_size=8,
    patch_size=4,
)
_TEXT = dict(
    vocab_size=24,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=8,
    bos_token_id=1,
    eos_token_id=2,
)
_DINO = {k: v for k, v in _VISION.items() if k != "intermediate_size"} | dict(mlp_ratio=2)
_CONVNEXT = dict(num_stages=2, hidden_sizes=[8, 16], depths=[2, 2], image_size=16)
_RESNET = dict(embedding_size=8, depths=[2, 2])
# Body, classifier, config and its settings, by the names in `tests.merging.image_models`.
KINDS: dict[str, tuple[type, type, Callable, dict]] = {
    "siglip": (
        hf.SiglipModel,
        hf.SiglipForImageClassification,
        hf.SiglipConfig,
        dict(text_config=_TEXT, vision_config=_VISION),
    ),
    "vit": (hf.ViTModel, hf.ViTForImageClassification, hf.ViTConfig, _VISION),
    "deit": (hf.DeiTModel, hf.DeiTForImageClassification, hf.DeiTConfig, _VISION),
    "dinov2": (hf.Dinov2Model, hf.Dinov2ForImageClassification, hf.Dinov2Config, _DINO),
    "dinov2 swiglu": (
        hf.Dinov2Model,
        hf.Dinov2ForImageClassification,
        hf.Dinov2Config,
        _DINO | dict(use_swiglu_ffn=True),
    ),
    "dinov2_with_registers": (
        hf.Dinov2WithRegistersModel,
        hf.Dinov2WithRegistersForImageClassification,
        hf.Dinov2WithRegistersConfig,
        _DINO,
    ),
    "convnext": (
        hf.ConvNextModel,
        hf.ConvNextForImageClassification,
        hf.ConvNextConfig,
        _CONVNEXT,
    ),
    "convnextv2": (
        hf.ConvNextV2Model,
        hf.ConvNextV2ForImageClassification,
        hf.ConvNextV2Config,
        _CONVNEXT,
    ),
    "resnet basic": (
        hf.ResNetModel,
        hf.ResNetForImageClassification,
        hf.ResNetConfig,
        _RESNET | dict(hidden_sizes=[8, 16], layer_type="basic"),
    ),
    "resnet bottleneck": (
        hf.ResNetModel,
        hf.ResNetForImageClassification,
        hf.ResNetConfig,
        _RESNET | dict(embedding_size=4, hidden_sizes=[8, 16], layer_type="bottleneck"),
    ),
}
LABELS = ["cat", "dog", "owl"]


def random(model: torch.nn.Module) -> torch.nn.Module:
    """Perturb every parameter and statistic: initial zeros and ones would hide errors."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point():
                buffer.add_(torch.rand(buffer.shape, generator=generator))
            elif name.endswith("num_batches_tracked"):
                buffer.fill_(1000)
    return model.eval()


def body(name: str) -> torch.nn.Module:
    kind, _, config, settings = KINDS[name]
    torch.manual_seed(0)
    return random(kind(config(**settings)))


def classifier(name: str) -> torch.nn.Module:
    _, kind, config, settings = KINDS[name]
    torch.manual_seed(0)
    return random(kind(config(**settings, id2label=dict(enumerate(LABELS)))))


def logits(model: torch.nn.Module) -> torch.Tensor:
    towers = getattr(model.config, "vision_config", model.config)
    size = getattr(towers, "image_size", 16)
    images = torch.linspace(-1, 1, 3 * size * size).reshape(1, 3, size, size)
    with torch.no_grad():
        return model(pixel_values=images).logits


@pytest.mark.parametrize("name", KINDS)
def test_the_names_of_the_other_tests_are_those_of_transformers(tmp_path, name):
    for model, names in ((body(name), BODIES[name]), (classifier(name), classified(name))):
        model.save_pretrained(tmp_path / "model")
        found = {n: x.shape for n, x in tensors(tmp_path / "model").items()}
        if name == "resnet bottleneck":  # Other widths.
            assert found.keys() == names.keys()
        else:
            assert found == names


@pytest.mark.parametrize("name", KINDS)
def test_a_model_with_its_classifier(tmp_path, name):
    paths, out = save_all(tmp_path, model := classifier(name)), tmp_path / "out"
    assert merge(paths, out) == 0
    assert_merged(out, paths)
    again = opened(type(model), out)
    assert logits(again).isfinite().all()
    assert (logits(again) - logits(model)).norm() > 0
    for name, buffer in again.named_buffers():  # The statistics of the base, bit for bit.
        assert torch.equal(buffer, model.get_buffer(name)), name


@pytest.mark.parametrize("name", KINDS)
def test_a_body_as_base(tmp_path, capsys, name):
    """The base has no classifier and no prefix, as most models on the hub."""
    paths = [tmp_path / "base", tmp_path / "ft1", tmp_path / "ft2"]
    body(name).save_pretrained(paths[0])
    kind = KINDS[name][1]
    names = dict(enumerate(LABELS))
    start = kind.from_pretrained(
        paths[0], id2label=names, label2id={n: i for i, n in names.items()}
    )
    for i, path in enumerate(paths[1:], 1):
        fine_tuned(start, i).save_pretrained(path)
    assert merge(paths, tmp_path / "error") == 1
    assert "--head finetuned" in capsys.readouterr().err
    out = tmp_path / "out"
    assert merge(paths, out, "--head", "finetuned") == 0
    again = opened(hf.AutoModelForImageClassification, out)
    assert isinstance(again, kind) and list(again.config.id2label.values()) == LABELS
    # Compared as stored: transformers splits the fused SwiGLU of DINOv2 when it opens a file.
    prefix = f"{kind.base_model_prefix}."
    base, *tuned = ({n.removeprefix(prefix): x for n, x in tensors(path).items()} for path in paths)
    made = tensors(out)
    assert made.keys() == tuned[0].keys()
    for key, value in made.items():
        values = [model[key] for model in tuned]
        if key.startswith("classifier."):
            expected = np.mean([x.astype(np.float64) for x in values], 0)
        else:
            expected = merged(base[key], values) if value.dtype.kind == "f" else base[key]
        assert_close(value, expected, key)
    assert logits(again).isfinite().all()


def test_a_distilled_deit(tmp_path):
    """Two classifiers: of the class token and of the distillation token."""
    torch.manual_seed(0)
    model = random(hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**_VISION, num_labels=3)))
    paths, out = save_all(tmp_path, model), tmp_path / "out"
    assert merge(paths, out) == 0
    assert_merged(out, paths)
    opened(hf.DeiTForImageClassificationWithTeacher, out)


@pytest.mark.parametrize("unit", ["layer", "head", "block", "filter"])
@pytest.mark.parametrize("name", KINDS)
def test_every_unit_opens(tmp_path, capsys, name, unit):
    paths, out = save_all(tmp_path, model := classifier(name)), tmp_path / "out"
    status = merge(paths, out, "--unit", unit)
    if unit == "head" and ("convnext" in name or "resnet" in name):
        assert status == 1 and "no attention" in capsys.readouterr().err
        return
    assert status == 0
    assert logits(opened(type(model), out)).isfinite().all()


def test_heads_of_a_config_that_leaves_out_defaults(tmp_path):
    """google/siglip-base-patch16-224: its config.json names neither widths nor heads."""
    text, vision = (x | dict(hidden_size=24, num_attention_heads=12) for x in (_TEXT, _VISION))
    model = random(hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=vision)))
    paths = save_all(tmp_path, model)
    for path in paths:
        config = config_of(path)
        towers = {
            key: {k: v for k, v in config[key].items() if k != "num_attention_heads"}
            for key in ("text_config", "vision_config")
        }
        edit_config(path, **towers)
    assert merge(paths, tmp_path / "out", "--unit", "head") == 0
    opened(hf.SiglipModel, tmp_path / "out")


@pytest.mark.parametrize("old", ["base", "fine-tunes"])
def test_an_image_tower_of_siglip_in_the_names_of_earlier_releases(tmp_path, old):
    """transformers 4 saved SiglipVisionModel with the prefix `vision_model.`."""
    torch.manual_seed(0)
    model = random(hf.SiglipVisionModel(hf.SiglipVisionConfig(**_VISION)))
    plain = save_all(tmp_path, model)
    prefixed = [
        save_tensors(
            tmp_path / "old" / path.name,
            {f"vision_model.{n}": torch.from_numpy(x) for n, x in tensors(path).items()},
            path,
        )
        for path in plain
    ]
    paths = [prefixed[0], *plain[1:]] if old == "base" else [plain[0], *prefixed[1:]]
    out = tmp_path / "out"
    assert merge(paths, out) == 0
    made = {n.removeprefix("vision_model."): x for n, x in tensors(out).items()}
    assert_merged(made, plain)
    opened(hf.SiglipVisionModel, out)
