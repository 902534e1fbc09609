"""Our CLIP compared with torch at published sizes: few layers here, full depth in slow tests."""

from __future__ import annotations

import dataclasses

import pytest

from tests.parity.sizes import SIZES, compare, shrunk

# About a dozen float32 rounding errors in each of up to 24 blocks, embeddings of norm 1.
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
