"""Tiny checkpoints on disk: Llama-shaped models and LoRA adapters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from modelstock_jax.tensor_files.writer import write_directory_tensors, write_tensors

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 20,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def llama_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes that LlamaForCausalLM of transformers saves."""
    width, middle, rows = 16, 24, 20
    shapes = {"model.embed_tokens.weight": (rows, width), "model.norm.weight": (width,)}
    for i in range(LLAMA["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (16, width),
            f"{layer}.self_attn.k_proj.weight": (8, width),
            f"{layer}.self_attn.v_proj.weight": (8, width),
            f"{layer}.self_attn.o_proj.weight": (width, 16),
            f"{layer}.mlp.gate_proj.weight": (middle, width),
            f"{layer}.mlp.up_proj.weight": (middle, width),
            f"{layer}.mlp.down_proj.weight": (width, middle),
            f"{layer}.input_layernorm.weight": (width,),
            f"{layer}.post_attention_layernorm.weight": (width,),
        }
    return shapes | {"lm_head.weight": (rows, width)}


def weights(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 tensors."""
    rng = np.random.default_rng(seed)
    return {
        n: rng.standard_normal(s).astype(np.float32) * np.float32(0.2) for n, s in shapes.items()
    }


def moved(base: Mapping[str, np.ndarray], seed: int, cosine: float = 0.5) -> dict[str, np.ndarray]:
    """A fine-tune: the base plus an update that all seeds share and an update of this seed."""
    common, own = np.random.default_rng(99), np.random.default_rng(seed)
    return {
        name: (w + 0.05 * (cosine**0.5 * common.standard_normal(w.shape)
                           + (1 - cosine) ** 0.5 * own.standard_normal(w.shape))).astype(w.dtype)
        for name, w in base.items()
    }  # fmt: skip


def save(
    directory: Path,
    tensors: Mapping[str, np.ndarray],
    config: Mapping | None = None,
    max_shard_bytes: int = 10**9,
) -> Path:
    """Write a checkpoint with a config, tokenizer files, and a pickle and code to be ignored."""
    directory.mkdir(parents=True, exist_ok=True)
    write_directory_tensors(directory, tensors, max_shard_bytes)
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
        (directory / "generation_config.json").write_text('{"max_length": 32}')
        (directory / "tokenizer_config.json").write_text('{"model_max_length": 32}')
        (directory / "chat_template.jinja").write_text("{{ messages }}")
        (directory / "merges.txt").write_text("#version: 0.2\n")
        (directory / "tokenizer.model").write_bytes(b"\n\x07sentencepiece")
        (directory / "training_args.bin").write_bytes(b"\x80\x04pickle")
        (directory / "modeling.py").write_text("raise SystemExit")
    return directory


def llama(root: Path, count: int = 2) -> list[Path]:
    """A base and its fine-tunes, in directories `base`, `ft1`, ...."""
    base = weights(llama_shapes())
    models = [base, *(moved(base, seed) for seed in range(1, count + 1))]
    return [
        save(root / (f"ft{i}" if i else "base"), tensors, LLAMA) for i, tensors in enumerate(models)
    ]


def adapter(directory: Path, tensors: Mapping[str, np.ndarray], **config) -> Path:
    """Write an adapter as PEFT does."""
    directory.mkdir(parents=True, exist_ok=True)
    defaults = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "base_model_name_or_path": "base"}
    (directory / "adapter_config.json").write_text(json.dumps(defaults | config))
    write_tensors(directory / "adapter_model.safetensors", tensors)
    return directory


def factors(module: str, out: int, inner: int, rank: int = 3, seed: int = 0) -> dict:
    """LoRA factors of one linear module, with PEFT's names."""
    rng = np.random.default_rng(seed)
    start = f"base_model.model.{module}"
    return {
        f"{start}.lora_A.weight": rng.standard_normal((rank, inner)).astype(np.float32),
        f"{start}.lora_B.weight": rng.standard_normal((out, rank)).astype(np.float32),
    }
