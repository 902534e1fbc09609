"""Tiny checkpoints of every image model and a small image folder, for complete runs."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from configs import folder
from modelstock_jax.models import checkpoint_io
from modelstock_jax.models.checkpoint import Checkpoint
from modelstock_jax.models.config import ModelConfig, TextConfig, VisionConfig
from modelstock_jax.models.convnext import ConvNeXtConfig, ConvNeXtV2Config
from modelstock_jax.models.model import init
from modelstock_jax.models.preprocessor import Preprocessor
from modelstock_jax.models.resnet import ResNetConfig
from modelstock_jax.models.siglip import SiglipConfig
from modelstock_jax.models.vit import (
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    ViTConfig,
)
from tests.models import siglip_tokenizers

CLASSES = ("black cat", "dog", "owl")
SIDE = 32
# The batch can be split over the eight devices of the tests.
TRAIN_IMAGES, BATCH, EPOCHS = 48, 8, 2
STEPS_PER_EPOCH = TRAIN_IMAGES // BATCH
STEPS = EPOCHS * STEPS_PER_EPOCH


@dataclass(frozen=True)
class Kind:
    """A tiny checkpoint, and how a run starts from it.

    Attributes:
      config: sizes
      preprocessing: fields of `Preprocessor` besides mean, std and image size
      own_head: whether the checkpoint has a classifier whose labels are those of the folder
      architecture: transformers' class of the exported model
      objective: options of the run, without 'config.objective.'
    """

    config: ModelConfig
    preprocessing: Mapping[str, Any]
    architecture: str
    own_head: bool = False
    objective: tuple[str, ...] = ()


_WIDE = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
_DEEP = dict(**_WIDE, intermediate_size=24, image_size=SIDE, patch_size=8)
_DINOV2 = dict(**_WIDE, mlp_ratio=2, image_size=SIDE + 24, patch_size=8)
_CONVNEXT = dict(hidden_sizes=(8, 16), depths=(1, 2), layer_norm_eps=1e-6)
_TEXT = TextConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    vocab_size=400,
    max_position_embeddings=siglip_tokenizers.LENGTH,
    hidden_act="gelu_pytorch_tanh",
)
_RANDOM = ("head=random",)
_PROBED = ("name=lp_ft", "probe_epochs=1", "probe_learning_rate=0.1")
_BILINEAR = 2
# Preprocessing as in a published checkpoint of each kind, at this size.
_SQUARE = dict(short_side=None, resample=_BILINEAR)
_CROPPED = dict(short_side=36, image_processor_type="BitImageProcessor")
_CONVNEXT_CROP = dict(
    short_side=36, resample=_BILINEAR, image_processor_type="ConvNextImageProcessor"
)
KINDS = {
    "siglip": Kind(
        SiglipConfig(VisionConfig(**_DEEP, hidden_act="gelu_pytorch_tanh"), _TEXT, 16),
        dict(short_side=None, image_processor_type="SiglipImageProcessor"),
        "SiglipModel",
    ),
    "vit": Kind(
        ViTConfig(**_DEEP),
        dict(**_SQUARE, image_processor_type="ViTImageProcessor"),
        "ViTForImageClassification",
        own_head=True,
    ),
    "deit": Kind(
        DeiTConfig(**_DEEP),
        dict(short_side=None, square_side=36, image_processor_type="DeiTImageProcessor"),
        "DeiTForImageClassificationWithTeacher",
        own_head=True,
    ),
    # Their position embeddings are those of larger images, as in the published models.
    "dinov2": Kind(
        Dinov2Config(**_DINOV2), _CROPPED, "Dinov2ForImageClassification", False, _RANDOM
    ),
    "dinov2_with_registers": Kind(
        Dinov2WithRegistersConfig(**_DINOV2, num_register_tokens=2),
        _CROPPED,
        "Dinov2WithRegistersForImageClassification",
        objective=_PROBED,
    ),
    "convnext": Kind(
        ConvNeXtConfig(**_CONVNEXT),
        _CONVNEXT_CROP,
        "ConvNextForImageClassification",
        objective=_PROBED,
    ),
    "convnextv2": Kind(
        ConvNeXtV2Config(**_CONVNEXT),
        _CONVNEXT_CROP,
        "ConvNextV2ForImageClassification",
        own_head=True,
    ),
    "resnet": Kind(
        ResNetConfig(embedding_size=8, hidden_sizes=(16, 24), depths=(1, 2)),
        _CONVNEXT_CROP,
        "ResNetForImageClassification",
        objective=_RANDOM,
    ),
}


def perturbed(config: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """Return random parameters in which no norm, bias, scale or statistic has its default."""
    rng = np.random.default_rng(seed)

    def move(path, leaf):
        if np.issubdtype(leaf.dtype, np.integer):
            return rng.integers(1, 1000, leaf.shape)
        if path[-1].key == "var":
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        return np.asarray(leaf + 0.1 * rng.standard_normal(leaf.shape), np.float32)

    return jax.tree.map_with_path(move, init(config, jax.random.key(seed)))


def checkpoint(kind: str, tokenizer: Path | None = None) -> Checkpoint:
    """Return the checkpoint of a kind, with the classifier of its file if it has one."""
    case, head = KINDS[kind], None
    params, features = perturbed(case.config), case.config.feature_size
    if case.own_head:
        rng = np.random.default_rng(1)
        both = "Teacher" in case.architecture
        heads = [
            {
                "kernel": rng.standard_normal((features, len(CLASSES)), np.float32) / 4,
                "bias": rng.standard_normal(len(CLASSES), np.float32),
            }
            for _ in range(1 + both)
        ]
        head = heads[0] | ({"distillation": heads[1]} if both else {})
        params = {name: x for name, x in params.items() if name not in case.config.base_only}
    preprocessor = Preprocessor((0.5, 0.45, 0.4), (0.25, 0.2, 0.3), SIDE, **case.preprocessing)
    labels = tuple(name.upper() for name in CLASSES) if head else None
    return Checkpoint(case.config, params, preprocessor, tokenizer, head, labels)


def save(kind: str, root: Path) -> Path:
    """Write the checkpoint of a kind to ROOT/KIND; a SigLIP also has a tokenizer."""
    tokenizer = None
    if kind == "siglip":
        tokenizer = siglip_tokenizers.siglip2(root / "tokenizer")
    return checkpoint_io.save(root / kind, checkpoint(kind, tokenizer))


def write_images(root: Path) -> Path:
    """Write class folders for training, validation and test, as in configs/folder.py."""
    for part, count in (("train", TRAIN_IMAGES), ("val", 24), ("test", 12)):
        for label, name in enumerate(CLASSES):
            directory = root / part / name.replace(" ", "_")
            directory.mkdir(parents=True)
            for number in range(count // len(CLASSES)):
                seed = [label, number, len(part)]
                (directory / f"{number}.png").write_bytes(_photograph(label, seed))
    return root


def _photograph(label: int, seed: list[int]) -> bytes:
    """Return a smooth image of which one color channel, that of the class, is brighter."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 160, (5, 5, 3))
    coarse[..., label] += 90
    size = (40, 36) if seed[1] % 2 else (44, 60)
    file = io.BytesIO()
    Image.fromarray(coarse.astype(np.uint8)).resize(size, Image.BICUBIC).save(file, "PNG")
    return file.getvalue()


