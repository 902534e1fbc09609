"""Small image towers as pure functions of nested dictionaries of arrays, as in `models.clip`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from modelstock_jax.errors import UserError
from modelstock_jax.models.clip import ImageTower
from modelstock_jax.models.config import CLIPConfig, VisionConfig
from modelstock_jax.models.convnext import WIDTHS as CONVNEXT_WIDTHS
from modelstock_jax.models.convnext import ConvNeXt
from modelstock_jax.models.resnet import SIZES, Hybrid, ResNet
from modelstock_jax.models.resnet import WIDTHS as RESNET_WIDTHS
from modelstock_jax.models.transformer import Compute

Params = dict[str, Any]
IMAGE_SIZE = 24
# Image tower of the small CLIP that the package contains.
_VIT = CLIPConfig(
    VisionConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=3,
        image_size=IMAGE_SIZE,
        patch_size=6,
    ),
    projection_dim=64,
)


class Tower(NamedTuple):
    """An architecture.

    Attributes:
      build: (compute, rngs) -> a module that maps images [B, 24, 24, 3] to features [B, E]
      width: E
      num_heads: attention heads; 1 without attention
    """

    build: Callable[[Compute, nnx.Rngs], nnx.Module]
    width: int
    num_heads: int = 1


TOWERS = {
    "vit": Tower(
        functools.partial(ImageTower, _VIT), _VIT.projection_dim, _VIT.vision.num_attention_heads
    ),
    "hybrid": Tower(Hybrid, SIZES.hidden_size, SIZES.num_attention_heads),
    "resnet": Tower(ResNet, RESNET_WIDTHS[-1]),
    "convnext": Tower(ConvNeXt, CONVNEXT_WIDTHS[-1]),
}


def tower(name: str) -> Tower:
    """Return the architecture of this name.

    Raises:
      UserError: unknown name
    """
    if name not in TOWERS:
        raise UserError(f"tower:{name}: choose one of {', '.join(TOWERS)}")
    return TOWERS[name]


def init(name: str, num_classes: int, key: jax.Array) -> Params:
    """Draw initial parameters {"image_tower", "head": {"kernel" [E, K], "bias" [K]}}, float32.

    Example:
      >>> params = jax.eval_shape(lambda key: init("resnet", 62, key), jax.random.key(0))
      >>> params["image_tower"]["stem"]["kernel"].shape, params["head"]["kernel"].shape
      ((27, 32), (128, 62))
    """
    shape = tower(name)
    first, second = jax.random.split(key)

    @jax.jit
    def draw(key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(shape.build(Compute(), nnx.Rngs(key)), nnx.Param))

    kernel = shape.width**-0.5 * jax.random.normal(second, (shape.width, num_classes))
    return {"image_tower": draw(first), "head": {"kernel": kernel, "bias": jnp.zeros(num_classes)}}


def classifier(name: str, compute: Compute) -> Callable[[Params, jax.Array], jax.Array]:
    """Return a tower with a linear head: logits = f W + b.

    Args:
      name: name of the tower
      compute: dtype and remat

    Returns:
      apply(params, images) -> logits [B, K], float32; images float [B, 24, 24, 3]
    """
    shape = tower(name)

    def apply(params: Params, images: jax.Array) -> jax.Array:
        weights = jax.tree.map(jnp.asarray, params["image_tower"])
        features = nnx.merge(_structure(shape, compute), weights)(images)
        head, wide = params["head"], jnp.promote_types(features.dtype, jnp.float32)
        logits = jnp.matmul(
            features.astype(wide), head["kernel"], precision=jax.lax.Precision.HIGHEST
        )
        return logits + head["bias"][None]

    return apply


@functools.lru_cache(maxsize=16)
def _structure(shape: Tower, compute: Compute) -> Any:
    """Return the structure of the module without drawing parameters."""
    return nnx.split(nnx.eval_shape(lambda: shape.build(compute, nnx.Rngs(0))))[0]
