"""The sentence encoder of the studies against `BertModel` of transformers, with random weights."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from studies.sentences import encoder, texts

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=encoder.NUM_HEADS,
        intermediate_size=96,
        max_position_embeddings=texts.LENGTH,
        layer_norm_eps=1e-12,
    )
    model = BertModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # Also biases and norms, which start at 0 and 1.
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def tokens():
    rng = np.random.default_rng(0)
    made = rng.integers(1, 100, (6, texts.LENGTH)).astype(np.int32)
    for row, length in enumerate((32, 31, 17, 16, 5, 1)):
        made[row, length:] = texts.PADDING
    return made


def torch_embeddings(bert, tokens):
    mask = torch.tensor(tokens != texts.PADDING)
    states = bert(torch.tensor(tokens).long(), attention_mask=mask.long()).last_hidden_state
    pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return torch.nn.functional.normalize(pooled, dim=-1)


def params_of(bert):
    return encoder.from_hugging_face({n: t.numpy() for n, t in bert.state_dict().items()})


def test_embeddings(bert, tokens):
    with torch.no_grad():
        expected = torch_embeddings(bert, tokens).numpy()
    with jax.numpy_rank_promotion("allow"):
        found = jax.jit(encoder.encode)(params_of(bert), tokens)
    # Unit vectors: a few roundings of float32 in each of three layers.
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_gradients(bert, tokens):
    direction = np.random.default_rng(1).normal(size=(len(tokens), 48)).astype(np.float32)
    bert.zero_grad()
    (torch_embeddings(bert, tokens) * torch.tensor(direction)).sum().backward()
    with jax.numpy_rank_promotion("allow"):
        grads = jax.grad(lambda p: (encoder.encode(p, tokens) * direction).sum())(params_of(bert))
    named = {n: p.grad.numpy() for n, p in bert.named_parameters() if p.grad is not None}
    expected = encoder.from_hugging_face(named)
    for (path, found), reference in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(expected), strict=True
    ):
        # Sums over 102 tokens in another order, relative to the largest element of the tensor. Key
        # biases have no gradient (softmax is shift-invariant); theirs is rounding, about 1e-9.
        scale = max(np.abs(reference).max(), 1e-3)
        np.testing.assert_allclose(found / scale, reference / scale, atol=2e-4, err_msg=str(path))
