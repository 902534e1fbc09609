"""Time, memory and error of `modelstock merge`, compared with a copy of the bytes and mergekit.

    python benchmarks/files.py --mergekit /path/to/env/bin/mergekit-yaml --json results.json

Writes synthetic Llama-shaped checkpoints (a random base; fine-tunes = base + correlated updates)
and merges them with every tool in turn, --rounds times. Each run is a separate process, start-up
included; wall time, CPU time and peak resident memory are those of the child (wait4). The copy
reads every input and writes one output, like `cp`, and flushes it to disk as a merge does. The
table has medians over the rounds, and medians of the ratios within each round; the JSON has all
values.

Error is |out - ref| / |ref - w0| per tensor, where ref is the merge in float64. `floor` is the
error of the exact result rounded once to the output dtype. Two fine-tunes of 853M need 9 GB of
disk, four need 14 GB. Without --mergekit, its row is left out. The errors of other methods than
Model Stock are not measured here: tests compare them with mergekit and with float64.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from checkpoints import CHUNK, NAMES, SIZES, make  # noqa: E402

from modelstock_jax.tensor_files.checksums import checksum_file  # noqa: E402
from modelstock_jax.tensor_files.reader import DTYPES, TensorFiles  # noqa: E402

CASES = ("134M-f32-2", "134M-bf16-2", "853M-bf16-2", "134M-f32-4", "134M-bf16-4", "853M-bf16-4")
LARGE = ("3.2B-bf16-2",)  # 32 GB of disk; only if asked for
# Methods of mergekit -> parameters of each model.
METHODS = {
    "model_stock": {},
    "ties": {"weight": 0.5, "density": 0.5},
    "dare_ties": {"weight": 0.5, "density": 0.5},
}

COPY = """
import os, sys
buffer = bytearray(2**20)
out, *inputs = sys.argv[1:]
for number, source in enumerate(inputs):
    target = open(os.path.join(out, str(number)), "wb", 0) if number < int(os.environ["NUM_OUTPUTS"]) else None
    with open(source, "rb", 0) as file:
        while count := file.readinto(buffer):
            if target:
                target.write(memoryview(buffer)[:count])
    if target:
        os.fsync(target.fileno())
"""  # noqa: E501


def errors(root: Path, number: int, outputs: list[str]) -> dict[str, list[float]]:
    """Return the relative error of every tensor of each output, and of rounding only."""
    models = [TensorFiles(root / m) for m in ("base", *(f"ft{i + 1}" for i in range(number)))]
    merged = {name: TensorFiles(root / name) for name in outputs}
    relative: dict[str, list[float]] = {name: [] for name in ("floor", *outputs)}
    for name in models[0]:
        count, code = int(np.prod(models[0].shape(name))), models[0].code(name)
        cuts = [(a, min(a + CHUNK, count)) for a in range(0, count, CHUNK)]

        def read(model: int, start: int, stop: int, name: str = name) -> np.ndarray:
            return models[model].read(name, start, stop).astype(np.float64)

        def updates(start: int, stop: int, read=read) -> np.ndarray:
            anchor = read(0, start, stop)
            return np.stack([read(i + 1, start, stop) - anchor for i in range(number)])

        gram = np.zeros((number, number))
        for a, b in cuts:
            update = updates(a, b)
            gram += update @ update.T
        norms = np.sqrt(gram.diagonal())
        cosine = (gram / np.outer(norms, norms))[np.triu_indices(number, 1)].mean()
        ratio = max(0.0, number * cosine / (1 + (number - 1) * cosine))
        squares = dict.fromkeys((*relative, "update"), 0.0)
        for a, b in cuts:
            anchor = read(0, a, b)
            exact = anchor + ratio * updates(a, b).mean(axis=0)
            squares["update"] += float(np.sum((exact - anchor) ** 2))
            # Rounding via float32 rounds twice in one of 2^16 cases: negligible in a norm.
            rounded = exact.astype(np.float32).astype(DTYPES[code]).astype(np.float64)
            squares["floor"] += float(np.sum((rounded - exact) ** 2))
            for output, tensors in merged.items():
                values = tensors.read(name, a, b).astype(np.float64)
                squares[output] += float(np.sum((values - exact) ** 2))
        for key in relative:
            relative[key].append(float(np.sqrt(squares[key] / squares["update"])))
    return relative


def timed(command: list[str], **environment: str) -> dict[str, float]:
    """Run a process; return its wall and CPU seconds, peak resident bytes and the system load."""
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | environment,
        text=True,
    )
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.monotonic() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)}\n{output}")
    return {
        "wall": wall,
        "cpu": usage.ru_utime + usage.ru_stime,
        "peak": 1024.0 * usage.ru_maxrss,
        "load": os.getloadavg()[0],
    }


def commands(
    root: Path, size: str, number: int, mergekit: str | None, method: str, dtype: str
) -> dict:
    """Return tool -> command; each writes to a directory with the name of the tool."""
    models = [str(root / f"ft{i + 1}") for i in range(number)]
    limit = SIZES[size].limit
    files = [
        str(f) for m in (root / "base", *map(Path, models)) for f in sorted(m.glob("*.safetensors"))
    ]
    (root / "copy.py").write_text(COPY)
    recipe = {
        "merge_method": method,
        "base_model": str(root / "base"),
        "models": [{"model": m, **_parameters(method)} for m in models],
        "dtype": NAMES[dtype],
    }
    path = root / "recipe.yml"
    path.write_text(json.dumps(recipe))  # JSON is valid YAML.
    commands_by_tool = {
        "copy": [sys.executable, str(root / "copy.py"), str(root / "copy"), *files],
        "ours": [sys.executable, "-m", "modelstock_jax", "merge", str(path), "--out",
                 str(root / "ours"), *(["--max-shard-size", limit] if limit else [])],
    }  # fmt: skip
    if mergekit:
        commands_by_tool["mergekit"] = [
            mergekit,
            str(path),
            str(root / "mergekit"),
            "--no-copy-tokenizer",
            # mergekit writes B for 10^9.
            *(["--out-shard-size", limit[:-1].replace("G", "B")] if limit else []),
        ]
    return commands_by_tool


def _parameters(method: str) -> dict:
    return {"parameters": METHODS[method]} if METHODS[method] else {}


def measure(
    case: str, folder: Path, mergekit: str | None, rounds: int, methods: Iterable[str]
) -> Iterator[tuple[str, dict]]:
    """Measure all tools on one case; yield the name of each row with its values."""
    size, dtype, number = case.split("-")
    root = folder / case
    root.mkdir()
    try:
        _in_process(make, root, size, dtype, int(number))
        for method in methods:
            tools = commands(root, size, int(number), mergekit, method, dtype)
            name = case if method == "model_stock" else f"{case} {method}"
            yield name, _measure_method(root, tools, int(number), rounds, method)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _measure_method(root: Path, tools: dict, number: int, rounds: int, method: str) -> dict:
    runs: dict[str, list] = {tool: [] for tool in tools}
    num_outputs = str(len(list((root / "base").glob("*.safetensors"))))
    for _ in range(rounds):
        for tool, command in tools.items():
            shutil.rmtree(root / tool, ignore_errors=True)
            if tool == "copy":
                (root / tool).mkdir()
            runs[tool].append(timed(command, NUM_OUTPUTS=num_outputs, HF_HUB_OFFLINE="1"))
            print(f"{method} {tool}: {runs[tool][-1]['wall']:.1f} s", file=sys.stderr, flush=True)
            if tool == "copy":
                shutil.rmtree(root / tool)
    outputs = [tool for tool in tools if tool != "copy"]
    same = _checksums_agree(root / "ours")
    relative = _in_process(errors, root, number, outputs) if method == "model_stock" else {}
    for tool in outputs:
        shutil.rmtree(root / tool)
    return {
        "runs": runs,
        "errors": relative,
        "digests_agree": same,
        "bytes_of_a_model": sum(f.stat().st_size for f in (root / "base").glob("*.safetensors")),
    }


def _in_process(function, *arguments):
    """Run in a separate process: the memory of a parent counts in the peak of a later child."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _checksums_agree(out: Path) -> bool:
    report = json.loads((out / "merge_report.json").read_text())
    return all(
        checksum == f"{kind}:{checksum_file(out / file, kind)}"
        for file, checksum in report["outputs"].items()
        for kind in [checksum.partition(":")[0]]
    )


