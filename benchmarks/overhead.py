"""What the watch, the records, asynchronous saving and the merge add to training.

    python benchmarks/overhead.py --cases glyphs,middle --rounds 15
    python benchmarks/overhead.py --cases vitb32 --rounds 3
    python benchmarks/overhead.py --cases ""

Prints what the records take of the host's thread (all that the last of these does), and Markdown
tables. In each round the same steps are run in every way, one after the other and in another order
each time, in one process; a cost is the median over rounds of its difference, so that what else the
machine does falls on all alike. Each is given by the wall clock / by the CPU time of the process,
which others disturb less. What is added does not depend on the batch: it is measured on one of 2,
where it shows, and held against a step on the true one. Random weights and images; two replicas.
Cases: `glyphs` (configs/glyphs.py), `middle` (a ViT-S/32, batches of 8) and
`vitb32` (ViT-B/32 at its true size, its steps on small batches: for the merge's share alone, whose
epoch of 1.28 million images in batches of 512 is extrapolated).
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


def step_costs(case: str, rounds: int, workdir: Path, step: np.ndarray) -> list[str]:
    """A line of the first table; `step` is a step's seconds on the true batch, wall and CPU."""
    loops = Loops(case, workdir)
    ways = ["bare", "flags", "records", "saving", "epoch"]
    seconds = {way: [] for way in ways}
    with loops.stores, loops.record:
        for way in ways:
            getattr(loops, way)()  # Compiles, opens files.
        loops.lasted.clear()
        for number in range(rounds):
            first = number % len(ways)
            for way in ways[first:] + ways[:first]:
                seconds[way].append(getattr(loops, way)())
        loops.record.flush_pending()
    seconds = {way: np.array(rounds) for way, rounds in seconds.items()}

    def added(way: str, than: str) -> np.ndarray:
        return np.median(seconds[way] - seconds[than], axis=0)

    flags, records = added("flags", "bare") / loops.steps, added("records", "flags") / loops.steps
    one_save, with_merged = added("saving", "records"), added("epoch", "records")
    # The glyphs' epoch of 32 steps ends before a save is due; others save many times in one.
    glyphs = case == "glyphs"
    every = 32 if glyphs else loops.config.checkpoint.save_every_steps
    share = 100 * (flags + records + (with_merged if glyphs else one_save) / every) / step
    size = sum(x.size for x in jax.tree.leaves(loops.anchor)) / 1e6
    return [
        case,
        f"{size:.2f} M",
        both(step, "s"),
        both(1000 * flags, "ms"),
        both(1000 * records, "ms"),
        f"{both(one_save, 's')} ({statistics.median(loops.lasted):.2f} s)",
        both(with_merged, "s"),
        f"1 in {every}",
        both(share, "%"),
    ]


def both(pair: np.ndarray, unit: str) -> str:
    """Wall / CPU."""
    return f"{pair[0]:.2f} / {pair[1]:.2f} {unit}"


def merge_costs(case: str, rounds: int) -> tuple[list[str], np.ndarray]:
    """A line of the second table, and the seconds of a step on its batch, wall and CPU."""
    measured = {}
    for batch_size in {"glyphs": [None], "middle": [None], "vitb32": [2, 6]}[case]:
        config, programs = make_programs(case, batch_size)
        config.image_size = SIZES[case][4]
        state, reference = programs.init_state(0), programs.step_constants(programs.anchor)
        times = []
        for number in range(rounds + 1):
            began, cpu = time.perf_counter(), time.process_time()
            for seed in range(2):
                batch = put_batch(programs.mesh, random_batch(config, seed))
                state, values = programs.train_step(state, batch, reference)
            jax.block_until_ready(state)
            if number:
                wall = time.perf_counter() - began
                times.append([wall / 2, (time.process_time() - cpu) / 2])
        measured[config.batch_size] = np.median(times, axis=0)
    merges = []
    for number in range(rounds + 1):
        state, _ = programs.train_step(state, batch, reference)  # Replicas that differ.
        jax.block_until_ready(state)
        began = time.perf_counter()
        state, merged, stats = programs.merge_step[False](programs.anchor, state)
        stats = jax.device_get(stats)
        check_finite(stats)
        report(stats)
        jax.block_until_ready(merged)
        if number:
            merges.append(time.perf_counter() - began)
    one_step = measured[config.batch_size]
    measured = {size: float(wall) for size, (wall, _) in measured.items()}
    (small, first), *more = sorted(measured.items())
    size = 512 if more else small
    slope = (more[0][1] - first) / (more[0][0] - small) if more else 0.0
    step = first + slope * (size - small)
    steps = SIZES[case][6] // size
    merge = statistics.median(merges)
    said = ", ".join(f"{b}: {s:.2f}" for b, s in sorted(measured.items()))
    return [
        case,
        f"{merge:.3f}",
        said,
        f"{steps} of {step:.3g} s" + (" (extrapolated)" if more else ""),
        f"{100 * merge / (steps * step):.2g} %",
    ], one_step


def host_cost(workdir: Path, steps: int = 1200) -> float:
    """Seconds of the loop's own thread that a step's records take, a line of metrics in ten."""
    config = linear.config(log_every_steps=10)
    programs, timeline = (
        linear.step_functions(config, 2 * steps),
        Timeline(workdir / "timeline.jsonl"),
    )
    batch = put_batch(programs.mesh, next(linear.batches(config, 0)))
    state, reference, spent = programs.init_state(0), programs.step_constants(programs.anchor), 0.0
    with TrainLogger(config, programs.task, workdir, "host", 0, timeline) as record:
        for step in range(1, steps + 1):
            state, values = programs.train_step(state, batch, reference)
            jax.block_until_ready(values)  # Waiting for the device is not the records'.
            began = time.thread_time()
            with timeline.phase("data"), timeline.phase("train"):
                record.log_step(step, values)
            spent += time.thread_time() - began
    return spent / steps


def table(header: list[str], rows: list[list[str]]) -> None:
    """Prints Markdown."""
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default="glyphs,middle")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--workdir", default=None, help="where to save; a temporary directory")
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {jax.devices()}, jax {jax.__version__}")
    with tempfile.TemporaryDirectory(dir=args.workdir) as place:
        print(f"records: {1000 * host_cost(Path(place)):.2f} ms of CPU a step, on the host")
    costs, merges = [], []
    for case in filter(None, args.cases.split(",")):
        with tempfile.TemporaryDirectory(dir=args.workdir) as place:
            row, step = merge_costs(case, args.rounds)
            merges.append(row)
            if case != "vitb32":
                costs.append(step_costs(case, args.rounds, Path(place), step))
    if costs:
        table(
            [
                "case",
                "weights",
                "a step",
                "flags in it add",
                "watch, metrics, timeline add",
                "a save adds (lasts)",
                "with a merged model's",
                "steps",
                "all, of a step",
            ],
            costs,
        )
    if merges:
        table(["case", "a merge, s", "steps, s (batch: s)", "an epoch", "merge's share"], merges)


if __name__ == "__main__":
    main()
