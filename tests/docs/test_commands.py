"""Every command that a page gives is one that its program takes."""

from __future__ import annotations

import re

import pytest

from tests.docs.blocks import PAGES, ROOT, commands, named, simple_commands
from tests.docs.checks import launch, wrong


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # --config=configs/... is a path from there.


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_command_is_taken(page):
    found = {command: wrong(command) for command in commands(page)}
    assert not any(found.values()), "\n".join(
        f"{named(page)}: {command}: {what}" for command, what in found.items() if what)


def test_so_is_every_command_of_the_configs():
    for path in sorted((ROOT / "configs").glob("*.py")):
        text = path.read_text().replace("\\\\\n", " ")
        for line in re.findall(r"^ *python launch\.py (.*)$", text, re.MULTILINE):
            assert wrong(f"python launch.py {line}") is None, f"{path.name}: {line}"


def test_pages_have_commands():
    """Else the checks above would pass on nothing."""
    counts = {named(page): len(commands(page)) for page in PAGES}
    assert counts["README.md"] > 12 and counts["docs/train_on_imagenet.md"] > 7
    assert counts["docs/merging.md"] > 8 and counts["docs/scale.md"] > 3


@pytest.mark.parametrize(
    ("command", "what"),
    [
        ("python launch.py --config=configs/vitb32.py:strong --config.merge.every=100", None),
        ("JAX_PLATFORMS=cpu python launch.py --num_processes=2", None),
        ("srun --kill-on-bad-exit=1 python launch.py --worker=2", "worker"),
        ("gcloud compute ssh --command='cd x && python launch.py --confg=x'", "confg"),
        ("python launch.py --config.merge.evry=100", "evry"),
        ("python launch.py --config=configs/nowhere.py", "nowhere"),
        ("python launch.py --config=configs/vitb32.py:weak", "weak"),
        ("python launch.py --config.num_replicas=two", "two"),
        ("python launch.py --dryrun", "dryrun"),
        ("modelstock merge BASE FT1 FT2 --out DIR --unit layer", None),
        ("modelstock merge BASE FT1 FT2 --out DIR --units layer", "exit status 2"),
        ("modelstock merg BASE", "exit status 2"),
        ("python -m modelstock_jax.data prepare DIR --set v2 --out OUT", None),
        ("python -m modelstock_jax.data prepare DIR --set v3 --out OUT", "exit status 2"),
        ("python -m modelstock_jax.nothing", "no module"),
        ("python -m studies table1 --dry-run", None),
        ("python -m studies table99", "no study"),
        ("make demo WORKDIR=runs/x", None),
        ("make demos", "no target"),
        ("pip install -e '.[cuda14]'", "no extra"),
        ("pip install -r requirements-gpu.txt", "no file"),
        ("pytest tests/nothing.py", "no file"),
        ("python benchmarks/nothing.py", "no file"),
        ("modelstok merge", "what is"),
    ],
)
def test_a_mistake_is_seen(command, what):
    found = wrong(command)
    assert found is None if what is None else what in (found or ""), found


def test_commands_of_a_line():
    line = "cd <a folder's name> && A=1 python x.py --y=\"(1,2)\" 2>log | tail & # not this"
    assert simple_commands(line) == [
        "cd PLACEHOLDER", "A=1 python x.py '--y=(1,2)' 2", "log", "tail"]


def test_flags_of_one_command_do_not_reach_the_next():
    assert launch(["--config.num_replicas=3", "--mode=eval"]) is None
    assert launch(["--config.num_replicas=x"]) is not None
    assert launch([]) is None
