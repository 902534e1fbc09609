"""The one table of tensor names and layouts between our parameters and a checkpoint's.

Each row serves both directions, so that what is read is what is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from modelstock_jax.clip.config import CLIPConfig

Shape = tuple[int, ...]
Path = tuple[str, ...]


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
    """One tensor of theirs, and the tensors of ours that lie in it, joined along its first axis.

    Attributes:
        ours: Paths in our tree; nearly always one.
        theirs: Name in the file.
        transform: The layout of each part.

    Example:
        >>> row = Row((("q",), ("k",)), "in_proj_weight", TRANSPOSED)
        >>> row.shape({("q",): (3, 2), ("k",): (3, 2)})
        (4, 3)
        >>> joined = np.arange(12.0).reshape(4, 3)
        >>> parts = row.read(joined)
        >>> parts[("k",)].tolist()
        [[6.0, 9.0], [7.0, 10.0], [8.0, 11.0]]
        >>> bool((row.write(parts) == joined).all())
        True
    """

    ours: tuple[Path, ...]
    theirs: str
    transform: Transform

    def shape(self, shapes: Mapping[Path, Shape]) -> Shape:
        """Shape of theirs, from the shapes of ours."""
        parts = [self.transform.shape(shapes[path]) for path in self.ours]
        if len(parts) == 1:
            return parts[0]
        return (sum(part[0] for part in parts), *parts[0][1:])

    def read(self, tensor: np.ndarray) -> dict[Path, np.ndarray]:
        """Ours, by path, from theirs."""
        parts = [tensor] if len(self.ours) == 1 else np.split(tensor, len(self.ours))
        return {p: self.transform.read(x) for p, x in zip(self.ours, parts, strict=True)}

    def write(self, leaves: Mapping[Path, np.ndarray]) -> np.ndarray:
        """Theirs, from ours by path."""
        parts = [self.transform.write(leaves[path]) for path in self.ours]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


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


# What a name in the table ends in, ours and theirs.
_LEAF = (("", ""),)
_NORM = (("scale", "weight"), ("bias", "bias"))
_LINEAR = (("kernel", "weight"), ("bias", "bias"))

# Ours; transformers' CLIPModel; OpenAI's state dict, which OpenCLIP and Model Soups kept. Where
# there are fewer names there than here, ours lie joined in theirs.
_IMAGE = (
    (_LEAF, "class_embedding", "vision_model.embeddings.class_embedding", "visual.class_embedding"),
    (
        _LEAF,
        "patch_embedding.kernel",
        "vision_model.embeddings.patch_embedding.weight",
        "visual.conv1.weight",
    ),
    (
        _LEAF,
        "position_embedding",
        "vision_model.embeddings.position_embedding.weight",
        "visual.positional_embedding",
    ),
    # The file's own spelling.
    (_NORM, "pre_layernorm.", "vision_model.pre_layrnorm.", "visual.ln_pre."),
    (_NORM, "post_layernorm.", "vision_model.post_layernorm.", "visual.ln_post."),
    (_LEAF, "projection.kernel", "visual_projection.weight", "visual.proj"),
)
_TEXT = (
    (
        _LEAF,
        "token_embedding",
        "text_model.embeddings.token_embedding.weight",
        "token_embedding.weight",
    ),
    (
        _LEAF,
        "position_embedding",
        "text_model.embeddings.position_embedding.weight",
        "positional_embedding",
    ),
    (_NORM, "final_layernorm.", "text_model.final_layer_norm.", "ln_final."),
    (_LEAF, "projection.kernel", "text_projection.weight", "text_projection"),
)
_QKV = "self_attn.q_proj. self_attn.k_proj. self_attn.v_proj."
_BLOCK = (
    (_NORM, "layer_norm1.", "layer_norm1.", "ln_1."),
    (_LINEAR, _QKV, _QKV, "attn.in_proj_"),
    (_LINEAR, "self_attn.out_proj.", "self_attn.out_proj.", "attn.out_proj."),
    (_NORM, "layer_norm2.", "layer_norm2.", "ln_2."),
    (_LINEAR, "mlp.fc1.", "mlp.fc1.", "mlp.c_fc."),
    (_LINEAR, "mlp.fc2.", "mlp.fc2.", "mlp.c_proj."),
)
_TOWERS = (
    ("image_tower", _IMAGE, "vision_model.encoder.layers.{}.", "visual.transformer.resblocks.{}."),
    ("text_tower", _TEXT, "text_model.encoder.layers.{}.", "transformer.resblocks.{}."),
)
COLUMNS = ("hugging_face", "openai")


def rows(config: CLIPConfig, column: str) -> list[Row]:
    """The rows of a whole model in one column of the table.

    Args:
        config: Sizes.
        column: One of `COLUMNS`: transformers' ``CLIPModel``, or OpenAI's state dict.

    Returns:
        One row for each tensor of theirs.

    Example:
        >>> [len(rows(CLIPConfig(), column)) for column in COLUMNS]
        [398, 302]
    """
    which = COLUMNS.index(column)
    found = [Row((("logit_scale",),), "logit_scale", SAME)]
    for tower, table, *blocks in _TOWERS:
        layers = (config.vision if tower == "image_tower" else config.text).num_hidden_layers
        for kind, ours, *theirs in table:
            found += _rows(config, column, (tower,), kind, ours, "", theirs[which])
        for i in range(layers):
            here, there = (tower, "blocks", f"block_{i:02d}"), blocks[which].format(i)
            for kind, ours, *theirs in _BLOCK:
                found += _rows(config, column, here, kind, ours, there, theirs[which])
    return found


# The classifier of a fine-tuned model, a file of its own beside the model.
HEAD = [
    Row((("kernel",),), "weight", TRANSPOSED),
    Row((("bias",),), "bias", SAME),
]


def _rows(
    config: CLIPConfig,
    column: str,
    here: Path,
    kind: Sequence[tuple[str, str]],
    ours: str,
    there: str,
    theirs: str,
) -> Iterator[Row]:
    """One line of the table as rows."""
    names, others = ours.split(), theirs.split()
    for leaf, other in kind:
        paths = [(*here, *f"{name}{leaf}".split(".")) for name in names]
        step = len(paths) // len(others)
        for i, name in enumerate(others):
            part = tuple(paths[i * step : (i + 1) * step])
            yield Row(part, f"{there}{name}{other}", _transform(config, column, part[0]))


def _transform(config: CLIPConfig, column: str, path: Path) -> Transform:
    if path[-1] != "kernel":
        return SAME
    if path[-2] == "patch_embedding":
        return patches(config.vision.patch_size, config.vision.num_channels)
    # OpenAI multiplies by its projections as they are, [in, out].
    return SAME if path[-2] == "projection" and column == "openai" else TRANSPOSED
