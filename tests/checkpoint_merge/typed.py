"""Write small checkpoints file by file, and run the command line on them in this process."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from modelstock_jax.checkpoint_merge import commands
from modelstock_jax.checkpoint_merge.cli import main
from modelstock_jax.tensor_files.reader import TensorFiles
from modelstock_jax.tensor_files.writer import write_tensors


class CommandResult(NamedTuple):
    """Exit status, standard output, and the notes, errors and full text of standard error."""

    status: int
    out: str
    notes: list[str]
    errors: list[str]
    err: str


@pytest.fixture
def say(capsys, monkeypatch):
    """Run a command in this process, without the figure, which is the slowest part."""
    monkeypatch.setattr(
        commands.PlotProcess, "finish", lambda plot: plot._path.write_bytes(b"\x89PNG")
    )

    def run(*arguments: object) -> CommandResult:
        capsys.readouterr()
        try:
            status = main([str(a) for a in arguments])
        except SystemExit as error:
            status = error.code
        out, err = capsys.readouterr()
        lines = err.splitlines()
        notes, errors = (
            [line for line in lines if line.startswith(start)] for start in ("note: ", "error: ")
        )
        assert len(errors) == (status != 0), err
        return CommandResult(status, out, notes, errors, err)

    return run


def write(directory: Path, files: Mapping[str, Any]) -> Path:
    """Write tensors to `.safetensors`, JSON to `.json`, and text to other files."""
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            write_tensors(path, {k: np.asarray(x) for k, x in content.items()})
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return directory


def weights(
    shapes: Mapping[str, Sequence[int]], seed: int = 0, start: Mapping | None = None
) -> dict[str, np.ndarray]:
    """Random float32 tensors; with `start`, a fine-tune whose update all seeds share in part."""
    own, common = np.random.default_rng(seed), np.random.default_rng(99)
    if start is None:
        return {n: own.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    return {
        n: (start[n] + 0.05 * (common.standard_normal(s) + own.standard_normal(s))).astype(
            np.float32
        )
        for n, s in shapes.items()
    }


SHAPES = {
    "model.embed_tokens.weight": (12, 8),
    "model.layers.0.mlp.up_proj.weight": (16, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.norm.weight": (8,),
}


def trio(
    root: Path,
    *extra: Mapping[str, Any],
    shapes: Mapping[str, Sequence[int]] = SHAPES,
    file: str = "model.safetensors",
) -> list[Path]:
    """A base and two fine-tunes, in `base`, `ft1` and `ft2`, each with `extra` files."""
    base = weights(shapes)
    models = [base, weights(shapes, 1, base), weights(shapes, 2, base)]
    extra = extra or ({},)
    return [
        write(root / name, {file: tensors, **extra[min(i, len(extra) - 1)]})
        for i, (name, tensors) in enumerate(zip(("base", "ft1", "ft2"), models, strict=True))
    ]


def tensors(path: Path) -> dict[str, np.ndarray]:
    """Read all tensors at a path."""
    files = TensorFiles(path)
    return {name: files[name] for name in files}


def load(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text())


def stock(base: np.ndarray, *tuned: np.ndarray) -> np.ndarray:
    """Merge by equation 3, in float64."""
    w0 = base.astype(np.float64)
    d = np.array([(w.astype(np.float64) - w0).ravel() for w in tuned])
    unit = d / np.linalg.norm(d, axis=1, keepdims=True)
    n = len(d)
    cosine = (unit @ unit.T)[np.triu_indices(n, 1)].mean()
    ratio = n * cosine / (1 + (n - 1) * cosine) if cosine > 0 else 0.0
    return w0 + ratio * d.mean(axis=0).reshape(w0.shape)
