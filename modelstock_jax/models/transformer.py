"""Transformers of images and texts (Flax NNX): one block serves every architecture."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from modelstock_jax.models.compute import Compute
from modelstock_jax.models.config import LEGACY_EOS_TOKEN_ID, TextConfig
from modelstock_jax.models.positions import interpolate

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """Return the activation function of this name, one of `config.ACTIVATIONS`."""
    return _ACTIVATIONS[name]


def attention(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool, kind: str) -> jax.Array:
    """Compute softmax(q k^T / sqrt(head_dim)) v.

    Args:
      q: queries [B, T, heads, head_dim]
      k: keys [B, S, heads, head_dim]
      v: values [B, S, heads, head_dim]
      causal: whether a token attends only to those before it; then S = T
      kind: 'xla' or 'cudnn'. Under `vmap` in JAX 0.10, 'cudnn' raises a TypeError if q, k, v or the
        gradient of the result does not depend on the mapped axis
    """
    if kind == "cudnn":
        return _cudnn_attention(q, k, v, causal)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    q = q * q.shape[-1] ** -0.5
    scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=wide)
    if causal:
        length = q.shape[1]
        mask = jnp.tril(jnp.ones((length, length), bool))[None, None]
        scores = jnp.where(mask, scores, jnp.finfo(wide).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bhts,bshd->bthd", weights, v)


def _cudnn_attention(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> jax.Array:
    """Compute `attention` with cuDNN, on lengths that are padded to even numbers.

    JAX raises an error for the gradient at odd lengths: it takes its placeholder for a bias, for
    which cuDNN has no such gradient. CLIP has 197 (B/16), 257 (L/14) and 77 (text) tokens.
    """
    queries, keys = q.shape[1], k.shape[1]
    q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    query_lengths = key_lengths = None
    if keys % 2 and not causal:  # A causal mask excludes the last key already.
        # JAX 0.10 requires the axis of an enclosing vmap in all operands: these depend on q.
        zeros = jnp.where(q[:, 0, 0, 0] > 0, jnp.int32(0), jnp.int32(0))
        query_lengths, key_lengths = zeros + queries, zeros + keys
    y = jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=causal,
        query_seq_lengths=query_lengths,
        key_value_seq_lengths=key_lengths,
        implementation="cudnn",
    )
    return y[:, :queries]


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Sizes and options of the blocks of a transformer.

    Attributes:
      hidden_size: width D
      intermediate_size: width of the MLP
      num_hidden_layers: number of blocks
      num_attention_heads: number of heads; divides D
      hidden_act: activation of the MLP, one of `config.ACTIVATIONS`
      layer_norm_eps: epsilon of all layer norms
      causal: whether a token attends only to those before it
      qkv_bias: whether the q, k and v projections have biases
      layer_scale: initial value of a trained factor per channel on each residual branch; None has
        no such factor
      gated_mlp: SwiGLU instead of an MLP with `hidden_act`
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str
    layer_norm_eps: float
    causal: bool = False
    qkv_bias: bool = True
    layer_scale: float | None = None
    gated_mlp: bool = False

    @classmethod
    def of(cls, tower: Any, **more: Any) -> BlockSizes:
        """Create from a config with the fields of the same names; `more` replaces them."""
        names = [field.name for field in dataclasses.fields(cls)]
        own = {name: getattr(tower, name) for name in names if hasattr(tower, name)}
        return cls(**(own | more))


class Attention(nnx.Module):
    """Multi-head self-attention with separate q, k, v and output projections."""

    def __init__(self, sizes: BlockSizes, compute: Compute, rngs: nnx.Rngs):
        self.heads, self.causal = sizes.num_attention_heads, sizes.causal
        self.kind = compute.attention_impl
        width, bias = sizes.hidden_size, sizes.qkv_bias
        std = width**-0.5
        self.q_proj = linear(width, width, std, compute, rngs, bias=bias)
        self.k_proj = linear(width, width, std, compute, rngs, bias=bias)
        self.v_proj = linear(width, width, std, compute, rngs, bias=bias)
        out_std = std * (2 * sizes.num_hidden_layers) ** -0.5
        self.out_proj = linear(width, width, out_std, compute, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x [B, T, D] to [B, T, D]."""
        split = (*x.shape[:2], self.heads, -1)
        q, k, v = (f(x).reshape(split) for f in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attention(q, k, v, self.causal, self.kind).reshape(x.shape))


