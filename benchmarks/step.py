"""Images per second of a training step, and its fraction of the device's peak.

    python benchmarks/step.py --json step.json
    python benchmarks/step.py --sizes b32 --batch 4 --torch .venv-parity/bin/python   # on a CPU

Measures the package's own step (`training.step_fns.StepFunctions`) of CLIP ViT-B/32, B/16 and L/14
at their true sizes with random weights on one device: two replicas in parallel (`vmap`), two in
sequence (`map`), and one replica; attention `xla` and, on a GPU, `cudnn`. If an interpreter has
torch, PyTorch's step is measured first in a separate process (torch_step.py). The batch is already
on the device; input.py measures reading. The images of all replicas are counted.

"/ PyTorch" is images/s relative to PyTorch's. "% of peak" is the rate of the model's products
(`models.image_flops`) relative to that of a large product in the same round. Memory is weights,
optimizer state, batch and the temporaries that XLA plans; for PyTorch it is the allocator's peak.
Needs jax, flax, optax and ml_collections. Without a GPU, pass a small --batch.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

# JAX allocates memory as needed, so that it is free for PyTorch's process, which runs first.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax  # noqa: E402
import numpy as np  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import limits, models  # noqa: E402
from benchmarks.turns import conditions, ratio, table, take_turns, write_json  # noqa: E402
from modelstock_jax.training.cost_analysis import device_bytes, temporary_bytes  # noqa: E402
from modelstock_jax.training.sharding import put_batch  # noqa: E402

REPLICAS = {"vmap": 2, "map": 2, "one": 1}
TORCH = "PyTorch, one replica"


class Variant(NamedTuple):
    """How a step is compiled."""

    replicas: str
    attention: str
    remat: str

    def __str__(self) -> str:
        replicas = "one replica" if self.replicas == "one" else f"two by {self.replicas}"
        return f"{replicas}, {self.attention}" + (", remat" if self.remat == "on" else "")


class Steps:
    """The compiled steps of one size; variants with the same replicas share one training state."""

    def __init__(self, size: str, batch_size: int, dtype: str) -> None:
        self.size, self.batch_size, self.dtype = size, batch_size, dtype
        self.params = models.weights(size)
        self.states, self.batches = {}, {}

    def make(self, variant: Variant):
        """Return a function for `take_turns`, and the memory and compile time of its program."""
        replicas = REPLICAS[variant.replicas]
        config = models.run_config(self.size, self.dtype)
        config.num_replicas, config.batch_size = replicas, self.batch_size
        config.compute.replica_mode = "map" if variant.replicas == "map" else "vmap"
        config.compute.attention_impl = variant.attention
        config.compute.remat = variant.remat == "on"
        programs = models.make_programs(config, self.size, self.params)
        constants = programs.step_constants()  # Fine-tuning reads only its state.
        shapes = programs.abstract_batch(models.SIZES[self.size][4])
        start = time.perf_counter()
        step = programs.train_step.lower(programs.abstract_state, shapes, constants).compile()
        compile_seconds = time.perf_counter() - start
        if replicas not in self.batches:
            self.batches[replicas] = put_batch(programs.mesh, self._batch(replicas))

        def run(count: int) -> None:
            # A step donates the state: there is none at first, nor after a step that failed.
            state = self.states.pop(replicas, None) or programs.init_state(0)
            for _ in range(count):
                state, metrics = step(state, self.batches[replicas], constants)
            jax.block_until_ready((state, metrics))
            self.states[replicas] = state
            assert np.isfinite(metrics["loss"]).all()

        stored = device_bytes(programs.abstract_state) + device_bytes(shapes)
        return run, {
            "compile_seconds": compile_seconds,
            "memory_bytes": stored + temporary_bytes(step),
        }

    def _batch(self, replicas: int) -> dict[str, np.ndarray]:
        rng, lead = np.random.default_rng(0), (replicas, self.batch_size)
        *_, side, _, classes = models.SIZES[self.size]
        return {
            "image": rng.integers(0, 256, (*lead, side, side, 3), np.uint8),
            "label": rng.integers(0, classes, lead).astype(np.int32),
        }


def measure(size: str, batch_size: int, variants: list[Variant], args) -> list[dict]:
    """Return one row per variant of one size, measured in turns with the large product."""
    steps, runs, rows = Steps(size, batch_size, args.dtype), {}, []
    for variant in variants:
        row = {"size": size, "way": str(variant), "batch": batch_size} | variant._asdict()
        try:
            run, details = steps.make(variant)
            run(1)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            rows.append(row | {"failed": "out of memory"})
            continue
        runs[str(variant)] = run
        rows.append(row | details)
    runs["product"], flops = limits.product(args.dtype, args.side)
    seconds = take_turns(runs, args.rounds, args.seconds)
    for row in rows:
        if "failed" not in row:
            _rate(row, seconds[row["way"]], seconds["product"], flops, REPLICAS[row["replicas"]])
            if args.profile:
                with jax.profiler.trace(str(args.profile / f"{size}, {row['way']}")):
                    runs[row["way"]](3)
    return rows


def measure_torch(size: str, batch_size: int, args, eager: bool = False) -> dict:
    """Return PyTorch's row, measured in a process that has the device for itself.

    Args:
      size: key of `models.SIZES`
      batch_size: images per step
      args: options of the command line
      eager: run without torch.compile
    """
    clip = models.clip_config(size)
    sizes = {"vision": clip.to_dict()["vision_config"], "features": clip.projection_dim}
    del sizes["vision"]["projection_dim"]
    command = [args.torch, str(Path(__file__).with_name("torch_step.py")), "--sizes",
               json.dumps(sizes | {"classes": models.SIZES[size][-1]}),
               "--batch", str(batch_size), "--dtype", args.dtype, "--side", str(args.side),
               "--rounds", str(args.rounds), "--seconds", str(args.seconds),
               *(["--eager"] if eager else [])]  # fmt: skip
    way = TORCH + ", eager" * eager
    row = {"size": size, "way": way, "batch": batch_size}
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no error message"]
        # PyTorch may print advice after the error.
        errors = [line for line in lines if "Error" in line]
        return row | {"failed": (errors or lines)[-1]}
    result = json.loads(done.stdout.strip().splitlines()[-1])
    seconds, flops = result.pop("seconds"), result.pop("product_flops")
    _rate(row, seconds["step"], seconds["product"], flops, 1)
    return row | result


def _rate(row: dict, step: list[float], product: list[float], flops: float, replicas: int) -> None:
    images = replicas * row["batch"]
    work = images * models.image_flops(row["size"])
    row["seconds"], row["product_flops_per_second"] = step, flops / statistics.median(product)
    row["images_per_second"] = images / statistics.median(step)
    row["of_peak"] = work / flops * ratio(product, step)


def table_row(row: dict) -> dict[str, str]:
    """Return a row of the table."""
    line = {"model": row["size"], "step": row["way"], "batch": str(row["batch"])}
    headings = ("ms per step", "images/s", "/ PyTorch", "% of peak", "memory, GB",
                "compile time, s")  # fmt: skip
    if "failed" in row:
        return line | {headings[0]: row["failed"]} | dict.fromkeys(headings[1:], "")
    memory, compiled = row.get("memory_bytes"), row.get("compile_seconds")
    return line | {
        "ms per step": f"{1000 * statistics.median(row['seconds']):.4g}",
        "images/s": f"{row['images_per_second']:.4g}",
        "/ PyTorch": f"{row['of_torch']:.2f}" if "of_torch" in row else "",
        "% of peak": f"{100 * row['of_peak']:.1f} %",
        "memory, GB": f"{memory / 1e9:.2f}" if memory else "",
        "compile time, s": f"{compiled:.0f}" if compiled else "",
    }


def peers(rows: list[dict]) -> list[str]:
    """Return lines with the ratios of the pair to one replica and to PyTorch."""
    done = {row["way"]: row for row in rows if "failed" not in row}
    lines = []
    for name, row in done.items():
        single = done.get(name.replace("two by vmap", "one replica"))
        if name.startswith("two by vmap") and single:
            times = ratio(row["seconds"], single["seconds"])
            lines.append(f"{row['size']}, {name}: {times:.2f} x the time of one replica")
    torch = done.get(TORCH)
    if torch and len(done) > 1:
        best = max((r for r in done.values() if r is not torch), key=lambda r: r["of_torch"])
        # Each process is compared with the large product that it measured in the same rounds.
        of_peak = best["of_peak"] / torch["of_peak"]
        lines.append(
            f"{best['size']}, {best['way']}: {best['of_torch']:.2f} x PyTorch's images/s, "
            f"{of_peak:.2f} x its % of peak"
        )
    return lines


def compare_with_torch(rows: list[dict]) -> None:
    """Add the images per second relative to PyTorch's to the rows, if it was measured."""
    for torch in rows:
        if torch["way"] == TORCH and "failed" not in torch:
            for row in rows:
                if "failed" not in row:
                    row["of_torch"] = row["images_per_second"] / torch["images_per_second"]


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["b32", "b16", "l14"], choices=models.SIZES)
    parser.add_argument("--batch", type=int, help="batch size per replica (default: the config's)")
    parser.add_argument("--replicas", nargs="+", default=list(REPLICAS), choices=REPLICAS)
    parser.add_argument("--attention", nargs="+", choices=("xla", "cudnn"))
    parser.add_argument("--remat", nargs="+", default=["off"], choices=("off", "on"))
    parser.add_argument("--dtype", help="compute dtype (default: float32 on a CPU, else bfloat16)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each variant (default: 5)")
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="minimum time of a turn (default: 1)"
    )
    parser.add_argument(
        "--side", type=int, default=0, help="size of the product's matrices; 0: automatic"
    )
    parser.add_argument(
        "--torch",
        default=sys.executable,
        help="interpreter with torch; '' for none (default: this)",
    )
    parser.add_argument("--profile", type=Path, help="output directory for traces (jax.profiler)")
    parser.add_argument("--json", type=Path, help="output file with all values")
    args = parser.parse_args(argv)
    on_cpu = jax.default_backend() == "cpu"
    args.dtype = args.dtype or ("float32" if on_cpu else "bfloat16")
    attention = args.attention or (["xla"] if on_cpu else ["xla", "cudnn"])
    if on_cpu and "cudnn" in attention:
        parser.error("--attention cudnn needs a GPU")
    if args.torch == sys.executable and importlib.util.find_spec("torch") is None:
        args.torch = ""
    variants = list(
        itertools.starmap(Variant, itertools.product(args.replicas, attention, args.remat))
    )
    batches = {s: args.batch or models.run_config(s).batch_size for s in args.sizes}
    torch_rows = {s: [measure_torch(s, batches[s], args)] for s in args.sizes if args.torch}
    results = conditions(jax.devices()[0].device_kind, ("jax", "jaxlib", "flax", "optax", "numpy"))
    results |= {"dtype": args.dtype, "rows": []}
    for size in args.sizes:
        rows = torch_rows.get(size, []) + measure(size, batches[size], variants, args)
        compare_with_torch(rows)
        results["rows"] += rows
        print(table([table_row(row) for row in rows]), *peers(rows), sep="\n", flush=True)
        write_json(args.json, results)
    measured = [row for row in results["rows"] if "seconds" in row]
    peak = statistics.median([row["product_flops_per_second"] for row in measured] or [0])
    print(f"{results['device']}, {args.dtype}: the large product runs at {peak / 1e12:.3g} TFLOP/s")


if __name__ == "__main__":
    main()
