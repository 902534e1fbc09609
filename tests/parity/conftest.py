"""Models that several files compare, opened once; files in this directory that are not tests."""

from __future__ import annotations

import functools

import pytest

# A program for a separate interpreter; --doctest-modules would import it.
collect_ignore = ["open_clip_reader.py"]


@pytest.fixture(scope="session")
def small_pair(tmp_path_factory):
    """Name of a case -> our checkpoint and transformers' model of the same directory."""
    from tests.models.small_models import CASES
    from tests.parity.reference import pair

    @functools.cache
    def opened(name):
        return pair(CASES[name], tmp_path_factory.mktemp("model") / "model")

    return opened
