"""docs/configuration.md is generated from configs/default.py."""

from __future__ import annotations

import importlib.util

import pytest

from configs import default
from tests.docs.blocks import ROOT


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
    flat = set(default.get_config().to_dict())
    for key, value in default.get_config().to_dict().items():
        if isinstance(value, dict):
            flat.remove(key)
            flat |= _flat(value, f"{key}.")
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
