"""OpenCLIP's layout: OpenAI's names, and a config of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from modelstock_jax.clip.checkpoint import Checkpoint
from modelstock_jax.clip.config import CLIPConfig
from modelstock_jax.clip.layouts.layout import WholeLayout
from modelstock_jax.clip.layouts.open_clip_config import read_model, refuse, section, write_model
from modelstock_jax.clip.preprocessor import CLIP_MEAN, CLIP_STD, Preprocessor
from modelstock_jax.errors import UserError
from modelstock_jax.tensor_files.reader import SINGLE, TensorFiles, read_json
from modelstock_jax.tensor_files.writer import write_tensors

CONFIG = "open_clip_config.json"
_RESIZING = {"mode": "RGB", "interpolation": "bicubic", "resize_mode": "shortest"}


class OpenCLIP(WholeLayout):
    """``open_clip_config.json`` and ``open_clip_model.safetensors`` (or ``model.safetensors``)."""

    name = "open_clip"
    column = "openai"
    file = "open_clip_model.safetensors"
    weights = (file, SINGLE)

    def locate(self, path: Path) -> Path | None:
        """The first of its two names that is there."""
        return next((path / name for name in self.weights if (path / name).is_file()), None)

    def sizes(self, path: Path, files: TensorFiles) -> tuple[CLIPConfig, Preprocessor]:
        """From ``model_cfg`` and ``preprocess_cfg``."""
        raw = read_json(path / CONFIG)
        try:
            config = read_model(section(raw, "model_cfg"))
            return config, _read_preprocessor(raw, config.vision.image_size)
        except UserError as error:
            raise UserError(f"{path / CONFIG}: {error}") from None

    def describe(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """One config of both."""
        pixels = checkpoint.preprocessor
        statistics = {"mean": list(pixels.mean), "std": list(pixels.std)}
        model = write_model(checkpoint.config)
        return {CONFIG: {"model_cfg": model, "preprocess_cfg": {**statistics, **_RESIZING}}}

    def write(
        self, directory: Path, tensors: Mapping[str, np.ndarray], max_shard_bytes: int
    ) -> None:
        """One file, whatever its size: OpenCLIP reads no shards."""
        write_tensors(directory / self.file, tensors)


def _read_preprocessor(raw: dict[str, Any], image_size: int) -> Preprocessor:
    """From ``preprocess_cfg``; what it leaves out is CLIP's own."""
    given = section({"preprocess_cfg": {}, **raw}, "preprocess_cfg")
    given = {key: value for key, value in given.items() if value is not None}
    refuse(given, _RESIZING, "preprocess_cfg", ("mean", "std", "size"))
    try:
        mean, std = (
            tuple(float(x) for x in given.get(key, default))
            for key, default in (("mean", CLIP_MEAN), ("std", CLIP_STD))
        )
    except (TypeError, ValueError):
        raise UserError("preprocess_cfg: mean and std must be lists of numbers.") from None
    if len(mean) != 3:
        raise UserError(f"preprocess_cfg: mean {mean} and std {std} do not fit.")
    try:
        return Preprocessor(mean, std, image_size)
    except UserError as error:
        raise UserError(f"preprocess_cfg: {error}") from None
