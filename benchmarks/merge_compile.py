"""Compile time of `model_stock`, compared with a plain formula, and its first call.

    python benchmarks/merge_compile.py --json merge_compile.json    # all: about 15 minutes
    python benchmarks/merge_compile.py --parts compile --leaves 100 --rounds 3

`formula` is equation 3 in plain jax.numpy (`benchmarks.merge.formula`), jitted. It returns only the
merged tree. `model_stock` returns the merged tree and `Stats`; `without stats` only the tree.

- `compile`: CPU seconds to trace, lower and compile each of them under `jit`, in total and per
  leaf. `transformer`: the leaves repeat the shapes of a block. `distinct`: no two shapes are equal.
- `run`: time of a call and temporaries, as XLA plans them, for a transformer of --width.
- `eager`: the first and the later calls of `model_stock` outside of `jit` for a new tree, compared
  with those of the jitted formula.

Except in `run`, every measurement is a new process, so that none finds the traces and programs of
an earlier one. The ways take turns. The compilation cache is off. Imports and the start of the
backend are not measured. CPU seconds are those of all threads. Values are medians, and ratios are
medians of the ratios within each round; in `run`, the time is the minimum.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import turns  # noqa: E402
from benchmarks.merge import formula  # noqa: E402
from modelstock_jax.merging import model_stock  # noqa: E402

PARTS = ("compile", "run", "eager")
KINDS = ("transformer", "distinct")
EAGER_TREES = ((1, "transformer"), (300, "transformer"), (100, "distinct"))
LATER_CALLS = 5
NUM_BLOCKS = 12  # of the model of `run`


def without_stats(anchor, replicas):
    """Merge, and return only the merged tree, so that XLA removes what only the stats need."""
    return model_stock(anchor, replicas)[0]


WAYS = {"formula": formula, "model_stock": model_stock, "without stats": without_stats}
EAGER_WAYS = {"formula, jitted": jax.jit(formula), "model_stock, eager": model_stock}


def block_shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Return the 16 shapes of a transformer's block."""
    shapes: dict[str, tuple[int, ...]] = {}
    sizes = dict.fromkeys(("query", "key", "value", "out"), (width, width))
    sizes |= {"up": (width, 4 * width), "down": (4 * width, width)}
    for name, (inputs, outputs) in sizes.items():
        shapes |= {f"{name}_kernel": (inputs, outputs), f"{name}_bias": (outputs,)}
    for name in ("norm_1", "norm_2"):
        shapes |= {f"{name}_scale": (width,), f"{name}_bias": (width,)}
    return shapes


def abstract_trees(leaves: int, kind: str, replicas: int, width: int = 64) -> tuple[Any, Any]:
    """Return the shapes of an anchor and its replicas, both float32.

    Args:
      leaves: number of tensors
      kind: one of `KINDS`
      replicas: number of replicas N
      width: width of the transformer
    """
    anchor: dict[str, dict] = {}
    block = list(block_shapes(width).items())
    for i in range(leaves):
        name, shape = block[i % len(block)]
        if kind == "distinct":
            shape = (width + i, width) if i % 2 else (width + i,)
        tensors = anchor.setdefault(f"block_{i // len(block)}", {})
        tensors[name] = jax.ShapeDtypeStruct(shape, jnp.float32)
    stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((replicas, *x.shape), x.dtype), anchor)
    return anchor, stacked


def random_values(trees: Any) -> Any:
    """Return random arrays on the device; NumPy draws them, so that JAX compiles nothing."""
    rng = np.random.default_rng(0)
    arrays = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), trees)
    return jax.block_until_ready(jax.device_put(arrays))


def in_new_process(function: Callable, *arguments: Any) -> Any:
    """Return the result of a function, called in a new process with a started backend."""
    return turns.in_new_process(function, *arguments, initializer=start)


def start() -> None:
    """Start the backend of a new process, without a compilation cache."""
    jax.config.update("jax_enable_compilation_cache", False)
    jax.block_until_ready(jax.jit(jnp.negative)(1.0))


