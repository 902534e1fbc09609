"""What this machine has."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """Cores that this process may run on: `taskset` and a batch system's share count."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # Linux alone tells.
        return os.cpu_count() or 1
