"""How long jax traces and compiles, counted apart from the phase in which it happens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from jax import monitoring

from modelstock_jax.reporting.timeline import Timeline

COMPILES = "/jax/core/compile/"  # Tracing, lowering, and XLA or the cache of its programs.


@contextlib.contextmanager
def counted(timeline: Timeline) -> Iterator[None]:
    """Moves what the open phase of `timeline` spends compiling to its phase "compile"."""

    def listen(event: str, duration_secs: float, **_) -> None:
        if event.startswith(COMPILES):
            timeline.move("compile", duration_secs)

    monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        monitoring.unregister_event_duration_listener(listen)
