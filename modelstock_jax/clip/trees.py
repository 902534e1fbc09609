"""Trees of parameters from the tensors of files and back: all that does not fit in one error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modelstock_jax.clip.model import Params
from modelstock_jax.clip.names import Row
from modelstock_jax.errors import UserError
from modelstock_jax.tensor_files.reader import TensorFiles

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
        rows: The table, as `names.rows` gives it.
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
        if row.theirs not in files:
            problems.append(f"missing: {row.theirs} {show(expected)}")
        elif files.shape(row.theirs) != expected:
            found = show(files.shape(row.theirs))
            problems.append(f"misshapen: {row.theirs} is {found}, not {show(expected)}")
        elif files.dtype(row.theirs).name not in FLOATS:
            problems.append(f"not floating-point: {row.theirs} is {files.dtype(row.theirs)}")
        else:
            with np.errstate(over="ignore"):  # Infinities are reported below.
                tensor = files[row.theirs].astype(np.float32, copy=False)
            if not np.isfinite(tensor).all():
                problems.append(f"not finite: {row.theirs}")
            leaves |= {path: np.asarray(x, order="C") for path, x in row.read(tensor).items()}
    known = {row.theirs for row in rows}
    problems += [
        f"unused: {name} {show(files.shape(name))}"
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
        for path in row.ours:
            name = ".".join(path)
            if path not in leaves:
                problems.append(f"missing: {name} {show(shapes[path])}")
                continue
            array = np.asarray(leaves[path], np.float32)
            if array.shape != shapes[path]:
                expected = show(shapes[path])
                problems.append(f"misshapen: {name} is {show(array.shape)}, not {expected}")
            elif not np.isfinite(array).all():
                problems.append(f"not finite: {name}")
            else:
                fitting[path] = array
        if len(fitting) == len(row.ours):
            tensors[row.theirs] = row.write(fitting)
    _raise(where, problems)
    return tensors


def show(shape: tuple[int, ...]) -> str:
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
