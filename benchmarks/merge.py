"""The merge inside training, compared with a copy of the same bytes and with eager code.

    python benchmarks/merge.py --json merge.json

Two replicas in float32 at the true sizes of ViT-B/32, B/16 and L/14, random weights, one device.

- `in the loop`: `training.step_fns.StepFunctions.merge_step`, one compiled program: reads anchor
  and replicas twice (angles, then weights), writes the merged model and both replicas: 9 models'
  bytes.
- `model_stock, jitted` and `model_stock, eager`: the library's function: 7.
- `formula, eager`: plain jax.numpy, tensor by tensor: at least 7.

"% of copy" is the merge's bandwidth relative to that of a copy in the same round. The copy reads
and writes an array of one model's size: 100 % is limited only by the device's memory.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import limits, models  # noqa: E402
from benchmarks.turns import conditions, ratio, table, take_turns, write_json  # noqa: E402
from modelstock_jax.merging import model_stock  # noqa: E402
from modelstock_jax.training.cost_analysis import device_bytes  # noqa: E402

# Minimum bytes that each variant moves, in models.
MOVED = {"in the loop": 9, "model_stock, jitted": 7, "model_stock, eager": 7, "formula, eager": 7}


def formula(anchor, replicas):
    """Merge by equation 3, one operation at a time; for two replicas it is equation 2."""

    def merge_leaf(w0, w):
        n = len(w)
        updates = [w[i] - w0 for i in range(n)]
        norms = [jnp.linalg.norm(update) for update in updates]
        cosine = functools.reduce(jnp.add, [
            jnp.sum(updates[i] * updates[j]) / (norms[i] * norms[j])
            for i, j in itertools.combinations(range(n), 2)
        ]) / math.comb(n, 2)  # fmt: skip
        ratio = jnp.maximum(0, n * cosine / (1 + (n - 1) * cosine))
        total = functools.reduce(jnp.add, [w[i] for i in range(n)])
        return ratio * total / n + (1 - ratio) * w0

    return jax.tree.map(merge_leaf, anchor, replicas)


def make_variants(size: str) -> tuple[dict, int]:
    """Return the variants of the merge of one size, and the bytes of a model."""
    config = models.run_config(size)
    config.num_replicas = 2
    programs = models.make_programs(config, size, models.weights(size))
    anchor, state = programs.anchor, programs.init_state(0)
    params = jax.jit(_perturbed, donate_argnums=0)(state.params)
    current = {"state": state._replace(params=params)}

    def in_the_loop(count: int) -> None:
        for _ in range(count):
            current["state"], merged, stats = programs.merge_step[False](anchor, current["state"])
        jax.block_until_ready((current["state"], merged, stats))

    def repeated(function):
        def run(count: int) -> None:
            for _ in range(count):
                merged = function(anchor, current["state"].params)
            jax.block_until_ready(merged)

        return run

    merge = functools.partial(model_stock, unit=config.merge.unit)
    variants = {
        "in the loop": in_the_loop,
        "model_stock, jitted": repeated(jax.jit(merge)),
        "model_stock, eager": repeated(merge),
        "formula, eager": repeated(formula),
    }
    return variants, device_bytes(anchor)


def _perturbed(replicas):
    """Return replicas [R, ...] that differ. A merge makes them equal, which changes no program."""
    return jax.tree.map(
        lambda x: x + 1e-3 * jnp.cos(jax.lax.iota(jnp.float32, x.size)).reshape(x.shape), replicas
    )


def measure(size: str, rounds: int, seconds: float, names: Iterable[str] = MOVED) -> list[dict]:
    """Return one row per named variant of one size."""
    variants, model_bytes = make_variants(size)
    variants = {name: variants[name] for name in names}
    copy, copied = limits.copy(model_bytes)
    times = take_turns(variants | {"copy": copy}, rounds, seconds)
    rows = []
    for name in variants:
        moved = MOVED[name] * model_bytes
        rows.append({
            "size": size, "way": name, "model_bytes": model_bytes, "moved_bytes": moved,
            "seconds": times[name],
            "of_copy": moved / copied * ratio(times["copy"], times[name]),
            "copy_bytes_per_second": copied / statistics.median(times["copy"]),
        })  # fmt: skip
    return rows


def table_row(row: dict) -> dict[str, str]:
    """Return a row of the table."""
    time = statistics.median(row["seconds"])
    return {
        "model": row["size"],
        "merge": row["way"],
        "ms": f"{1000 * time:.4g}",
        "GB moved": f"{row['moved_bytes'] / 1e9:.3g}",
        "GB/s": f"{row['moved_bytes'] / 1e9 / time:.3g}",
        "% of copy": f"{100 * row['of_copy']:.0f} %",
    }


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["b32", "b16", "l14"], choices=models.SIZES)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each variant (default: 5)")
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="minimum time of a turn (default: 1)"
    )
    parser.add_argument("--json", type=Path, help="output file with all values")
    args = parser.parse_args(argv)
    results = conditions(jax.devices()[0].device_kind, ("jax", "jaxlib", "numpy")) | {"rows": []}
    for size in args.sizes:
        rows = measure(size, args.rounds, args.seconds)
        results["rows"] += rows
        print(table([table_row(row) for row in rows]), flush=True)
        write_json(args.json, results)
    copy = statistics.median(row["copy_bytes_per_second"] for row in results["rows"])
    print(f"{results['device']}: the copy moves {copy / 1e9:.3g} GB/s (read and written)")


if __name__ == "__main__":
    main()
