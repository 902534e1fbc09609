"""Overhead of monitoring, logging, asynchronous saving and the merge.

    python benchmarks/overhead.py --cases glyphs,middle --rounds 15
    python benchmarks/overhead.py --cases vitb32 --rounds 3
    python benchmarks/overhead.py --cases ""

Prints the host's CPU time per step for monitor, metrics, progress and timeline (the last command
prints only this), and Markdown tables. In each round, the same steps run in every variant, in a
different order each round, in one process. A cost is the median over rounds of a difference, so
that other load affects all variants equally. Costs are given as wall time and as CPU time of the
process, which other load disturbs less. Costs do not depend on the batch: they are measured with a
batch of 2, where they are visible, and compared with a step at the true batch. Weights and images
are random; there are two replicas.

Cases: `glyphs` (configs/glyphs.py), `middle` (a ViT-S/32, batches of 8) and `vitb32` (ViT-B/32 at
its true size with small batches, only for the merge's fraction of an epoch; its epoch of 1.28
million images in batches of 512 is extrapolated).
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.loops import SIZES, Loops, make_programs, random_batch  # noqa: E402
from modelstock_jax.merging import check_finite, report  # noqa: E402
from modelstock_jax.reporting.timeline import Timeline  # noqa: E402
from modelstock_jax.training.metrics import TrainLogger  # noqa: E402
from modelstock_jax.training.sharding import put_batch  # noqa: E402
from tests.training import linear  # noqa: E402


def step_costs(case: str, rounds: int, workdir: Path, step: np.ndarray) -> list[list[str]]:
    """Return the rows of the table of one case.

    Args:
      case: key of `loops.SIZES`
      rounds: number of rounds
      workdir: directory for the files of the run
      step: wall and CPU seconds of a step at the true batch
    """
    loops = Loops(case, workdir)
    variants = ["bare", "checks", "logging", "saving", "epoch"]
    seconds = {variant: [] for variant in variants}
    with loops.checkpoints, loops.logger:
        for variant in variants:
            getattr(loops, variant)()  # Compiles, opens files.
        loops.save_seconds.clear()
        for number in range(rounds):
            first = number % len(variants)
            for variant in variants[first:] + variants[:first]:
                seconds[variant].append(getattr(loops, variant)())
        loops.logger.flush_pending()
    seconds = {variant: np.array(times) for variant, times in seconds.items()}

    def added(variant: str, base: str) -> np.ndarray:
        return np.median(seconds[variant] - seconds[base], axis=0)

    checks = added("checks", "bare") / loops.steps
    logging = added("logging", "checks") / loops.steps
    save, save_merged = added("saving", "logging"), added("epoch", "logging")
    # An epoch of `glyphs` has 32 steps and ends before a save is due; others save often per epoch.
    glyphs = case == "glyphs"
    every = 32 if glyphs else loops.config.checkpoint.save_every_steps
    total = 100 * (checks + logging + (save_merged if glyphs else save) / every) / step
    size = sum(x.size for x in jax.tree.leaves(loops.anchor)) / 1e6
    case = f"{case} ({size:.2f} M weights)"
    return [
        [case, "one step", *wall_and_cpu(step, "s")],
        [
            case,
            "added by the non-finite checks inside the step",
            *wall_and_cpu(1000 * checks, "ms"),
        ],
        [case, "added by monitor, metrics and timeline", *wall_and_cpu(1000 * logging, "ms")],
        [case, "added by a save", *wall_and_cpu(save, "s")],
        [case, "duration of a save", f"{statistics.median(loops.save_seconds):.2f} s", ""],
        [case, "added by a save with a merged model", *wall_and_cpu(save_merged, "s")],
        [
            case,
            f"total, with one save in {every} steps, relative to a step",
            *wall_and_cpu(total, "%"),
        ],
    ]


def wall_and_cpu(pair: np.ndarray, unit: str) -> list[str]:
    """Return the cells of wall time and CPU time."""
    return [f"{value:.2f} {unit}" for value in pair]


def merge_costs(case: str, rounds: int) -> tuple[list[str], np.ndarray]:
    """Return the row of the merge table, and wall and CPU seconds of a step at its batch."""
    measured = {}
    for batch_size in {"glyphs": [None], "middle": [None], "vitb32": [2, 6]}[case]:
        config, programs = make_programs(case, batch_size)
        config.image_size = SIZES[case][4]
        state, constants = programs.init_state(0), programs.step_constants(programs.anchor)
        times = []
        for number in range(rounds + 1):
            start, cpu = time.perf_counter(), time.process_time()
            for seed in range(2):
                batch = put_batch(programs.mesh, random_batch(config, seed))
                state, values = programs.train_step(state, batch, constants)
            jax.block_until_ready(state)
            if number:
                wall = time.perf_counter() - start
                times.append([wall / 2, (time.process_time() - cpu) / 2])
        measured[config.batch_size] = np.median(times, axis=0)
    merges = []
    for number in range(rounds + 1):
        state, _ = programs.train_step(state, batch, constants)  # So that the replicas differ.
        jax.block_until_ready(state)
        start = time.perf_counter()
        state, merged, stats = programs.merge_step[False](programs.anchor, state)
        stats = jax.device_get(stats)
        check_finite(stats)
        report(stats)
        jax.block_until_ready(merged)
        if number:
            merges.append(time.perf_counter() - start)
    step_seconds = measured[config.batch_size]
    measured = {size: float(wall) for size, (wall, _) in measured.items()}
    (small, first), *more = sorted(measured.items())
    size = 512 if more else small
    slope = (more[0][1] - first) / (more[0][0] - small) if more else 0.0
    step = first + slope * (size - small)
    steps = SIZES[case][6] // size
    merge = statistics.median(merges)
    steps_measured = ", ".join(f"{b}: {s:.2f}" for b, s in sorted(measured.items()))
    return [
        case,
        f"{merge:.3f}",
        steps_measured,
        f"{steps} of {step:.3g} s" + (" (extrapolated)" if more else ""),
        f"{100 * merge / (steps * step):.2g} %",
    ], step_seconds


def host_cost(workdir: Path, steps: int = 1200) -> float:
    """Return CPU seconds of the loop thread per step for logging, with metrics every ten steps."""
    config = linear.config(log_every_steps=10)
    programs, timeline = (
        linear.step_functions(config, 2 * steps),
        Timeline(workdir / "timeline.jsonl"),
    )
    batch = put_batch(programs.mesh, next(linear.batches(config, 0)))
    state, constants, spent = programs.init_state(0), programs.step_constants(programs.anchor), 0.0
    with TrainLogger(config, programs.task, workdir, "host", 0, timeline) as logger:
        for step in range(1, steps + 1):
            state, values = programs.train_step(state, batch, constants)
            jax.block_until_ready(values)  # Waiting for the device is not part of logging.
            start = time.thread_time()
            with timeline.phase("data"), timeline.phase("train"):
                logger.log_step(step, values)
            spent += time.thread_time() - start
    return spent / steps


def table(header: list[str], rows: list[list[str]]) -> None:
    """Print a Markdown table."""
    rule = "---|" + "---:|" * (len(header) - 1)
    print("\n| " + " | ".join(header) + " |\n|" + rule)
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cases", default="glyphs,middle", help="glyphs, middle, vitb32 (default: glyphs,middle)"
    )
    parser.add_argument("--rounds", type=int, default=15, help="number of rounds (default: 15)")
    parser.add_argument("--workdir", default=None, help="directory for saves (default: temporary)")
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {jax.devices()}, jax {jax.__version__}")
    with tempfile.TemporaryDirectory(dir=args.workdir) as directory:
        milliseconds = 1000 * host_cost(Path(directory))
        print(
            f"monitor, metrics, progress and timeline: {milliseconds:.2f} ms of CPU time per step"
        )
    costs, merges = [], []
    for case in filter(None, args.cases.split(",")):
        with tempfile.TemporaryDirectory(dir=args.workdir) as directory:
            row, step = merge_costs(case, args.rounds)
            merges.append(row)
            if case != "vitb32":
                costs += step_costs(case, args.rounds, Path(directory), step)
    if costs:
        table(["case", "cost", "wall time", "CPU time"], costs)
    if merges:
        headings = [
            "case",
            "merge, s",
            "step, s (batch: s)",
            "steps per epoch",
            "merge, fraction of an epoch",
        ]
        table(headings, merges)


if __name__ == "__main__":
    main()
