"""What each layer of a tower gives: for research, and for parity layer by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax import nnx

from modelstock_jax.clip.config import CLIPConfig
from modelstock_jax.clip.model import DEFAULT_COMPUTE, Compute, Params, image_tower, text_tower

Activations = dict[str, jax.Array]


def image_activations(
    config: CLIPConfig, tower_params: Params, images: jax.Array, compute: Compute = DEFAULT_COMPUTE
) -> Activations:
    """The output of every layer of the image tower.

    The names are those of the parameters: ``blocks.block_03.self_attn.q_proj`` [B, T, D] beside
    the kernel of that name, ``blocks.block_03.self_attn`` and ``.mlp`` (what they add to the
    residual stream), ``blocks.block_03`` (the stream after the block), ``post_layernorm`` [B, D],
    ``projection`` [B, E]; and ``embed`` [B, T, D], the tokens with their positions. `encode_image`
    is not made slower: the layers are instrumented (by `flax.nnx.capture`, process-wide: not from
    two threads at once) only while this function is called or traced.

    Args:
        config: Sizes.
        tower_params: params["image_tower"].
        images: As in `encode_image`.
        compute: As in `encode_image`; remat is left out.

    Returns:
        Name -> activation.

    Raises:
        UserError: As `encode_image`.

    Example:
        >>> import jax.numpy as jnp
        >>> from modelstock_jax.clip.config import TextConfig, VisionConfig
        >>> from modelstock_jax.clip.model import abstract_params
        >>> config = CLIPConfig(VisionConfig(num_hidden_layers=1), TextConfig(num_hidden_layers=1))
        >>> outputs = jax.eval_shape(
        ...     lambda tower, images: image_activations(config, tower, images),
        ...     abstract_params(config)["image_tower"],
        ...     jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32))
        >>> outputs["blocks.block_00.mlp.fc1"].shape
        (2, 50, 3072)
    """
    return _capture(image_tower(config, tower_params, images, _kept(compute)), images)


def text_activations(
    config: CLIPConfig, tower_params: Params, ids: jax.Array, compute: Compute = DEFAULT_COMPUTE
) -> Activations:
    """The output of every layer of the text tower, as `image_activations` has them.

    Args:
        config: Sizes.
        tower_params: params["text_tower"].
        ids: As in `encode_text`.
        compute: As in `encode_text`; remat is left out.

    Returns:
        Name -> activation; ``final_layernorm`` [B, D] is of the token at the end of text.

    Raises:
        UserError: As `encode_text`.
    """
    return _capture(text_tower(config, tower_params, ids, _kept(compute)), ids)


def _kept(compute: Compute) -> Compute:
    return dataclasses.replace(compute, remat=False)


def _capture(tower: nnx.Module, inputs: jax.Array) -> Activations:
    _, captured = nnx.capture(tower, nnx.Intermediate, method_outputs=nnx.Intermediate)(inputs)
    return dict(_named(nnx.to_pure_dict(captured)))


def _named(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _named(value, (*prefix, name))
        else:
            (output,) = value  # Each layer is called once.
            path = prefix if name == "__call__" else (*prefix, name)
            if path:  # The tower's own output is its projection's.
                yield ".".join(path), output
