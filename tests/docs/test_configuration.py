"""docs/configuration.md is generated from configs/default.py."""

from __future__ import annotations

import importlib.util
import re
import shlex

import pytest

from configs import default
from tests.docs.blocks import PAGES, ROOT, named
from tests.docs.checks import launch


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("configuration", ROOT / "docs/configuration.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_is_current(generator):
    text = generator.page(generator.SOURCE.read_text())
    assert generator.PAGE.read_text() == text, "run `python docs/configuration.py`"


def test_every_option_is_listed_with_a_meaning(generator):
    listed = {}
    for group in generator.groups(generator.SOURCE.read_text()):
        for entry in group.entries:
            for name, default_text in entry.options:
                listed[name] = (entry.meaning or group.meaning, default_text)
    flat = _flat(default.get_config().to_dict(), "")
    covered = {
        name
        for name in flat
        if name in listed or name.startswith(("data.paths.", "pretrain.clip."))
    }
    assert covered == flat
    assert listed.keys() - flat == {"data.paths", "pretrain.clip"}
    assert not [name for name, (meaning, _) in listed.items() if len(meaning) < 4]
    assert listed["checkpoint.save_every_steps"][1] == "`500`"
    assert listed["mesh.fsdp_min_size"][1] == "`262144`"


def _flat(tree, prefix):
    return {
        name
        for key, value in tree.items()
        for name in (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}"}
        )
    }


def test_option_shares_only_the_comment_of_the_line_directly_above(generator):
    top, group = generator.groups(
        "def get_config():\n    config = ConfigDict()\n    # First.\n    config.a = 1\n"
        "    config.b = 2\n\n    config.c = 3\n    # A group,\n    # of one.\n"
        "    config.d = ConfigDict()\n    config.d.e = 2**3\n    return config\n"
    )
    assert [(entry.options, entry.meaning) for entry in top.entries] == [
        ((("a", "`1`"), ("b", "`2`")), "First."),
        ((("c", "`3`"),), ""),
    ]
    assert group == ("d", "A group, of one.", (((("d.e", "`8`"),), ""),))


def unknown_options(text: str) -> list[str]:
    """Options in `code` that do not exist: `--config.a.b`, its value, or `a.b` of a known group."""
    options = default.get_config().to_dict()
    groups = {name for name, value in options.items() if isinstance(value, dict)}
    found = []
    for code in re.findall(r"`([^`\n]+)`", text):
        if code.startswith("--config."):
            found += [word for word in shlex.split(code) if _is_wrong(options, word)]
        elif re.fullmatch(r"[a-z_]+(\.[a-z_]+[0-9]?)+", code) and not code.endswith(".py"):
            is_option = code.partition(".")[0] in groups
            found += [code] if is_option and not _exists(options, code) else []
    return found


def _is_wrong(options: dict, argument: str) -> bool:
    name, _, value = argument.partition("=")
    if not name.startswith("--config."):  # Of another program.
        return False
    if value and not value.isupper():  # The reader replaces a value in capitals, such as N.
        return launch([argument]) is not None
    return not _exists(options, name.removeprefix("--config."))


def _exists(options: dict, name: str) -> bool:
    for part in filter(None, name.split(".")):
        if not isinstance(options, dict) or part not in options:
            return False
        options = options[part]
    return True


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=named)
def test_pages_name_options_that_exist(page):
    """The changelog has old names; CONTRIBUTING.md adds an option, whose test runs this one."""
    added = {"data.paths.paintings"} if page.name == "CONTRIBUTING.md" else set()
    assert set(unknown_options(page.read_text())) <= added


def test_options_that_do_not_exist_are_seen():
    good = ["--config.", "--config.epochs=3", "--config.epochs=N", "--config.merge", "optimizer.b1"]
    good += ["--config.epochs=3 --steps=1", "--config.data.shifts=\"('v2',)\"", "merge.py"]
    assert not unknown_options(" ".join(f"`{code}`" for code in good))
    bad = ["--config.epoch=3", "--config.epochs=many", "--config.merge.evry", "optimizer.beta"]
    assert unknown_options(" ".join(f"`{code}`" for code in bad)) == bad
