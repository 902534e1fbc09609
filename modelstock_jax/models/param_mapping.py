"""The one table of tensor names and layouts between our parameters and a checkpoint's.

Each row serves both directions, so that what is read is what is written.
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

    path: tuple[KeyPath, ...]
    name: str
    transform: Transform

    def shape(self, shapes: Mapping[KeyPath, Shape]) -> Shape:
        """Shape of theirs, from the shapes of ours."""
        parts = [self.transform.shape(shapes[path]) for path in self.path]
        if len(parts) == 1:
            return parts[0]
        return (sum(part[0] for part in parts), *parts[0][1:])

    def read(self, tensor: np.ndarray) -> dict[KeyPath, np.ndarray]:
        """Ours, by path, from theirs."""
        parts = [tensor] if len(self.path) == 1 else np.split(tensor, len(self.path))
        return {p: self.transform.read(x) for p, x in zip(self.path, parts, strict=True)}

    def write(self, leaves: Mapping[KeyPath, np.ndarray]) -> np.ndarray:
        """Theirs, from ours by path."""
        parts = [self.transform.write(leaves[path]) for path in self.path]
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
    here: KeyPath,
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


def _transform(config: CLIPConfig, column: str, path: KeyPath) -> Transform:
    if path[-1] != "kernel":
        return SAME
    if path[-2] == "patch_embedding":
        return patches(config.vision.patch_size, config.vision.num_channels)
    # OpenAI multiplies by its projections as they are, [in, out].
    return SAME if path[-2] == "projection" and column == "openai" else TRANSPOSED


# Trees of parameters from the tensors of files and back: all that does not fit in one error.


Shapes = Mapping[tuple[str, ...], tuple[int, ...]]
MOST = 30  # Problems of one kind that an error names.
FLOATS = ("float16", "bfloat16", "float32", "float64")


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


def read_tree(
    files: TensorFiles,
    rows: Sequence[Row],
    shapes: Shapes,
    where: Path,
    tolerates: Callable[[str], bool] = lambda name: False,
) -> Params:
    """Our tree from their tensors, as float32.

    Args:
        files: Theirs.
        rows: The table, as `rows` gives it.
        shapes: Shapes of ours, by path.
        where: What an error names.
        tolerates: Says of a tensor outside the table whether it may be there.

    Returns:
        Nested dictionaries of float32 NumPy arrays.

    Raises:
        UserError: Tensors that are missing, unused, misshapen, of a wrong dtype or not finite,
            all of them in one list.
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
    """Their tensors, by name and as float32, from our tree; the other way of `read_tree`."""
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
    """A shape as people write it."""
    return f"[{', '.join(map(str, shape))}]"


def _raise(where: Path, problems: list[str]) -> None:
    """All problems in one error; of each kind the first, for another model's are hundreds."""
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        kinds.setdefault(problem.partition(":")[0], []).append(problem)
    shown = []
    for kind, found in kinds.items():
        more = len(found) - MOST
        shown += [*found[:MOST], *([f"{kind}: {more} more"] if more > 0 else [])]
    if shown:
        raise UserError(f"{where}: tensors that do not fit: {'; '.join(shown)}.")
