"""Hugging Face's layout: what transformers' ``CLIPModel`` reads and writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from modelstock_jax.clip import preprocessor
from modelstock_jax.clip.checkpoint import Checkpoint
from modelstock_jax.clip.config import CLIPConfig
from modelstock_jax.clip.layouts.layout import WholeLayout
from modelstock_jax.clip.preprocessor import Preprocessor
from modelstock_jax.errors import UserError
from modelstock_jax.tensor_files.reader import INDEX, SINGLE, TensorFiles, read_json
from modelstock_jax.tensor_files.writer import write_directory_tensors

CONFIG = "config.json"


class HuggingFace(WholeLayout):
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
        return {CONFIG: raw, preprocessor.FILE: checkpoint.preprocessor.to_dict()}

    def tolerates(self, name: str) -> bool:
        """Older checkpoints keep a count 0, 1, 2, ... beside the position embeddings."""
        return name.endswith(".position_ids")

    def write(
        self, directory: Path, tensors: Mapping[str, np.ndarray], max_shard_bytes: int
    ) -> None:
        """One file, or shards and their index."""
        write_directory_tensors(directory, tensors, max_shard_bytes)
