"""Random numbers of the elements of a tensor: Philox 4x64-10, equal in NumPy and JAX.

A number depends only on the key and on the index of its element. It is the same in whatever pieces,
by whatever thread and on whatever device the tensor is computed.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from modelstock_jax.merging.geometry import namespace

# Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), table 2.
_ROUNDS = 10
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_INCREMENTS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_PER_COUNTER = 8  # Numbers of 32 bits in the four words of a counter.

Key = tuple[Any, Any]


def key(seed: int, model: int, name: str) -> tuple[int, int]:
    """Return the key of one tensor of one model: 128 bits of the SHA-256 of all three.

    Args:
      seed: seed of the merge
      model: index of the fine-tune, from 0
      name: name of the tensor

    Example:
      >>> key(0, 0, "w") == key(0, 0, "w"), key(0, 0, "w") == key(0, 1, "w")
      (True, False)
    """
    digest = hashlib.sha256(f"{seed}/{model}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


def rounds(counter, key: Key):
    """Return the four words of Philox 4x64-10 for each counter.

    Args:
      counter: four arrays [...] of uint64, NumPy or JAX with 64-bit types
      key: two words: integers, or uint64 scalars of the kind of the counter

    Returns:
      Four arrays [...] of uint64.

    Example:
      >>> zero = np.zeros(1, np.uint64)
      >>> [f"{int(word[0]):x}" for word in rounds((zero,) * 4, (0, 0))][:2]
      ['16554d9eca36314c', 'db20fe9d672d0fdc']
    """
    a, b, c, d = counter
    keys = [np.uint64(k) if isinstance(k, int) else k for k in key]
    with np.errstate(over="ignore"):  # Sums are modulo 2^64.
        for _ in range(_ROUNDS):
            left, right = (_product(x, m) for x, m in zip((a, c), _MULTIPLIERS, strict=True))
            a, b = right[0] ^ b ^ keys[0], right[1]
            c, d = left[0] ^ d ^ keys[1], left[1]
            keys = [k + np.uint64(step) for k, step in zip(keys, _INCREMENTS, strict=True)]
    return a, b, c, d


def _product(x, factor: int):
    """Return the upper and the lower half of the 128 bits of a product."""
    low, shift = np.uint64(2**32 - 1), np.uint64(32)
    factor_low, factor_high = np.uint64(factor % 2**32), np.uint64(factor >> 32)
    x_low, x_high = x & low, x >> shift
    middle = x_high * factor_low
    carry = (x_low * factor_low >> shift) + (middle & low) + x_low * factor_high
    upper = x_high * factor_high + (middle >> shift) + (carry >> shift)
    return upper, x * np.uint64(factor)


def words(index, key: Key):
    """Return the random 32 bits of each element.

    Element i has number i % 8 of counter i // 8 + 1, the lower half of a word first: the order of
    `numpy.random.Philox`.

    Args:
      index: [...] uint64, NumPy or JAX with 64-bit types
      key: from `key`

    Returns:
      [...] uint64, each below 2^32.
    """
    xp, one = namespace(index), np.uint64(1)
    block, zero = (index >> np.uint64(3)) + one, xp.zeros_like(index)
    output = rounds((block, zero, zero, zero), key)
    which, half = index >> one & np.uint64(3), index & one
    word = output[3]
    for i in range(3):  # Not `select`, whose lowering in JAX needs 64-bit types outside.
        word = xp.where(which == i, output[i], word)
    return word >> (half << np.uint64(5)) & np.uint64(2**32 - 1)


def range_of_words(start: int, stop: int, key: Key) -> np.ndarray:
    """Return `words` of the elements from `start` to `stop`, [stop - start] uint32, by NumPy.

    Args:
      start: index of the first element
      stop: end
      key: from `key`

    Example:
      >>> some = range_of_words(3, 9, (1, 2))
      >>> bool((some == words(np.arange(3, 9, dtype=np.uint64), (1, 2))).all())
      True
    """
    first = start // _PER_COUNTER
    generator = np.random.Philox(
        key=np.array(key, np.uint64), counter=np.array([first, 0, 0, 0], np.uint64)
    )
    raw = generator.random_raw((stop - first * _PER_COUNTER + 1) // 2).astype("<u8", copy=False)
    return raw.view("<u4")[start - first * _PER_COUNTER : stop - first * _PER_COUNTER]


def below(probability):
    """Return the bound of the words that occur with a probability: round(probability * 2^32).

    Args:
      probability: in [0, 1], [...], float64

    Returns:
      [...] uint64; a word is below it with that probability, to 2^-33.
    """
    return namespace(probability).rint(probability * 2.0**32).astype(np.uint64)
