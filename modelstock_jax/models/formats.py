"""Checkpoint formats: Hugging Face's, OpenAI's and Model Soups'; which of them a path has."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from modelstock_jax.errors import UserError
from modelstock_jax.models import open_clip_format
from modelstock_jax.models.checkpoint import (
    Checkpoint,
    CheckpointFormat,
    CompleteFormat,
    param_shapes,
)
from modelstock_jax.models.config import (
    CLIP_MEAN,
    CLIP_STD,
    LEGACY_EOS_TOKEN_ID,
    PREPROCESSOR_FILE,
    CLIPConfig,
    Preprocessor,
    TextConfig,
    VisionConfig,
)
from modelstock_jax.models.open_clip_format import OpenCLIP
from modelstock_jax.models.param_mapping import HEAD, Row, Shape, flatten, read_tree, rows
from modelstock_jax.tensor_files.reader import INDEX, SINGLE, TensorFiles, read_json
from modelstock_jax.tensor_files.writer import write_directory_tensors, write_tensors

CONFIG = "config.json"


class HuggingFace(CompleteFormat):
    """``config.json``, ``preprocessor_config.json``, ``model.safetensors`` or shards and index."""

    name = "hugging_face"
    column = "hugging_face"
    weights = ("model*.safetensors",)

    def locate(self, path: Path) -> Path | None:
        """The directory, where it holds the one file or an index."""
        return path if (path / SINGLE).is_file() or (path / INDEX).is_file() else None

    def sizes(self, path: Path, files: TensorFiles) -> tuple[CLIPConfig, Preprocessor]:
        """From both configs."""
        raw = read_json(path / CONFIG)
        try:
            config = CLIPConfig.from_dict(raw)
        except UserError as error:
            raise UserError(f"{path / CONFIG}: {error}") from None
        return config, Preprocessor.read(path)

    def describe(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Both configs; the head's labels are in the first, where transformers keeps them."""
        raw = checkpoint.config.to_dict()
        if checkpoint.labels is not None:
            raw["id2label"] = {str(i): label for i, label in enumerate(checkpoint.labels)}
            raw["label2id"] = {label: i for i, label in enumerate(checkpoint.labels)}
        return {CONFIG: raw, PREPROCESSOR_FILE: checkpoint.preprocessor.to_dict()}

    def tolerates(self, name: str) -> bool:
        """Older checkpoints keep a count 0, 1, 2, ... beside the position embeddings."""
        return name.endswith(".position_ids")

    def write(
        self, directory: Path, tensors: Mapping[str, np.ndarray], max_shard_bytes: int
    ) -> None:
        """One file, or shards and their index."""
        write_directory_tensors(directory, tensors, max_shard_bytes)


# OpenAI's layout: the names of its state dict, and nothing beside the tensors.


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


class OpenAI(CompleteFormat):
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
        named = {row.name: row.shape(shapes) for row in rows(checkpoint.config, self.column)}
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


# Model Soups' layout: a fine-tuned image tower and its head, in OpenAI's names under a prefix.


_HEAD = "classification_head."
# CLIP was released in half precision, which rounds by at most 2**-11 of a number.
_ROUNDING = 1e-3