def options(kind: str, anchor: Path, images: Path) -> dict[str, Any]:
    """Return the options of a short run that differ from those of configs/folder.py."""
    values: dict[str, Any] = {
        "pretrained": str(anchor),
        "data.root": str(images),
        "data.augment.crop_area": (0.5, 1.0),
        "batch_size": BATCH,
        "epochs": EPOCHS,
        "optimizer.learning_rate": 3e-3,
        "optimizer.weight_decay": 0.1,
        "evaluation.batch_size": BATCH,
        "evaluation.wise_ft_alphas": (0.5,),
        "checkpoint.save_every_steps": 2,
        "log_every_steps": 1,
    }
    for option in KINDS[kind].objective:
        name, _, value = option.partition("=")
        default = folder.get_config().objective[name]
        values[f"objective.{name}"] = type(default)(value)
    return values


def config(kind: str, anchor: Path, images: Path, **more: Any) -> ConfigDict:
    """Return the config of a short run; in the names of `more`, '__' stands for '.'."""
    values = options(kind, anchor, images)
    values |= {name.replace("__", "."): value for name, value in more.items()}
    run_config = folder.get_config()
    run_config.update_from_flattened_dict(values)
    return run_config


def arguments(kind: str, anchor: Path, images: Path, workdir: Path, *more: str) -> list[str]:
    """Return the arguments of launch.py for a short run."""
    values = options(kind, anchor, images)
    return [
        "--config=configs/folder.py",
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in values.items()),
        *more,
    ]


def leaves(tree: Any) -> dict[str, np.ndarray]:
    """Return the leaves of a tree on the host, by dotted name."""
    paths = jax.tree.leaves_with_path(jax.device_get(tree))
    return {jax.tree_util.keystr(p, simple=True, separator="."): np.asarray(x) for p, x in paths}
