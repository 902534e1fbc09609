"""The strict settings of tests/conftest.py and pyproject.toml are in force."""

import warnings

import jax.numpy as jnp
import pytest


def test_no_silent_rank_promotion():
    with pytest.raises(ValueError, match="rank promotion|rank_promotion"):
        jnp.ones((2, 3)) + jnp.ones(3)


def test_warnings_are_errors():
    with pytest.raises(UserWarning):
        warnings.warn("made up", UserWarning, stacklevel=1)


def test_float32_is_the_default():
    assert jnp.ones(1).dtype == jnp.float32
