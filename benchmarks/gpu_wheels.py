"""Wheels that `make gpu` installs on a machine without a network.

    make gpu-wheels     # with a network: downloads gpu_wheels.txt to benchmarks/wheels

The wheels are for Python 3.12 on Linux (x86-64). Copy the folder with the repository. `make gpu`
installs those of the packages that its interpreter lacks to a temporary directory.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "wheels"
LIST = Path(__file__).resolve().with_name("gpu_wheels.txt")
MAX_MEGABYTES = 40
# Packages of gpu_wheels.txt that this project imports; the others are their requirements.
IMPORTED = (
    *("array_record", "grain", "huggingface_hub", "matplotlib", "ml_collections", "pillow"),
    *("simplejpeg", "tensorboardX", "tokenizers", "transformers", "zlib-ng"),
)
PYTHON = "3.12"
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 26, 24, 17)] + [
    "manylinux2014_x86_64", "manylinux1_x86_64", "linux_x86_64",
]  # fmt: skip


def requirements() -> list[str]:
    """Return the lines NAME==VERSION of gpu_wheels.txt."""
    lines = (line.partition("#")[0].strip() for line in LIST.read_text().splitlines())
    return [line for line in lines if line]


def missing() -> list[str]:
    """Return the lines of the packages that this interpreter lacks.

    If it has all packages that are imported here, it has what they need, perhaps under other names.
    """

    def is_missing(line: str) -> bool:
        try:
            importlib.metadata.version(line.partition("==")[0])
        except importlib.metadata.PackageNotFoundError:
            return True
        return False

    if not any(map(is_missing, IMPORTED)):
        return []
    return [line for line in requirements() if is_missing(line)]


def install_missing(target: Path) -> Path | None:
    """Install what this interpreter lacks to a directory for PYTHONPATH; None if that is nothing.

    A failure prints a warning: most parts of gpu.py need few of the packages.
    """
    names = missing()
    if not names:
        return None
    error = f"{FOLDER} does not exist; run 'make gpu-wheels' with a network and copy it here"
    if FOLDER.is_dir():
        # --target and not a virtual environment, which does not see the packages of another one.
        error = _pip(
            "install", "--no-index", "--no-deps", "--no-compile", f"--find-links={FOLDER}",
            f"--target={target}", *names,
        )  # fmt: skip
    if error:
        print(f"warning: cannot install {', '.join(names)}: {error}", file=sys.stderr, flush=True)
    return target


def _pip(command: str, *arguments: str) -> str:
    """Run pip; return the last line of its error, or ""."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", command, "--quiet", "--disable-pip-version-check",
         *arguments],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    if not done.returncode:
        return ""
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def download(folder: Path) -> float:
    """Download the wheels to a new folder; return their size in MB."""
    shutil.rmtree(folder, ignore_errors=True)
    compiled = ["--implementation=cp", *(f"--platform={name}" for name in PLATFORMS)]
    # The wheel without compiled code is a quarter of the size.
    pure = ["--implementation=py", "--abi=none", "--platform=any"]
    lines = requirements()
    small = [line for line in lines if line.startswith("fonttools==")]
    for options, names in ((compiled, [x for x in lines if x not in small]), (pure, small)):
        error = _pip(
            "download", "--no-deps", "--only-binary=:all:", f"--python-version={PYTHON}",
            *options, f"--dest={folder}", *names,
        )  # fmt: skip
        if error:
            sys.exit(f"error: pip download failed: {error}")
    return sum(path.stat().st_size for path in folder.glob("*.whl")) / 1e6


def main() -> None:
    """Run the command line."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    size = download(FOLDER)
    if size > MAX_MEGABYTES:
        sys.exit(f"error: the wheels have {size:.1f} MB, more than {MAX_MEGABYTES} MB")
    print(f"{len(requirements())} wheels, {size:.1f} MB, in {FOLDER}")


if __name__ == "__main__":
    main()
