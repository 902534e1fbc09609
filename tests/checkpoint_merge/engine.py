"""Merges of models that are given as arrays, and their float64 NumPy reference."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from modelstock_jax.checkpoint_merge.executor import MergeResult, run
from modelstock_jax.checkpoint_merge.options import Options
from modelstock_jax.checkpoint_merge.plan import Plan, make_plan
from modelstock_jax.checkpoint_merge.sources import open_source
from modelstock_jax.tensor_files.reader import TensorFiles
from modelstock_jax.tensor_files.writer import write_directory_tensors

Model = Mapping[str, np.ndarray]

# Names and shapes in PyTorch's layout: an embedding, grouped-query attention, a convolution,
# one-dimensional tensors and a scalar.
SHAPES = {
    "model.embed_tokens.weight": (40, 16),
    "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.0.self_attn.k_proj.weight": (8, 16),
    "model.layers.0.self_attn.v_proj.weight": (8, 16),
    "model.layers.0.self_attn.o_proj.weight": (16, 16),
    "model.layers.0.mlp.up_proj.weight": (24, 16),
    "model.layers.0.input_layernorm.weight": (16,),
    "model.layers.1.self_attn.q_proj.weight": (16, 16),
    "model.layers.1.self_attn.k_proj.weight": (8, 16),
    "model.layers.1.self_attn.v_proj.weight": (8, 16),
    "model.layers.1.self_attn.o_proj.weight": (16, 16),
    "patch.conv.weight": (6, 3, 2, 2),
    "model.norm.weight": (16,),
    "logit_scale": (),
}


def models(shapes=SHAPES, number=2, dtype=np.float32, size=0.1, seed=0) -> list[Model]:
    """A base and fine-tunes whose task vectors have pairwise cosines of about 0.5."""
    rng = np.random.default_rng(seed)
    base = {n: np.asarray(rng.standard_normal(s)).astype(dtype) for n, s in shapes.items()}
    common = {n: rng.standard_normal(s) for n, s in shapes.items()}
    return [
        base,
        *(
            {
                n: np.asarray(
                    w.astype(np.float64) + size * (common[n] + rng.standard_normal(w.shape))
                ).astype(dtype)
                for n, w in base.items()
            }
            for _ in range(number)
        ),
    ]


def save(
    root: Path,
    inputs: Sequence[Model],
    configs: Sequence[Mapping] | None = None,
    shard: int = 10**9,
) -> list[Path]:
    """Write `base`, `ft1`, ..., each with a config."""
    paths = []
    for i, model in enumerate(inputs):
        path = root / (f"ft{i}" if i else "base")
        path.mkdir(parents=True, exist_ok=True)
        write_directory_tensors(path, model, shard)
        config = {"model_type": "llama"} if configs is None else configs[i]
        (path / "config.json").write_text(json.dumps(config))
        paths.append(path)
    return paths


def plan(paths: Sequence[Path], **options) -> Plan:
    base = open_source(str(paths[0]))
    return make_plan(base, [open_source(str(p), base) for p in paths[1:]], Options(**options))


def merge(
    root: Path, inputs: Sequence[Model], out="out", **options
) -> tuple[TensorFiles, MergeResult]:
    """Save models, merge them, and open the result."""
    report = run(plan(save(root, inputs), **options), root / out)
    return TensorFiles(root / out), report


def numbers(tensor: np.ndarray) -> np.ndarray:
    return np.asarray(tensor).astype(np.float64)


def deltas(inputs: Sequence[Model], name: str) -> np.ndarray:
    """[N, n], float64."""
    base = numbers(inputs[0][name]).reshape(-1)
    return np.stack([numbers(model[name]).reshape(-1) - base for model in inputs[1:]])


def stock_ratio(d: np.ndarray) -> float:
    """Return the ratio of equation 3 for task vectors [N, n]."""
    number = len(d)
    lengths = np.sqrt((d**2).sum(axis=1))
    cosine = np.mean(
        [d[i] @ d[j] / lengths[i] / lengths[j] for i in range(number) for j in range(i)]
    )
    return max(0.0, number * cosine / (1 + (number - 1) * cosine))


def rounding(dtype, *values: np.ndarray) -> np.ndarray:
    """Return one unit in the last place of the maximum absolute value, in a dtype."""
    import ml_dtypes

    info = ml_dtypes.finfo(dtype)
    maximum = np.max([np.abs(v) for v in np.broadcast_arrays(*values)], axis=0)
    exponent = np.floor(np.log2(np.maximum(maximum, float(info.smallest_normal))))
    return 2.0 ** (exponent - info.nmant)


def rows(report: MergeResult) -> dict[str, dict]:
    return {row["name"]: row for row in report.rows}


def total(shapes=SHAPES) -> int:
    return sum(math.prod(shape) for shape in shapes.values())
