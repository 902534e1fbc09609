"""Our CLIP against torch at the sizes that are in use: shallow ones here, true ones when slow."""

from __future__ import annotations

import dataclasses

import pytest

from tests.parity.sizes import SIZES, compare, shrunk

# A dozen float32 roundings in each of up to 24 blocks, of embeddings of norm 1.
TOLERANCE = 2e-6


@pytest.mark.parametrize("name", SIZES)
def test_shallow(name, tmp_path):
    config, size = SIZES[name]
    errors = compare(shrunk(config), size, tmp_path)
    assert max(dataclasses.astuple(errors)) <= TOLERANCE, errors


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_true_size(name, tmp_path):
    errors = compare(*SIZES[name], tmp_path)
    assert max(dataclasses.astuple(errors)) <= TOLERANCE, errors
