"""transformers opens merged directories: a Llama-shaped model generates, a CLIP embeds."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, CLIPModel

from modelstock_jax.checkpoint_merge.cli import main
from modelstock_jax.models.checkpoint_io import save
from modelstock_jax.tensor_files.reader import TensorFiles
from tests.checkpoint_merge.small import LLAMA, llama, moved, weights
from tests.checkpoint_merge.small import save as write
from tests.models import small

IDS = torch.tensor([[1, 5, 7, 9]])


def opened(kind, directory, **how):
    model, report = kind.from_pretrained(
        directory, attn_implementation="eager", output_loading_info=True, **how
    )
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.parametrize("options", [
    [], ["--max-shard-size", "4KB"], ["--unit", "head"],
    ["--unit", "block", "--method", "model-stock"],
])  # fmt: skip
def test_llama_generates(tmp_path, options):
    paths = [str(path) for path in llama(tmp_path)]
    assert main(["merge", *paths, "--out", str(tmp_path / "out"), *options]) == 0
    model = opened(AutoModelForCausalLM, tmp_path / "out")
    files = TensorFiles(tmp_path / "out")
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), files[name])
    ids = model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert ids.shape == (1, 8)
    logits = {str(p): opened(AutoModelForCausalLM, p)(IDS).logits.detach() for p in paths}
    base, merged = logits[paths[0]], model(IDS).logits.detach()
    # The output differs from that of the base, but less than that of either fine-tune.
    moves = [(logits[p] - base).norm() for p in paths[1:]]
    assert 0 < (merged - base).norm() < max(moves)


def test_transformers_reads_the_dtype(tmp_path):
    paths = [str(path) for path in llama(tmp_path)]
    out = tmp_path / "out"
    assert main(["merge", *paths, "--out", str(out), "--dtype", "bfloat16"]) == 0
    assert AutoConfig.from_pretrained(out).dtype == torch.bfloat16
    model = opened(AutoModelForCausalLM, out, dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(model(IDS).logits).all()


def test_tied_embeddings_stay_tied(tmp_path):
    config = LLAMA | {"tie_word_embeddings": True}
    shapes = {n: a.shape for n, a in weights_of(tmp_path).items() if n != "lm_head.weight"}
    base = weights(shapes)
    paths = [str(write(tmp_path / f"tied{i}", tensors, config))
             for i, tensors in enumerate([base, moved(base, 1), moved(base, 2)])]  # fmt: skip
    assert main(["merge", *paths, "--out", str(tmp_path / "out")]) == 0
    assert "lm_head.weight" not in TensorFiles(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    model = opened(AutoModelForCausalLM, tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def weights_of(root):
    return dict(TensorFiles(llama(root / "untied")[0]))


def test_clip_embeds(tmp_path):
    config, paths = small.config(), []
    for seed in range(3):
        tree = small.checkpoint(config, seed=0)
        other = small.perturbed(config, seed + 1)
        if seed:
            tree.params.update(_mixed(tree.params, other, 0.05))
        paths.append(str(save(tmp_path / str(seed), tree)))
    assert main(["merge", *paths, "--out", str(tmp_path / "out"), "--unit", "layer"]) == 0
    models = [opened(CLIPModel, path) for path in (*paths, tmp_path / "out")]
    pixels = torch.from_numpy(small.images(4).transpose(0, 3, 1, 2).copy())
    ids = torch.from_numpy(small.ids(4)).long()
    with torch.no_grad():
        images = [m(pixel_values=pixels, input_ids=ids).image_embeds for m in models]
    base, *tuned, merged = images
    assert torch.isfinite(merged).all()
    assert 0 < (merged - base).norm() < max((t - base).norm() for t in tuned)


def _mixed(tree, other, share):
    if isinstance(tree, dict):
        return {k: _mixed(tree[k], other[k], share) for k in tree}
    return ((1 - share) * tree + share * other).astype(np.float32)
