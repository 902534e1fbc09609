"""Run the snippets of docs/reproduce.md unchanged, on random weights."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import numpy as np
import torch

from modelstock_jax.models import checkpoint_io
from modelstock_jax.models.convert import main
from modelstock_jax.models.param_mapping import flatten
from tests.models import small
from tests.parity.test_export import CONFIG, fine_tuned

PAGE = (Path(__file__).parents[2] / "docs" / "reproduce.md").read_text()
BASE = "openai/clip-vit-base-patch32"


def snippets() -> list[str]:
    """The Python code of the page, dedented."""
    found = re.findall(r"   ```python\n(.*?)   ```\n", PAGE, re.DOTALL)
    return [re.sub(r"^   ", "", text, flags=re.MULTILINE) for text in found]


def pickled(path: Path, seed: int) -> None:
    """A checkpoint as the Model Soups code saves it: several GPUs, no text transformer."""
    tuned = fine_tuned()
    params = {**tuned.params, "image_tower": small.perturbed(CONFIG, seed)["image_tower"]}
    leaves = dict(flatten(params))
    state = {
        f"module.model.{row.name}": torch.from_numpy(np.array(row.write(leaves)))
        for row in CONFIG.rows("openai")
        if not row.name.startswith("transformer.")
    }
    state["module.classification_head.weight"] = torch.from_numpy(tuned.head["kernel"] + seed).T
    state["module.classification_head.bias"] = torch.from_numpy(tuned.head["bias"] + seed)
    torch.save({"state_dict": state}, path)


def test_the_steps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    to_safetensors, merge = snippets()
    clip = small.checkpoint(CONFIG, fine_tuned().directory)
    checkpoint_io.save("clip", clip)
    for seed in (1, 2):
        pickled(tmp_path / f"ft{seed}.pt", seed)
    exec(compile(to_safetensors, "step 1", "exec"), {})
    assert f"--base {BASE}" in PAGE and "--to hugging_face --out $name" in PAGE
    for name in ("ft1", "ft2"):
        main([f"{name}.safetensors", "--base", "clip", "--to", "hugging_face", "--out", name])
    # A tiny model and three names replace the published model and lists.
    names = "from modelstock_jax.data.imagenet import CLASS_NAMES, TEMPLATES\n"
    assert merge.count(names) == 1 and merge.count(f'"{BASE}"') == 1
    small_lists = "CLASS_NAMES, TEMPLATES = ('cat', 'dog', 'cat'), ('a {}',)\n"
    merge = merge.replace(names, small_lists).replace(f'"{BASE}"', '"clip"')
    exec(compile(merge, "step 3", "exec"), {})
    base, merged = checkpoint_io.load("base"), checkpoint_io.load("merged")
    assert merged.labels == ("cat", "dog", "cat")
    for name in ("text_tower", "logit_scale"):
        jax.tree.map(np.testing.assert_array_equal, merged.params[name], clip.params[name])
    tuned = [checkpoint_io.load(name).replica() for name in ("ft1", "ft2")]
    for path, start in flatten(base.replica()):
        leaves = [dict(flatten(tree))[path] for tree in (merged.replica(), *tuned)]
        found, mean = leaves[0], (leaves[1] + leaves[2]) / 2
        # The merged kernel is on the line from the anchor to the mean, between them.
        ratio = ((found - start) * (mean - start)).sum() / ((mean - start) ** 2).sum()
        np.testing.assert_allclose(found, start + ratio * (mean - start), atol=2e-5, rtol=0)
        assert -1e-6 <= ratio <= 1 + 1e-6
        if path[-1] == "kernel":
            assert 0.05 < ratio < 0.999, path
