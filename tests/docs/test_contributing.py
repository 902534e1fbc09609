"""The three examples of CONTRIBUTING.md are patches of this tree: apply and test them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, fenced

PAGE = ROOT / "CONTRIBUTING.md"
# Title of the example -> tests to run in the patched tree.
EVERYWHERE = "tests/test_layering.py"
TRIED = {
    "A merge method": [
        "tests/merging/test_every_merge.py",
        "tests/test_registry.py",
        "tests/docs/test_library.py",
        "modelstock_jax/merging/baselines.py",
        EVERYWHERE,
        "-k",
        "balanced or share or table_names or this_tree or public_name",
    ],
    "A shift set": [
        "tests/data/test_imagenet_sets.py",
        "tests/docs/test_configuration.py",
        EVERYWHERE,
    ],
    "A model": [
        "tests/models/test_pool_mixer.py",
        "modelstock_jax/models/pool_mixer.py",
        EVERYWHERE,
        "-k",
        "pool_mixer or this_tree",
    ],
}


def patches() -> dict[str, str]:
    """Title -> its diff blocks, as one patch."""
    text = PAGE.read_text()
    starts = [
        (text.count("\n", 0, found.start()) + 1, found[1])
        for found in re.finditer(r"^## (.*)$", text, re.MULTILINE)
    ]
    made: dict[str, str] = {}
    for line, language, block in fenced(PAGE):
        if language == "diff":
            title = next(title for start, title in reversed(starts) if start < line)
            made[title] = made.get(title, "") + block
    return made


def apply(patch: str, tree: Path, *options: str) -> None:
    """One line of context is enough; a context line that does not match is an error."""
    done = subprocess.run(
        ["git", "apply", "-C1", *options, "-"],
        cwd=tree,
        text=True,
        input=patch,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the files that the examples change and run."""
    copy = tmp_path_factory.mktemp("tree")
    without = shutil.ignore_patterns("__pycache__", ".*")
    folders = ("modelstock_jax", "studies", "tests", "configs", "docs", "notebooks", "benchmarks")
    for name in folders:
        shutil.copytree(ROOT / name, copy / name, ignore=without)
    for name in (
        "pyproject.toml",
        "launch.py",
        "Makefile",
        *(path.name for path in ROOT.glob("*.md")),
        *(path.name for path in ROOT.glob("requirements*.txt")),
    ):
        shutil.copy(ROOT / name, copy / name)
    return copy


def test_there_are_three():
    assert list(patches()) == list(TRIED)


@pytest.mark.parametrize("title", TRIED)
def test_the_patch_applies(title):
    apply(patches()[title], ROOT, "--check")


@pytest.mark.slow  # a tree of its own, and programs that are compiled in it
@pytest.mark.parametrize("title", TRIED)
def test_its_tests_pass(title, tree):
    apply(patches()[title], tree)
    try:
        env = os.environ | {"PYTHONPATH": str(tree)}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, *TRIED[title]],
            cwd=tree,
            env=env,
            text=True,
            capture_output=True,
            check=False,
            timeout=500,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
        assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 2, done.stdout
        where = subprocess.run(
            [sys.executable, "-c", "import modelstock_jax; print(modelstock_jax.__file__)"],
            cwd=tree,
            env=env,
            text=True,
            capture_output=True,
            check=True,
        ).stdout
        assert where.startswith(str(tree)), "the tests ran on another tree"
        lint = subprocess.run(
            [sys.executable, "-m", "ruff", "check", "."],
            cwd=tree,
            text=True,
            capture_output=True,
            check=False,
        )
        assert lint.returncode == 0, lint.stdout
    finally:
        apply(patches()[title], tree, "--reverse")
