"""Table of tensor names and memory layouts: our parameters and those of each checkpoint format.

Each row is used for both directions, so reading inverts writing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modelstock_jax.errors import UserError
from modelstock_jax.models.clip import Params
from modelstock_jax.models.config import CLIPConfig
from modelstock_jax.tensor_files.reader import TensorFiles

Shape = tuple[int, ...]
KeyPath = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
    """Conversion of one tensor between a checkpoint and our parameters.

    Attributes:
      read: tensor of the checkpoint -> ours
      write: ours -> tensor of the checkpoint
      shape: our shape -> shape in the checkpoint
    """

    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]
    shape: Callable[[Shape], Shape]


@dataclasses.dataclass(frozen=True)
class Row:
    """One checkpoint tensor and our tensors that it contains, joined along its first axis.

    Attributes:
      path: paths in our tree; usually one
      name: name in the checkpoint
      transform: conversion of each part

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

    path: tuple[KeyPath, ...]
    name: str
    transform: Transform

    def shape(self, shapes: Mapping[KeyPath, Shape]) -> Shape:
        """Return the shape in the checkpoint, from our shapes."""
        parts = [self.transform.shape(shapes[path]) for path in self.path]
        if len(parts) == 1:
            return parts[0]
        return (sum(part[0] for part in parts), *parts[0][1:])

    def read(self, tensor: np.ndarray) -> dict[KeyPath, np.ndarray]:
        """Return our tensors by path, from a checkpoint tensor."""
        parts = [tensor] if len(self.path) == 1 else np.split(tensor, len(self.path))
        return {p: self.transform.read(x) for p, x in zip(self.path, parts, strict=True)}

    def write(self, leaves: Mapping[KeyPath, np.ndarray]) -> np.ndarray:
        """Return the checkpoint tensor, from our tensors by path."""
        parts = [self.transform.write(leaves[path]) for path in self.path]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _same(x: Any) -> Any:
    return x


SAME = Transform(_same, _same, _same)
# PyTorch stores a linear layer as [out, in], we as [in, out].
TRANSPOSED = Transform(np.transpose, np.transpose, lambda shape: shape[::-1])


