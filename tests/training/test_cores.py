"""One process on a CPU takes its cores as devices, where nobody has said otherwise."""

from __future__ import annotations

import pytest

from modelstock_jax.machine import usable_cores
from modelstock_jax.training.launcher import num_cpu_devices
from tests.experiment import small_run

SAY = """
import jax, sys
from configs import glyphs
from modelstock_jax.training.launcher import use_cores
config = glyphs.get_config()
config.num_replicas, config.compute.replica_mode = int(sys.argv[1]), sys.argv[2]
if sys.argv[3] == "late":
    jax.numpy.ones(2)
use_cores(config)
print("devices:", jax.device_count())
"""


@pytest.mark.parametrize(
    ("replicas", "execution", "when", "said", "expected"),
    [
        (2, "auto", "early", {}, num_cpu_devices(2, usable_cores())),
        (2, "vmap", "early", {"JAX_NUM_CPU_DEVICES": "3"}, 3),
        (2, "vmap", "early", {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}, 4),
        (2, "map", "early", {}, 1),
        (2, "vmap", "late", {}, 1),
    ],
)
def test_devices_of_a_process(monkeypatch, replicas, execution, when, said, expected):
    code, output = small_run.finish(
        str(replicas), execution, when, program=("-c", SAY), environment=said
    )
    assert code == 0 and f"devices: {expected}\n" in output, output


def test_no_batch_is_cut():
    for replicas in range(1, 9):
        for cores in range(1, 17):
            count = num_cpu_devices(replicas, cores)
            assert count <= cores and replicas % count == 0
            assert not any(replicas % more == 0 for more in range(count + 1, cores + 1))
