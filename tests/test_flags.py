"""What is typed wrong after `python launch.py` is said in one line, at once."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch.py"


@pytest.mark.parametrize(("argument", "said"), [
    ("--config.num_replica=3", " num_replica;.* num_replicas"),
    ("--config.merge.evry=3", " merge.evry;.* merge.every"),
    ("--config.foo=3", " foo .*docs/configuration.md"),
    ("--config.optimizer=sgd", "--config.optimizer .*group"),
    ("--config.epochs=two", r"--config.epochs=two: .*int\(\)"),
    ("--config=configs/vitl41.py", " configs/vitl41.py in "),
    ("--config=configs/vitl41.py", "configs/vitl41.py .*configs/vitl14.py"),
    ("--config=/nowhere.py", "--config: .* /nowhere.py "),
    ("--config=configs/vitl14.py:strnog", ":strnog.*:plain, :strong"),
    ("--confg=configs/vitl14.py", "confg.*: config"),
    ("--checkpoint=runs/b32/model", "--mode=eval --checkpoint=runs/b32/model"),
])  # fmt: skip
def test_a_mistake_is_one_line(argument, said):
    ran = subprocess.run(
        [sys.executable, LAUNCH, "--workdir=/dev/null/nowhere", argument],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (1, "", 1)
    assert ran.stderr.startswith("error: ") and "Errno" not in ran.stderr
    assert re.search(said, ran.stderr)


def test_help_tells_of_the_config():
    ran = subprocess.run(
        [sys.executable, LAUNCH, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert "--config.epochs=4" in ran.stdout and "docs/configuration.md" in ran.stdout


def test_a_run_is_written_by_its_configs_name(tmp_path):
    """Else the second experiment would lie in the workdir of the first."""
    (tmp_path / "own.py").write_text("from configs.glyphs import get_config\n")
    (tmp_path / "runs").touch()
    ran = subprocess.run(
        [sys.executable, LAUNCH, "--config=own.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 1 and "--workdir=runs/own: " in ran.stderr


def test_what_was_typed_of_the_config_can_be_typed_again():
    say = "import sys; from modelstock_jax.flags import *; parse(sys.argv); "
    say += "print(config_arguments(sys.argv[1:]))"
    typed = [
        "fig1",
        "--config",
        "configs/glyphs.py",
        "--config.compute.remat",
        "fig2",
        "--noconfig.data.check_counts",
        "--config.seed",
        "3",
        "--config.data.name=glyphs",
    ]
    ran = subprocess.run(
        [sys.executable, "-c", say, *typed], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    kept = [
        "--config=configs/glyphs.py",
        "--config.compute.remat",
        "--noconfig.data.check_counts",
        "--config.seed=3",
        "--config.data.name=glyphs",
    ]
    assert ran.stdout == f"{kept}\n", ran.stderr