def patches(size: int, channels: int) -> Transform:
    """Convert a convolution [D, C, P, P] to [P P C, D], patches in (row, column, channel) order.

    Args:
      size: P
      channels: C

    Returns:
      The transform

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


# Endings of names in the table: (ours, in the checkpoint).
_LEAF = (("", ""),)
_NORM = (("scale", "weight"), ("bias", "bias"))
_LINEAR = (("kernel", "weight"), ("bias", "bias"))

# Columns: ours; transformers' CLIPModel; OpenAI's state dict, also used by OpenCLIP and Model
# Soups. If a row has fewer checkpoint names than ours, the checkpoint joins our tensors.
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
    # Spelled so in the files.
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
    """Return the rows of a complete model for one column of the table.

    Args:
      config: sizes
      column: one of `COLUMNS`: transformers' `CLIPModel`, or OpenAI's state dict

    Returns:
      One row per tensor of the checkpoint

    Example:
      >>> [len(rows(CLIPConfig(), column)) for column in COLUMNS]
      [398, 302]
    """
    index = COLUMNS.index(column)
    result = [Row((("logit_scale",),), "logit_scale", SAME)]
    for tower, table, *blocks in _TOWERS:
        layers = (config.vision if tower == "image_tower" else config.text).num_hidden_layers
        for kind, path, *names in table:
            result += _rows(config, column, (tower,), kind, path, "", names[index])
        for i in range(layers):
            prefix, name_prefix = (tower, "blocks", f"block_{i:02d}"), blocks[index].format(i)
            for kind, path, *names in _BLOCK:
                result += _rows(config, column, prefix, kind, path, name_prefix, names[index])
    return result


# The classifier of a fine-tuned model, stored in a separate file.
HEAD = [
    Row((("kernel",),), "weight", TRANSPOSED),
    Row((("bias",),), "bias", SAME),
]


def _rows(
    config: CLIPConfig,
    column: str,
    prefix: KeyPath,
    kind: Sequence[tuple[str, str]],
    path: str,
    name_prefix: str,
    name: str,
) -> Iterator[Row]:
    """Yield the rows of one line of the table."""
    stems, file_stems = path.split(), name.split()
    for ending, file_ending in kind:
        paths = [(*prefix, *f"{stem}{ending}".split(".")) for stem in stems]
        step = len(paths) // len(file_stems)
        for i, stem in enumerate(file_stems):
            joined = tuple(paths[i * step : (i + 1) * step])
            transform = _transform(config, column, joined[0])
            yield Row(joined, f"{name_prefix}{stem}{file_ending}", transform)


def _transform(config: CLIPConfig, column: str, path: KeyPath) -> Transform:
    if path[-1] != "kernel":
        return SAME
    if path[-2] == "patch_embedding":
        return patches(config.vision.patch_size, config.vision.num_channels)
    # OpenAI stores its projections as [in, out].
    return SAME if path[-2] == "projection" and column == "openai" else TRANSPOSED


Shapes = Mapping[tuple[str, ...], tuple[int, ...]]
MAX_NAMED = 30  # problems of one kind that an error lists
FLOATS = ("float16", "bfloat16", "float32", "float64")


def flatten(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[Any, Any]]:
    """Yield (path, leaf) of nested dictionaries, sorted by name.

    Args:
      tree: nested dictionaries
      prefix: beginning of the paths

    Yields:
      Paths as tuples of names, with their leaves

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
    """Invert `flatten`.

    Args:
      leaves: path -> leaf

    Returns:
      Nested dictionaries

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


def read_tree(
    files: TensorFiles,
    rows: Sequence[Row],
    shapes: Shapes,
    where: Path,
    tolerates: Callable[[str], bool] = lambda name: False,
) -> Params:
    """Read a tree of parameters as float32.

    Args:
      files: tensors of the checkpoint
      rows: result of `rows`
      shapes: our shapes by path
      where: path for error messages
      tolerates: whether a tensor that is not in the table is allowed

    Returns:
      Nested dictionaries of float32 NumPy arrays

    Raises:
      UserError: tensors that are missing, unused, of wrong shape or dtype, or not finite (all in
        one list)
    """
    problems, leaves = [], {}
    for row in rows:
        expected = row.shape(shapes)
        if row.name not in files:
            problems.append(f"missing: {row.name} {shape_text(expected)}")
        elif files.shape(row.name) != expected:
            found = shape_text(files.shape(row.name))
            problems.append(f"misshapen: {row.name} is {found}, not {shape_text(expected)}")
        elif files.dtype(row.name).name not in FLOATS:
            problems.append(f"not floating-point: {row.name} is {files.dtype(row.name)}")
        else:
            with np.errstate(over="ignore"):  # Infinities are reported below.
                tensor = files[row.name].astype(np.float32, copy=False)
            if not np.isfinite(tensor).all():
                problems.append(f"not finite: {row.name}")
            leaves |= {path: np.asarray(x, order="C") for path, x in row.read(tensor).items()}
    known = {row.name for row in rows}
    problems += [
        f"unused: {name} {shape_text(files.shape(name))}"
        for name in files
        if name not in known and not tolerates(name)
    ]
    _raise(where, problems)
    return unflatten(leaves)


def write_tree(
    tree: Params, rows: Sequence[Row], shapes: Shapes, where: Path
) -> dict[str, np.ndarray]:
    """Return checkpoint tensors by name, as float32: the inverse of `read_tree`."""
    leaves = dict(flatten(tree))
    problems = [f"unused: {'.'.join(path)}" for path in sorted(leaves.keys() - shapes.keys())]
    tensors = {}
    for row in rows:
        fitting = {}
        for path in row.path:
            name = ".".join(path)
            if path not in leaves:
                problems.append(f"missing: {name} {shape_text(shapes[path])}")
                continue
            array = np.asarray(leaves[path], np.float32)
            if array.shape != shapes[path]:
                expected = shape_text(shapes[path])
                problems.append(f"misshapen: {name} is {shape_text(array.shape)}, not {expected}")
            elif not np.isfinite(array).all():
                problems.append(f"not finite: {name}")
            else:
                fitting[path] = array
        if len(fitting) == len(row.path):
            tensors[row.name] = row.write(fitting)
    _raise(where, problems)
    return tensors


def shape_text(shape: tuple[int, ...]) -> str:
    """Format a shape."""
    return f"[{', '.join(map(str, shape))}]"


def _raise(where: Path, problems: list[str]) -> None:
    """Raise one error with all problems, at most `MAX_NAMED` of each kind."""
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        kinds.setdefault(problem.partition(":")[0], []).append(problem)
    shown = []
    for kind, found in kinds.items():
        more = len(found) - MAX_NAMED
        shown += [*found[:MAX_NAMED], *([f"{kind}: {more} more"] if more > 0 else [])]
    if shown:
        raise UserError(f"{where}: tensors that do not match: {'; '.join(shown)}")
