"""The exported model of a run: directories, model card, and checks before training."""

from __future__ import annotations

import numpy as np
import pytest

from configs import default
from modelstock_jax.errors import UserError
from modelstock_jax.experiment import results
from modelstock_jax.models import checkpoint_io
from modelstock_jax.reporting.tables import make_row
from tests.models import small
from tests.models.all_formats import CHECKPOINT, with_head, with_tokenizer


def config_of(*export_formats: str):
    config = default.get_config()
    config.pretrained = "org/anchor"
    config.export.formats = export_formats
    return config


def test_merged_model_is_exported_in_every_requested_format(tmp_path):
    anchor, tuned = with_tokenizer(tmp_path / "anchor"), with_head()
    rows = [
        make_row("zero_shot", id=51.25, shifts={"v2": 40.0}),
        make_row("periodic_model_stock", id=63.5, shifts={"v2": 44.75}, num_replicas=2, cost=2),
    ]
    ratios = {"weights": {"count": 9, "median": 0.625, "low": 0.5, "high": 0.75}}
    arguments = (
        config_of("open_clip", "hugging_face", "openai"),
        anchor,
        tuned.replica(),
        tuned.labels,
        rows,
        ratios,
        "python launch.py --workdir=runs/b32",
    )
    results.export(tmp_path / "model", *arguments)
    directories = {
        "hugging_face": "model",
        "open_clip": "model_open_clip",
        "openai": "model_openai",
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*directories.values(), "anchor"])
    for name, directory in directories.items():
        loaded = checkpoint_io.load(tmp_path / directory)
        assert (loaded.format, loaded.labels) == (name, tuned.labels)
        assert loaded.checksum == tuned.checksum
        assert checkpoint_io.has_tokenizer(loaded)
        card = (tmp_path / directory / "README.md").read_text()
        for text in (
            "org/anchor",  # The anchor and the checksum of its weights.
            anchor.checksum,
            "Model Stock",  # Method, ratios, accuracies.
            "0.625",
            "63.50",
            "44.75",
            "51.25",
            "python launch.py --workdir=runs/b32",  # Command and versions.
            f"numpy {np.__version__}",
            "modelstock_jax ",
        ):
            assert text in card, text
    # An existing directory is not changed.
    (tmp_path / "model" / "README.md").write_text("edited")
    results.export(tmp_path / "model", *arguments)
    assert (tmp_path / "model" / "README.md").read_text() == "edited"


def test_export_errors_are_raised_before_training():
    with pytest.raises(UserError, match="export.formats: .*'onnx'.*hugging_face"):
        results.check_export(config_of("onnx"), CHECKPOINT)
    with pytest.raises(UserError, match="export.formats: OpenAI.*num_attention_heads .*3"):
        results.check_export(config_of("hugging_face", "openai"), small.checkpoint(small.config()))
    results.check_export(config_of("hugging_face", "open_clip", "openai"), CHECKPOINT)
