"""The schedule of a study: each measurement follows the last run that it needs."""

from __future__ import annotations

import pytest

from studies.expressions import Anchor, Mean, Replica
from studies.ledger import Ledger, lock_run
from studies.measurements import Score
from studies.runner import Schedule
from studies.runs import Run
from tests.studies.context import DrawnContext

FIRST, SECOND, THIRD = (Run(seed) for seed in range(3))
ONE, TWO = Score(Replica(FIRST)), Score(Replica(SECOND))
BOTH = Score(Mean((Replica(FIRST), Replica(SECOND))))
ANCHOR, KNOWN = Score(Anchor()), Score(Replica(THIRD))


class FakeContext(DrawnContext):
    def __init__(self, path):
        super().__init__()
        self.ledger, self.runs, self.trained = Ledger(path), self, set()

    def is_trained(self, run):
        return run in self.trained

    def key(self, measurement):
        return repr(measurement)

    def do(self, task):
        if isinstance(task, Run):
            self.trained.add(task)
        else:
            self.ledger.add(self.key(task), value=0, what="Score", seconds=1, commit="c")


def done_of(schedule, context, locks, on_wait=pytest.fail):
    done = []
    for _, task in schedule.queue(context, locks, on_wait):
        context.do(task)
        done.append(task)
    return done


@pytest.fixture
def context(tmp_path):
    context = FakeContext(tmp_path / "measured.jsonl")
    context.do(KNOWN)
    return context


def test_a_run_is_measured_before_the_next_is_trained(context, tmp_path):
    done = done_of(Schedule.of(context, [BOTH, TWO, KNOWN, ONE, ANCHOR, ONE]), context, tmp_path)
    assert done == [ANCHOR, FIRST, ONE, SECOND, BOTH, TWO]
    assert Schedule.of(context, done[:1] + [ONE, BOTH]) == Schedule({}, {})


def test_a_stored_run_is_not_trained(context, tmp_path):
    context.do(SECOND)
    assert done_of(Schedule.of(context, [ONE, TWO, BOTH]), context, tmp_path) == [
        TWO,
        FIRST,
        ONE,
        BOTH,
    ]


def test_measurements_wait_for_a_run_of_another_process(context, tmp_path):
    schedule = Schedule.of(context, [ONE, TWO, BOTH])
    counts = []

    def on_wait(count):
        counts.append(count)
        other.__exit__(None, None, None)  # The other process stops; this one takes the run over.

    other = lock_run(tmp_path, context.name(FIRST))
    assert other.__enter__()
    done = done_of(schedule, context, tmp_path, on_wait)
    assert done == [SECOND, TWO, FIRST, ONE, BOTH] and counts == [3]
