"""The table of docs/gpu.md: settings, memory and hours of the paper's runs, by size of the GPU.

    python benchmarks/gpu_table.py

Nothing is measured. Memory is the estimate of `--dry-run` (docs/memory.md). Hours are

    2 replicas * 10 epochs * 1,281,167 images * operations per image / (FRACTION * peak)

with the operations of `models.image_flops` (4/3 of them if activations are recomputed) and the
peak of the GPU's data sheet. FRACTION is an assumption, which `make gpu` replaces.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import limits, models  # noqa: E402
from modelstock_jax.data.benchmark import summarize  # noqa: E402
from modelstock_jax.experiment.abstract_run import (  # noqa: E402
    Change,
    MemoryPlan,
    abstract_step_functions,
)

# Assumed fraction of the peak that a step reaches.
FRACTION = 0.3
# Fraction of the memory that JAX may allocate: XLA_PYTHON_CLIENT_MEM_FRACTION.
ALLOCATED = 0.9


class Gpu(NamedTuple):
    """A GPU of the table.

    Attributes:
      name: name, a key of `limits.DATA_SHEETS` if that has it
      memory: GB
      flops: peak of dense products in bfloat16, by the data sheet
    """

    name: str
    memory: int
    flops: float


GPUS = (
    Gpu("RTX A4000", 16, 76.7e12),
    Gpu("A10G", 24, limits.DATA_SHEETS["A10G"].flops),
    Gpu("RTX 4090", 24, 165.2e12),
    Gpu("A100 40GB", 40, limits.DATA_SHEETS["A100 40GB"].flops),
    Gpu("A100 80GB", 80, limits.DATA_SHEETS["A100"].flops),
)
MODELS = {
    "ViT-B/32": ("b32", ""),
    "ViT-B/16": ("b16", ""),
    "ViT-L/14": ("l14", ""),
    "ViT-L/14@336": ("l14-336", "openai/clip-vit-large-patch14-336"),
}
HEADER = (
    "| model | GPU | memory | batch per replica | micro-batches | remat | replica mode "
    "| peak of a step | hours | basis |\n|---|---|---:|---:|---:|---|---|---:|---:|---|"
)


def hours(size: str, config, gpu: Gpu, remat: bool) -> float:
    """Return the computed hours of a run of `config` on one GPU."""
    images = config.num_replicas * config.epochs * summarize(config.data).num_train
    flops = images * models.image_flops(size) * (4 / 3 if remat else 1)
    return flops / (FRACTION * gpu.flops) / 3600


def row(model: str, size: str, config, gpu: Gpu, change: Change | None, mode: str) -> str:
    """Return one row of the table."""
    cells = [model, gpu.name, f"{gpu.memory} GB", str(config.batch_size)]
    if change is None:
        cells += ["does not fit on one GPU", "", "", "", ""]
    else:
        time = hours(size, config, gpu, change.remat)
        cells += [
            str(change.accumulation),
            "yes" if change.remat else "no",
            mode,
            f"{change.memory.step / 1e9:.1f} GB",
            f"{time:.0f}" if time >= 10 else f"{time:.1f}",
        ]
    return f"| {' | '.join([*cells, 'computed'])} |"


def rows(model: str) -> list[str]:
    """Return the rows of one of `MODELS`."""
    size, pretrained = MODELS[model]
    config = models.run_config(size)
    config.pretrained = pretrained or config.pretrained
    programs, found = abstract_step_functions(config)
    plan = MemoryPlan(config, programs, found.image_size, (1, 1))
    lines = []
    for gpu in GPUS:
        changes = plan.changes_that_fit(ALLOCATED * gpu.memory * 1e9)
        change = next((c for c in changes if "mesh" not in c.options), None)
        lines.append(row(model, size, config, gpu, change, plan.placement.replica_mode))
    return lines


if __name__ == "__main__":
    print("\n".join([HEADER, *(line for model in MODELS for line in rows(model))]))
