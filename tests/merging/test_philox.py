"""Random numbers of elements: the published vectors, any order of elements, NumPy and JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelstock_jax.merging import philox

# From the known answers of Random123, the reference implementation: counter, key, output.
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip
KEY = philox.key(7, 1, "model.layers.0.mlp.up_proj.weight")


def integers(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "output"), VECTORS)
def test_known_answers(counter, key, output):
    words = [np.array(word, np.uint64) for word in integers(counter)]
    assert [int(word) for word in philox.rounds(words, tuple(integers(key)))] == integers(output)


def test_keys():
    """Keys of files that exist: a change of the definition would change their merges."""
    assert philox.key(0, 0, "w") == (746836433, 2868323075)
    keys = {philox.key(s, m, n) for s in range(3) for m in range(3) for n in ("a", "b", "0/a")}
    assert len(keys) == 27


@pytest.mark.parametrize("start", [0, 1, 2**32 - 5, 2**32 * 4 - 3, 2**34 + 1, 2**40])
def test_jax_has_the_same_words(start):
    index = np.arange(start, start + 40, dtype=np.uint64)
    expected = philox.words(index, KEY)
    np.testing.assert_array_equal(philox.range_of_words(start, start + 40, KEY), expected)
    with jax.enable_x64(True):
        found = jax.jit(lambda index: philox.words(index, KEY))(jnp.asarray(index))
        assert found.dtype == jnp.uint64
        np.testing.assert_array_equal(found, expected)


@given(st.integers(0, 2**36), st.lists(st.integers(1, 50), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_pieces_have_the_words_of_the_whole(start, lengths):
    ends = start + np.cumsum([0, *lengths])
    pieces = [
        philox.range_of_words(int(a), int(b), KEY) for a, b in zip(ends, ends[1:], strict=False)
    ]
    np.testing.assert_array_equal(
        np.concatenate(pieces), philox.range_of_words(start, int(ends[-1]), KEY)
    )


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_share_of_words_below_a_bound(probability):
    words = philox.range_of_words(0, 2**20, KEY)
    share = (words < philox.below(np.float64(probability))).mean()
    error = np.sqrt(probability * (1 - probability) / 2**20)
    assert abs(share - probability) <= 5 * error


def test_words_of_two_keys_are_independent():
    a, b = (philox.range_of_words(0, 2**20, philox.key(0, model, "w")) for model in (0, 1))
    both = ((a < 2**31) & (b < 2**31)).mean()
    assert abs(both - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 2**20)
