"""Our models compared with torch at published sizes: CLIP with few layers, all in slow tests."""

from __future__ import annotations

import dataclasses

import pytest

from tests.parity.sizes import CLIPS, SIZES, compare, shrunk

# About a dozen float32 rounding errors in each of up to 36 blocks; embeddings of norm 1, or the
# largest logit of a classifier.
TOLERANCE = 2e-6


@pytest.mark.parametrize("name", CLIPS)
def test_shallow(name, tmp_path):
    case = CLIPS[name]
    errors = compare(dataclasses.replace(case, config=shrunk(case.config)), tmp_path)
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_true_size(name, tmp_path):
    errors = compare(SIZES[name], tmp_path)
    assert max(errors.values()) <= TOLERANCE, errors
