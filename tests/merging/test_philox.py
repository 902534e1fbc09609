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
    ("0 0 0 0", "0 0", "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"),
    (" ".join(["f" * 16] * 4), " ".join(["f" * 16] * 2),
     "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0"),
    ("243f6a8885a308d3 13198a2e03707344 a4093822299f31d0 082efa98ec4e6c89",
     "452821e638d01377 be5466cf34e90c6c",
     "a528f45403e61d95 38c72dbd566e9788 a5a1610e72fd18b5 57bd43b5e52b7fe6"),
]  # fmt: skip
KEY = philox.key(7, 1, "model.layers.0.mlp.up_proj.weight")


def integers(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "output"), VECTORS)
def test_known_answers(counter, key, output):
    words = [np.array([word], np.uint64) for word in integers(counter)]
    assert [int(word[0]) for word in philox.rounds(words, tuple(integers(key)))] == integers(output)


def test_keys():
    """Keys of files that exist: a change of the definition would change their merges."""
    assert philox.key(0, 0, "w") == (12319353802233991633, 11287968907413351584)
    keys = {philox.key(s, m, n) for s in range(3) for m in range(3) for n in ("a", "b", "0/a")}
    assert len(keys) == 27


@pytest.mark.parametrize("start", [0, 1, 7, 2**32 - 5, 2**35 - 3, 2**40])
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
