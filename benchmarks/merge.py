"""The merge inside training, beside a copy of the same bytes and eager code.

    python benchmarks/merge.py --json merge.json

Two replicas in float32 at the true sizes of ViT-B/32, B/16 and L/14, random weights, one device.

- `in the loop`: `training.step_fns.StepFunctions.merge_step`, one compiled program: reads
  anchor and replicas twice (angles, then weights), writes the merged model and both replicas: 9
  models' bytes.
- `model_stock, jitted` and `model_stock, eager`: the library's function: 7.
- `formula, eager`: jax.numpy as one writes it, tensor by tensor: 7 at the least.

Of the copy: these bytes over the time that an array of one model's size takes to be read and
written, scaled to them, in the same round: 100 % is the device's memory and nothing else.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import limits, models  # noqa: E402
from benchmarks.turns import conditions, keep, ratio, table, take_turns  # noqa: E402
from modelstock_jax.merging import model_stock  # noqa: E402
from modelstock_jax.training.cost_analysis import device_bytes  # noqa: E402

# Models' bytes that each way moves at the least.
MOVED = {"in the loop": 9, "model_stock, jitted": 7, "model_stock, eager": 7, "formula, eager": 7}


def formula(anchor, replicas):
    """Equation 2, an operation at a time."""

    def one(w0, w):
        first, second = w[0] - w0, w[1] - w0
        cosine = jnp.sum(first * second) / (jnp.linalg.norm(first) * jnp.linalg.norm(second))
        ratio = jnp.maximum(0, 2 * cosine / (1 + cosine))
        return ratio * (w[0] + w[1]) / 2 + (1 - ratio) * w0

    return jax.tree.map(one, anchor, replicas)


def make_ways(size: str) -> tuple[dict, int]:
    """The ways to merge one size, and a model's bytes."""
    config = models.run_config(size)
    config.num_replicas = 2
    programs = models.make_programs(config, size, models.weights(size))
    anchor, state = programs.anchor, programs.init_state(0)
    params = jax.jit(_moved, donate_argnums=0)(state.params)
    held = {"state": state._replace(params=params)}

    def in_the_loop(count: int) -> None:
        for _ in range(count):
            held["state"], merged, stats = programs.merge_step[False](anchor, held["state"])
        jax.block_until_ready((held["state"], merged, stats))

    def repeated(function):
        def run(count: int) -> None:
            for _ in range(count):
                merged = function(anchor, held["state"].params)
            jax.block_until_ready(merged)

        return run

    stock = functools.partial(model_stock, unit=config.merge.unit)
    ways = {
        "in the loop": in_the_loop,
        "model_stock, jitted": repeated(jax.jit(stock)),
        "model_stock, eager": repeated(stock),
        "formula, eager": repeated(formula),
    }
    return ways, device_bytes(anchor)


def _moved(replicas):
    """Replicas [R, ...] that differ. A merge makes them equal, which changes no instruction."""
    return jax.tree.map(
        lambda x: x + 1e-3 * jnp.cos(jax.lax.iota(jnp.float32, x.size)).reshape(x.shape), replicas
    )


def measure(size: str, rounds: int, seconds: float) -> list[dict]:
    """A row for each way of one size."""
    ways, one_model = make_ways(size)
    copy, copied = limits.copy(one_model)
    times = take_turns(ways | {"copy": copy}, rounds, seconds)
    rows = []
    for name in ways:
        moved = MOVED[name] * one_model
        rows.append({
            "size": size, "way": name, "model_bytes": one_model, "moved_bytes": moved,
            "seconds": times[name],
            "of_copy": moved / copied * ratio(times["copy"], times[name]),
            "copy_bytes_per_second": copied / statistics.median(times["copy"]),
        })  # fmt: skip
    return rows


def shown(row: dict) -> dict[str, str]:
    """A line of the table."""
    time = statistics.median(row["seconds"])
    return {
        "model": row["size"],
        "merge": row["way"],
        "ms": f"{1000 * time:.4g}",
        "GB moved": f"{row['moved_bytes'] / 1e9:.3g}",
        "GB/s": f"{row['moved_bytes'] / 1e9 / time:.3g}",
        "of the copy": f"{100 * row['of_copy']:.0f} %",
    }


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["b32", "b16", "l14"], choices=models.SIZES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="least time of a turn")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    results = conditions(jax.devices()[0].device_kind, ("jax", "jaxlib", "numpy")) | {"rows": []}
    for size in args.sizes:
        rows = measure(size, args.rounds, args.seconds)
        results["rows"] += rows
        print(table([shown(row) for row in rows]), flush=True)
        keep(args.json, results)
    copy = statistics.median(row["copy_bytes_per_second"] for row in results["rows"])
    print(f"{results['device']}: the copy moves {copy / 1e9:.3g} GB/s, read and written")


if __name__ == "__main__":
    main()
