"""The cores of a CPU as devices.

XLA splits each operation over the cores and joins them after it. Replicas that have a core each
join at a merge.
"""

from __future__ import annotations

import contextlib
import os

import jax
from ml_collections import ConfigDict

from modelstock_jax.machine import usable_cores

_CPU_DEVICES = "jax_num_cpu_devices"


def use_cores(config: ConfigDict) -> None:
    """Makes CPU devices, one a replica as far as the cores reach.

    Whoever has said how many there are (`XLA_FLAGS`, `JAX_NUM_CPU_DEVICES`) keeps them, as do
    replicas that run one after the other, and one of several processes. Accelerators are not
    touched, nor is a jax that has computed before.

    Args:
      config: of the run.
    """
    said = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    said = said or getattr(jax.config, _CPU_DEVICES) > 0 or jax.distributed.is_initialized()
    if said or config.compute.execution == "map":
        return
    with contextlib.suppress(RuntimeError):
        jax.config.update(_CPU_DEVICES, devices(config.num_replicas, usable_cores()))


def devices(num_replicas: int, cores: int) -> int:
    """The largest divisor of the number of replicas that is not above the cores: no batch is cut.

    >>> [devices(2, 1), devices(2, 64), devices(3, 2), devices(4, 3)]
    [1, 2, 1, 2]
    """
    return max(d for d in range(1, cores + 1) if num_replicas % d == 0)
