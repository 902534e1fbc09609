"""Pre-norm transformer blocks of both towers (Flax NNX); bicubic position embeddings."""

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
    """Dtype, attention implementation and rematerialization; parameters do not depend on it.

    Attributes:
      dtype: dtype, or its name, of activations and of weights in matrix products. Layer-norm
        statistics, softmax and output features are float32 or wider in any case.
      attention_impl: "xla", or "cudnn" (GPU only, dtype bfloat16 or float16)
      remat: recompute each block in the backward pass instead of storing its activations
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
                f"compute.attention_impl='cudnn' requires compute.dtype bfloat16 or float16, not "
                f"{self.dtype.name}"
            )

    @classmethod
    def of(cls, options: Any) -> Compute:
        """Create from options that have at least these fields, such as `config.compute`."""
        return cls(**{field.name: options[field.name] for field in dataclasses.fields(cls)})


DEFAULT_COMPUTE = Compute()

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}


def _attention(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool, kind: str) -> jax.Array:
    """Compute softmax(q k^T / sqrt(head_dim)) v for q, k, v [B, T, heads, head_dim]."""
    if kind == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
    wide = jnp.promote_types(q.dtype, jnp.float32)
    q = q * q.shape[-1] ** -0.5
    scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=wide)
    if causal:
        length = q.shape[1]
        mask = jnp.tril(jnp.ones((length, length), bool))[None, None]
        scores = jnp.where(mask, scores, jnp.finfo(wide).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bhts,bshd->bthd", weights, v)


class Attention(nnx.Module):
    """Multi-head self-attention with biases on the q, k, v and output projections."""

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
        """Map x [B, T, D] to [B, T, D]."""
        split = (*x.shape[:2], self.heads, -1)
        q, k, v = (f(x).reshape(split) for f in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(_attention(q, k, v, self.causal, self.kind).reshape(x.shape))


class MLP(nnx.Module):
    """Two-layer perceptron of a block."""

    def __init__(self, tower: VisionConfig | TextConfig, compute: Compute, rngs: nnx.Rngs):
        width, layers = tower.hidden_size, tower.num_hidden_layers
        self.activation = _ACTIVATIONS[tower.hidden_act]
        self.fc1 = linear(width, tower.intermediate_size, (2 * width) ** -0.5, compute, rngs)
        std = width**-0.5 * (2 * layers) ** -0.5
        self.fc2 = linear(tower.intermediate_size, width, std, compute, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x [B, T, D] to [B, T, D]."""
        return self.fc2(self.activation(self.fc1(x)))


