"""The verdict on carried noise, from accuracies whose curves are known."""

from __future__ import annotations

import pytest

from studies.catalog.noise_carry import CARRIED
from studies.expressions import Anchor, Between
from studies.study import Setup

SETUP = Setup(seeds=(0, 1, 2, 3), epochs=8, steps_per_epoch=32)
JITTER = (0.01, -0.01, 0.02, -0.02)


def score(name, alpha, seed):
    """All methods lie on one curve; `every` 1 point above it, `last` with more ID than any."""
    accuracy = 75 + 15 * alpha + 4 * alpha * (name == "last")
    shifts = 53 - 6 * alpha**2 + alpha * (name == "every") + JITTER[seed] * alpha
    return {"id": accuracy, "shifts": {"v2": shifts}}


@pytest.fixture(scope="module")
def report():
    values = {}
    for key, measurement in CARRIED.measurements(SETUP).items():
        model = measurement.model
        alpha = 0 if isinstance(model, Anchor) else getattr(model, "alpha", 1)
        assert isinstance(model, (Between, Anchor)) or alpha == 1
        name, seed = (key[0], key[-1]) if key[0] == "side" else key[:2]
        values[key] = score(name, alpha, seed)
    return CARRIED.summarize(SETUP, values)


def test_what_lies_above_holds(report):
    claims = [c for c in report.claims if "every merge" in c.text and "last" not in c.text]
    assert len(claims) == 14 and {claim.verdict for claim in claims} == {"holds"}
    as_it_is = next(c for c in claims if "as it is, beats the mean after training" in c.text)
    # The jitter of a seed is in both curves.
    assert as_it_is.differences == pytest.approx([1.0] * 4, abs=1e-6)
    # On one curve, between half its accuracies and all: the mean of alpha over [1/2, 1].
    along = next(c for c in claims if "best α, beats the mean after training" in c.text)
    assert along.differences == pytest.approx([0.75] * 4, abs=1e-3)


def test_mean_curves_say_the_same_where_noise_is_shared(report):
    rows = {row[0]: row for row in report.tables[1].rows}
    row = rows["noise carried, shrunk at every merge − the mean after training"]
    assert row[1:4] == ["1.00 ± 0.00", "4", "1.00 ± 0.00"]
    assert rows["noise carried, shrunk at the last merge − periodic mean"][3] == "–"


def test_what_is_out_of_range_is_said_and_not_judged(report):
    told = [note for note in report.notes if note.startswith("noise carried, shrunk at the last")]
    assert len(told) == 7
    assert "at 4 of 4 seeds there is no point of equal ID (4 times it has more ID" in told[0]
    assert not [c for c in report.claims if "last merge, as it is" in c.text]


def test_a_further_anchor_has_the_verdict_and_no_variants(report):
    wanted = CARRIED.measurements(SETUP._replace(further=True))
    assert not [key for key in wanted if key[0] == "side"]
    assert len(wanted) < len(CARRIED.measurements(SETUP))
    assert len(report.tables) == 3
