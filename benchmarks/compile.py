"""CPU seconds to trace, lower and compile the training step and the merge of a config.

    python benchmarks/compile.py --cases l14 --json benchmarks/results/compile_cpu.json

Needs no weights and no dataset. Each program is compiled alone, one after the other, without a
compilation cache. The merge is traced once, during setup. The dry run is a separate process,
`launch.py --dry-run`, which compiles both at the same time. It runs without a compilation cache,
then twice with the default one in an empty directory: cold, warm. --no-dry-run leaves it out.

CPU seconds are those of all threads of a process: on two cores, one second of wall time can be two
of them. `config_programs` and `measure` also work for other programs.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import jax  # noqa: E402

from benchmarks import turns  # noqa: E402
from benchmarks.turns import STAGES, Seconds  # noqa: E402
from modelstock_jax.experiment.dry_run import abstract_step_functions  # noqa: E402
from modelstock_jax.training.compilation_cache import use_compilation_cache  # noqa: E402
from modelstock_jax.training.launcher import set_cpu_devices  # noqa: E402

IMPORT_SECONDS = time.process_time()  # Since the start of the interpreter.
CASES = {"l14": "configs/vitl14.py", "b32": "configs/vitb32.py", "glyphs": "configs/glyphs.py"}


def config_programs(path: str) -> tuple[dict[str, tuple], Seconds]:
    """Return {"step": (jitted, arguments), "merge": ...} of a config, and the time to set it up."""
    config = import_module(path.removesuffix(".py").replace("/", ".")).get_config()
    set_cpu_devices(config)
    jax.devices()
    (functions, sizes), seconds = turns.timed(lambda: abstract_step_functions(config))
    batch = functions.abstract_batch(sizes.image_size)
    state, anchor = functions.abstract_state, functions.abstract_anchor
    programs = {
        "step": (functions.train_step, (state, batch, functions.step_constants())),
        "merge": (functions.merge_step[False], (anchor, state)),
    }
    return programs, seconds


def measure(programs: Mapping[str, tuple]) -> dict[str, dict[str, Seconds]]:
    """Return {program: {stage: seconds}}; the programs are compiled one after the other.

    Args:
      programs: name -> (jitted function, its arguments or their shapes)
    """
    return {
        name: turns.compile_stages(jitted, *arguments)[1]
        for name, (jitted, arguments) in programs.items()
    }


def dry_run(path: str, cache: Path | None) -> Seconds:
    """Return the seconds of `launch.py --dry-run` in its own process, including all imports."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": ""}
    env |= {"XDG_CACHE_HOME": str(cache)} if cache else {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    before, wall = _children(), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "launch.py", f"--config={path}", "--workdir=runs/unused", "--dry-run"],
        cwd=ROOT, env=env, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode not in (0, 1) or "memory per device" not in done.stdout:  # 1: no dataset.
        raise RuntimeError(f"{path}: the dry run failed:\n{done.stdout}{done.stderr}")
    return {"cpu": _children() - before, "wall": time.perf_counter() - wall}


def _children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def case(name: str, with_dry_run: bool = True) -> dict:
    """Return the result of one case."""
    programs, setup = config_programs(CASES[name])
    result = {"case": name, "setup": setup, "programs": measure(programs)}
    if with_dry_run:
        runs = {"no cache": dry_run(CASES[name], None)}
        with tempfile.TemporaryDirectory() as cache:
            runs |= {kind: dry_run(CASES[name], Path(cache)) for kind in ("cold", "warm")}
        result["dry_run"] = runs
    return result


def rows(result: dict) -> list[dict[str, str]]:
    """Return the rows of the printed table: CPU seconds (and in brackets, wall seconds)."""
    lines = []
    for program, seconds in result["programs"].items():
        total = {kind: sum(seconds[s][kind] for s in STAGES) for kind in ("cpu", "wall")}
        cells = {stage: _cell(seconds[stage]) for stage in STAGES}
        lines.append({"CPU s (wall s)": f"{result['case']}, {program}", **cells,
                      "total": _cell(total)})  # fmt: skip
    others = {"setup": result["setup"]}
    others |= {f"dry run, {kind}": s for kind, s in result.get("dry_run", {}).items()}
    for name, seconds in others.items():
        lines.append({"CPU s (wall s)": f"{result['case']}, {name}", **dict.fromkeys(STAGES, ""),
                      "total": _cell(seconds)})  # fmt: skip
    return lines


def _cell(seconds: Seconds) -> str:
    return f"{seconds['cpu']:.1f} ({seconds['wall']:.1f})"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["l14"])
    parser.add_argument("--dry-run", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path, help="file to write the results to (default: none)")
    args = parser.parse_args(argv)
    use_compilation_cache("off")
    results = [case(name, args.dry_run) for name in args.cases]
    print(f"imports: {IMPORT_SECONDS:.1f} CPU s")
    print(turns.table([row for result in results for row in rows(result)]))
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    conditions = turns.conditions(device, ["jax", "jaxlib"])
    turns.write_json(args.json, conditions | {"imports": IMPORT_SECONDS, "results": results})


if __name__ == "__main__":
    main()