class Block(nnx.Module):
    """Pre-norm transformer block."""

    def __init__(
        self, tower: VisionConfig | TextConfig, causal: bool, compute: Compute, rngs: nnx.Rngs
    ):
        width, heads = tower.hidden_size, tower.num_attention_heads
        self.layer_norm1 = layer_norm(tower, compute, rngs)
        self.self_attn = Attention(width, heads, tower.num_hidden_layers, causal, compute, rngs)
        self.layer_norm2 = layer_norm(tower, compute, rngs)
        self.mlp = MLP(tower, compute, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x [B, T, D] to [B, T, D]."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


def make_blocks(
    tower: VisionConfig | TextConfig, causal: bool, compute: Compute, rngs: nnx.Rngs
) -> nnx.Dict:
    """Create the blocks of a tower, named, not stacked: each has its own angles in a merge."""
    return nnx.Dict(
        {
            f"block_{i:02d}": Block(tower, causal, compute, rngs)
            for i in range(tower.num_hidden_layers)
        }
    )


def run_blocks(blocks: nnx.Dict, x: jax.Array, remat: bool) -> jax.Array:
    """Apply the blocks in order to x [B, T, D]; `remat` stores only the input of each block."""
    # `nnx.capture` adds its own item to the dictionary.
    names = (name for name in blocks if name.startswith("block_"))
    for name in sorted(names, key=lambda n: int(n.removeprefix("block_"))):
        x = _recomputed(blocks[name], x) if remat else blocks[name](x)
    return x


def _recomputed(block: Block, x: jax.Array) -> jax.Array:
    graph, state = nnx.split(block)
    return jax.checkpoint(lambda state, x: nnx.merge(graph, state)(x))(state, x)


def patches(images: jax.Array, size: int) -> jax.Array:
    """Map images [B, H, W, C] to flattened patches [B, H/P W/P, P P C].

    The patch embedding is then a matrix product. A convolution with vmapped weights would become a
    grouped convolution, which is several times slower.
    """
    b, h, w, c = images.shape
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


def linear(
    inputs: int, outputs: int, std: float, compute: Compute, rngs: nnx.Rngs, bias: bool = True
) -> nnx.Linear:
    """Create a linear layer with a kernel from N(0, std^2)."""
    init = nnx.initializers.normal(std)
    return nnx.Linear(
        inputs, outputs, use_bias=bias, dtype=compute.dtype, kernel_init=init, rngs=rngs
    )


def layer_norm(tower: VisionConfig | TextConfig, compute: Compute, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Create a layer norm; the two-pass variance keeps parity with PyTorch."""
    return nnx.LayerNorm(
        tower.hidden_size,
        epsilon=tower.layer_norm_eps,
        dtype=compute.dtype,
        use_fast_variance=False,
        rngs=rngs,
    )


# Free parameter of the cubic kernel, as in PyTorch and transformers; jax.image uses -0.5.
A = -0.75


@functools.lru_cache(maxsize=64)
def bicubic(old: int, new: int) -> np.ndarray:
    """Return the matrix that resizes one axis as torch's bicubic `interpolate` does.

    Output i samples the input at s = (i + 1/2) old / new - 1/2 (`align_corners=False`) from its
    four neighbors with Keys' kernel, a = -3/4; indices are clamped at the border. No antialiasing.

    Args:
      old: current length of the axis
      new: new length

    Returns:
      [new, old], float64; each row sums to 1

    Example:
      >>> bicubic(2, 2)
      array([[1., 0.],
             [0., 1.]])
      >>> bicubic(4, 2)[0]
      array([ 0.5    ,  0.59375, -0.09375,  0.     ])
    """
    sample = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(sample).astype(int)
    matrix = np.zeros((new, old))
    for tap in range(-1, 3):
        column = np.clip(first + tap, 0, old - 1)
        # Add: several taps may be clamped to the same column.
        np.add.at(matrix, (np.arange(new), column), _keys(np.abs(sample - (first + tap))))
    matrix.setflags(write=False)
    return matrix


def _keys(x: np.ndarray) -> np.ndarray:
    near = (A + 2) * x**3 - (A + 3) * x**2 + 1
    far = A * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, far)


def interpolate(positions: jax.Array, old: tuple[int, int], new: tuple[int, int]) -> jax.Array:
    """Resize position embeddings to another grid: q[h, w] = sum_ij R[h, i] C[w, j] p[i, j].

    The embedding of the class token is unchanged. Equal to transformers' CLIP with
    `interpolate_pos_encoding=True`.

    Args:
      positions: [1 + H W, D], class token first, then patches row by row
      old: (H, W), patches
      new: (H', W')

    Returns:
      [1 + H' W', D], of the same dtype; `positions` itself if the grid is unchanged

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
    # Full precision: TF32 would change every token, and the product is small.
    grid = jnp.einsum("hi,wj,ijd->hwd", rows, columns, grid, precision=jax.lax.Precision.HIGHEST)
    return jnp.concatenate([positions[:1], grid.reshape(-1, positions.shape[1])])


def resize_positions(
    params: dict[str, Any], config: CLIPConfig, image_size: int
) -> tuple[CLIPConfig, dict[str, Any]]:
    """Change the training resolution of a model before fine-tuning.

    Replaces the position embedding by the interpolated one, so that features of images of the new
    size equal those that interpolation at every call gives. (OpenCLIP resizes with antialiasing
    and a = -1/2: its embedding differs slightly.)

    Args:
      params: tree with "image_tower", of a CLIP or a replica; not modified
      config: its configuration
      image_size: new side of the images in pixels; a multiple of the patch size

    Returns:
      The config with the new image size, and the tree with the new position embedding (a NumPy
      array); all other leaves are shared

    Raises:
      UserError: `image_size` is not a positive multiple of the patch size

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
