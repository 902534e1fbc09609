"""One part of gpu.py, run as a separate process: `python benchmarks/gpu_parts.py b16 --json FILE`.

Every result is stored at once, so that those of a part that is stopped remain.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

START = time.monotonic()  # The time limit of a part includes its imports.

import jax  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import gpu_checks, kernels, limits, merge, models, step  # noqa: E402
from benchmarks.gpu_tables import fastest  # noqa: E402
from benchmarks.turns import conditions, take_turns  # noqa: E402
from modelstock_jax.fileio import write_json  # noqa: E402

# Batch sizes per replica, in the order in which they are tried; the first fits into 80 GB.
BATCHES = {"b16": (256, 512, 128), "l14": (64, 128, 32), "b32": (512, 1024, 256)}
PROFILED_STEPS = 3
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "torch")


class Run:
    """Sizes, time and results of a part.

    Attributes:
      rehearse: whether sizes are tiny and the device is a CPU
      torch: interpreter with torch
      attentions: attention implementations to measure
      rounds: turns of each measured function
      seconds: minimum time of a turn
      side: size of the large product's matrices; 0: automatic
      results: what the part has found so far
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.rehearse, self.torch, self._path = args.rehearse, args.torch, args.json
        self._end = START + args.seconds
        on_cpu = jax.default_backend() == "cpu"
        self.dtype = "float32" if on_cpu else "bfloat16"
        self.attentions = ("xla",) if on_cpu else ("xla", "cudnn")
        self.rounds, self.seconds, self.side = (2, 1e-3, 64) if args.rehearse else (3, 0.5, 0)
        self.results: dict[str, Any] = {}
        self.data_sheet = limits.data_sheet(jax.devices()[0].device_kind)

    def size(self, name: str) -> str:
        """Return the key of `models.SIZES` for a size."""
        return "tiny" if self.rehearse else name

    def batches(self, name: str) -> tuple[int, ...]:
        """Return the batch sizes to try for a size."""
        return (4, 8) if self.rehearse else BATCHES[name]

    def store(self, **values: Any) -> None:
        """Store values."""
        self.results |= values
        write_json(self._path, self.results)

    def append(self, name: str, row: dict[str, Any]) -> None:
        """Store a row of the list `name`."""
        self.store(**{name: [*self.results.get(name, ()), row]})
        print(name, {k: v for k, v in row.items() if not isinstance(v, list)}, flush=True)

    def has_time(self, seconds: float) -> bool:
        """Return whether this many seconds are left."""
        return time.monotonic() + seconds < self._end

    def earlier(self, part: str) -> dict[str, Any]:
        """Return what an earlier part stored; empty if it was not run."""
        path = self._path.with_name(f"{part}.json")
        return json.loads(path.read_text()) if path.exists() else {}