class MLP(nnx.Module):
    """Two-layer perceptron of a block."""

    def __init__(self, sizes: BlockSizes, compute: Compute, rngs: nnx.Rngs):
        width, layers = sizes.hidden_size, sizes.num_hidden_layers
        self.activation = activation(sizes.hidden_act)
        self.fc1 = linear(width, sizes.intermediate_size, (2 * width) ** -0.5, compute, rngs)
        std = width**-0.5 * (2 * layers) ** -0.5
        self.fc2 = linear(sizes.intermediate_size, width, std, compute, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x [B, T, D] to [B, T, D]."""
        return self.fc2(self.activation(self.fc1(x)))


class SwiGLU(nnx.Module):
    """Gated perceptron: W_out (silu(g) u), where g and u are the halves of W_in x."""

    def __init__(self, sizes: BlockSizes, compute: Compute, rngs: nnx.Rngs):
        width, inner = sizes.hidden_size, sizes.intermediate_size
        self.weights_in = linear(width, 2 * inner, (2 * width) ** -0.5, compute, rngs)
        std = width**-0.5 * (2 * sizes.num_hidden_layers) ** -0.5
        self.weights_out = linear(inner, width, std, compute, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x [B, T, D] to [B, T, D]."""
        gate, up = jnp.split(self.weights_in(x), 2, axis=-1)
        return self.weights_out(jax.nn.silu(gate) * up)


class Block(nnx.Module):
    """Pre-norm transformer block."""

    def __init__(self, sizes: BlockSizes, compute: Compute, rngs: nnx.Rngs):
        self.layer_norm1 = layer_norm(sizes, compute, rngs)
        self.self_attn = Attention(sizes, compute, rngs)
        self.layer_norm2 = layer_norm(sizes, compute, rngs)
        self.mlp = (SwiGLU if sizes.gated_mlp else MLP)(sizes, compute, rngs)
        self.has_layer_scale = sizes.layer_scale is not None
        if sizes.layer_scale is not None:
            scale = jnp.full(sizes.hidden_size, sizes.layer_scale, jnp.float32)
            self.layer_scale1, self.layer_scale2 = nnx.Param(scale), nnx.Param(scale)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x [B, T, D] to [B, T, D]."""
        scales = (self.layer_scale1, self.layer_scale2) if self.has_layer_scale else (None, None)
        x = x + _scaled(self.self_attn(self.layer_norm1(x)), scales[0])
        return x + _scaled(self.mlp(self.layer_norm2(x)), scales[1])


def _scaled(x: jax.Array, scale: nnx.Param | None) -> jax.Array:
    """Multiply x [B, T, D] by a factor per channel, if there is one."""
    return x if scale is None else x * scale[...].astype(x.dtype)[None, None]


def make_blocks(sizes: BlockSizes, compute: Compute, rngs: nnx.Rngs) -> nnx.Dict:
    """Create the blocks of a tower, named, not stacked: each has its own angles in a merge."""
    return named_blocks(Block(sizes, compute, rngs) for _ in range(sizes.num_hidden_layers))


def named_blocks(blocks: Iterable[nnx.Module]) -> nnx.Dict:
    """Return blocks under the names block_00, block_01, ... in order."""
    return nnx.Dict({block_name(i): block for i, block in enumerate(blocks)})


def block_name(index: int) -> str:
    """Return the name of a block.

    Example:
      >>> block_name(3)
      'block_03'
    """
    return f"block_{index:02d}"


def run_blocks(blocks: nnx.Dict, x: jax.Array, remat: bool) -> jax.Array:
    """Apply the blocks in order to x [B, T, D]; `remat` stores only the input of each block."""
    # `nnx.capture` adds its own item to the dictionary.
    for index in range(sum(name.startswith("block_") for name in blocks)):
        x = run_block(blocks[block_name(index)], x, remat)
    return x


def run_block(block: nnx.Module, x: jax.Array, remat: bool) -> jax.Array:
    """Apply a block to x; `remat` recomputes its activations in the backward pass."""
    if not remat:
        return block(x)  # pyrefly: ignore [not-callable]
    graph, state = nnx.split(block)
    return jax.checkpoint(lambda state, x: nnx.merge(graph, state)(x))(state, x)


class _Transformer(nnx.Module):
    """A base class with a method `embed`, which `image_activations` records."""

    embed: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # `nnx.capture` records the methods of a module's own class only.
        cls.embed = cls.embed


class VisionTransformer(_Transformer):
    """Patches, tokens, position embeddings, blocks: a vision transformer without its pooling."""

    def __init__(
        self,
        sizes: BlockSizes,
        image: PatchSizes,
        compute: Compute,
        rngs: nnx.Rngs,
        *,
        tokens: Sequence[str] = (),
        patch_bias: bool = True,
        pre_norm: bool = False,
        num_registers: int = 0,
        antialias: bool = False,
    ):
        """Draw initial parameters.

        Args:
          sizes: sizes of the blocks
          image: images and patches
          compute: dtype, attention implementation and remat
          rngs: random keys
          tokens: names of the trained tokens before the patches, with position embeddings
          patch_bias: whether the patch embedding has a bias
          num_registers: number of trained tokens without position embeddings, which are inserted
            between the tokens and the patches
          pre_norm: whether there is a layer norm before the first block
          antialias: of the interpolation of position embeddings
        """
        width, size = sizes.hidden_size, image.patch_size
        self.patch_size, self.remat, self.dtype = size, compute.remat, compute.dtype
        self.grid, self.antialias = image.image_size // size, antialias
        self.tokens = tuple(tokens)
        for name in self.tokens:
            setattr(self, name, nnx.Param(normal(rngs, (width,), width**-0.5)))
        # PyTorch's initialization of a convolution: uniform within 1 / sqrt(fan_in).
        self.patch_embedding = nnx.Linear(
            size * size * image.num_channels,
            width,
            use_bias=patch_bias,
            dtype=compute.dtype,
            kernel_init=nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
            rngs=rngs,
        )
        count = len(self.tokens) + self.grid**2
        self.position_embedding = nnx.Param(normal(rngs, (count, width), width**-0.5))
        self.num_registers = num_registers
        if num_registers:
            self.register_tokens = nnx.Param(normal(rngs, (num_registers, width), 0.02))
        self.has_pre_norm = pre_norm
        if pre_norm:
            self.pre_layernorm = layer_norm(sizes, compute, rngs)
        self.blocks = make_blocks(sizes, compute, rngs)
        self.post_layernorm = layer_norm(sizes, compute, rngs)

    def embed(self, images: jax.Array) -> jax.Array:
        """Map images [B, H, W, C] to tokens [B, T, D]: trained tokens, registers, patches."""
        x = self.patch_embedding(patches(images.astype(self.dtype), self.patch_size))
        starts = [getattr(self, name)[...].astype(x.dtype)[None, None] for name in self.tokens]
        starts = [jnp.broadcast_to(start, (x.shape[0], 1, x.shape[2])) for start in starts]
        grid = (images.shape[1] // self.patch_size, images.shape[2] // self.patch_size)
        positions = interpolate(
            self.position_embedding[...], (self.grid, self.grid), grid, antialias=self.antialias
        )
        x = jnp.concatenate([*starts, x], axis=1) + positions.astype(x.dtype)[None]
        if not self.num_registers:
            return x
        registers = self.register_tokens[...].astype(x.dtype)[None]
        registers = jnp.broadcast_to(registers, (x.shape[0], *registers.shape[1:]))
        first = len(self.tokens)
        return jnp.concatenate([x[:, :first], registers, x[:, first:]], axis=1)

    def encode(self, images: jax.Array) -> jax.Array:
        """Map images [B, H, W, C] to tokens [B, T, D] after the last block, without its norm."""
        x = self.embed(images)
        x = self.pre_layernorm(x) if self.has_pre_norm else x
        return run_blocks(self.blocks, x, self.remat)


class PatchSizes(Protocol):
    """Sizes of images and their patches."""

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""

    @property
    def num_channels(self) -> int:
        """Color channels of an image."""


class TextTransformer(_Transformer):
    """Token and position embeddings and blocks: a text tower without its pooling."""

    def __init__(self, tower: TextConfig, causal: bool, compute: Compute, rngs: nnx.Rngs):
        sizes, width = BlockSizes.of(tower, causal=causal), tower.hidden_size
        self.remat, self.dtype = compute.remat, compute.dtype
        self.token_embedding = nnx.Param(normal(rngs, (tower.vocab_size, width), 0.02))
        self.position_embedding = nnx.Param(
            normal(rngs, (tower.max_position_embeddings, width), 0.01)
        )
        self.blocks = make_blocks(sizes, compute, rngs)
        self.final_layernorm = layer_norm(sizes, compute, rngs)

    def embed(self, ids: jax.Array) -> jax.Array:
        """Map token ids [B, L] to tokens [B, L, D]."""
        x = self.token_embedding[...][ids].astype(self.dtype)
        return x + self.position_embedding[...][None, : ids.shape[1]].astype(self.dtype)

    def encode(self, ids: jax.Array) -> jax.Array:
        """Map token ids [B, L] to tokens [B, L, D] after the last block, without its norm."""
        return run_blocks(self.blocks, self.embed(ids), self.remat)


class AttentionPool(nnx.Module):
    """Attention of one trained query over all tokens, then an MLP with a residual connection.

    The kernel of q, k and v is one tensor, [D, 3 D], as in the checkpoints: a merge gives it one
    angle.
    """

    def __init__(self, sizes: BlockSizes, compute: Compute, rngs: nnx.Rngs):
        width = sizes.hidden_size
        self.heads, self.kind = sizes.num_attention_heads, compute.attention_impl
        self.probe = nnx.Param(normal(rngs, (width,), width**-0.5))
        self.in_proj = linear(width, 3 * width, width**-0.5, compute, rngs)
        self.out_proj = linear(width, width, width**-0.5, compute, rngs)
        self.layer_norm = layer_norm(sizes, compute, rngs)
        self.mlp = MLP(sizes, compute, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map tokens x [B, T, D] to [B, D]."""
        probe = jnp.broadcast_to(self.probe[...].astype(x.dtype), (x.shape[0], 1, x.shape[2]))
        # One product with the fused kernel for all tokens; q is read at the query alone.
        q, k, v = (
            part.reshape(*part.shape[:2], self.heads, -1)
            for part in jnp.split(self.in_proj(jnp.concatenate([probe, x], 1)), 3, axis=-1)
        )
        y = attention(q[:, :1], k[:, 1:], v[:, 1:], False, self.kind)
        y = self.out_proj(y.reshape(probe.shape))
        return (y + self.mlp(self.layer_norm(y)))[:, 0]


def patches(images: jax.Array, size: int) -> jax.Array:
    """Map images [B, H, W, C] to flattened patches [B, H//P W//P, P P C]; drop the remainder.

    The patch embedding is then a matrix product. A convolution with vmapped weights would become a
    grouped convolution, which is several times slower.
    """
    b, h, w, c = images.shape
    images = images[:, : h // size * size, : w // size * size]
    x = images.reshape(b, h // size, size, w // size, size, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, (h // size) * (w // size), size * size * c)


def end_of_text(ids: jax.Array, eos_token_id: int) -> jax.Array:
    """Return where a text is pooled: at its highest id (legacy rule, id 2) or at the first EOS.

    Args:
      ids: token ids [B, L], integers
      eos_token_id: as in the config

    Returns:
      Positions [B], int32; 0 if the rule is 'first EOS' and the text has none

    Example:
      >>> ids = jnp.array([[5, 9, 7, 7], [5, 7, 9, 7]])
      >>> end_of_text(ids, 2).tolist(), end_of_text(ids, 7).tolist()
      ([1, 2], [2, 1])
    """
    scores = ids if eos_token_id == LEGACY_EOS_TOKEN_ID else (ids == eos_token_id)
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float) -> jax.Array:
    """Draw float32 values from N(0, std^2)."""
    return std * jax.random.normal(rngs.params(), shape, jnp.float32)


def _product_of_rows(
    x: jax.Array, kernel: jax.Array, dimension_numbers: Any, **options: Any
) -> jax.Array:
    """Return x @ kernel as a product of two matrices, for x [..., D] and a kernel [D, F].

    With three dimensions, XLA's CPU backend copies kernels and activations to other layouts before
    each product, which takes a fifth of the CPU time of a train step.
    """
    rows = x.reshape(-1, x.shape[-1])
    product = jax.lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())), **options)
    return product.reshape(*x.shape[:-1], kernel.shape[-1])


def linear(
    inputs: int, outputs: int, std: float, compute: Compute, rngs: nnx.Rngs, bias: bool = True
) -> nnx.Linear:
    """Create a linear layer with a kernel from N(0, std^2)."""
    init = nnx.initializers.normal(std)
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=bias,
        dtype=compute.dtype,
        kernel_init=init,
        dot_general=_product_of_rows,
        rngs=rngs,
    )


def layer_norm(sizes: BlockSizes, compute: Compute, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Create a layer norm; the two-pass variance keeps parity with PyTorch."""
    return nnx.LayerNorm(
        sizes.hidden_size,
        epsilon=sizes.layer_norm_eps,
        dtype=compute.dtype,
        use_fast_variance=False,
        rngs=rngs,
    )


def widen(x: jax.Array) -> jax.Array:
    """Cast dtypes narrower than float32 to float32."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