def device_kind() -> str:
    """Return the name of the device."""
    return jax.devices()[0].device_kind


def compile_way(way: str, leaves: int, kind: str, replicas: int) -> dict[str, Any]:
    """Compile one of `WAYS`; return the seconds of each stage, and the bytes of temporaries."""
    trees = abstract_trees(leaves, kind, replicas)
    compiled, stages = turns.compile_stages(jax.jit(WAYS[way]), *trees)
    return {"stages": stages, "temporaries": _temporaries(compiled)}


def _temporaries(program) -> int:
    return program.memory_analysis().temp_size_in_bytes


def run_ways(width: int, replicas: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Run the compiled ways in turns.

    Returns:
      the number of parameters; per way the seconds per call of each round, and the bytes of
      temporaries
    """
    leaves = NUM_BLOCKS * len(block_shapes(width))
    trees = abstract_trees(leaves, "transformer", replicas, width)
    programs = {name: jax.jit(way).lower(*trees).compile() for name, way in WAYS.items()}
    arrays = random_values(trees)

    def calls(program, count: int) -> None:
        for _ in range(count):
            merged = program(*arrays)
        jax.block_until_ready(merged)

    variants = {name: functools.partial(calls, program) for name, program in programs.items()}
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(trees[0])),
        "seconds": turns.take_turns(variants, rounds, seconds),
        "temporaries": {name: _temporaries(program) for name, program in programs.items()},
    }


def call_way(way: str, leaves: int, kind: str, replicas: int) -> dict[str, Any]:
    """Return the seconds of the first and of the later calls of one of `EAGER_WAYS`."""
    arrays = random_values(abstract_trees(leaves, kind, replicas))
    seconds = [
        turns.timed(lambda: jax.block_until_ready(EAGER_WAYS[way](*arrays)))[1]
        for _ in range(1 + LATER_CALLS)
    ]
    later = {clock: statistics.median(s[clock] for s in seconds[1:]) for clock in seconds[0]}
    return {"first": seconds[0], "later": later}


def measure(function: Callable, ways: Any, rounds: int, *arguments: Any) -> dict[str, list]:
    """Return {way: results of all rounds}; every result is that of a new process."""
    results: dict[str, list] = {way: [] for way in ways}
    for number in range(rounds):
        for way in turns.order(ways, number):
            results[way].append(in_new_process(function, way, *arguments))
            print(progress(way, *arguments, results[way][-1]), file=sys.stderr)
    return results


def progress(way: str, leaves: int, kind: str, replicas: int, result: dict[str, Any]) -> str:
    """Return a line with the CPU seconds of one process."""
    seconds = {name: s["cpu"] for name, s in result.get("stages", result).items()}
    cells = ", ".join(f"{name} {cpu:.3f}" for name, cpu in seconds.items())
    return f"{way}, {leaves} leaves, {kind}, N = {replicas}, CPU s: {cells}"


def measure_compile(leaves: int, kind: str, replicas: int, rounds: int) -> dict[str, Any]:
    """Return the results of `compile_way` for one tree."""
    results = measure(compile_way, WAYS, rounds, leaves, kind, replicas)
    return {"leaves": leaves, "shapes": kind, "replicas": replicas, "ways": results}


def measure_eager(leaves: int, kind: str, rounds: int) -> dict[str, Any]:
    """Return the results of `call_way` for one tree."""
    results = measure(call_way, EAGER_WAYS, rounds, leaves, kind, 2)
    return {"leaves": leaves, "shapes": kind, "replicas": 2, "ways": results}


def cpu_seconds(row: dict[str, Any], way: str) -> list[float]:
    """Return the CPU seconds of all stages, one value per round."""
    return [sum(x["stages"][stage]["cpu"] for stage in turns.STAGES) for x in row["ways"][way]]


def compile_cells(row: dict[str, Any]) -> dict[str, str]:
    """Return a row of the table of `compile`."""
    cells = {"leaves": f"{row['leaves']}", "shapes": row["shapes"], "N": f"{row['replicas']}"}
    base = cpu_seconds(row, "formula")
    for way in WAYS:
        seconds = cpu_seconds(row, way)
        cells[f"{way}, CPU s"] = f"{statistics.median(seconds):.2f}"
        if way != "formula":
            cells[f"{way} / formula"] = f"{turns.ratio(seconds, base):.2f}"
    return cells


def per_leaf_cells(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Return the rows of the table of CPU time per leaf: constant if the time is linear."""
    table: dict[tuple, dict[str, str]] = {}
    for row in rows:
        for way in WAYS:
            labels = {"shapes": row["shapes"], "N": f"{row['replicas']}", "CPU ms per leaf": way}
            cells = table.setdefault(tuple(labels.values()), labels)
            seconds = statistics.median(cpu_seconds(row, way))
            cells[f"{row['leaves']} leaves"] = f"{1000 * seconds / row['leaves']:.1f}"
    return list(table.values())


def run_cells(result: dict[str, Any]) -> list[dict[str, str]]:
    """Return the rows of the table of `run`."""
    seconds = result["seconds"]
    return [
        {
            f"run, {result['parameters'] / 1e6:.3g} M parameters": way,
            "ms": f"{1000 * min(seconds[way]):.4g}",
            "time / formula": f"{turns.ratio(seconds[way], seconds['formula']):.2f}",
            "temporaries, MB": f"{result['temporaries'][way] / 1e6:.4g}",
        }
        for way in WAYS
    ]


def eager_cells(row: dict[str, Any]) -> list[dict[str, str]]:
    """Return the rows of the table of `eager`, for one tree."""
    rows = []
    for way, results in row["ways"].items():
        cells = {"leaves": f"{row['leaves']}", "shapes": row["shapes"], "call": way}
        for call, unit, factor in (("first", "s", 1), ("later", "ms", 1000)):
            for clock, label in (("cpu", "CPU"), ("wall", "wall")):
                seconds = statistics.median(x[call][clock] for x in results)
                cells[f"{call}, {label} {unit}"] = f"{factor * seconds:.2f}"
        rows.append(cells)
    return rows


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--parts", nargs="+", default=PARTS, choices=PARTS, help="default: all")
    add("--leaves", nargs="+", type=int, default=[100, 300, 1000],
        help="tensors of the trees of `compile` (default: 100 300 1000)")  # fmt: skip
    add("--replicas", nargs="+", type=int, default=[2, 4],
        help="replicas of the trees of `compile` (default: 2 4)")  # fmt: skip
    add("--rounds", type=int, default=1,
        help="processes per measurement of `compile` and `eager` (default: 1)")  # fmt: skip
    add("--width", type=int, default=832,
        help="width of the model of `run` (default: 832, 100 M parameters)")  # fmt: skip
    add("--seconds", type=float, default=1.0,
        help="minimum time of each of the 5 turns of `run` (default: 1)")  # fmt: skip
    add("--json", type=Path, help="output file with all values")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    args = parse_arguments(argv)
    # The device is asked for in another process, because on a GPU this one would reserve memory.
    results = turns.conditions(in_new_process(device_kind), ("jax", "jaxlib", "numpy"))
    if "compile" in args.parts:
        rows = results["compile"] = []
        for leaves in args.leaves:
            for kind in KINDS:
                for replicas in args.replicas:
                    rows.append(measure_compile(leaves, kind, replicas, args.rounds))
                    turns.write_json(args.json, results)
        print(turns.table([compile_cells(row) for row in rows]), end="\n\n")
        print(turns.table(per_leaf_cells(rows)), end="\n\n", flush=True)
    if "run" in args.parts:
        results["run"] = in_new_process(run_ways, args.width, 2, 5, args.seconds)
        turns.write_json(args.json, results)
        print(turns.table(run_cells(results["run"])), end="\n\n", flush=True)
    if "eager" in args.parts:
        rows = results["eager"] = []
        for leaves, kind in EAGER_TREES:
            rows.append(measure_eager(leaves, kind, args.rounds))
            turns.write_json(args.json, results)
        print(turns.table([cells for row in rows for cells in eager_cells(row)]))


if __name__ == "__main__":
    main()
