"""The Python blocks of every page run in order and print what the text says."""

from __future__ import annotations

import ast
import importlib

import numpy as np
import pytest

from modelstock_jax.models import checkpoint_io
from modelstock_jax.models.checkpoint import Checkpoint
from modelstock_jax.models.clip import CLIPConfig
from modelstock_jax.models.config import TextConfig, VisionConfig
from modelstock_jax.models.model import abstract_params
from modelstock_jax.models.preprocessor import Preprocessor
from tests.docs.blocks import PAGES, ROOT, named, python_blocks, run_blocks

WITH_PYTHON = [named(page) for page in PAGES if python_blocks(page)]
# Suite of each page: some take longer, one needs torch.
RUN_BY = {
    "README.md": "tests/docs/test_blocks.py",
    "docs/library.md": "tests/docs/test_library.py",
    "docs/method.md": "tests/docs/test_blocks.py",
    "docs/parity.md": "tests/docs/test_blocks.py",
    "docs/pytorch.md": "tests/parity/test_pytorch.py",
    "docs/questions.md": "tests/docs/test_questions.py",
    "docs/reproduce.md": "tests/parity/test_reproduce.py",
}


def test_every_page_is_run_somewhere():
    assert sorted(RUN_BY) == sorted(WITH_PYTHON)
    for page, test in RUN_BY.items():
        assert page.rpartition("/")[2] in (ROOT / test).read_text(), f"{test} does not name {page}"


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_blocks_import_what_there_is(page):
    for line, text in python_blocks(ROOT / page):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("modelstock_jax"):
                for alias in node.names:
                    known = hasattr(importlib.import_module(node.module), alias.name)
                    assert known or importlib.util.find_spec(f"{node.module}.{alias.name}"), (
                        f"{page}:{line + node.lineno - 1}: no {alias.name}"
                    )


def test_the_readme():
    w0, movement = np.zeros(2, np.float32), np.array([[1, 0], [0.5, 0.75**0.5]], np.float32)
    ran = run_blocks(
        ROOT / "README.md",
        {
            "pretrained": {"w": w0},
            "finetuned_a": {"w": movement[0]},
            "finetuned_b": {"w": movement[1]},
        },
    )
    np.testing.assert_allclose(ran["merged"]["w"], movement.mean(0) * 2 / 3, rtol=1e-6)  # 60 deg.


def test_the_method(capsys):
    """The assertions of the page hold; its output agrees with the text."""
    ran = run_blocks(ROOT / "docs/method.md")
    printed = capsys.readouterr().out
    assert "mean of 3: predicted 7.43, in Table 1 7.44" in printed
    assert float(ran["cos"]) == pytest.approx(0.5, abs=0.01)
    stock, weighted = (
        np.linalg.norm(np.asarray(merge(ran["w0"], ran["noisy"])[0]["kernel"]) - ran["mu"])
        for merge in (ran["model_stock"], ran["weighted_model_stock"])
    )
    assert weighted < 0.97 * stock
    # The noise of both periods requires a smaller ratio than that of the last period alone.
    assert float(ran["stats"].ratio["kernel"]) < float(ran["plain"]) - 0.05


@pytest.mark.slow  # a CLIP's towers, layer by layer
def test_the_page_of_parity(tmp_path, monkeypatch):
    size = dict(hidden_size=12, intermediate_size=24, num_attention_heads=2, num_hidden_layers=4)
    config = CLIPConfig(
        VisionConfig(**size, image_size=12, patch_size=6),
        TextConfig(**size, vocab_size=9, max_position_embeddings=4),
        projection_dim=8,
    )
    rng = np.random.default_rng(0)
    params = _draw(rng, abstract_params(config))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "path/to").mkdir(parents=True)
    pixels = Preprocessor((0.5,) * 3, (0.5,) * 3, image_size=12)
    checkpoint_io.save("path/to/clip", Checkpoint(config, params, pixels))
    images = rng.standard_normal((2, 12, 12, 3)).astype(np.float32)
    ran = run_blocks(ROOT / "docs/parity.md", {"images": images})
    assert ran["layers"]["blocks.block_03.self_attn"].shape == (2, 5, 12)


def _draw(rng, shapes):
    if isinstance(shapes, dict):
        return {name: _draw(rng, shape) for name, shape in shapes.items()}
    return rng.standard_normal(shapes.shape).astype(np.float32)
