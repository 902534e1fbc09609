"""Write requirements.txt from pyproject.toml.

python docs/requirements.py
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE, LIST = ROOT / "pyproject.toml", ROOT / "requirements.txt"
_HEAD = """\
# Training on Linux with an NVIDIA GPU (driver for CUDA 12). README.md has the other targets.
# Written by `python docs/requirements.py` from pyproject.toml: edit that file.
"""


def requirements(extra: str, source: str) -> list[str]:
    """Return the requirements of an extra; an extra that it contains is replaced by its own.

    Args:
      extra: name of the extra
      source: text of pyproject.toml
    """
    project = tomllib.loads(source)["project"]
    found = []
    for line in project["optional-dependencies"][extra]:
        inner = re.fullmatch(rf"{project['name']}\[(\w+)\]", line)
        found += requirements(inner[1], source) if inner else [line]
    return found


def text(source: str) -> str:
    """Return requirements.txt for the text of pyproject.toml."""
    lines = requirements("cuda12", source) + tomllib.loads(source)["project"]["dependencies"]
    return _HEAD + "\n".join(sorted(lines, key=lambda line: not line.startswith("jax"))) + "\n"


if __name__ == "__main__":
    LIST.write_text(text(SOURCE.read_text()))
    print(LIST)
