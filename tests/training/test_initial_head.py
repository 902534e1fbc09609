"""Whether a checkpoint's classifier has the classes of the data."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from modelstock_jax.models.checkpoint import Checkpoint
from modelstock_jax.training.classifier import head_difference

LONG = [f"class {i}" for i in range(120)]


def difference(labels: list[str] | None, names: list[str], count: int | None = None) -> str | None:
    count = len(labels or names) if count is None else count
    checkpoint: Any = SimpleNamespace(head={"bias": np.zeros(count)}, labels=labels)
    return head_difference(cast(Checkpoint, checkpoint), names)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["cat", "dog"], ["cat", "dog"]),
        (["Cat", "hot_dog"], ["cat", "hot dog"]),
        (["tench, Tinca tinca", "goldfish"], ["tench", "Carassius auratus, goldfish"]),
        (["C", "C++"], ["C", "C++"]),
        (["+", "-"], ["+", "-"]),
        (["crane", "crane"], ["crane", "crane"]),  # as in ImageNet's list
        (None, ["cat", "dog"]),
        ([*LONG[:70], *(f"other words {i}" for i in range(50))], LONG),
    ],
)
def test_these_classes_agree(labels, names):
    assert difference(labels, names) is None


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        (["cat", "dog", "owl"], ["cat", "dog"], "3 classes.* 2"),
        (["dog", "cat"], ["cat", "dog"], "class 0 .*'dog'.*'cat'"),
        (["cat", "dog"], ["cat", "wolf"], "class 1 .*'dog'.*'wolf'"),
        (["C", "C++"], ["C++", "C"], "class 0"),
        (["+", "-"], ["-", "+"], "class 0"),
        (["-1", "1"], ["1", "-1"], "class 0"),
        ([*LONG[1:], LONG[0]], LONG, "class 0"),
        # Two classes of many exchanged, with synonyms in both lists.
        (
            [f"{name}, alias {name}" for name in [LONG[1], LONG[0], *LONG[2:]]],
            [f"{name}, alias {name}" for name in LONG],
            "class 0 ",
        ),
        ([*LONG[:50], *(f"other words {i}" for i in range(70))], LONG, "class 50"),
    ],
)
def test_these_classes_differ(labels, names, message):
    found = difference(labels, names)
    assert found is not None and re.search(message, found), found
