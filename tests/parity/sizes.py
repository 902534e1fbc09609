"""CLIP sizes that are compared with torch, and a table of the errors.

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

import jax
import numpy as np

from modelstock_jax.models.clip import CLIPConfig
from modelstock_jax.models.config import LEGACY_EOS_TOKEN_ID, TextConfig, VisionConfig
from modelstock_jax.models.model import encode_image, encode_text
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


# Name -> sizes, and (H, W) of the images.
SIZES: dict[str, tuple[CLIPConfig, tuple[int, int]]] = {
    "ViT-B/32": (_base(32), (224, 224)),
    "ViT-B/16": (_base(16), (224, 224)),
    "ViT-L/14": (_large(224), (224, 224)),
    "ViT-L/14 at 336": (_large(336), (336, 336)),
    "ViT-B/32, gelu": (_base(32, act="gelu"), (224, 224)),
    "ViT-B/32, first end of text": (_base(32, eos_token_id=END, vocab_size=END + 3), (224, 224)),
    "ViT-B/32, images of 288 x 224": (_base(32), (288, 224)),
}


def shrunk(config: CLIPConfig) -> CLIPConfig:
    """Two layers and two heads of 64; patches, resolution, vocabulary and rules are the same."""
    size = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=2)
    return CLIPConfig(
        dataclasses.replace(config.vision, **size),
        dataclasses.replace(config.text, **size),
        projection_dim=64,
    )


def inputs(config: CLIPConfig, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Two images and three texts, padded with the end-of-text token.

    Where the config says that the first end of text counts, a word that was added to the
    vocabulary, with a higher id, stands before it: the other rule would pool there.
    """
    rng = np.random.default_rng(3)
    images = rng.standard_normal((2, *size, config.vision.num_channels)).astype(np.float32)
    ids = rng.integers(0, END - 1, (3, config.text.max_position_embeddings)).astype(np.int32)
    for row, end in zip(ids, (5, 40, 76), strict=True):
        row[end:] = END
    if config.text.eos_token_id == END:
        ids[:, 2] = config.text.vocab_size - 1
    return images, ids


@dataclasses.dataclass(frozen=True)
class Errors:
    """Maximum differences from torch, relative to unit embeddings and to exp(logit_scale)."""

    image: float
    text: float
    logits: float


def compare(config: CLIPConfig, size: tuple[int, int], directory: Path) -> Errors:
    """Run random weights through transformers' model and ours, in float32."""
    ours, theirs = reference.pair(config, directory)
    images, ids = inputs(config, size)
    out = reference.torch_features(theirs, images, ids)
    del theirs

    @jax.jit
    def embed(params, images, ids):
        image = encode_image(config, params["image_tower"], images)
        return image, encode_text(config, params["text_tower"], ids)

    image, text = (reference.unit(x) for x in embed(ours.params, images, ids))
    scale = np.exp(np.float64(ours.params["logit_scale"]))
    # The rows differ, so the comparison can fail.
    assert np.abs(image[0] - image[1]).max() > 1e-2 and np.abs(text[0] - text[1]).max() > 1e-2
    return Errors(
        np.abs(image - reference.unit(out.image_embeds)).max(),
        np.abs(text - reference.unit(out.text_embeds)).max(),
        np.abs(scale * image @ text.T - out.logits_per_image.numpy()).max() / scale,
    )


def main(names: list[str]) -> None:
    """Print one row of a Markdown table for each size."""
    print("| model | image embedding | text embedding | logits | CPU s | peak GiB |")
    print("|---|---|---|---|---|---|")
    # One process per size: peak memory is per process.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        for row in pool.map(_row, names or SIZES):
            print(row, flush=True)


def _row(name: str) -> str:
    start = time.process_time()
    with tempfile.TemporaryDirectory() as directory:
        errors = compare(*SIZES[name], Path(directory))
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    numbers = " | ".join(f"{x:.1e}" for x in dataclasses.astuple(errors))
    return f"| {name} | {numbers} | {seconds:.0f} | {peak:.1f} |"


if __name__ == "__main__":
    main(sys.argv[1:])
