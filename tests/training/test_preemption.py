"""Signals to a single process during training."""

from __future__ import annotations

import signal

import pytest

from modelstock_jax.training.launcher import PreemptionHandler


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM])
def outer_handler(request):
    """(signal, list of the signals that the handler outside of training received)."""
    received = []
    previous = signal.signal(request.param, lambda number, frame: received.append(number))
    yield request.param, received
    signal.signal(request.param, previous)


def test_training_stops_at_the_next_step(outer_handler):
    kind, received = outer_handler
    with PreemptionHandler() as preemption:
        assert not preemption.should_stop(1)
        signal.raise_signal(kind)
        assert preemption.should_stop(2)
    assert received == []


def test_a_signal_after_the_last_step_is_passed_on(outer_handler):
    kind, received = outer_handler
    with PreemptionHandler() as preemption:
        assert not preemption.should_stop(1)
        signal.raise_signal(kind)
    assert received == [kind]


def test_an_ignored_signal_remains_ignored(outer_handler):
    kind, _ = outer_handler
    signal.signal(kind, signal.SIG_IGN)
    with PreemptionHandler() as preemption:
        signal.raise_signal(kind)
        assert not preemption.requested
    assert signal.getsignal(kind) is signal.SIG_IGN


def test_a_second_ctrl_c_stops_immediately():
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt), PreemptionHandler():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, previous)
