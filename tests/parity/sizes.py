"""Published sizes of models that are compared with torch, and a table of the errors.

.venv-parity/bin/python -m tests.parity.sizes
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from modelstock_jax.models.clip import CLIPConfig
from modelstock_jax.models.config import LEGACY_EOS_TOKEN_ID, TextConfig, VisionConfig
from modelstock_jax.models.convnext import ConvNeXtConfig, ConvNeXtV2Config
from modelstock_jax.models.resnet import ResNetConfig
from modelstock_jax.models.siglip import SiglipConfig
from modelstock_jax.models.vit import (
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    ViTConfig,
)
from tests.models import small_models
from tests.models.small_models import Case
from tests.parity import reference

END = 49407  # The end of text in CLIP's vocabulary, its highest id.


def _base(patch: int, act: str = "quick_gelu", **text) -> CLIPConfig:
    text = {"eos_token_id": LEGACY_EOS_TOKEN_ID, **text}
    return CLIPConfig(
        VisionConfig(patch_size=patch, hidden_act=act), TextConfig(hidden_act=act, **text)
    )


def _large(image: int) -> CLIPConfig:
    vision = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24)
    text = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    return CLIPConfig(
        VisionConfig(**vision, num_attention_heads=16, patch_size=14, image_size=image),
        TextConfig(**text, eos_token_id=LEGACY_EOS_TOKEN_ID),
        projection_dim=768,
    )


_SQUARE = ((224, 224),)


def _siglip(image: int, **text) -> SiglipConfig:
    """SigLIP so400m with patches of 14 or, if the vocabulary is given, SigLIP 2 base with 16."""
    act = dict(hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6)
    large = dict(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16
    )
    base = dict(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    size, patch = (base, 16) if text else (large, 14)
    text = {"vocab_size": 32000, "max_position_embeddings": 64, **text}
    return SiglipConfig(
        VisionConfig(**size, **act, image_size=image, patch_size=patch),
        TextConfig(**size, **act, **text),
        projection_size=size["hidden_size"],
    )


CLIPS: dict[str, Case] = {
    "ViT-B/32": Case(_base(32), _SQUARE),
    "ViT-B/16": Case(_base(16), _SQUARE),
    "ViT-L/14": Case(_large(224), _SQUARE),
    "ViT-L/14 at 336": Case(_large(336), ((336, 336),)),
    "ViT-B/32, gelu": Case(_base(32, act="gelu"), _SQUARE),
    "ViT-B/32, first end of text": Case(_base(32, eos_token_id=END, vocab_size=END + 3), _SQUARE),
    "ViT-B/32, images of 288 x 224": Case(_base(32), ((288, 224),)),
}
CLIPS = {f"CLIP {name}": case for name, case in CLIPS.items()}
SIZES: dict[str, Case] = {
    **CLIPS,
    "SigLIP 2 B/16": Case(_siglip(224, vocab_size=256000), _SQUARE),
    "SigLIP so400m/14 at 384": Case(_siglip(384), ((384, 384),)),
    "ViT-B/16": Case(ViTConfig(pooler_output_size=768), _SQUARE, classes=1000),
    "DeiT-B distilled": Case(
        DeiTConfig(pooler_output_size=768), _SQUARE, classes=1000, teacher=True
    ),
    "DINOv2 B/14 of 518, images of 224": Case(Dinov2Config(image_size=518), _SQUARE),
    "DINOv2 B/14 with registers, images of 224": Case(
        Dinov2WithRegistersConfig(image_size=518, patch_size=14), _SQUARE
    ),
    "ConvNeXt-B": Case(
        ConvNeXtConfig(hidden_sizes=(128, 256, 512, 1024), depths=(3, 3, 27, 3)),
        _SQUARE,
        classes=1000,
    ),
    "ConvNeXt V2 T": Case(ConvNeXtV2Config(), _SQUARE, classes=1000),
    "ResNet-50": Case(ResNetConfig(), _SQUARE, classes=1000),
}


def shrunk(config: CLIPConfig) -> CLIPConfig:
    """Two layers and two heads of 64; patches, resolution, vocabulary and rules are the same."""
    size = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=2)
    return CLIPConfig(
        dataclasses.replace(config.vision, **size),
        dataclasses.replace(config.text, **size),
        projection_dim=64,
    )


def inputs(case: Case) -> tuple[np.ndarray, np.ndarray | None]:
    """Two images and, if the model has texts, three of them.

    Texts of CLIP are padded with the end-of-text token. Where the config says that the first end of
    text counts, a word that was added to the vocabulary, with a higher id, is before it: the other
    rule would pool there.
    """
    config = case.config
    images, ids = small_models.images(case, case.sides[0]), small_models.ids(case)
    if ids is not None and isinstance(config, CLIPConfig):
        ids %= END - 1
        for row, end in zip(ids, (5, 40, 76), strict=True):
            row[end:] = END
        if config.text.eos_token_id == END:
            ids[:, 2] = config.text.vocab_size - 1
    return images, ids


def compare(case: Case, directory: Path) -> dict[str, float]:
    """Return the errors of random weights that transformers' model and ours open, in float32."""
    ours, theirs = reference.pair(case, directory)
    arrays = inputs(case)
    expected = reference.torch_outputs(case.config, theirs, *arrays)
    del theirs
    return reference.errors(expected, reference.our_outputs(ours, *arrays))


def main(names: list[str]) -> None:
    """Print one row of a Markdown table for each size."""
    print("| model | image embedding | text embedding | logits | CPU s | peak GiB |")
    print("|---|---:|---:|---:|---:|---:|")
    # One process per size: peak memory is per process.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        for row in pool.map(_row, names or SIZES):
            print(row, flush=True)


def _row(name: str) -> str:
    start = time.process_time()
    with tempfile.TemporaryDirectory() as directory:
        errors = compare(SIZES[name], Path(directory))
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    found = [f"{errors[x]:.1e}" if x in errors else "" for x in ("image", "text", "logits")]
    return f"| {name} | {' | '.join(found)} | {seconds:.0f} | {peak:.1f} |"


if __name__ == "__main__":
    main(sys.argv[1:])