def _ratio(runs: list[dict], others: list[dict]) -> float:
    """Return the median ratio of wall times per round: other load affects both runs of a round."""
    return float(np.median([a["wall"] / b["wall"] for a, b in zip(runs, others, strict=True)]))


def table(results: dict[str, dict]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| case | tool | wall time, s | wall time / copy | wall time / ours | CPU time, s | "
        "peak memory, MB | error, median | error, max | load |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for case, result in results.items():
        floor = result["errors"].get("floor")
        for tool, runs in result["runs"].items():
            error = result["errors"].get(tool)
            mark = "" if error else " (floor)"
            error = error or floor
            shown = "– | –"
            if error:
                shown = f"{np.median(error):.3g}{mark} | {max(error):.3g}{mark}"
            wall, cpu, peak, load = (
                float(np.median([run[key] for run in runs]))
                for key in ("wall", "cpu", "peak", "load")
            )
            ratios = (f"{_ratio(runs, result['runs'][other]):.2f}" for other in ("copy", "ours"))
            lines.append(
                f"| {case} | {tool} | {wall:.1f} | {' | '.join(ratios)} | {cpu:.1f} | "
                f"{peak / 1e6:.0f} | {shown} | {load:.1f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--mergekit", help="path of mergekit-yaml in a separate environment (default: not measured)"
    )
    parser.add_argument(
        "--cases", nargs="+", default=CASES, choices=(*CASES, *LARGE),
        help=f"SIZE-DTYPE-N (default: all but {LARGE[0]})",
    )  # fmt: skip
    parser.add_argument(
        "--methods", nargs="+", default=["model_stock"], choices=METHODS,
        help="methods of mergekit (default: model_stock)",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3, help="runs of each tool (default: 3)")
    parser.add_argument("--json", type=Path, help="output file with all values")
    parser.add_argument("--folder", help="directory for the files (default: a temporary directory)")
    arguments = parser.parse_args()
    results = {}
    if arguments.folder:
        os.makedirs(arguments.folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        options = arguments.mergekit, arguments.rounds, arguments.methods
        for case in arguments.cases:
            for name, result in measure(case, Path(folder), *options):
                results[name] = result
                print(table({name: result}), flush=True)
                if arguments.json:
                    arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{table(results)}")


if __name__ == "__main__":
    main()
