"""CLIP's towers in float64 NumPy, written from the formulas of the paper and its released code."""

from __future__ import annotations

import math

import numpy as np

ACTIVATIONS = {
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
}


def image_features(config, tower, images) -> np.ndarray:
    """Features [B, E] of images [B, H, W, C] with the config's image size."""
    p, x = config.vision.patch_size, np.asarray(images, np.float64)
    grid = config.vision.image_size // p
    kernel = tower["patch_embedding"]["kernel"].reshape(p, p, -1, config.vision.hidden_size)
    tokens = [np.broadcast_to(tower["class_embedding"], (len(x), config.vision.hidden_size))]
    for row in range(grid):
        for column in range(grid):
            patch = x[:, row * p : (row + 1) * p, column * p : (column + 1) * p]
            tokens.append(np.einsum("bhwc,hwcd->bd", patch, kernel))
    x = np.stack(tokens, axis=1) + tower["position_embedding"]
    x = blocks(config.vision, tower, norm(x, tower["pre_layernorm"]), causal=False)
    return norm(x[:, 0], tower["post_layernorm"]) @ tower["projection"]["kernel"]


def text_features(config, tower, ids) -> np.ndarray:
    """Features [B, E] of ids [B, L], pooled at the first end-of-text token."""
    x = tower["token_embedding"].astype(np.float64)[ids]
    x = blocks(config.text, tower, x + tower["position_embedding"][: ids.shape[1]], causal=True)
    end = [list(row).index(config.text.eos_token_id) for row in ids]
    x = x[np.arange(len(ids)), end]
    return norm(x, tower["final_layernorm"]) @ tower["projection"]["kernel"]


def blocks(sizes, tower, x, causal: bool) -> np.ndarray:
    """The transformer's blocks in order, [B, T, D] -> [B, T, D]."""
    for i in range(sizes.num_hidden_layers):
        block = tower["blocks"][f"block_{i:02d}"]
        x = x + attention(
            sizes.num_attention_heads, block["self_attn"], norm(x, block["layer_norm1"]), causal
        )
        hidden = affine(norm(x, block["layer_norm2"]), block["mlp"]["fc1"])
        x = x + affine(ACTIVATIONS[sizes.hidden_act](hidden), block["mlp"]["fc2"])
    return x


def attention(heads: int, layer, x, causal: bool) -> np.ndarray:
    """Attention, one head at a time."""
    q, k, v = (affine(x, layer[name]) for name in ("q_proj", "k_proj", "v_proj"))
    size, out = x.shape[-1] // heads, np.zeros_like(x)
    for head in range(heads):
        at = slice(head * size, (head + 1) * size)
        scores = q[..., at] @ k[..., at].transpose(0, 2, 1) / math.sqrt(size)
        if causal:
            scores = np.where(np.tri(x.shape[1], dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[..., at] = weights / weights.sum(-1, keepdims=True) @ v[..., at]
    return affine(out, layer["out_proj"])


def affine(x, layer) -> np.ndarray:
    """x W + b."""
    return x @ layer["kernel"] + layer["bias"]


def norm(x, layer, epsilon: float = 1e-5) -> np.ndarray:
    """Layer norm with CLIP's epsilon."""
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)
    return x * layer["scale"] + layer["bias"]
