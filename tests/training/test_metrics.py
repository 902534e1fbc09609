"""The log of a run: progress while JAX compiles, and the number of series on TensorBoard."""

from __future__ import annotations

import io
import threading

import jax
import pytest
import tensorboardX
from rich.console import Console

from modelstock_jax.reporting.progress import Progress
from modelstock_jax.training.metrics import show_compilation
from tests.training import linear


class Clock:
    """A clock that each function advances while it is traced."""

    now = 0.0

    def __call__(self):
        return self.now


def test_compilation_is_shown_and_is_not_part_of_the_rate():
    clock, shown = Clock(), []
    console = Console(file=io.StringIO(), force_terminal=True)
    progress = Progress("train", 100, console=console, clock=clock)
    begin = progress.begin_pause
    progress.begin_pause = lambda text: (shown.append(text), begin(text))

    def function(x):
        clock.now += 30  # This runs once, while JAX traces the function.
        return x + 1

    with progress, show_compilation(progress):
        compiled = jax.jit(function)
        x = jax.numpy.zeros(3)
        for step in range(1, 9):
            if step == 5:
                shown.clear()
                compiled(x)
                assert set(shown) == {"compiling ..."}
            clock.now += 0.5
            progress.update(step)
        shown.clear()
        compiled(x)
        assert not shown, "the function is compiled already"
        assert clock.now == 34 and progress.rate() == pytest.approx(2.0)
        thread = threading.Thread(target=lambda: jax.jit(lambda x: x * 3)(x))
        thread.start()
        thread.join()
        assert not shown, "another thread does not delay the loop"
    jax.jit(lambda x: x * 2)(x)
    assert not shown, "the progress has ended"


def test_a_run_has_at_most_30_scalar_series(tmp_path, monkeypatch):
    tags = set()
    add_scalar = tensorboardX.SummaryWriter.add_scalar

    def recorded(self, tag, *args):
        tags.add(tag)
        add_scalar(self, tag, *args)

    monkeypatch.setattr(tensorboardX.SummaryWriter, "add_scalar", recorded)
    linear.trainer(tmp_path).run()
    assert {"merge/ratio/mean", "merge/angle/max", "time/compile"} < tags
    assert "train/loss/replica_1" in tags and len(tags) <= 30, sorted(tags)
