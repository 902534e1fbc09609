"""Synthetic Llama-shaped checkpoints: a random base, and fine-tunes with different cosines."""

import itertools
import json
import sys
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from modelstock_jax.tensor_files.writer import ShardWriter  # noqa: E402


class Size(NamedTuple):
    """Size of a Llama.

    Attributes:
      hidden: hidden size
      width: width of the MLP
      layers: number of layers
      limit: maximum size of a file
      kv: width of keys and values; None for the hidden size
      rows: number of tokens
      tied: whether the head is the embedding
    """

    hidden: int
    width: int
    layers: int
    limit: str | None
    kv: int | None = None
    rows: int = 32000
    tied: bool = False


SIZES = {
    "134M": Size(768, 2048, 12, None),
    "853M": Size(2048, 5664, 14, "600MB"),
    "3.2B": Size(3072, 8192, 28, "2GB", kv=1024, rows=128256, tied=True),
}
CODES = {"f32": "F32", "bf16": "BF16"}
NAMES = {"f32": "float32", "bf16": "bfloat16"}
WEIGHT_RMS, UPDATE_RMS = 0.02, 2e-4
CHUNK = 2**22


def shapes(size: str) -> dict[str, tuple[int, ...]]:
    """Return the tensor names and shapes of a Llama."""
    llama = SIZES[size]
    hidden, width, kv = llama.hidden, llama.width, llama.kv or llama.hidden
    result = {
        "model.embed_tokens.weight": (llama.rows, hidden),
        "model.norm.weight": (hidden,),
    }
    if not llama.tied:
        result["lm_head.weight"] = (llama.rows, hidden)
    for layer in range(llama.layers):
        prefix = f"model.layers.{layer}."
        for name, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            result[f"{prefix}self_attn.{name}_proj.weight"] = (rows, hidden)
        result |= {f"{prefix}mlp.{x}_proj.weight": (width, hidden) for x in ("gate", "up")}
        result[f"{prefix}mlp.down_proj.weight"] = (hidden, width)
        result |= {f"{prefix}{x}_layernorm.weight": (hidden,) for x in ("input", "post_attention")}
    return result


def config(size: str, dtype: str) -> dict:
    """Return a config.json like those of transformers."""
    llama = SIZES[size]
    head = 128 if llama.kv else 64
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": llama.hidden,
        "intermediate_size": llama.width, "num_hidden_layers": llama.layers,
        "vocab_size": llama.rows, "num_attention_heads": llama.hidden // head,
        "num_key_value_heads": (llama.kv or llama.hidden) // head, "head_dim": head,
        "tie_word_embeddings": llama.tied, "torch_dtype": NAMES[dtype],
    }  # fmt: skip


def make(root: Path, size: str, dtype: str, number: int) -> None:
    """Write base, ft1, ft2, ... to `root`."""
    models = ["base", *(f"ft{i + 1}" for i in range(number))]
    files = _shards(shapes(size), {"f32": 4, "bf16": 2}[dtype], 3 if SIZES[size].limit else 1)
    rng = np.random.default_rng(0)
    # All tensors take their values from one pool, each from another position.
    pool = rng.standard_normal(2**24 + 1, np.float32)
    for model in models:
        (root / model).mkdir()
        (root / model / "config.json").write_text(json.dumps(config(size, dtype)))
    for file, tensors in files.items():
        writers = [
            ShardWriter(root / m / file, {n: (CODES[dtype], s) for n, s in tensors.items()})
            for m in models
        ]
        for (name, shape), depth in zip(tensors.items(), itertools.count()):
            common_part = np.sqrt(0.15 + 0.7 * (depth % 11) / 10)  # cosines from 0.15 to 0.85
            starts = rng.integers(len(pool), size=2 + number)
            for start_index in range(0, int(np.prod(shape)), CHUNK):
                n = min(CHUNK, int(np.prod(shape)) - start_index)
                base, common, *noises = (_values(pool, s + start_index, n) for s in starts)
                writers[0].write(name, start_index, _as_dtype(WEIGHT_RMS * base, dtype))
                for writer, noise in zip(writers[1:], noises, strict=True):
                    update = common_part * common + np.sqrt(1 - common_part**2) * noise
                    values = WEIGHT_RMS * base + UPDATE_RMS * update
                    writer.write(name, start_index, _as_dtype(values, dtype))
        for writer in writers:
            writer.finish()
    if len(files) > 1:
        index = {"metadata": {}, "weight_map": {n: f for f, ts in files.items() for n in ts}}
        for model in models:
            (root / model / "model.safetensors.index.json").write_text(json.dumps(index))


def _values(pool, start: int, count: int):
    start %= len(pool)
    return (
        np.concatenate([pool[start:], pool])[:count]
        if start + count > len(pool)
        else pool[start : start + count]
    )


def _as_dtype(values, dtype: str):
    return values.astype(np.float32 if dtype == "f32" else ml_dtypes.bfloat16)


def _shards(tensors: dict, width: int, number: int) -> dict[str, dict]:
    sizes = np.cumsum([width * int(np.prod(shape)) for shape in tensors.values()])
    files: dict[str, dict] = {}
    for (name, shape), end in zip(tensors.items(), sizes, strict=True):
        k = min(number - 1, int(number * (end - 1) / sizes[-1])) + 1
        file = f"model-{k:05d}-of-{number:05d}.safetensors" if number > 1 else "model.safetensors"
        files.setdefault(file, {})[name] = shape
    return files
