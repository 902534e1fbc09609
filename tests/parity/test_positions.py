"""Position embeddings at other image sizes compared with torch and transformers' CLIP."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from modelstock_jax.models.compute import DEFAULT_COMPUTE
from modelstock_jax.models.model import image_tower, resize_positions
from modelstock_jax.models.positions import bicubic, interpolate
from tests.models import small
from tests.models.small_models import Case
from tests.parity.reference import pair, pixels

SIZES = [(9, 7), (7, 9), (14, 14), (3, 20), (4, 5), (1, 1), (7, 7), (1, 49)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("new", "antialias"),
    # Not (49, 1) with antialiasing: torch 2.13 resizes a column of patches wrongly, because another
    # order of the two axes gives another result there.
    [*((size, False) for size in (*SIZES, (49, 1))), *((size, True) for size in SIZES)],
)
def test_the_matrices_are_torch_s(new, antialias, dtype):
    grid = torch.randn(7, 7, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))
    theirs = torch.nn.functional.interpolate(
        grid.permute(2, 0, 1)[None],
        size=new,
        mode="bicubic",
        align_corners=False,
        antialias=antialias,
    )[0].permute(1, 2, 0)
    rows, columns = (bicubic(7, size, antialias) for size in new)
    ours = np.einsum("hi,wj,ijd->hwd", rows, columns, grid.double().numpy())
    # Ours is in float64. torch computes positions and weights in the dtype of the grid: errors of a
    # few units in the last place in each of up to 49 products of size 1.
    atol = 1e-13 if dtype == torch.float64 else 3e-6
    np.testing.assert_allclose(ours, theirs.double().numpy(), atol=atol)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return pair(Case(small.config(), ()), tmp_path_factory.mktemp("clip") / "model")


@pytest.mark.parametrize("size", [(30, 24), (24, 24), (12, 48), (6, 96), (36, 36)])
def test_tokens_are_transformers_s(models, size):
    # (12, 48) and (6, 96) have the same number of patches as the config's image, in another shape.
    ours, theirs = models
    images = np.random.default_rng(1).standard_normal((2, *size, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs.vision_model.embeddings(pixels(images), interpolate_pos_encoding=True)
    params = ours.params["image_tower"]
    tokens = image_tower(ours.config, params, images, DEFAULT_COMPUTE).embed(images)
    # Values of 0.1 in float32; torch computes the kernel in float32 too.
    np.testing.assert_allclose(tokens, expected.numpy(), atol=2e-7)


def test_a_resized_model_is_transformers_s_at_that_size(models):
    ours, theirs = models
    _, params = resize_positions(ours.params, ours.config, 36)
    embeddings = theirs.vision_model.embeddings
    expected = embeddings.interpolate_pos_encoding(torch.zeros(1, 37, 96), 36, 36)[0]
    np.testing.assert_allclose(
        params["image_tower"]["position_embedding"], expected.detach().numpy(), atol=1e-7
    )
    same = interpolate(
        jnp.asarray(ours.params["image_tower"]["position_embedding"]), (4, 4), (6, 6)
    )
    np.testing.assert_array_equal(params["image_tower"]["position_embedding"], same)
