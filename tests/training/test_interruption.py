"""Signals to one process while it trains."""

from __future__ import annotations

import signal

import pytest

from modelstock_jax.training.launcher import PreemptionHandler


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM])
def heard(request):
    """(the signal, what the handler around a training heard)."""
    numbers = []
    before = signal.signal(request.param, lambda number, frame: numbers.append(number))
    yield request.param, numbers
    signal.signal(request.param, before)


def test_it_is_granted_at_a_step(heard):
    kind, numbers = heard
    with PreemptionHandler() as interruption:
        assert not interruption.granted(1)
        signal.raise_signal(kind)
        assert interruption.granted(2)
    assert numbers == []


def test_one_after_the_last_step_is_not_forgotten(heard):
    kind, numbers = heard
    with PreemptionHandler() as interruption:
        assert not interruption.granted(1)
        signal.raise_signal(kind)
    assert numbers == [kind]


def test_what_was_ignored_stays_ignored(heard):
    kind, _ = heard
    signal.signal(kind, signal.SIG_IGN)
    with PreemptionHandler() as interruption:
        signal.raise_signal(kind)
        assert not interruption.requested
    assert signal.getsignal(kind) is signal.SIG_IGN


def test_a_second_ctrl_c_stops_at_once():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt), PreemptionHandler():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)
