"""OpenAI's layout: the names of its state dict, and nothing beside the tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from modelstock_jax.clip.checkpoint import Checkpoint
from modelstock_jax.clip.config import LEGACY_EOS_TOKEN_ID, CLIPConfig, TextConfig, VisionConfig
from modelstock_jax.clip.layouts.layout import WholeLayout, param_shapes
from modelstock_jax.clip.names import Shape, rows
from modelstock_jax.clip.preprocessor import CLIP_MEAN, CLIP_STD, Preprocessor
from modelstock_jax.errors import UserError
from modelstock_jax.tensor_files.reader import TensorFiles
from modelstock_jax.tensor_files.writer import write_tensors

# What the jit archive holds beside the weights.
SCALARS = ("input_resolution", "context_length", "vocab_size")
# Tensors that tell the sizes, with their numbers of axes.
_TELLING = {
    "visual.conv1.weight": 4,
    "visual.positional_embedding": 2,
    "text_projection": 2,
    "positional_embedding": 2,
    "token_embedding.weight": 2,
    "ln_final.weight": 1,
}
_HEAD_WIDTH = 64
# Fields that say nothing about what the towers compute.
_SILENT = ("pad_token_id", "bos_token_id", "eos_token_id")


class OpenAI(WholeLayout):
    """One file of tensors; sizes are inferred from shapes, and the rest is OpenAI's own."""

    name = "openai"
    column = "openai"

    def sizes(self, path: Path, files: TensorFiles) -> tuple[CLIPConfig, Preprocessor]:
        """From the shapes."""
        shapes = {name: files.shape(name) for name in files}
        try:
            config = infer(shapes)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        return config, Preprocessor(CLIP_MEAN, CLIP_STD, config.vision.image_size)

    def describe(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """No file: only a model of which the shapes tell all can be written."""
        shapes = param_shapes(checkpoint.config)
        named = {row.theirs: row.shape(shapes) for row in rows(checkpoint.config, self.column)}
        try:
            untold = _untold(checkpoint, infer(named))
        except UserError as error:
            untold = [str(error).rstrip(".")]
        if untold:
            raise UserError(
                "OpenAI's layout has no config, and its readers would take this model for another: "
                f"{'; '.join(untold)}. Choose hugging_face or open_clip."
            )
        return {}

    def tolerates(self, name: str) -> bool:
        """The jit archive's own numbers."""
        return name in SCALARS

    def write(
        self, directory: Path, tensors: Mapping[str, np.ndarray], max_shard_bytes: int
    ) -> None:
        """One file, whatever its size."""
        write_tensors(directory / self.file, tensors)


def infer(shapes: Mapping[str, Shape]) -> CLIPConfig:
    """The config that OpenAI's code gives a state dict of these shapes.

    Heads are 64 wide, the perceptron 4 times the width, the activation quick_gelu, and a text ends
    at its highest id.

    Args:
        shapes: OpenAI's names -> shapes.

    Returns:
        The configuration.

    Raises:
        UserError: Other names, or a ResNet.
    """
    if any(name.startswith("visual.layer1.") for name in shapes):
        raise UserError("a ResNet CLIP (visual.layer1); only vision transformers can be opened.")
    wrong = [
        f"{name} with {axes} axes"
        for name, axes in _TELLING.items()
        if len(shapes.get(name, ())) != axes
    ]
    if wrong:
        raise UserError(
            f"not a CLIP with OpenAI's names, which need {', '.join(wrong)}; another layout needs "
            "its config.json or open_clip_config.json beside the tensors."
        )
    width, channels, _, patch = shapes["visual.conv1.weight"]
    tokens, _ = shapes["visual.positional_embedding"]
    context, text_width = shapes["positional_embedding"]
    return CLIPConfig(
        VisionConfig(
            **_tower(width, _blocks(shapes, "visual.transformer.resblocks.")),
            num_channels=channels,
            image_size=patch * math.isqrt(max(tokens - 1, 0)),
            patch_size=patch,
        ),
        TextConfig(
            **_tower(text_width, _blocks(shapes, "transformer.resblocks.")),
            vocab_size=shapes["token_embedding.weight"][0],
            max_position_embeddings=context,
            eos_token_id=LEGACY_EOS_TOKEN_ID,
        ),
        projection_dim=shapes["text_projection"][1],
    )


def _untold(checkpoint: Checkpoint, told: CLIPConfig) -> list[str]:
    """Where a model is another than its tensors tell."""
    config, pixels = checkpoint.config, checkpoint.preprocessor
    untold = []
    for tower in ("vision", "text"):
        found, expected = getattr(config, tower), getattr(told, tower)
        untold += [
            f"{tower} {key} is {value!r}, not {other!r}"
            for (key, value), other in zip(
                dataclasses.asdict(found).items(), dataclasses.astuple(expected), strict=True
            )
            if value != other and key not in _SILENT
        ]
    if not config.text.pools_at_highest_id:
        untold.append(f"text eos_token_id {config.text.eos_token_id} is not the highest id")
    if (pixels.mean, pixels.std) != (CLIP_MEAN, CLIP_STD):
        untold.append(f"pixels have mean {pixels.mean} and std {pixels.std}, not CLIP's")
    return untold


def _tower(width: int, layers: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // _HEAD_WIDTH,
    }


def _blocks(shapes: Mapping[str, Shape], prefix: str) -> int:
    return len({n.removeprefix(prefix).split(".")[0] for n in shapes if n.startswith(prefix)})
