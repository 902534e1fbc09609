"""Limits of the device for `turns.take_turns`: a large matrix product and a copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Peaks(NamedTuple):
    """Peaks of a device by its data sheet.

    Attributes:
      flops: operations per second of dense matrix products in bfloat16
      bandwidth: bytes per second of the memory
    """

    flops: float
    bandwidth: float


# By the words in the device's name; the first entry with all of its words counts.
DATA_SHEETS = {
    "B200": Peaks(2250e12, 8.0e12),
    "H200 NVL": Peaks(835e12, 4.8e12),
    "H200": Peaks(989e12, 4.8e12),
    "GH200": Peaks(989e12, 4.0e12),
    "H100 PCIe": Peaks(756e12, 2.0e12),
    "H100 NVL": Peaks(835e12, 3.9e12),
    "H100": Peaks(989e12, 3.35e12),
    "A100 40GB": Peaks(312e12, 1.555e12),
    "A100": Peaks(312e12, 2.0e12),
    "L40S": Peaks(362e12, 0.864e12),
    "L4": Peaks(121e12, 0.3e12),
    "A10G": Peaks(70e12, 0.6e12),
}


def data_sheet(device_kind: str) -> Peaks | None:
    """Return the peaks of a device by its name; None if it is not in the table, or a part (MIG).

    Example:
      >>> data_sheet("NVIDIA H100 80GB HBM3").bandwidth, data_sheet("cpu")
      (3350000000000.0, None)
    """
    words = set(device_kind.replace("-", " ").split())
    matches = (peaks for name, peaks in DATA_SHEETS.items() if words >= set(name.split()))
    return None if "MIG" in words else next(matches, None)


def product(dtype: str, side: int = 0) -> tuple[Callable[[int], None], float]:
    """Return a product of two square matrices of random values (zeros are faster).

    Args:
      dtype: dtype of the matrices
      side: size of the matrices; 0 uses one that fills the device

    Returns:
      a function for `take_turns`, and its operations per call
    """
    side = side or (2048 if jax.default_backend() == "cpu" else 8192)
    left, right = (
        jax.random.normal(jax.random.key(seed), (side, side), jnp.dtype(dtype)) for seed in range(2)
    )
    return _repeated(jax.jit(jnp.matmul), left, right), 2.0 * side**3


def copy(size: int) -> tuple[Callable[[int], None], float]:
    """Return a copy: one array is read and another is written.

    Args:
      size: bytes of the float32 array

    Returns:
      a function for `take_turns`, and the bytes moved per call: twice the size
    """
    array = jnp.arange(size // 4, dtype=jnp.float32)
    # XLA can remove a copy, but not a change of sign.
    return _repeated(jax.jit(jnp.negative), array), 2.0 * 4 * (size // 4)


def _repeated(function: Callable[..., jax.Array], *arguments: jax.Array) -> Callable[[int], None]:
    def run(count: int) -> None:
        for _ in range(count):
            result = function(*arguments)
        result.block_until_ready()

    return run
