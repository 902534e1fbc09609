"""transformers' torch CLIPModel with random weights, the same model in JAX, layers of both."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers
from torch import nn

from modelstock_jax.models import checkpoint_io
from modelstock_jax.models.checkpoint import Checkpoint
from modelstock_jax.models.clip import CLIPConfig
from modelstock_jax.models.model import image_activations, text_activations
from modelstock_jax.models.preprocessor import Preprocessor


def pair(
    config: CLIPConfig, directory: Path, seed: int = 0
) -> tuple[Checkpoint, transformers.CLIPModel]:
    """A directory written by transformers: our checkpoint of it, and transformers' model."""
    theirs = transformers.CLIPModel._from_config(
        transformers.CLIPConfig.from_dict(config.to_dict()), attn_implementation="eager"
    ).eval()
    draw(theirs, seed)
    theirs.save_pretrained(directory)
    preprocessor = Preprocessor((0.5,) * 3, (0.25,) * 3, config.vision.image_size)
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor.to_dict()))
    ours = checkpoint_io.load(directory)
    assert ours.config == config
    return ours, theirs


@torch.no_grad()
def draw(model: nn.Module, seed: int) -> None:
    """Random weights under which every parameter and every trap moves the features.

    Biases and norms are not the defaults. What enters a tower is small, as in trained models: the
    first layer norm then feels its epsilon.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if name == "logit_scale":
            weight.fill_(4.5)
            continue
        if "embedding" in name:  # Patches sum over P P C pixels of size 1.
            std = 0.03 if "patch" not in name else 0.03 * weight[0].numel() ** -0.5
        else:
            std = 0.1 if weight.ndim < 2 else weight.shape[1] ** -0.5
        weight.normal_(0.0, std, generator=generator)
        if re.search(r"norm\d?\.weight$", name):
            weight.add_(1.0)


def pixels(images: np.ndarray) -> torch.Tensor:
    """Convert [B, H, W, C] to PyTorch's [B, C, H, W]."""
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def torch_features(
    model: transformers.CLIPModel, images: np.ndarray, ids: np.ndarray
) -> transformers.models.clip.modeling_clip.CLIPOutput:
    """transformers' embeddings and logits, at any image size."""
    with torch.no_grad():
        return model(
            pixel_values=pixels(images),
            input_ids=torch.from_numpy(ids).long(),
            interpolate_pos_encoding=True,
        )


_OURS = (
    (r"^vision_model\.", "image_tower."),
    (r"^text_model\.", "text_tower."),
    (r"^visual_projection$", "image_tower.projection"),
    (r"^text_projection$", "text_tower.projection"),
    (r"\.embeddings$", ".embed"),
    (r"\.embeddings\.patch_embedding$", ".patch_embedding"),
    (r"\.pre_layrnorm$", ".pre_layernorm"),
    (r"\.encoder\.layers\.(\d+)", lambda found: f".blocks.block_{int(found[1]):02d}"),
    # transformers normalizes every token, then pools; we pool, then normalize.
    (r"^text_model$", "text_tower.final_layernorm"),
)
_NOT_OURS = re.compile(r"activation_fn|_embedding$|final_layer_norm$|encoder$|^vision_model$")


def torch_layers(
    model: transformers.CLIPModel, images: np.ndarray, ids: np.ndarray
) -> dict[str, np.ndarray]:
    """Our layer name -> output of transformers' layer, in the order of computation."""
    layers: dict[str, np.ndarray] = {}

    def record(name: str):
        def hook(module, inputs, output):
            output = getattr(output, "pooler_output", output)
            output = output[0] if isinstance(output, tuple) else output
            if isinstance(module, nn.Conv2d):
                output = output.flatten(2).transpose(1, 2)
            layers[name] = output.numpy()

        return hook

    hooks = []
    for name, module in model.named_modules():
        if name and (name.endswith("patch_embedding") or not _NOT_OURS.search(name)):
            for pattern, replacement in _OURS:
                name = re.sub(pattern, replacement, name)
            if not isinstance(module, nn.ModuleList):
                hooks.append(module.register_forward_hook(record(name)))
    try:
        torch_features(model, images, ids)
    finally:
        for hook in hooks:
            hook.remove()
    return layers


_image_layers = jax.jit(image_activations, static_argnums=0)
_text_layers = jax.jit(text_activations, static_argnums=0)


def our_layers(
    config: CLIPConfig, params: dict[str, Any], images: np.ndarray, ids: np.ndarray
) -> dict[str, np.ndarray]:
    """Layer name -> output."""
    layers = {
        "image_tower": _image_layers(config, params["image_tower"], images),
        "text_tower": _text_layers(config, params["text_tower"], ids),
    }
    return {
        f"{tower}.{name}": np.asarray(x) for tower in layers for name, x in layers[tower].items()
    }


def first_difference(
    theirs: dict[str, np.ndarray], ours: dict[str, np.ndarray], tolerance: float
) -> str | None:
    """The first layer, in the order of `theirs`, that differs by more than `tolerance` of its size.

    The size of a layer is its largest number.
    """
    for name, expected in theirs.items():
        if np.abs(ours[name] - expected).max() > tolerance * np.abs(expected).max():
            return name
    return None


def unit(features) -> np.ndarray:
    """x / |x| in float64."""
    x = np.asarray(features, np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)