def last_line(error: BaseException | str) -> str:
    """Return the last line of an error."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def device(run: Run) -> None:
    """Name the device, and measure its limits: matrix products and a copy."""
    if jax.default_backend() == "cpu" and not run.rehearse:
        sys.exit("error: JAX found no GPU; pass --rehearse to run tiny sizes on the CPU")
    installed = [name for name in PACKAGES if _is_installed(name)]
    found = conditions(jax.devices()[0].device_kind, installed)
    run.store(**{name: found[name] for name in ("device", "host", "versions")})
    sheet = run.data_sheet
    product, flops = limits.product("bfloat16", run.side)
    single, _ = limits.product("float32", run.side)
    copy, copied = limits.copy(2**20 if run.rehearse else 2**30)
    times = take_turns(
        {"bfloat16": product, "float32": single, "copy": copy}, run.rounds, run.seconds
    )
    rate = {name: min(seconds) for name, seconds in times.items()}
    rows = [
        ("matrix product, bfloat16", "TFLOP/s", flops / 1e12, "bfloat16", sheet and sheet.flops),
        ("matrix product, float32 (TF32)", "TFLOP/s", flops / 1e12, "float32", None),
        ("copy, read and written", "TB/s", copied / 1e12, "copy", sheet and sheet.bandwidth),
    ]
    run.store(limits=[
        {
            "name": name, "unit": unit, "measured": work / rate[key],
            "data_sheet": peak and peak / 1e12,
        }
        for name, unit, work, key, peak in rows
    ])  # fmt: skip


def _is_installed(name: str) -> bool:
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False


def correct(run: Run) -> None:
    """Run all checks; one that fails is a row with its error."""
    small, large = ("tiny", "tiny") if run.rehearse else ("glyph", "b32")
    batch = 8 if run.rehearse else 32
    *others, fused = run.attentions
    checks: list[tuple[Callable[..., Iterator[dict[str, Any]]], tuple[Any, ...]]] = [
        (gpu_checks.merge_is_exact, ()),
        (gpu_checks.resize_equals_pillow, ()),
        (gpu_checks.gradients_agree, (small, batch, "float32", "xla")),
        (gpu_checks.gradients_agree, (small, batch, "bfloat16", fused)),
        (gpu_checks.pair_agrees, (small, batch, "float32", "xla")),
        (gpu_checks.pair_agrees, (small, batch, "bfloat16", fused)),
        (gpu_checks.state_is_donated, (small, batch)),
        (gpu_checks.gradients_agree, (large, batch // 4, "bfloat16", fused)),
        (gpu_checks.attentions_agree, (50, fused, True)),
        (gpu_checks.attentions_agree, (257, fused, False)),
        (gpu_checks.attentions_agree, (257, fused, True)),
        *((gpu_checks.gradients_agree, (large, batch // 4, "bfloat16", a)) for a in others),
    ]
    for check, arguments in checks:
        try:
            for row in check(*arguments):
                run.append("checks", row)
        except Exception as error:  # The other checks still run.
            name = " ".join([check.__name__, *map(str, arguments)])
            run.append("checks", {"check": name, "ok": False, "error": last_line(error)})


def glyphs(run: Run) -> None:
    """Train, merge and evaluate the small CLIP for one epoch, as a user does."""
    small = ["--config.data.shifts=('v2',)", "--config.batch_size=1024"] if run.rehearse else []
    with tempfile.TemporaryDirectory() as workdir:
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "launch.py", "--config=configs/glyphs.py", f"--workdir={workdir}",
             "--config.epochs=1", "--config.compare=False", "--config.evaluation.wise_ft_alphas=()",
             "--config.evaluation.max_shift_images=100", *small],
            cwd=ROOT, stderr=subprocess.STDOUT,
        )  # fmt: skip
        if done.returncode:
            sys.exit(done.returncode)  # Its last line is the error.
        rows = json.loads((Path(workdir) / "results.json").read_text())["rows"]
        run.store(
            seconds=time.monotonic() - start, accuracy={row["method"]: row["id"] for row in rows}
        )


def measure_step(run: Run, size: str, batch: int, variant: step.Variant, profile=None):
    """Return the row of a step, which contains its error if it cannot be measured."""
    settings = argparse.Namespace(
        dtype=run.dtype, side=run.side, rounds=1 if profile else run.rounds,
        seconds=0.0 if profile else run.seconds, profile=profile,
    )  # fmt: skip
    try:
        (row,) = step.measure(size, batch, [variant], settings)
    except Exception as error:  # The next variant may run.
        row = {"size": size, "way": str(variant), "batch": batch, **variant._asdict()}
        return row | {"failed": last_line(error)}
    return with_data_sheet(run, row)


def with_data_sheet(run: Run, row: dict[str, Any]) -> dict[str, Any]:
    """Return the row of a step with its fraction of the data sheet's peak."""
    if run.data_sheet and "failed" not in row:
        flops = row["images_per_second"] * models.image_flops(row["size"])
        row["of_data_sheet"] = flops / run.data_sheet.flops
    return row


def training_step(run: Run, name: str) -> None:
    """Measure the steps of one size, the most important ones first, while there is time."""
    size, (first, *others) = run.size(name), run.batches(name)
    rows: list[dict[str, Any]] = []
    longest = 0.0

    def measure(variant: step.Variant, batch: int) -> None:
        nonlocal longest
        if run.has_time(longest):
            start = time.monotonic()
            rows.append(measure_step(run, size, batch, variant))
            run.append("steps", rows[-1])
            longest = max(longest, time.monotonic() - start)

    for attention in run.attentions:
        measure(step.Variant("vmap", attention, "off"), first)
    best = variant_of(fastest(rows, "vmap"), run)
    measure(best, others[0])
    fast = fastest(rows, "vmap")
    if fast and run.has_time(longest / 2):  # The compiled program is in the cache.
        run.store(profile=profile_step(run, size, fast))
    measure(best._replace(replicas="one"), fast["batch"] if fast else first)
    for batch in others[1:]:
        measure(best, batch)
    fast = fastest(rows, "vmap")
    measure(best._replace(replicas="map"), fast["batch"] if fast else first)


