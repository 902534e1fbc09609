"""Images a second of a training step, and how much of the device that is.

    python benchmarks/step.py --json step.json
    python benchmarks/step.py --sizes b32 --batch 4 --torch .venv-parity/bin/python   # on a CPU

The package's own step (`training.step_fns.StepFunctions`) of CLIP ViT-B/32, B/16 and L/14 at their true
sizes, random weights, on one device: two replicas side by side (`vmap`), one after the other
(`map`), and one replica; attention `xla` and, on a GPU, `cudnn`; beside them PyTorch's step
(torch_step.py, a process of its own before the others) where an interpreter has torch. The batch
lies on the device: reading images is what input.py measures. Replicas' images are counted together.

Of peak: the model's products (`models.image_flops`) over the time that a large product takes in the
same round. Memory: weights, moments, batch and what XLA plans beside them; torch's is its
allocator's peak. Needs jax, flax, optax and ml_collections; without a GPU, say a small --batch.
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

# JAX takes memory as it needs it: PyTorch's process, which comes first, finds it free.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax  # noqa: E402
import numpy as np  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import limits, models  # noqa: E402
from benchmarks.turns import conditions, keep, ratio, table, take_turns  # noqa: E402
from modelstock_jax.training.cost_analysis import device_bytes, extra_bytes  # noqa: E402
from modelstock_jax.training.sharding import put_batch  # noqa: E402

REPLICAS = {"vmap": 2, "map": 2, "one": 1}


class Way(NamedTuple):
    """How a step is compiled."""

    replicas: str
    attention: str
    remat: str

    def __str__(self) -> str:
        how = "one replica" if self.replicas == "one" else f"two by {self.replicas}"
        return f"{how}, {self.attention}" + (", remat" if self.remat == "on" else "")


class Steps:
    """The compiled steps of one size; ways with equally many replicas share one training state."""

    def __init__(self, size: str, batch_size: int, dtype: str) -> None:
        self.size, self.batch_size, self.dtype = size, batch_size, dtype
        self.params = models.weights(size)
        self.states, self.batches = {}, {}

    def make(self, way: Way):
        """A way for `take_turns`, and what is known of its program."""
        replicas = REPLICAS[way.replicas]
        config = models.run_config(self.size, self.dtype)
        config.num_replicas, config.batch_size = replicas, self.batch_size
        config.compute.replica_mode = "map" if way.replicas == "map" else "vmap"
        config.compute.attention_impl, config.compute.remat = way.attention, way.remat == "on"
        programs = models.make_programs(config, self.size, self.params)
        reference = programs.step_constants()  # Fine-tuning reads nothing beside its state.
        shapes = programs.abstract_batch(models.SIZES[self.size][4])
        began = time.perf_counter()
        step = programs.train_step.lower(programs.abstract_state, shapes, reference).compile()
        compiled = time.perf_counter() - began
        if replicas not in self.batches:
            self.batches[replicas] = put_batch(programs.mesh, self._batch(replicas))

        def run(count: int) -> None:
            # A step takes the state's memory: there is none at first, nor after a step that failed.
            state = self.states.pop(replicas, None) or programs.init_state(0)
            for _ in range(count):
                state, metrics = step(state, self.batches[replicas], reference)
            jax.block_until_ready((state, metrics))
            self.states[replicas] = state
            assert np.isfinite(metrics["loss"]).all()

        held = device_bytes(programs.abstract_state) + device_bytes(shapes)
        return run, {"compile_seconds": compiled, "memory_bytes": held + extra_bytes(step)}

    def _batch(self, replicas: int) -> dict[str, np.ndarray]:
        rng, lead = np.random.default_rng(0), (replicas, self.batch_size)
        *_, side, _, classes = models.SIZES[self.size]
        return {
            "image": rng.integers(0, 256, (*lead, side, side, 3), np.uint8),
            "label": rng.integers(0, classes, lead).astype(np.int32),
        }


def measure(size: str, batch_size: int, ways: list[Way], args) -> list[dict]:
    """A row for each way of one size, their steps and the large product taking turns."""
    steps, runs, rows = Steps(size, batch_size, args.dtype), {}, []
    for way in ways:
        row = {"size": size, "way": str(way), "batch": batch_size} | way._asdict()
        try:
            run, known = steps.make(way)
            run(1)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            rows.append(row | {"failed": "out of memory"})
            continue
        runs[str(way)] = run
        rows.append(row | known)
    runs["product"], flops = limits.product(args.dtype, args.side)
    seconds = take_turns(runs, args.rounds, args.seconds)
    for row in rows:
        if "failed" not in row:
            _rate(row, seconds[row["way"]], seconds["product"], flops, REPLICAS[row["replicas"]])
            if args.profile:
                with jax.profiler.trace(str(args.profile / f"{size}, {row['way']}")):
                    runs[row["way"]](3)
    return rows


def measure_torch(size: str, batch_size: int, args) -> dict:
    """PyTorch's row, by a process that has the device for itself."""
    clip = models.clip_config(size)
    sizes = {"vision": clip.to_dict()["vision_config"], "features": clip.projection_dim}
    del sizes["vision"]["projection_dim"]
    command = [args.torch, str(Path(__file__).with_name("torch_step.py")), "--sizes",
               json.dumps(sizes | {"classes": models.SIZES[size][-1]}),
               "--batch", str(batch_size), "--dtype", args.dtype, "--side", str(args.side),
               "--rounds", str(args.rounds), "--seconds", str(args.seconds)]  # fmt: skip
    row = {"size": size, "way": "PyTorch, one replica", "batch": batch_size}
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return row | {"failed": (done.stderr.strip().splitlines() or ["no reason given"])[-1]}
    found = json.loads(done.stdout.strip().splitlines()[-1])
    seconds, flops = found.pop("seconds"), found.pop("product_flops")
    _rate(row, seconds["step"], seconds["product"], flops, 1)
    return row | found


