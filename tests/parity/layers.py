"""The output of every layer of transformers' models and ours, under our names."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch

from modelstock_jax.models.checkpoint import Checkpoint
from modelstock_jax.models.config import DualEncoderConfig, ModelConfig
from modelstock_jax.models.model import classifier, image_activations, text_activations
from tests.parity.reference import QUICK, Outputs, run_torch

Rule = tuple[str, str | Callable[[re.Match], str]]

# transformers' module -> our layer: all rules of a model are applied in order. Modules that are
# then not among our layers, such as activations, are not compared.
_CLIP: tuple[Rule, ...] = (
    (r"^visual_projection$", "image_tower.projection"),
    (r"^text_projection$", "text_tower.projection"),
    # transformers normalizes every token, then pools; we pool, then normalize.
    (r"^text_model$", "text_tower.final_layernorm"),
    (r"^vision_model\.", "image_tower."),
    (r"^text_model\.", "text_tower."),
    (r"\.embeddings$", ".embed"),
    (r"\.embeddings\.patch_embedding$", ".patch_embedding"),
    (r"\.pre_layrnorm$", ".pre_layernorm"),
    (r"\.encoder\.layers\.(\d+)", lambda found: f".blocks.{_block(int(found[1]))}"),
)
_SIGLIP: tuple[Rule, ...] = (
    (r"^text_model$", "text_model.pooled"),
    (r"^text_model\.head$", "text_tower.projection"),
    (r"^text_model\.final_layer_norm$", "text_tower.final_layernorm"),
    (r"^vision_model\.head\.attention$", "image_tower.pool.out_proj"),
    (r"^vision_model\.head\.layernorm$", "image_tower.pool.layer_norm"),
    (r"^vision_model\.head", "image_tower.pool"),
    *_CLIP,
)
_VIT: tuple[Rule, ...] = (
    (r"^embeddings\.patch_embeddings\.projection$", "patch_embedding"),
    (r"^embeddings$", "embed"),
    (r"^layernorm$", "post_layernorm"),
    (r"^(?:encoder\.)?layers?\.(\d+)", lambda found: f"blocks.{_block(int(found[1]))}"),
    (r"\.(layernorm_before|norm1)$", ".layer_norm1"),
    (r"\.(layernorm_after|norm2)$", ".layer_norm2"),
    (r"\.attention\b", ".self_attn"),
    (r"\.o_proj$", ".out_proj"),
    (r"\.(gate|up)_proj$", ".weights_in"),
    (r"\.down_proj$", ".weights_out"),
)
_CONVNEXT: tuple[Rule, ...] = (
    (r"^embeddings\.patch_embeddings$", "patch_embedding"),
    (r"^embeddings\.layernorm$", "patch_norm"),
    (r"^embeddings$", "embed"),
    (r"^layernorm$", "post_layernorm"),
    (r"\.downsampling_layer\.0$", ".downsampling_layer.norm"),
    (r"\.downsampling_layer\.1$", ".downsampling_layer.conv"),
    (r"\.dwconv$", ".depthwise"),
    (r"(\.layers\.\d+)\.layernorm$", r"\1.norm"),
    (r"\.pwconv(\d)$", r".fc\1"),
)
_RESNET: tuple[Rule, ...] = (
    (r"^embedder\.embedder\.convolution$", "stem"),
    (r"^embedder\.embedder\.normalization$", "stem_norm"),
    (r"^embedder$", "embed"),
    (r"\.layer\.(\d)\.convolution$", lambda found: f".conv{int(found[1]) + 1}"),
    (r"\.layer\.(\d)\.normalization$", lambda found: f".norm{int(found[1]) + 1}"),
    (r"\.shortcut$", ".both"),
    (r"\.shortcut\.convolution$", ".shortcut"),
    (r"\.shortcut\.normalization$", ".shortcut_norm"),
)
_RULES = {
    **{"clip": _CLIP, "siglip": _SIGLIP, "resnet": _RESNET},
    **dict.fromkeys(("convnext", "convnextv2"), _CONVNEXT),
    **dict.fromkeys(("vit", "deit", "dinov2", "dinov2_with_registers"), _VIT),
}
# transformers normalizes every token where we normalize those that are pooled.
_POOLED: dict[tuple[str, str], Callable[[np.ndarray], np.ndarray]] = {
    ("vit", "image_tower.post_layernorm"): lambda x: x[:, 0],
    ("deit", "image_tower.post_layernorm"): lambda x: x[:, :2],
    ("siglip", "text_tower.final_layernorm"): lambda x: x[:, -1],
}


def _block(index: int) -> str:
    return f"block_{index:02d}"


def _our_name(config: Any, name: str) -> str:
    def first(stage: str) -> int:
        return sum(config.depths[: int(stage)])

    name = name.removeprefix(config.prefix)
    for pattern, replacement in _RULES[config.model_type]:
        name = re.sub(pattern, replacement, name)
    name = re.sub(
        r"^encoder\.stages\.(\d+)\.layers\.(\d+)",
        lambda found: f"blocks.{_block(first(found[1]) + int(found[2]))}",
        name,
    )
    name = re.sub(
        r"^encoder\.stages\.(\d+)\.downsampling_layer",
        lambda found: f"downsample_{first(found[1]):02d}",
        name,
    )
    return name if isinstance(config, DualEncoderConfig) else f"image_tower.{name}"


def torch_layers(config: Any, model: torch.nn.Module, images: np.ndarray, ids: Any) -> Outputs:
    """Our layer name -> output of transformers' layer, in the order of computation."""
    layers: Outputs = {}

    def record(name: str):
        def hook(module, inputs, output):
            output = getattr(output, "pooler_output", output)
            output = output[0] if isinstance(output, tuple) else output
            if not torch.is_tensor(output):
                return
            output = _POOLED.get((config.model_type, name), lambda x: x)(output.numpy())
            # transformers has two modules for the two halves of SwiGLU's first layer.
            both = [layers[name], output] if name in layers else [output]
            layers[name] = np.concatenate(both, axis=-1)

        return hook

    hooks = [
        module.register_forward_hook(record(_our_name(config, name)))
        for name, module in model.named_modules()
        if name
    ]
    try:
        out = run_torch(model, images, ids)
    finally:
        for hook in hooks:
            hook.remove()
    return layers | ({"head": out.logits.numpy()} if "logits" in out else {})


