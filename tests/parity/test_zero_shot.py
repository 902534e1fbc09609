"""Our zero-shot head compared with transformers' torch CLIPModel, on the same directory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import CLIPModel, CLIPTokenizer

from modelstock_jax.models import checkpoint_io
from modelstock_jax.models.tokenizer import build
from modelstock_jax.models.zero_shot import zero_shot_head
from tests.models import small
from tests.models.prompts import CAPTIONS, CLASSES, EOS, TEMPLATES

NAMES = (*CLASSES, "the photo", "font")


@pytest.fixture(scope="module", params=[EOS, 2], ids=["first end of text", "highest id"])
def directory(request, tmp_path_factory):
    """A checkpoint with a tokenizer that transformers opens."""
    root = tmp_path_factory.mktemp("clip")
    size = build(CAPTIONS, root / "tokenizer", context_length=16)
    config = small.config(layers=4, vocab_size=size, eos_token_id=request.param)
    return checkpoint_io.save(root / "model", small.checkpoint(config, root / "tokenizer"))


def by_torch(directory) -> np.ndarray:
    """The kernel [E, K], one class at a time, as in OpenAI's notebook."""
    model = CLIPModel.from_pretrained(directory, attn_implementation="eager").eval()
    tokenizer = CLIPTokenizer.from_pretrained(directory)
    columns = []
    with torch.no_grad():
        for name in NAMES:
            prompts = [template.replace("{}", name) for template in TEMPLATES]
            tokens = tokenizer(prompts, padding="max_length", max_length=16, return_tensors="pt")
            features = model.get_text_features(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            ).pooler_output
            features = features / features.norm(dim=-1, keepdim=True)
            mean = features.mean(dim=0)
            columns.append(mean / mean.norm())
        return (model.logit_scale.exp() * torch.stack(columns, dim=1)).numpy()


def test_the_head_is_torch_s(directory):
    head = zero_shot_head(checkpoint_io.load(directory), NAMES, TEMPLATES, batch_size=4)
    theirs = by_torch(directory)
    scale = np.linalg.norm(theirs, axis=0)
    # 1e-5 of the column norm, exp(logit_scale): float32 towers that differ only in the order of
    # their sums.
    np.testing.assert_allclose(head["kernel"] / scale, theirs / scale, atol=1e-5, rtol=0)
    assert not head["bias"].any()
    # Classes differ by far more, so the comparison can fail.
    assert np.abs(theirs[:, 0] - theirs[:, 1]).max() / scale[0] > 1e-2
