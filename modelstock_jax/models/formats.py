"""Checkpoint formats of Hugging Face, OpenAI and Model Soups; detection of the format."""

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
from modelstock_jax.models.clip import CLIPConfig, require_clip
from modelstock_jax.models.config import LEGACY_EOS_TOKEN_ID, ModelConfig, TextConfig, VisionConfig
from modelstock_jax.models.model import config_from_dict
from modelstock_jax.models.open_clip_format import OpenCLIP
from modelstock_jax.models.param_mapping import HEAD, Row, Shape, flatten, read_tree
from modelstock_jax.models.preprocessor import CLIP_MEAN, CLIP_STD, PREPROCESSOR_FILE, Preprocessor
from modelstock_jax.tensor_files.reader import INDEX, SINGLE, TensorFiles, read_json
from modelstock_jax.tensor_files.writer import write_directory_tensors, write_tensors

CONFIG = "config.json"


class HuggingFace(CompleteFormat):
    """`config.json`, `preprocessor_config.json`, `model.safetensors` or shards and index."""

    name = "hugging_face"
    column = "hugging_face"
    weights = ("model*.safetensors",)

    def locate(self, path: Path) -> Path | None:
        """Return the directory if it contains the single file or an index."""
        return path if (path / SINGLE).is_file() or (path / INDEX).is_file() else None

    def sizes(self, path: Path, files: TensorFiles) -> tuple[ModelConfig, Preprocessor]:
        """Read both configs."""
        raw = read_json(path / CONFIG)
        try:
            config = config_from_dict(raw)
        except UserError as error:
            raise UserError(f"{path / CONFIG}: {error}") from None
        preprocessor = Preprocessor.read(path)
        if config.is_convolutional:  # Its config.json does not determine the size of the images.
            config = config.with_image_size(preprocessor.image_size)
        return config, preprocessor

    def describe(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return both configs; the labels of the head are in config.json, as in transformers."""
        config, head, labels = checkpoint.config, checkpoint.head, checkpoint.labels
        in_file = head if config.head_rows(head) else None
        name = config.base_class if in_file is None else config.classifier_name(in_file)
        raw = {"architectures": [name], **config.to_dict()}
        if labels is None and in_file is not None:
            # transformers has no other record of the number of classes.
            labels = unnamed_labels(len(in_file["bias"]))
        if labels is not None:
            raw["id2label"] = {str(i): label for i, label in enumerate(labels)}
            raw["label2id"] = {label: i for i, label in enumerate(labels)}
        return {CONFIG: raw, PREPROCESSOR_FILE: checkpoint.preprocessor.to_dict()}

    def tolerates(self, name: str) -> bool:
        """Accept position ids 0, 1, 2, ..., which older checkpoints store."""
        return name.endswith(".position_ids")

    def write(
        self, directory: Path, tensors: Mapping[str, np.ndarray], max_shard_bytes: int
    ) -> None:
        """Write one file, or shards and their index."""
        write_directory_tensors(directory, tensors, max_shard_bytes)


def unnamed_labels(count: int) -> tuple[str, ...]:
    """Return transformers' labels of classes without names.

    Example:
      >>> unnamed_labels(2)
      ('LABEL_0', 'LABEL_1')
    """
    return tuple(f"LABEL_{i}" for i in range(count))


# Scalars that OpenAI's jit archive contains besides the weights.
SCALARS = ("input_resolution", "context_length", "vocab_size")
# Tensors from which the sizes are inferred -> their number of axes.
_TELLING = {
    "visual.conv1.weight": 4,
    "visual.positional_embedding": 2,
    "text_projection": 2,
    "positional_embedding": 2,
    "token_embedding.weight": 2,
    "ln_final.weight": 1,
}
_HEAD_WIDTH = 64
# Fields that do not change what the towers compute.
_SILENT = ("pad_token_id", "bos_token_id", "eos_token_id")


class OpenAI(CompleteFormat):
    """One file of tensors; sizes are inferred from shapes, everything else is OpenAI's default."""

    name = "openai"
    column = "openai"

    def sizes(self, path: Path, files: TensorFiles) -> tuple[CLIPConfig, Preprocessor]:
        """Infer sizes from the shapes of the tensors."""
        shapes = {name: files.shape(name) for name in files}
        try:
            config = infer(shapes)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        return config, Preprocessor(CLIP_MEAN, CLIP_STD, config.vision.image_size)

    def describe(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Check that the shapes determine the model; the format has no config file."""
        config = require_clip(checkpoint.config, self.name)
        shapes = param_shapes(config)
        named = {row.name: row.shape(shapes) for row in config.rows(self.column)}
        try:
            undetermined = _undetermined(checkpoint, config, infer(named))
        except UserError as error:
            undetermined = [str(error).rstrip(".")]
        if undetermined:
            raise UserError(
                "OpenAI's format has no config, and its readers would open this model differently: "
                f"{'; '.join(undetermined)}; choose hugging_face or open_clip"
            )
        return {}

    def tolerates(self, name: str) -> bool:
        """Accept the scalars of the jit archive."""
        return name in SCALARS

    def write(
        self, directory: Path, tensors: Mapping[str, np.ndarray], max_shard_bytes: int
    ) -> None:
        """Write one file of any size."""
        write_tensors(directory / self.file, tensors)


def infer(shapes: Mapping[str, Shape]) -> CLIPConfig:
    """Infer the config from the shapes of a state dict, as OpenAI's code does.

    Heads have width 64, the MLP 4 times the model width, the activation is quick_gelu, and a text
    ends at its highest id.

    Args:
      shapes: OpenAI's tensor names -> shapes

    Returns:
      The configuration

    Raises:
      UserError: other tensor names, or a ResNet
    """
    if any(name.startswith("visual.layer1.") for name in shapes):
        raise UserError("a ResNet CLIP (visual.layer1); only vision transformers are supported")
    wrong = [
        f"{name} with {axes} axes"
        for name, axes in _TELLING.items()
        if len(shapes.get(name, ())) != axes
    ]
    if wrong:
        raise UserError(
            f"not a CLIP in OpenAI's format, which needs {', '.join(wrong)}; any other format "
            "needs its config.json or open_clip_config.json next to the tensors"
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


def _undetermined(checkpoint: Checkpoint, config: CLIPConfig, implied: CLIPConfig) -> list[str]:
    """List where a model differs from the config that its tensors imply."""
    pixels, undetermined = checkpoint.preprocessor, []
    for tower in ("vision", "text"):
        found, expected = getattr(config, tower), getattr(implied, tower)
        undetermined += [
            f"{tower} {key} is {value!r}, not {other!r}"
            for (key, value), other in zip(
                dataclasses.asdict(found).items(), dataclasses.astuple(expected), strict=True
            )
            if value != other and key not in _SILENT
        ]
    if not config.text.pools_at_highest_id:
        undetermined.append(f"text eos_token_id {config.text.eos_token_id} is not the highest id")
    if not pixels.resizes_as_clip:
        undetermined.append("images are not resized as CLIP's")
    if (pixels.mean, pixels.std) != (CLIP_MEAN, CLIP_STD):
        undetermined.append(f"pixels have mean {pixels.mean} and std {pixels.std}, not CLIP's")
    return undetermined


def _tower(width: int, layers: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // _HEAD_WIDTH,
    }


def _blocks(shapes: Mapping[str, Shape], prefix: str) -> int:
    return len({n.removeprefix(prefix).split(".")[0] for n in shapes if n.startswith(prefix)})


_HEAD = "classification_head."
# CLIP was released in half precision, with a relative rounding error of at most 2**-11.
_ROUNDING = 1e-3


class ModelSoups(CheckpointFormat):
    """One file: `model.visual.*` and `classification_head.*`, with or without `module.` prefix."""

    name = "model_soups"
    column = "openai"

    def read(self, path: Path, base: Checkpoint | None) -> Checkpoint:
        """Return the base with the image tower and head of the file.

        Text-tower tensors in the file must equal those of the base: they were not trained.
        """
        if base is None:
            raise UserError(
                f"{path}: contains a fine-tuned image tower and head (model_soups) but no text "
                "tower; pass the model that was fine-tuned as base"
            )
        files = self.open(path)
        prefix = _prefix(files)
        table = [
            dataclasses.replace(row, name=f"{prefix}model.{row.name}")
            for row in require_clip(base.config, self.name).rows(self.column)
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
            ("head", "kernel"): (base.config.feature_size, classes),
            ("head", "bias"): (classes,),
        }
        tree = read_tree(files, [*image, *head, *others], shapes, path)
        _check_base(path, tree, base, {p for row in others for p in row.path})
        # If the base has a head, it is the anchor of this head: the classes are the same.
        labels = base.labels if base.labels is not None and len(base.labels) == classes else None
        replica = {name: tree[name] for name in ("image_tower", "head")}
        return dataclasses.replace(base.with_replica(replica), labels=labels, format=self.name)


def is_fine_tuned(names: Iterable[str]) -> bool:
    """Whether the tensor names are those of this format."""
    return any(name.endswith(f"{_HEAD}weight") for name in names)


def _prefix(files: TensorFiles) -> str:
    """Return the prefix of all names, such as `module.` after training on several GPUs."""
    found = (name for name in files if name.endswith(f"{_HEAD}weight"))
    return next(found, f"{_HEAD}weight").removesuffix(f"{_HEAD}weight")


def _check_base(path: Path, tree: dict, base: Checkpoint, untrained: set[tuple[str, ...]]) -> None:
    found, expected = dict(flatten(tree)), dict(flatten(base.params))
    differing = [
        ".".join(name)
        for name in sorted(untrained)
        if np.linalg.norm(found[name] - expected[name]) > _ROUNDING * np.linalg.norm(expected[name])
    ]
    if differing:
        raise UserError(f"{path}: was not fine-tuned from this base: {', '.join(differing)} differ")


WRITABLE: dict[str, CompleteFormat] = {
    format.name: format for format in (HuggingFace(), OpenCLIP(), OpenAI())
}
READABLE: dict[str, CheckpointFormat] = {**WRITABLE, ModelSoups.name: ModelSoups()}


def writable(name: str) -> CompleteFormat:
    """Return the format of this name.

    Raises:
      UserError: unknown name; lists all names
    """
    if name not in WRITABLE:
        raise UserError(f"format {name!r} cannot be written; choose one of {', '.join(WRITABLE)}")
    return WRITABLE[name]


def readable(name: str) -> CheckpointFormat:
    """Return the format of this name.

    Raises:
      UserError: unknown name; lists all names
    """
    if name not in READABLE:
        raise UserError(f"unknown format {name!r}; choose one of {', '.join(READABLE)}")
    return READABLE[name]


def described(path: Path) -> list[CheckpointFormat]:
    """Return the formats whose config a directory contains, in the order in which they are tried.

    Hugging Face's is first: if a repository has a model in several formats, as LAION's do, it has
    the most complete config.

    Args:
      path: a directory, or a file (which has no config)

    Returns:
      Formats; empty if only the tensor names can tell
    """
    found: list[CheckpointFormat] = []
    config = path / CONFIG
    is_open_clip = (path / open_clip_format.CONFIG).is_file()
    raw = read_json(config) if config.is_file() and is_open_clip else None
    # timm's repositories have OpenCLIP's config and their own config.json without model_type.
    is_timm = is_open_clip and not (isinstance(raw, dict) and "model_type" in raw)
    if config.is_file() and not is_timm:
        found.append(WRITABLE[HuggingFace.name])
    if is_open_clip:
        found.append(WRITABLE[OpenCLIP.name])
    return found


def named(path: Path) -> CheckpointFormat:
    """Return the format that the tensor names imply, for a path without config."""
    files = READABLE[OpenAI.name].open(path)
    return READABLE[ModelSoups.name if is_fine_tuned(files) else OpenAI.name]
