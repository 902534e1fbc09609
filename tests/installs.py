"""Each documented line that installs this project, tried in a fresh environment.

    python -m tests.installs                        # rows of README's table; needs a network
    python -m tests.installs --python python3.12 --lines "pip install -e ."

A row has the packages, the megabytes of their files, and the CPU seconds of the second of two
installations, when pip's cache has all wheels. `RESOLVED` lines are not installed: the CUDA wheels
take 3 GB.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
# Programs of a part that needs an extra, by the extra that installs its packages.
NEEDS = {
    "jax": ['python -c "from modelstock_jax import model_stock"'],
    "train": [
        "python launch.py --config=configs/glyphs.py --dry-run",
        "python -m studies",
        "python -m modelstock_jax.data prepare --help",
        "python -m modelstock_jax.models.convert --help",
        "python -m modelstock_jax.models.tokenizer --help",
        'python -c "import modelstock_jax.experiment"',
        'python -c "import modelstock_jax.models.model"',
        'python -c "import modelstock_jax.training.trainer"',
    ],
}
# The parts that work after each line. They are tried, and so is the error of each other part.
INSTALLED: dict[str, set[str]] = {
    "pip install -e .": set(),
    "pip install -e '.[jax]'": {"jax"},
    "pip install -e '.[cpu]'": {"jax", "train"},
}
# A package that pip would install in addition to USER_PACKAGES.
RESOLVED = {
    "pip install -r requirements.txt": "jax-cuda12-plugin",
    "pip install -e '.[cuda12]'": "jax-cuda12-plugin",
    "pip install -e '.[cuda13]'": "jax-cuda13-plugin",
    "pip install -e '.[tpu]'": "libtpu",
    "pip install -e '.[cpu,test]'": "pytest",
}
TEMPORARY = ("uvx --from . modelstock merge BASE FT1 FT2 --out DIR",)
USER_PACKAGES = {
    *("jax", "flax", "optax", "orbax-checkpoint", "transformers", "tensorflow-datasets"),
    *("ml-collections", "chex"),
}
# Lines of the documents that install other projects.
OTHERS = {"tensorboard", "torch==2.13.0 mergekit==0.1.5"}
# Two updates with an angle of 60 degrees: t = 2/3, and the first element of the merge is 0.5.
_MODELS = {"BASE": (0, 0), "FT1": (1, 0), "FT2": (0.5, 0.75**0.5)}
_LIBRARY = """
import numpy as np
from modelstock_jax import model_stock
merged, _ = model_stock({"w": np.zeros(2)}, {"w": np.array([[1.0, 0.0], [0.5, 0.75**0.5]])})
assert abs(float(merged["w"][0]) - 0.5) < 1e-6, merged
"""


class Size(NamedTuple):
    """What a line installs; None for what was not measured."""

    packages: int
    megabytes: float | None
    cpu_seconds: float | None


def documented() -> dict[str, str]:
    """Return {line: document} of all lines that install packages, without placeholders."""
    from tests.docs.blocks import PAGES, commands, named

    found = {}
    for page in PAGES:
        for command in commands(page):
            words = shlex.split(command)
            if words[:3] == ["python", "-m", "pip"]:
                words = words[2:]
            program = Path(words[0]).name
            if program == "uvx" or (program == "pip" and words[1] == "install"):
                found[_line([program, *words[1:]])] = named(page)
    for path in sorted((ROOT / "notebooks").glob("*.py")):
        found |= dict.fromkeys(_notebook_lines(path.read_text()), f"notebooks/{path.name}")
    return found


def _line(words: list[str]) -> str:
    return " ".join(f"'{word}'" if "[" in word else word for word in words)


def _notebook_lines(text: str) -> Iterator[str]:
    """Yield the lines of a cell that runs [*pip, "-e", f".{extra}"], for each text in `extra`."""
    values = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            values[node.targets[0].id] = node.value
    if "pip" in values:
        for node in ast.walk(values["extra"]):
            if isinstance(node, ast.Constant) and str(node.value).startswith("["):
                yield _line(["pip", "install", "-e", f".{node.value}"])


def tracked(folder: str) -> list[str]:
    """Return the files of the repository in a folder, including new files that are not ignored."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", folder]
    found = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True)
    return [name for name in found.stdout.splitlines() if (ROOT / name).is_file()]


def copy_source(target: Path) -> Path:
    """Copy these files, as a clone has them."""
    for name in tracked("."):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target / name)
    return target


