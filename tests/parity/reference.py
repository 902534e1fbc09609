"""transformers' torch models with random weights, and the same models in JAX: their outputs."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers
from torch import nn

from modelstock_jax.models import checkpoint_io
from modelstock_jax.models.checkpoint import Checkpoint
from modelstock_jax.models.config import DualEncoderConfig, ModelConfig
from modelstock_jax.models.model import classifier, encode_image, encode_text
from modelstock_jax.models.preprocessor import Preprocessor
from modelstock_jax.models.vit import Dinov2Config
from tests.models.small_models import Case

Outputs = dict[str, np.ndarray]


def pair(
    case: Case, directory: Path, seed: int = 0
) -> tuple[Checkpoint, transformers.PreTrainedModel]:
    """A directory written by transformers: our checkpoint of it, and transformers' model."""
    theirs = torch_model(case)
    draw(theirs, seed)
    theirs.save_pretrained(directory)
    preprocessor = Preprocessor((0.5,) * 3, (0.25,) * 3, case.config.image_size)
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor.to_dict()))
    ours = checkpoint_io.load(directory)
    assert ours.config == case.config
    return ours, theirs


def torch_model(case: Case) -> transformers.PreTrainedModel:
    """transformers' model of a case, with its initial weights."""
    config, more = case.config, {"num_labels": case.classes} if case.classes else {}
    head = {"distillation": None} if case.teacher else {}
    name = config.classifier_name(head) if case.classes else config.base_class
    raw = transformers.AutoConfig.for_model(**config.to_dict(), **more)
    return getattr(transformers, name)._from_config(raw, attn_implementation="eager").eval()


@torch.no_grad()
def draw(model: nn.Module, seed: int) -> None:
    """Random weights under which every parameter, buffer and trap moves the features.

    Biases, norms and statistics are not the defaults. What enters a tower is small, as in trained
    models: the first layer norm then feels its epsilon.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if name == "logit_scale":
            weight.fill_(4.5)
        elif "layer_scale" in name or (name.endswith("weight") and weight.ndim == 1):
            weight.normal_(1.0, 0.1, generator=generator)  # factors: layer scales, norms
        else:
            if "embedding" in name:  # Patches sum over P P C pixels of size 1.
                std = 0.03 if "patch" not in name else 0.03 * weight[0].numel() ** -0.5
            else:
                std = 0.1 if weight.ndim < 2 else weight[0].numel() ** -0.5
            weight.normal_(0.0, std, generator=generator)
    for number, (name, buffer) in enumerate(model.named_buffers()):
        if name.endswith("running_mean"):
            buffer.normal_(0.0, 0.1, generator=generator)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith("num_batches_tracked"):
            buffer.fill_(1000 + number)


def pixels(images: np.ndarray) -> torch.Tensor:
    """Convert [B, H, W, C] to PyTorch's [B, C, H, W]."""
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


# transformers' models of these types interpolate position embeddings only if told so.
_INTERPOLATES = ("clip", "siglip", "vit", "deit")


def run_torch(model: transformers.PreTrainedModel, images: np.ndarray, ids: Any = None) -> Any:
    """transformers' output, at any image size."""
    inputs: dict[str, Any] = {"pixel_values": pixels(images)}
    if ids is not None:
        inputs["input_ids"] = torch.from_numpy(ids).long()
    if model.config.model_type in _INTERPOLATES:
        inputs["interpolate_pos_encoding"] = True
    with torch.no_grad():
        return model(**inputs)


def torch_outputs(
    config: ModelConfig, model: transformers.PreTrainedModel, images: np.ndarray, ids: Any = None
) -> Outputs:
    """Unit embeddings "image" and "text", and "logits", those that the model has.

    The logits of a dual encoder are cosines: without scale and bias.
    """
    out = run_torch(model, images, ids)
    if isinstance(config, DualEncoderConfig):
        bias = getattr(model, "logit_bias", torch.zeros(1))
        cosines = (out.logits_per_image - bias) / model.logit_scale.exp()
        found = {"image": unit(out.image_embeds), "text": unit(out.text_embeds), "logits": cosines}
    elif "logits" in out:
        found = {"logits": out.logits}
    else:
        found = {"image": unit(_pooled(config, out))}
    return {name: np.asarray(x.detach() if torch.is_tensor(x) else x) for name, x in found.items()}


def _pooled(config: Any, out: Any) -> torch.Tensor:
    """Features of a model without a classifier; transformers' classifiers compute them inside."""
    if config.is_convolutional:
        return out.pooler_output.flatten(1)
    x, tokens = out.last_hidden_state, len(config.tokens)
    if not isinstance(config, Dinov2Config):
        return x[:, :tokens].flatten(1)
    first = tokens + getattr(config, "num_register_tokens", 0)
    return torch.cat([x[:, 0], x[:, first:].mean(1)], dim=-1)


# Compiles in half the time: for models that compute for milliseconds.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def _run(
    config: ModelConfig, params: Any, head: Any, images: Any, ids: Any
) -> dict[str, jax.Array]:
    tower = params["image_tower"]
    if head is not None:
        return {"logits": classifier(config)({"image_tower": tower, "head": head}, images)}
    found = {"image": encode_image(config, tower, images)}
    if ids is not None and isinstance(config, DualEncoderConfig):
        found["text"] = encode_text(config, params["text_tower"], ids)
    return found


def our_outputs(
    checkpoint: Checkpoint, images: np.ndarray, ids: Any = None, compiler_options: Any = None
) -> Outputs:
    """The same by our towers, from float32 features."""
    run = jax.jit(functools.partial(_run, checkpoint.config), compiler_options=compiler_options)
    found = run(checkpoint.params, checkpoint.head, images, ids)
    found = {name: x if name == "logits" else unit(x) for name, x in found.items()}
    if "text" in found:
        found["logits"] = found["image"] @ found["text"].T
    return {name: np.asarray(x) for name, x in found.items()}


def errors(theirs: Outputs, ours: Outputs) -> dict[str, float]:
    """Maximum difference of each output: absolute, of a classifier relative to the largest logit.

    The rows of a batch differ by hundreds of times the tolerance, so a comparison can fail.
    """
    assert theirs.keys() == ours.keys()
    classifies = "image" not in theirs
    found = {}
    for name, expected in theirs.items():
        size = np.abs(expected).max() if classifies else 1.0
        if classifies or name != "logits":
            # Attention pooling over noise makes images alike: 6e-3 for SigLIP so400m at 384.
            assert np.abs(expected[0] - expected[1]).max() > 1e-3 * size, name
        found[name] = float(np.abs(ours[name] - expected).max() / size)
    return found


def unit(features: Any) -> np.ndarray:
    """x / |x| in float64."""
    x = np.asarray(features, np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)