class ModelSoups(CheckpointFormat):
    """One file: ``model.visual.*`` and ``classification_head.*``, both after ``module.`` or not."""

    name = "model_soups"
    column = "openai"

    def read(self, path: Path, base: Checkpoint | None) -> Checkpoint:
        """The base with the file's image tower and head.

        What lies there of the text tower must be the base's: it was not trained.
        """
        if base is None:
            raise UserError(
                f"{path}: a fine-tuned image tower and head (model_soups) without a text tower; "
                "name the model that was fine-tuned as its base."
            )
        files = self.open(path)
        prefix = _prefix(files)
        table = [
            dataclasses.replace(row, name=f"{prefix}model.{row.name}")
            for row in rows(base.config, self.column)
        ]
        image = [row for row in table if row.path[0][0] == "image_tower"]
        others = [row for row in table if row.path[0][0] != "image_tower" and row.name in files]
        head = [
            Row((("head", *row.path[0]),), f"{prefix}{_HEAD}{row.name}", row.transform)
            for row in HEAD
        ]
        classes = next(iter(files.shape(head[1].name)), 0) if head[1].name in files else 0
        shapes: dict[tuple[str, ...], tuple[int, ...]] = {
            **param_shapes(base.config),
            ("head", "kernel"): (base.config.projection_dim, classes),
            ("head", "bias"): (classes,),
        }
        tree = read_tree(files, [*image, *head, *others], shapes, path)
        _check_base(path, tree, base, {p for row in others for p in row.path})
        # The head of a base that has one is the anchor of the file's: the same classes.
        labels = base.labels if base.labels is not None and len(base.labels) == classes else None
        replica = {name: tree[name] for name in ("image_tower", "head")}
        return dataclasses.replace(base.with_replica(replica), labels=labels, format=self.name)


def is_fine_tuned(names: Iterable[str]) -> bool:
    """Whether tensors of these names are in this layout."""
    return any(name.endswith(f"{_HEAD}weight") for name in names)


def _prefix(files: TensorFiles) -> str:
    """What stands before every name, such as ``module.`` of a model trained on several GPUs."""
    found = (name for name in files if name.endswith(f"{_HEAD}weight"))
    return next(found, f"{_HEAD}weight").removesuffix(f"{_HEAD}weight")


def _check_base(path: Path, tree: dict, base: Checkpoint, untrained: set[tuple[str, ...]]) -> None:
    theirs, ours = dict(flatten(tree)), dict(flatten(base.params))
    other = [
        ".".join(name)
        for name in sorted(untrained)
        if np.linalg.norm(theirs[name] - ours[name]) > _ROUNDING * np.linalg.norm(ours[name])
    ]
    if other:
        raise UserError(
            f"{path}: was not fine-tuned from this base, whose {', '.join(other)} are others."
        )


# The layouts in which a CLIP checkpoint may lie on disk, and which one a path is in.


WRITABLE: dict[str, CompleteFormat] = {
    layout.name: layout for layout in (HuggingFace(), OpenCLIP(), OpenAI())
}
READABLE: dict[str, CheckpointFormat] = {**WRITABLE, ModelSoups.name: ModelSoups()}


def writable(name: str) -> CompleteFormat:
    """The layout of that name; a UserError that lists all where there is none."""
    if name not in WRITABLE:
        raise UserError(f"layout {name!r} is not known; write in one of {', '.join(WRITABLE)}.")
    return WRITABLE[name]


def readable(name: str) -> CheckpointFormat:
    """The layout of that name; a UserError that lists all where there is none."""
    if name not in READABLE:
        raise UserError(f"layout {name!r} is not known; read one of {', '.join(READABLE)}.")
    return READABLE[name]


def described(path: Path) -> list[CheckpointFormat]:
    """The layouts whose config lies in a directory, in the order in which they are tried.

    Hugging Face's comes first: where a repository holds a model in several layouts, as LAION's do,
    it is the one that says most.

    Args:
        path: A directory, or a file, in which there is no config.

    Returns:
        Layouts; none where only the names of the tensors can tell.
    """
    found: list[CheckpointFormat] = []
    config = path / CONFIG
    is_open_clip = (path / open_clip_format.CONFIG).is_file()
    raw = read_json(config) if config.is_file() and is_open_clip else None
    # Beside OpenCLIP's config, timm's repositories have one of their own, with no model_type.
    timms = is_open_clip and not (isinstance(raw, dict) and "model_type" in raw)
    if config.is_file() and not timms:
        found.append(WRITABLE[HuggingFace.name])
    if is_open_clip:
        found.append(WRITABLE[OpenCLIP.name])
    return found


def named(path: Path) -> CheckpointFormat:
    """The layout that the names of a path's tensors tell, where no config lies beside them."""
    files = READABLE[OpenAI.name].open(path)
    return READABLE[ModelSoups.name if is_fine_tuned(files) else OpenAI.name]
