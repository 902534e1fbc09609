"""The one table of tensor names and layouts between our parameters and a checkpoint's.

Each row serves both directions, so that what is read is what is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from modelstock_jax.clip.config import CLIPConfig

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
    """How one tensor is laid out there and here.

    Attributes:
        read: Theirs -> ours.
        write: Ours -> theirs.
        shape: Shape of ours -> shape of theirs.
    """

    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]
    shape: Callable[[Shape], Shape]


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor: its path in our tree, its name in the file, its layout."""

    ours: tuple[str, ...]
    theirs: str
    transform: Transform


def _same(x: Any) -> Any:
    return x


SAME = Transform(_same, _same, _same)
# A PyTorch linear layer is [out, in], a kernel here is [in, out].
TRANSPOSED = Transform(np.transpose, np.transpose, lambda shape: shape[::-1])


def patches(size: int, channels: int) -> Transform:
    """A convolution's [D, C, P, P] and our [P P C, D], a patch flattened as (row, column, channel).

    Args:
        size: P.
        channels: C.

    Returns:
        The transform.

    Example:
        >>> kernel = np.arange(24.0).reshape(2, 3, 2, 2)
        >>> ours = patches(2, 3).read(kernel)
        >>> bool(ours[1 * 3 + 2, 0] == kernel[0, 2, 0, 1])
        True
        >>> bool((patches(2, 3).write(ours) == kernel).all())
        True
    """
    return Transform(
        lambda x: x.transpose(2, 3, 1, 0).reshape(size * size * channels, x.shape[0]),
        lambda x: x.reshape(size, size, channels, x.shape[1]).transpose(3, 2, 0, 1),
        lambda shape: (shape[1], channels, size, size),
    )


def hugging_face(config: CLIPConfig) -> list[Row]:
    """Rows for transformers' ``CLIPModel``.

    Args:
        config: Sizes.

    Returns:
        One row for each tensor of the model.
    """
    rows = [Row(("logit_scale",), "logit_scale", SAME)]
    vision, text = "vision_model", "text_model"
    image = [
        (("class_embedding",), "embeddings.class_embedding", SAME),
        (
            ("patch_embedding", "kernel"),
            "embeddings.patch_embedding.weight",
            patches(config.vision.patch_size, config.vision.num_channels),
        ),
        (("position_embedding",), "embeddings.position_embedding.weight", SAME),
        *_affine(("pre_layernorm",), "pre_layrnorm", SAME, "scale"),  # The file's own spelling.
        *_blocks(config.vision.num_hidden_layers),
        *_affine(("post_layernorm",), "post_layernorm", SAME, "scale"),
    ]
    words = [
        (("token_embedding",), "embeddings.token_embedding.weight", SAME),
        (("position_embedding",), "embeddings.position_embedding.weight", SAME),
        *_blocks(config.text.num_hidden_layers),
        *_affine(("final_layernorm",), "final_layer_norm", SAME, "scale"),
    ]
    rows += [Row(("image_tower", *ours), f"{vision}.{name}", how) for ours, name, how in image]
    rows += [Row(("text_tower", *ours), f"{text}.{name}", how) for ours, name, how in words]
    for tower, name in (("image_tower", "visual_projection"), ("text_tower", "text_projection")):
        rows.append(Row((tower, "projection", "kernel"), f"{name}.weight", TRANSPOSED))
    return rows


# The classifier of a fine-tuned model, a file of its own beside the model.
HEAD = [
    Row(("kernel",), "weight", TRANSPOSED),
    Row(("bias",), "bias", SAME),
]


def flatten(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[Any, Any]]:
    """Yields (path, leaf) of nested dictionaries, in order of the names.

    Args:
        tree: Nested dictionaries.
        prefix: What the paths begin with.

    Yields:
        Tuples of names, and leaves.

    Example:
        >>> list(flatten({"b": 1, "a": {"c": 2}}))
        [(('a', 'c'), 2), (('b',), 1)]
    """
    for name in sorted(tree):
        if isinstance(tree[name], Mapping):
            yield from flatten(tree[name], (*prefix, name))
        else:
            yield (*prefix, name), tree[name]


def unflatten(leaves: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Nests (path, leaf) again.

    Args:
        leaves: Path -> leaf.

    Returns:
        Nested dictionaries.

    Example:
        >>> unflatten({("a", "c"): 2, ("b",): 1})
        {'a': {'c': 2}, 'b': 1}
    """
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree


_Entry = tuple[tuple[str, ...], str, Transform]


def _affine(ours: tuple[str, ...], name: str, how: Transform, weight: str) -> list[_Entry]:
    return [((*ours, weight), f"{name}.weight", how), ((*ours, "bias"), f"{name}.bias", SAME)]


def _blocks(layers: int) -> Iterator[_Entry]:
    for i in range(layers):
        ours, name = ("blocks", f"block_{i:02d}"), f"encoder.layers.{i}"
        for norm in ("layer_norm1", "layer_norm2"):
            yield from _affine((*ours, norm), f"{name}.{norm}", SAME, "scale")
        for part, layer in (
            ("self_attn", "q_proj"),
            ("self_attn", "k_proj"),
            ("self_attn", "v_proj"),
            ("self_attn", "out_proj"),
            ("mlp", "fc1"),
            ("mlp", "fc2"),
        ):
            path = f"{name}.{part}.{layer}"
            yield from _affine((*ours, part, layer), path, TRANSPOSED, "kernel")