def _rate(row: dict, step: list[float], product: list[float], flops: float, replicas: int) -> None:
    images = replicas * row["batch"]
    work = images * models.image_flops(row["size"])
    row["seconds"], row["product_flops_per_second"] = step, flops / statistics.median(product)
    row["images_per_second"] = images / statistics.median(step)
    row["of_peak"] = work / flops * ratio(product, step)


def shown(row: dict) -> dict[str, str]:
    """A line of the table."""
    line = {"model": row["size"], "step": row["way"], "batch": str(row["batch"])}
    numbers = ("ms a step", "images/s", "of peak", "memory GB", "compiling s")
    if "failed" in row:
        return line | {numbers[0]: row["failed"]} | dict.fromkeys(numbers[1:], "")
    memory, compiled = row.get("memory_bytes"), row.get("compile_seconds")
    return line | {
        "ms a step": f"{1000 * statistics.median(row['seconds']):.4g}",
        "images/s": f"{row['images_per_second']:.4g}",
        "of peak": f"{100 * row['of_peak']:.1f} %",
        "memory GB": f"{memory / 1e9:.2f}" if memory else "",
        "compiling s": f"{compiled:.0f}" if compiled else "",
    }


def peers(rows: list[dict]) -> list[str]:
    """Ratios for which there are goals: of the pair to one replica, and to PyTorch."""
    done = {row["way"]: row for row in rows if "failed" not in row}
    lines = []
    for name, row in done.items():
        single = done.get(name.replace("two by vmap", "one replica"))
        if name.startswith("two by vmap") and single:
            times = ratio(row["seconds"], single["seconds"])
            lines.append(f"{row['size']}, {name}: {times:.2f} x the time of one replica")
    torch = done.get("PyTorch, one replica")
    if torch and len(done) > 1:
        best = max((r for r in done.values() if r is not torch), key=_share)
        times = _share(best) / _share(torch)
        lines.append(f"{best['size']}, {best['way']}: {times:.2f} x PyTorch, of peak")
    return lines


def _share(row: dict) -> float:
    # Processes do not take turns: each is held against the large product of its own rounds.
    return row["of_peak"]


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["b32", "b16", "l14"], choices=models.SIZES)
    parser.add_argument("--batch", type=int, help="of a replica; the config's by default")
    parser.add_argument("--replicas", nargs="+", default=list(REPLICAS), choices=REPLICAS)
    parser.add_argument("--attention", nargs="+", choices=("xla", "cudnn"))
    parser.add_argument("--remat", nargs="+", default=["off"], choices=("off", "on"))
    parser.add_argument("--dtype", help="float32 on a CPU, else bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="least time of a turn")
    parser.add_argument("--side", type=int, default=0, help="of the large product's matrices")
    parser.add_argument("--torch", default=sys.executable, help="an interpreter with torch, or ''")
    parser.add_argument("--profile", type=Path, help="where to write traces (jax.profiler)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    on_cpu = jax.default_backend() == "cpu"
    args.dtype = args.dtype or ("float32" if on_cpu else "bfloat16")
    attention = args.attention or (["xla"] if on_cpu else ["xla", "cudnn"])
    if on_cpu and "cudnn" in attention:
        parser.error("--attention cudnn needs a GPU")
    if args.torch == sys.executable and importlib.util.find_spec("torch") is None:
        args.torch = ""
    ways = list(itertools.starmap(Way, itertools.product(args.replicas, attention, args.remat)))
    batches = {s: args.batch or models.run_config(s).batch_size for s in args.sizes}
    torch_rows = {s: [measure_torch(s, batches[s], args)] for s in args.sizes if args.torch}
    results = conditions(jax.devices()[0].device_kind, ("jax", "jaxlib", "flax", "optax", "numpy"))
    results |= {"dtype": args.dtype, "rows": []}
    for size in args.sizes:
        rows = torch_rows.get(size, []) + measure(size, batches[size], ways, args)
        results["rows"] += rows
        print(table([shown(row) for row in rows]), *peers(rows), sep="\n", flush=True)
        keep(args.json, results)
    measured = [row for row in results["rows"] if "seconds" in row]
    peak = statistics.median([row["product_flops_per_second"] for row in measured] or [0])
    print(f"{results['device']}, {args.dtype}: a large product runs at {peak / 1e12:.3g} TFLOP/s")


if __name__ == "__main__":
    main()
