"""Random numbers of the elements of a tensor: Philox 4x32-10, equal in NumPy and JAX.

A number depends only on the key and on the index of its element. It is the same in whatever pieces,
by whatever thread and on whatever device the tensor is computed.
"""

from __future__ import annotations

import hashlib

import numpy as np

from modelstock_jax.merging.geometry import namespace

# Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), table 2.
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_WORD = 2**32 - 1
_BLOCK = 2**14  # Counters whose arrays fit the cache of a core.

Key = tuple[int, int]


def key(seed: int, model: int, name: str) -> Key:
    """Return the key of one tensor of one model: 64 bits of the SHA-256 of all three.

    Args:
      seed: seed of the merge
      model: index of the fine-tune, from 0
      name: name of the tensor

    Example:
      >>> key(0, 0, "w") == key(0, 0, "w"), key(0, 0, "w") == key(0, 1, "w")
      (True, False)
    """
    digest = hashlib.sha256(f"{seed}/{model}/{name}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def rounds(counter, key: Key):
    """Return the four words of Philox 4x32-10 for each counter.

    Args:
      counter: four arrays [...] of uint64, each a word below 2^32, NumPy or JAX with 64-bit types
      key: two words

    Returns:
      Four arrays [...] of uint64, each below 2^32.

    Example:
      >>> zero = np.zeros((), np.uint64)
      >>> [f"{int(word):08x}" for word in rounds((zero,) * 4, (0, 0))]
      ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    a, b, c, d = counter
    keys = list(key)
    first, second, shift, word = map(np.uint64, (*_MULTIPLIERS, 32, _WORD))
    for _ in range(_ROUNDS):
        left, right = a * first, c * second
        a, b = (right >> shift) ^ b ^ np.uint64(keys[0]), right & word
        c, d = (left >> shift) ^ d ^ np.uint64(keys[1]), left & word
        keys = [(k + step) & _WORD for k, step in zip(keys, _INCREMENTS, strict=True)]
    return a, b, c, d


def words(index, key: Key):
    """Return the random 32 bits of each element: word `index % 4` of counter `index // 4`.

    Args:
      index: [...] uint64, NumPy or JAX with 64-bit types
      key: from `key`

    Returns:
      [...] uint64, each below 2^32.
    """
    xp = namespace(index)
    block, zero = index >> np.uint64(2), xp.zeros_like(index)
    output = rounds((block & np.uint64(_WORD), block >> np.uint64(32), zero, zero), key)
    return xp.select([index & np.uint64(3) == i for i in range(3)], list(output[:3]), output[3])


def range_of_words(start: int, stop: int, key: Key) -> np.ndarray:
    """Return `words` of the elements from `start` to `stop`, [stop - start], four times as fast.

    Args:
      start: index of the first element
      stop: end
      key: from `key`

    Example:
      >>> some = range_of_words(3, 9, (1, 2))
      >>> bool((some == words(np.arange(3, 9, dtype=np.uint64), (1, 2))).all())
      True
    """
    first, last = start // 4, -(-stop // 4)
    output = np.empty((last - first, 4), np.uint64)
    for a in range(first, last, _BLOCK):
        counter = np.arange(a, min(a + _BLOCK, last), dtype=np.uint64)
        zero = np.zeros_like(counter)
        words = rounds((counter & np.uint64(_WORD), counter >> np.uint64(32), zero, zero), key)
        np.stack(words, axis=-1, out=output[a - first : a - first + len(counter)])
    return output.reshape(-1)[start - 4 * first : stop - 4 * first]


def below(probability):
    """Return the bound of the words that occur with a probability: round(probability * 2^32).

    Args:
      probability: in [0, 1], [...], float64

    Returns:
      [...] uint64; a word is below it with that probability, to 2^-33.
    """
    return namespace(probability).rint(probability * 2.0**32).astype(np.uint64)
