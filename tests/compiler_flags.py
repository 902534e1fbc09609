"""Flags of XLA that halve the time of compiling.

The programs of the tests compile for longer than they run. `make test` and `make test-fast` set
FAST_COMPILATION; the slow tests, and a plain `pytest`, compile as users do.
"""

from __future__ import annotations

import os
from importlib.metadata import version

QUICK = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_parallel_codegen_split_count=1"
)
if version("jaxlib").startswith("0.10."):
    # The emitters of fusions take half of the rest. From 0.11, XLA has no other way.
    QUICK += " --xla_cpu_use_fusion_emitters=false"

FLAGS = QUICK if os.environ.get("FAST_COMPILATION") else ""
"""Flags of this test run, also for the processes that it starts."""