def variant_of(row: dict[str, Any] | None, run: Run) -> step.Variant:
    """Return the variant of a measured row; the default one without a row."""
    return step.Variant("vmap", row["attention"] if row else run.attentions[0], "off")


def profile_step(run: Run, size: str, row: dict[str, Any]) -> dict[str, Any]:
    """Return the time of a measured step by kind of kernel."""
    with tempfile.TemporaryDirectory() as directory:
        variant = step.Variant(*(row[field] for field in step.Variant._fields))
        measured = measure_step(run, size, row["batch"], variant, profile=Path(directory))
        if "failed" in measured:
            return {"failed": measured["failed"]}
        try:
            return {"way": row["way"], **kernels.breakdown(Path(directory), PROFILED_STEPS)}
        except Exception as error:  # Some systems do not allow profiling.
            return {"failed": last_line(error)}


def merges(run: Run) -> None:
    """Measure the merge inside training and `model_stock` relative to a copy."""
    compiled = ("in the loop", "model_stock, jitted")
    for name in ("b16", "l14", "b32"):
        for row in merge.measure(run.size(name), run.rounds, run.seconds / 2, compiled):
            if run.data_sheet:
                rate = row["moved_bytes"] / min(row["seconds"])
                row["of_data_sheet"] = rate / run.data_sheet.bandwidth
            run.append("merges", row)


def feed(run: Run) -> None:
    """Measure the training loop of B/32 with images that are read and decoded."""
    from benchmarks import gpu_input  # Imports grain and Pillow.

    row = fastest(run.earlier("b32").get("steps", ()), "vmap")
    batch = row["batch"] if row else run.batches("b32")[0]
    for source in gpu_input.measure(run, batch, variant_of(row, run)):
        run.append("sources", source)


def torch(run: Run) -> None:
    """Measure PyTorch's compiled step of the same models; if it cannot compile, the eager one."""
    command = [run.torch, "-c", "import torch, transformers"]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        run.store(skipped=last_line(found.stderr))
        return
    settings = argparse.Namespace(
        torch=run.torch, dtype=run.dtype, side=run.side, rounds=run.rounds, seconds=run.seconds
    )
    longest = 0.0

    def measure(name: str, batch: int, eager: bool = False) -> str:
        """Store the row of a step; return its error."""
        nonlocal longest
        if not run.has_time(longest):
            return ""
        start = time.monotonic()
        row = step.measure_torch(run.size(name), batch, settings, eager=eager)
        longest = max(longest, time.monotonic() - start)
        run.append("steps", with_data_sheet(run, row | {"replicas": "PyTorch"}))
        return row.get("failed", "")

    for name in ("b16", "l14", "b32"):
        row = fastest(run.earlier(name).get("steps", ()), "vmap")
        batch = row["batch"] if row else run.batches(name)[0]
        if "out of memory" in (error := measure(name, batch)):
            measure(name, batch // 2)
        elif error:
            measure(name, batch, eager=True)


def base(run: Run) -> tuple[str, int, step.Variant]:
    """Return the size, batch size and variant that the options are compared on: B/16's fastest."""
    row = fastest(run.earlier("b16").get("steps", ()), "vmap")
    batch = row["batch"] if row else run.batches("b16")[0]
    return run.size("b16"), batch, variant_of(row, run)


def variants(run: Run) -> None:
    """Measure rematerialization at the fastest batch size of B/16, and at twice its size."""
    size, batch, variant = base(run)
    for batch_size in (batch, 2 * batch):
        row = measure_step(run, size, batch_size, variant._replace(remat="on"))
        run.append("steps", row)


def flags(run: Run) -> None:
    """Measure B/16's fastest step with the options of XLA in this process's environment."""
    run.append("steps", measure_step(run, *base(run)))


PARTS: dict[str, Callable[[Run], None]] = {
    "device": device,
    "correct": correct,
    "glyphs": glyphs,
    "b16": lambda run: training_step(run, "b16"),
    "l14": lambda run: training_step(run, "l14"),
    "b32": lambda run: training_step(run, "b32"),
    "merge": merges,
    "input": feed,
    "torch": torch,
    "variants": variants,
    "flags": flags,
}


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--json", type=Path, required=True, help="output file")
    parser.add_argument("--seconds", type=float, default=60, help="time limit (default: 60)")
    parser.add_argument("--rehearse", action="store_true", help="run tiny sizes on the CPU")
    parser.add_argument("--torch", default=sys.executable, help="interpreter with torch")
    args = parser.parse_args(argv)
    PARTS[args.part](Run(args))


if __name__ == "__main__":
    main()
