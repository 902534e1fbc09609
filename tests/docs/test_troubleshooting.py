"""The source contains each message that docs/troubleshooting.md quotes."""

from __future__ import annotations

import numpy as np
import pytest

from modelstock_jax import NonFiniteError, UserError, model_stock
from modelstock_jax.checkpoint_merge.cli import main
from modelstock_jax.models.model import config_from_dict
from tests.docs.blocks import ROOT, fenced
from tests.docs.checks import launch
from tests.docs.messages import known, templates

PAGE = ROOT / "docs/troubleshooting.md"


def quoted() -> list[str]:
    """One message per line; indented lines, and the one after them, belong to the line above."""
    messages: list[str] = []
    for _, language, block in fenced(PAGE):
        if language == "text":
            lines = block.splitlines()
            for before, line in zip(["", *lines], lines, strict=False):
                if line.startswith(" ") or before.startswith(" "):
                    messages[-1] += "\n" + line
                else:
                    messages.append(line)
    return messages


@pytest.fixture(scope="module")
def patterns():
    return templates()


def test_every_message_is_in_the_source(patterns):
    """The whole message matches: only values of placeholders are left over."""
    assert len(quoted()) > 30
    for message in quoted():
        parts, rest = known(message, patterns), message
        assert parts, message
        for part in parts:
            rest = rest.replace(part, "")
        assert len(rest) < 120, message


def test_a_message_of_another_wording_is_not(patterns):
    assert not known("mesh.data=3 does not cut batch_size=128", patterns)


def said(page_line: str) -> str:
    """The quoted message with this beginning."""
    (message,) = [m for m in quoted() if m.startswith(page_line)]
    return message


def test_some_of_them_as_they_are_said(capsys, monkeypatch):
    """Messages that are cheap to provoke, word for word."""
    monkeypatch.chdir(ROOT)
    assert launch(["--config=configs/vitb32.py:weak"]).endswith(
        said("error: flag --config=configs/vitb32.py").partition("weak: ")[2]
    )
    for page_line, model_type in (("./llama/", "llama"), ("./naflex/", "siglip2")):
        with pytest.raises(UserError) as error:
            config_from_dict({"model_type": model_type})
        assert str(error.value) == said(page_line).partition(": ")[2]
    w0 = {"w": np.ones((2, 2), np.float32)}
    wrong = {
        "finetuned has no": w0,
        "this merge": {"w": np.ones((1, 2, 2), np.float32)},
        "pretrained and": {"v": np.ones((2, 2, 2), np.float32)},
    }
    for beginning, finetuned in wrong.items():
        with pytest.raises(UserError) as error:
            model_stock(w0, finetuned)
        assert str(error.value) == said(beginning)
    with pytest.raises(NonFiniteError) as error:
        model_stock(w0, {"w": np.stack([w0["w"], np.full((2, 2), np.nan, np.float32)])})
    assert str(error.value) == said("replica 1 (counted")
    assert main(["merge", "./base", "./ft1", "./ft2"]) == 1
    assert capsys.readouterr().err.strip() == said("error: --out DIR")
    with pytest.raises(SystemExit):
        main(["merge", "a", "b", "c", "--units", "layer"])
    assert capsys.readouterr().err.strip() == said("error: unknown option")
