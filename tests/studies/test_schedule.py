"""What is left of a study: runs, and measurements right after the last run that they need."""

from __future__ import annotations

import pytest

from studies.expressions import Anchor, Mean, Replica
from studies.ledger import Ledger, lock_run
from studies.measurements import Score
from studies.runner import Schedule
from studies.runs import Run
from tests.studies.bench import DrawnBench

FIRST, SECOND, THIRD = (Run(seed) for seed in range(3))
ONE, TWO = Score(Replica(FIRST)), Score(Replica(SECOND))
BOTH = Score(Mean((Replica(FIRST), Replica(SECOND))))
ANCHOR, KNOWN = Score(Anchor()), Score(Replica(THIRD))


class Bench(DrawnBench):
    def __init__(self, path):
        super().__init__()
        self.ledger, self.trained, self.here = Ledger(path), self, set()

    def is_here(self, run):
        return run in self.here

    def key(self, measurement):
        return repr(measurement)

    def do(self, piece):
        if isinstance(piece, Run):
            self.here.add(piece)
        else:
            self.ledger.add(self.key(piece), value=0, what="Score", seconds=1, commit="c")


def done_of(schedule, bench, locks, waits=pytest.fail):
    done = []
    for _, piece in schedule.turns(bench, locks, waits):
        bench.do(piece)
        done.append(piece)
    return done


@pytest.fixture
def bench(tmp_path):
    bench = Bench(tmp_path / "measured.jsonl")
    bench.do(KNOWN)
    return bench


def test_a_run_is_measured_before_the_next_is_trained(bench, tmp_path):
    done = done_of(Schedule.of(bench, [BOTH, TWO, KNOWN, ONE, ANCHOR, ONE]), bench, tmp_path)
    assert done == [ANCHOR, FIRST, ONE, SECOND, BOTH, TWO]
    assert Schedule.of(bench, done[:1] + [ONE, BOTH]) == Schedule({}, {})


def test_what_is_here_is_not_trained(bench, tmp_path):
    bench.do(SECOND)
    assert done_of(Schedule.of(bench, [ONE, TWO, BOTH]), bench, tmp_path) == [TWO, FIRST, ONE, BOTH]


def test_nothing_is_measured_of_a_run_that_another_is_at(bench, tmp_path):
    schedule = Schedule.of(bench, [ONE, TWO, BOTH])
    told = []

    def waits(count):
        told.append(count)
        other.__exit__(None, None, None)  # It gives up: the run is taken over.

    other = lock_run(tmp_path, bench.name(FIRST))
    assert other.__enter__()
    done = done_of(schedule, bench, tmp_path, waits)
    assert done == [SECOND, TWO, FIRST, ONE, BOTH] and told == [3]
