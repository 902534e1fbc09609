"""The pre-norm transformer of both towers (Flax NNX), and bicubic position embeddings."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from modelstock_jax.errors import UserError, check_choice
from modelstock_jax.models.config import LEGACY_EOS_TOKEN_ID, CLIPConfig, TextConfig, VisionConfig

_DTYPES = tuple(jnp.dtype(x) for x in ("float32", "bfloat16", "float16", "float64"))
ATTENTIONS = ("xla", "cudnn")


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
    attention_impl: str = "xla"
    remat: bool = False

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        except TypeError:
            pass
        name = getattr(self.dtype, "name", self.dtype)
        check_choice("compute.dtype", name, [dtype.name for dtype in _DTYPES])
        check_choice("compute.attention_impl", self.attention_impl, ATTENTIONS)
        if self.attention_impl == "cudnn" and self.dtype not in (jnp.bfloat16, jnp.float16):
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
        self.heads, self.causal, self.kind = heads, causal, compute.attention_impl
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


# Position embeddings of an image tower on another grid of patches: PyTorch's bicubic.


# The cubic kernel's free parameter: PyTorch's, and with it transformers'. jax.image has -0.5.
A = -0.75


@functools.lru_cache(maxsize=64)
def bicubic(old: int, new: int) -> np.ndarray:
    """The matrix that resizes one axis, as ``torch.nn.functional.interpolate(mode="bicubic")``.

    Output i lies at s = (i + 1/2) old / new - 1/2 (``align_corners=False``) and takes the four
    inputs around it by Keys' kernel with a = -3/4; inputs beyond the border are the border's. No
    antialiasing.

    Args:
        old: Length of the axis.
        new: Length that is wanted.

    Returns:
        [new, old], float64; each row sums to 1.

    Example:
        >>> bicubic(2, 2)
        array([[1., 0.],
               [0., 1.]])
        >>> bicubic(4, 2)[0]
        array([ 0.5    ,  0.59375, -0.09375,  0.     ])
    """
    at = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(at).astype(int)
    matrix = np.zeros((new, old))
    for tap in range(-1, 3):
        column = np.clip(first + tap, 0, old - 1)
        # Taps that were clamped to one column add up.
        np.add.at(matrix, (np.arange(new), column), _keys(np.abs(at - (first + tap))))
    matrix.setflags(write=False)
    return matrix


def _keys(x: np.ndarray) -> np.ndarray:
    near = (A + 2) * x**3 - (A + 3) * x**2 + 1
    far = A * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, far)


def interpolate(positions: jax.Array, old: tuple[int, int], new: tuple[int, int]) -> jax.Array:
    """Position embeddings on another grid: q[h, w] = sum_ij R[h, i] C[w, j] p[i, j].

    The class token keeps its own. What transformers' CLIP computes with
    ``interpolate_pos_encoding=True``.

    Args:
        positions: [1 + H W, D], the class token first, then the patches row by row.
        old: (H, W), patches.
        new: (H', W').

    Returns:
        [1 + H' W', D], of the same dtype; `positions` itself where the grid is the same.

    Example:
        >>> interpolate(jnp.arange(10.0).reshape(5, 2), (2, 2), (3, 2)).shape
        (7, 2)
    """
    if new == old:
        return positions
    grid = positions[1:].reshape(*old, -1)
    rows, columns = (
        jnp.asarray(bicubic(*sizes), positions.dtype) for sizes in zip(old, new, strict=True)
    )
    # Full precision: TF32 would move every token, and the product is small.
    grid = jnp.einsum("hi,wj,ijd->hwd", rows, columns, grid, precision=jax.lax.Precision.HIGHEST)
    return jnp.concatenate([positions[:1], grid.reshape(-1, positions.shape[1])])


def resize_positions(
    params: dict[str, Any], config: CLIPConfig, image_size: int
) -> tuple[CLIPConfig, dict[str, Any]]:
    """Moves a model to another training resolution, before it is fine-tuned there.

    The interpolated position embedding takes the place of the old one, so that the features of
    images of the new size are what they were through interpolation at the call. (OpenCLIP resizes
    with antialiasing, whose kernel has a = -1/2: its embedding differs a little.)

    Args:
        params: A tree with "image_tower" in it: CLIP's, or a replica's. It is not changed.
        config: Its sizes.
        image_size: Side of the images to come, in pixels; a multiple of the patch size.

    Returns:
        The config with that image size; the tree with a new position embedding (a NumPy array),
        its other leaves shared.

    Raises:
        UserError: `image_size` is no positive multiple of the patch size.

    Example:
        >>> from modelstock_jax.models.config import VisionConfig
        >>> config = CLIPConfig(VisionConfig(hidden_size=12, image_size=64, patch_size=32))
        >>> params = {"image_tower": {"position_embedding": np.ones((5, 12), np.float32)}}
        >>> config, params = resize_positions(params, config, 96)
        >>> config.vision.image_size, params["image_tower"]["position_embedding"].shape
        (96, (10, 12))
    """
    vision = dataclasses.replace(config.vision, image_size=image_size)
    old, new = (size.image_size // size.patch_size for size in (config.vision, vision))
    tower = params["image_tower"]
    positions = interpolate(jnp.asarray(tower["position_embedding"]), (old, old), (new, new))
    tower = {**tower, "position_embedding": np.asarray(positions)}
    return dataclasses.replace(config, vision=vision), {**params, "image_tower": tower}
