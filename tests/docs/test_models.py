"""The table of docs/models.md agrees with the models of the package."""

from __future__ import annotations

import re

from modelstock_jax.models.config import DualEncoderConfig
from modelstock_jax.models.model import MODELS
from tests.docs.blocks import ROOT


def table() -> dict[str, dict[str, str]]:
    """Return {model_type: {column: cell}} of the first table of the page."""
    page = (ROOT / "docs/models.md").read_text()
    lines = re.search(r"(?:^\|.*\n)+", page, re.MULTILINE)[0].splitlines()
    columns, _, *rows = ([cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines)
    found = (dict(zip(columns, row, strict=True)) for row in rows)
    return {row["model_type"].split("`")[0]: row for row in found}


def test_the_table_has_every_model():
    assert list(table()) == list(MODELS)


def test_its_columns_agree_with_the_code():
    for name, row in table().items():
        config = MODELS[name]
        zero_shot, convolutional = issubclass(config, DualEncoderConfig), config.is_convolutional
        assert row["initial head"].startswith("zero-shot" if zero_shot else "own"), name
        assert row["exported class"].startswith(config.classifier_class or config.base_class), name
        assert row["unit `head"] == ("no" if convolutional else "yes"), name
        assert row["replica_mode=auto"] == ("map" if convolutional else "vmap"), name
        # The base class has no restriction.
        restricted = "multiple_of" in vars(config)
        assert row["image sides"].startswith("multiples" if restricted else "any"), name