@functools.cache
def _compiled(config: ModelConfig) -> Callable[..., dict[str, jax.Array]]:
    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params, head, images, ids):
        tower = params["image_tower"]
        parts = {"image_tower.": image_activations(config, tower, images)}
        if isinstance(config, DualEncoderConfig):
            parts["text_tower."] = text_activations(config, params["text_tower"], ids)
        if head is not None:
            parts["head"] = {"": classifier(config)({"image_tower": tower, "head": head}, images)}
        return {f"{part}{name}": x for part in parts for name, x in parts[part].items()}

    return run


def our_layers(
    checkpoint: Checkpoint, images: np.ndarray, ids: Any, patched: bool = False
) -> Outputs:
    """Layer name -> output; "head" has the logits. Patched code is always compiled."""
    run = (_compiled.__wrapped__ if patched else _compiled)(checkpoint.config)
    layers = run(checkpoint.params, checkpoint.head, images, ids)
    return {name: np.asarray(x) for name, x in layers.items()}


def first_difference(theirs: Outputs, ours: Outputs, tolerance: float) -> str | None:
    """The first of our layers, in the order of `theirs`, that differs.

    It has another shape, or differs by more than `tolerance` of its largest number.
    """
    for name, found in ours.items():
        assert np.isfinite(found).all(), name
    for name, expected in theirs.items():
        if name not in ours:
            continue
        found, expected = ours[name], _channels_last(expected, ours[name].shape[-1])
        if expected.size != found.size:
            return name
        difference = np.abs(found - expected.reshape(found.shape)).max()
        if difference > tolerance * np.abs(expected).max():
            return name
    return None


def _channels_last(x: np.ndarray, channels: int) -> np.ndarray:
    """[B, C, H, W] as [B, H, W, C]; anything else unchanged."""
    first = x.ndim == 4 and x.shape[1] == channels and x.shape[3] != channels
    return np.moveaxis(x, 1, -1) if first else x
