"""A single CPU process creates one device per replica, unless the number is already set."""

from __future__ import annotations

import pytest

from modelstock_jax.machine import usable_cores
from modelstock_jax.training.launcher import num_cpu_devices
from tests.experiment import small_run

PRINT_DEVICES = """
import jax, sys
from configs import glyphs
from modelstock_jax.training.launcher import set_cpu_devices
config = glyphs.get_config()
config.num_replicas, config.compute.replica_mode = int(sys.argv[1]), sys.argv[2]
if sys.argv[3] == "late":
    jax.numpy.ones(2)
set_cpu_devices(config)
print("devices:", jax.device_count())
"""


@pytest.mark.parametrize(
    ("replicas", "replica_mode", "when", "environment", "expected"),
    [
        (2, "auto", "early", {}, num_cpu_devices(2, usable_cores())),
        (2, "vmap", "early", {"JAX_NUM_CPU_DEVICES": "3"}, 3),
        (2, "vmap", "early", {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}, 4),
        (2, "map", "early", {}, 1),
        (2, "vmap", "late", {}, 1),
    ],
)
def test_number_of_devices(replicas, replica_mode, when, environment, expected):
    code, output = small_run.finish(
        str(replicas),
        replica_mode,
        when,
        program=("-c", PRINT_DEVICES),
        environment=environment,
    )
    assert code == 0 and f"devices: {expected}\n" in output, output


def test_no_batch_is_split():
    for replicas in range(1, 9):
        for cores in range(1, 17):
            count = num_cpu_devices(replicas, cores)
            assert count <= cores and replicas % count == 0
            assert not any(replicas % larger == 0 for larger in range(count + 1, cores + 1))
