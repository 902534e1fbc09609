"""Tensor names and memory layouts: our parameters and those of checkpoint formats.

Every model has a table of lines in its module. Each row is used for both directions, so reading
inverts writing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from modelstock_jax.errors import UserError
from modelstock_jax.tensor_files.reader import TensorFiles

Shape = tuple[int, ...]
KeyPath = tuple[str, ...]
Params = dict[str, Any]


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
      optional: whether a checkpoint may lack the tensor: the model does not compute with it
      integer: whether the tensor is an integer; all others are floating-point
      nonnegative: whether negative values are an error, as those of a variance

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
    optional: bool = False
    integer: bool = False
    nonnegative: bool = False

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


def axes_added(count: int) -> Transform:
    """Convert a tensor with `count` leading axes of length 1 to one without.

    Example:
      >>> axes_added(2).read(np.zeros((1, 1, 3))).shape
      (3,)
    """
    return Transform(
        lambda x: x.reshape(x.shape[count:]),
        lambda x: x.reshape((1,) * count + x.shape),
        lambda shape: (1,) * count + shape,
    )


# PyTorch stores a linear layer as [out, in], we as [in, out].
TRANSPOSED = Transform(np.transpose, np.transpose, lambda shape: shape[::-1])


def convolution(size: int, channels: int) -> Transform:
    """Convert a convolution [D, C, P, P] to [P P C, D], windows in (row, column, channel) order.

    Args:
      size: P
      channels: C; 1 for a depthwise convolution, which has one channel per output

    Returns:
      The transform

    Example:
      >>> kernel = np.arange(24.0).reshape(2, 3, 2, 2)
      >>> ours = convolution(2, 3).read(kernel)
      >>> bool(ours[1 * 3 + 2, 0] == kernel[0, 2, 0, 1])
      True
      >>> bool((convolution(2, 3).write(ours) == kernel).all())
      True
    """
    return Transform(
        lambda x: x.transpose(2, 3, 1, 0).reshape(size * size * channels, x.shape[0]),
        lambda x: x.reshape(size, size, channels, x.shape[1]).transpose(3, 2, 0, 1),
        lambda shape: (shape[1], channels, size, size),
    )


# Endings of names in a table: (ours, in the checkpoint).
Endings = Sequence[tuple[str, str]]
LEAF: Endings = (("", ""),)
NORM: Endings = (("scale", "weight"), ("bias", "bias"))
LINEAR: Endings = (("kernel", "weight"), ("bias", "bias"))
KERNEL: Endings = (("kernel", "weight"),)
# A line of a table: endings, our name, then the name in each checkpoint format. A line of several
# names has them separated by spaces.
Line = tuple[Any, ...]


class Patches(Protocol):
    """Sizes of the kernel of a patch embedding."""

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""

    @property
    def num_channels(self) -> int:
        """Color channels of an image."""


def table_rows(
    table: Iterable[Line],
    column: int,
    prefix: KeyPath,
    name_prefix: str = "",
    *,
    patches: Patches | None = None,
    transforms: Mapping[str, Transform] = MappingProxyType({}),
) -> list[Row]:
    """Return the rows of a table of names.

    Kernels are transposed, patch embeddings are converted by `convolution`, all other tensors are
    the same in both.

    Args:
      table: lines of names
      column: index of the checkpoint format
      prefix: path of the part of our tree that the table describes
      name_prefix: beginning of the names in the checkpoint
      patches: sizes of `patch_embedding.kernel`
      transforms: our name in the table -> its transform, for exceptions

    Example:
      >>> rows = table_rows([(LINEAR, "mlp.fc1.", "intermediate.dense.")], 0, ("tower",))
      >>> rows[0].path, rows[0].name
      ((('tower', 'mlp', 'fc1', 'kernel'),), 'intermediate.dense.weight')
    """
    rows = []
    for endings, ours, *names in table:
        stems, file_stems = ours.split(), names[column].split()
        for ending, file_ending in endings:
            paths = [f"{stem}{ending}" for stem in stems]
            step = len(paths) // len(file_stems)
            for i, stem in enumerate(file_stems):
                joined = paths[i * step : (i + 1) * step]
                if joined[0] == "patch_embedding.kernel" and patches is not None:
                    transform = convolution(patches.patch_size, patches.num_channels)
                else:
                    transform = transforms.get(joined[0], _transform(joined[0]))
                path = tuple((*prefix, *name.split(".")) for name in joined)
                rows.append(Row(path, f"{name_prefix}{stem}{file_ending}", transform))
    return rows


def linear_head(name: str, path: KeyPath = ("head",)) -> list[Row]:
    """Return the rows of a linear classifier.

    Args:
      name: beginning of its names in the checkpoint, such as 'classifier.'
      path: path of {"kernel" [E, K], "bias" [K]} in our tree
    """
    return [
        Row(((*path, "kernel"),), f"{name}weight", TRANSPOSED),
        Row(((*path, "bias"),), f"{name}bias", SAME),
    ]


def linear_shapes(features: int, classes: int, path: KeyPath = ("head",)) -> dict[KeyPath, Shape]:
    """Return our shapes of a linear classifier, by path.

    Args:
      features: E
      classes: K
      path: path of {"kernel" [E, K], "bias" [K]} in our tree
    """
    return {(*path, "kernel"): (features, classes), (*path, "bias"): (classes,)}


def _transform(name: str) -> Transform:
    return TRANSPOSED if name.rpartition(".")[2] == "kernel" else SAME


# The classifier of a fine-tuned model, stored in a separate file.
HEAD = linear_head("", ())


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
      UserError: tensors that are missing, unused, of wrong shape or dtype, or not finite, and
        negative variances (all in one list)
    """
    problems, leaves = [], {}
    for row in rows:
        expected = row.shape(shapes)
        if row.name not in files:
            if not row.optional:
                problems.append(f"missing: {row.name} {shape_text(expected)}")
        elif files.shape(row.name) != expected:
            found = shape_text(files.shape(row.name))
            problems.append(f"misshapen: {row.name} is {found}, not {shape_text(expected)}")
        elif row.integer:
            if files.dtype(row.name).kind not in "iu":
                problems.append(f"not an integer: {row.name} is {files.dtype(row.name)}")
            leaves |= row.read(files[row.name])
        elif files.dtype(row.name).name not in FLOATS:
            problems.append(f"not floating-point: {row.name} is {files.dtype(row.name)}")
        else:
            with np.errstate(over="ignore"):  # Infinities are reported below.
                tensor = files[row.name].astype(np.float32, copy=False)
            problems += _unusable(row, tensor, row.name)
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
                if not row.optional:
                    problems.append(f"missing: {name} {shape_text(shapes[path])}")
                continue
            array = np.asarray(leaves[path], np.int64 if row.integer else np.float32)
            if array.shape != shapes[path]:
                expected = shape_text(shapes[path])
                problems.append(f"misshapen: {name} is {shape_text(array.shape)}, not {expected}")
            elif unusable := _unusable(row, array, name):
                problems += unusable
            else:
                fitting[path] = array
        if len(fitting) == len(row.path):
            tensors[row.name] = row.write(fitting)
    _raise(where, problems)
    return tensors


def _unusable(row: Row, tensor: np.ndarray, name: str) -> list[str]:
    """Return the problem with the values of a tensor, if there is one."""
    if not np.isfinite(tensor).all():
        return [f"not finite: {name}"]
    return [f"negative: {name}"] if row.nonnegative and (tensor < 0).any() else []


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
