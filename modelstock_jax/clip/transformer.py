"""The pre-norm transformer of both towers, as Flax NNX modules, and how it computes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from modelstock_jax.clip.config import LEGACY_EOS_TOKEN_ID, TextConfig, VisionConfig
from modelstock_jax.errors import UserError

_DTYPES = tuple(jnp.dtype(x) for x in ("float32", "bfloat16", "float16", "float64"))


@dataclasses.dataclass(frozen=True)
class Compute:
    """How the towers compute; it never changes the parameters.

    Attributes:
        dtype: Type, or its name, of the activations and of the weights as they enter a product.
            Layer norms' moments, softmax and the features are in float32 or better whatever it is.
        attention: "xla", or "cudnn" (a GPU, with a dtype of bfloat16 or float16).
        remat: Recompute each block in the backward pass instead of keeping its activations.
    """

    dtype: Any = jnp.float32
    attention: str = "xla"
    remat: bool = False

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        except TypeError:
            pass
        if self.dtype not in _DTYPES:
            known = ", ".join(dtype.name for dtype in _DTYPES)
            raise UserError(f"compute: dtype is one of {known}, not {self.dtype!r}.")
        if self.attention not in ("xla", "cudnn"):
            raise UserError(f"compute: attention is 'xla' or 'cudnn', not {self.attention!r}.")
        if self.attention == "cudnn" and self.dtype not in (jnp.bfloat16, jnp.float16):
            raise UserError(
                "compute: attention 'cudnn' needs dtype bfloat16 or float16, not "
                f"{self.dtype.name}."
            )

    @classmethod
    def of(cls, options: Any) -> Compute:
        """From options that have at least its fields, such as `config.compute`."""
        return cls(**{field.name: options[field.name] for field in dataclasses.fields(cls)})


DEFAULT_COMPUTE = Compute()

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}


def _attention(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool, kind: str) -> jax.Array:
    """softmax(q k^T / sqrt(head_dim)) v for q, k, v [B, T, heads, head_dim]."""
    if kind == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
    wide = jnp.promote_types(q.dtype, jnp.float32)
    q = q * q.shape[-1] ** -0.5
    scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=wide)
    if causal:
        length = q.shape[1]
        seen = jnp.tril(jnp.ones((length, length), bool))[None, None]
        scores = jnp.where(seen, scores, jnp.finfo(wide).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bhts,bshd->bthd", weights, v)


class Attention(nnx.Module):
    """Multi-head self-attention with biases on q, k, v and out."""

    def __init__(
        self, width: int, heads: int, layers: int, causal: bool, compute: Compute, rngs: nnx.Rngs
    ):
        self.heads, self.causal, self.kind = heads, causal, compute.attention
        std = width**-0.5
        self.q_proj = linear(width, width, std, compute, rngs)
        self.k_proj = linear(width, width, std, compute, rngs)
        self.v_proj = linear(width, width, std, compute, rngs)
        self.out_proj = linear(width, width, std * (2 * layers) ** -0.5, compute, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B, T, D] to [B, T, D]."""
        split = (*x.shape[:2], self.heads, -1)
        q, k, v = (f(x).reshape(split) for f in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(_attention(q, k, v, self.causal, self.kind).reshape(x.shape))


class MLP(nnx.Module):
    """The two-layer perceptron of a block."""

    def __init__(self, tower: VisionConfig | TextConfig, compute: Compute, rngs: nnx.Rngs):
        width, layers = tower.hidden_size, tower.num_hidden_layers
        self.activation = _ACTIVATIONS[tower.hidden_act]
        self.fc1 = linear(width, tower.intermediate_size, (2 * width) ** -0.5, compute, rngs)
        std = width**-0.5 * (2 * layers) ** -0.5
        self.fc2 = linear(tower.intermediate_size, width, std, compute, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B, T, D] to [B, T, D]."""
        return self.fc2(self.activation(self.fc1(x)))


class Block(nnx.Module):
    """A pre-norm transformer block."""

    def __init__(
        self, tower: VisionConfig | TextConfig, causal: bool, compute: Compute, rngs: nnx.Rngs
    ):
        width, heads = tower.hidden_size, tower.num_attention_heads
        self.layer_norm1 = layer_norm(tower, compute, rngs)
        self.self_attn = Attention(width, heads, tower.num_hidden_layers, causal, compute, rngs)
        self.layer_norm2 = layer_norm(tower, compute, rngs)
        self.mlp = MLP(tower, compute, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B, T, D] to [B, T, D]."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


def make_blocks(
    tower: VisionConfig | TextConfig, causal: bool, compute: Compute, rngs: nnx.Rngs
) -> nnx.Dict:
    """The blocks of a tower, named and not stacked: a merge gives each its own angle."""
    return nnx.Dict(
        {
            f"block_{i:02d}": Block(tower, causal, compute, rngs)
            for i in range(tower.num_hidden_layers)
        }
    )


def run_blocks(blocks: nnx.Dict, x: jax.Array, remat: bool) -> jax.Array:
    """Applies the blocks in order to x [B, T, D]; `remat` keeps only what enters each of them."""
    # `nnx.capture` keeps an item of its own in the dictionary.
    names = (name for name in blocks if name.startswith("block_"))
    for name in sorted(names, key=lambda n: int(n.removeprefix("block_"))):
        x = _recomputed(blocks[name], x) if remat else blocks[name](x)
    return x


def _recomputed(block: Block, x: jax.Array) -> jax.Array:
    graph, state = nnx.split(block)
    return jax.checkpoint(lambda state, x: nnx.merge(graph, state)(x))(state, x)


def patches(images: jax.Array, size: int) -> jax.Array:
    """Maps images [B, H, W, C] to flattened patches [B, H/P W/P, P P C].

    What follows is then a product, not a convolution, which under vmapped weights would become a
    grouped one and several times slower.
    """
    b, h, w, c = images.shape
    x = images.reshape(b, h // size, size, w // size, size, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, (h // size) * (w // size), size * size * c)


def end_of_text(ids: jax.Array, eos_token_id: int) -> jax.Array:
    """Position at which a text is pooled: the highest id (legacy rule, id 2) or the first EOS.

    Args:
        ids: Token ids [B, L], integers.
        eos_token_id: As the config has it.

    Returns:
        Positions [B], int32; 0 where the rule is 'first EOS' and there is none.

    Example:
        >>> ids = jnp.array([[5, 9, 7, 7], [5, 7, 9, 7]])
        >>> end_of_text(ids, 2).tolist(), end_of_text(ids, 7).tolist()
        ([1, 2], [2, 1])
    """
    scores = ids if eos_token_id == LEGACY_EOS_TOKEN_ID else (ids == eos_token_id)
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float) -> jax.Array:
    """A float32 draw of N(0, std^2)."""
    return std * jax.random.normal(rngs.params(), shape, jnp.float32)


def linear(
    inputs: int, outputs: int, std: float, compute: Compute, rngs: nnx.Rngs, bias: bool = True
) -> nnx.Linear:
    """A linear layer whose kernel is drawn from N(0, std^2)."""
    init = nnx.initializers.normal(std)
    return nnx.Linear(
        inputs, outputs, use_bias=bias, dtype=compute.dtype, kernel_init=init, rngs=rngs
    )


def layer_norm(tower: VisionConfig | TextConfig, compute: Compute, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """A layer norm with the config's epsilon; the two-pass variance keeps parity with PyTorch."""
    return nnx.LayerNorm(
        tower.hidden_size,
        epsilon=tower.layer_norm_eps,
        dtype=compute.dtype,
        use_fast_variance=False,
        rngs=rngs,
    )