class Environment:
    """A fresh virtual environment; its programs run in a folder without settings of the tests."""

    def __init__(self, path: Path, python: str = sys.executable):
        subprocess.run([python, "-m", "venv", path], check=True)
        (self.packages,) = path.glob("lib/python*/site-packages")
        settings = ("PYTHONPATH", "XLA_FLAGS", "JAX_")
        clean = {k: v for k, v in os.environ.items() if not k.startswith(settings)}
        self.bin = path / "bin"
        self._variables = clean | {"PATH": f"{self.bin}:{clean['PATH']}"}
        self._before = self._contents()

    def run(self, command: str, folder: Path, *, fails: bool = False) -> str:
        """Run a command; return its output, or its errors if it is expected to fail."""
        done = subprocess.run(
            shlex.split(command), cwd=folder, env=self._variables, capture_output=True, text=True
        )
        assert (done.returncode != 0) == fails, f"{command}: {done.stdout}\n{done.stderr}"
        return done.stderr if fails else done.stdout

    def install(self, line: str, folder: Path) -> Size:
        """Run a line with pip and measure it."""
        start = _cpu_seconds()
        self.run(f"{line} --quiet --disable-pip-version-check", folder)
        seconds = _cpu_seconds() - start
        count, size = self._contents()
        return Size(count - self._before[0], (size - self._before[1]) / 1e6, seconds)

    def _contents(self) -> tuple[int, int]:
        files = [path for path in self.packages.rglob("*") if path.is_file()]
        return len([*self.packages.glob("*.dist-info")]), sum(p.stat().st_size for p in files)


def _cpu_seconds() -> float:
    """Return the CPU time of the processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def check_merge(environment: Environment, command: str, folder: Path, models: Path) -> None:
    """Run a command in a folder; it merges small models BASE, FT1, FT2 to DIR. Check the result."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    for name, update in _MODELS.items():
        path = models / f"{name.lower()}.safetensors"
        save_file({"w": np.array(update, np.float32)}, path)
        command = command.replace(name, str(path))
    environment.run(command.replace("DIR", str(models / "merged")), folder)
    (path,) = (models / "merged").glob("*.safetensors")
    np.testing.assert_allclose(load_file(path)["w"][0], 0.5, atol=1e-6)


def install_line(extra: str) -> str:
    """Return the line of README that a message about a missing extra names."""
    name = "cpu" if extra == "train" else extra
    return f"pip install -e '.[{name}]'"


def check_installed(environment: Environment, parts: set[str], source: Path, folder: Path) -> None:
    """Merge files; use the other parts that are installed; see the error of those that are not."""
    check_merge(environment, "modelstock merge BASE FT1 FT2 --out DIR", source, folder)
    for command in ("average", "compare"):
        output = f"--out {folder / command}" if command == "average" else ""
        paths = " ".join(str(path) for path in sorted(folder.glob("*.safetensors")))
        environment.run(f"modelstock {command} {paths} {output}", folder)
    if "jax" in parts:
        environment.run(f"python -c {shlex.quote(_LIBRARY)}", folder)
    else:
        assert not (environment.packages / "jax").exists()
    for extra, programs in NEEDS.items():
        for program in programs:
            error = environment.run(program, source, fails=extra not in parts)
            if extra in parts:
                continue
            lines = error.splitlines()
            assert install_line(extra) in lines[-1], f"{program}: {error}"
            assert " -c " in program or len(lines) == 1, f"{program}: {error}"


def check_resolved(environment: Environment, line: str, package: str, source: Path) -> Size:
    """Resolve a line without installing it; it has all packages of users and one more."""
    report = json.loads(environment.run(f"{line} --dry-run --quiet --report -", source))
    names = {item["metadata"]["name"].lower().replace("_", "-") for item in report["install"]}
    missing = (USER_PACKAGES | {package}) - names
    assert not missing, f"{line} lacks {missing}"
    return Size(len(names), None, None)


def measure(line: str, source: Path, new: Callable[[], Environment]) -> Size:
    """Return the size of a line's installation and its CPU time with a warm cache of pip."""
    if line in RESOLVED:
        return check_resolved(new(), line, RESOLVED[line], source)
    new().install(line, source)
    return new().install(line, source)


def main() -> None:
    """Print the rows of the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lines", nargs="*", default=[*INSTALLED, *RESOLVED], metavar="LINE")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environments")
    options = parser.parse_args()
    for line in options.lines:
        with tempfile.TemporaryDirectory() as folder:
            source = copy_source(Path(folder, "source"))

            def new(folder: str = folder) -> Environment:
                return Environment(Path(tempfile.mkdtemp(dir=folder)), options.python)

            size = measure(line, source, new)
            values = [f"{x:.0f}" if x is not None else "" for x in size]
            print(f"| `{line}` | {' | '.join(values)} |", flush=True)


if __name__ == "__main__":
    main()
