"""A tree of weights as one safetensors file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from modelstock_jax.models.param_mapping import flatten, unflatten
from modelstock_jax.tensor_files.reader import TensorFiles
from modelstock_jax.tensor_files.writer import write_tensors

PyTree = Any


def write_tree(path: Path, tree: PyTree) -> None:
    """Writes nested dicts of arrays, a leaf by its keys joined with dots.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "w.safetensors"
      >>> write_tree(path, {"head": {"bias": np.arange(2.0)}})
      >>> read_tree(path)
      {'head': {'bias': array([0., 1.])}}
    """
    write_tensors(path, {".".join(keys): np.asarray(leaf) for keys, leaf in flatten(tree)})


def read_tree(path: Path) -> PyTree:
    """What `write_tree` wrote; NumPy arrays."""
    files = TensorFiles(path)
    tree = unflatten({tuple(name.split(".")): files[name] for name in files})
    return jax.tree.map(np.asarray, tree)
