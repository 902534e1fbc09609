"""The verdicts on carried noise, from accuracies with known curves."""

from __future__ import annotations

import pytest

from studies.catalog.noise_carry import CARRIED
from studies.expressions import Anchor, Between
from studies.study import Setup

EVERY, LAST = "`every`", "`last`"
SETUP = Setup(seeds=(0, 1, 2, 3), epochs=8, steps_per_epoch=32)
JITTER = (0.01, -0.01, 0.02, -0.02)


def score(name, alpha, seed):
    """All methods are on one curve, except `every`, 1 point above it; `last` has the highest ID."""
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
        name, seed = (key[0], key[-1]) if key[0] == "variant" else key[:2]
        values[key] = score(name, alpha, seed)
    return CARRIED.summarize(SETUP, values)


def test_a_higher_curve_is_reproduced(report):
    claims = [c for c in report.claims if c.text.startswith(EVERY)]
    assert len(claims) == 14 and {claim.verdict for claim in claims} == {"reproduced"}
    untuned = next(
        c for c in claims if "without tuning beats the uniform mean after training" in c.text
    )
    # The jitter of a seed is in both curves.
    assert untuned.differences == pytest.approx([1.0] * 4, abs=1e-6)
    # The upper half of the accuracies is alpha in [1/2, 1], with mean 0.75.
    tuned = next(c for c in claims if "best α beats the uniform mean after training" in c.text)
    assert tuned.differences == pytest.approx([0.75] * 4, abs=1e-3)


def test_mean_curves_agree_if_the_noise_is_shared(report):
    rows = {row[0]: row for row in report.tables[1].rows}
    row = rows[f"{EVERY} − the uniform mean after training"]
    assert row[1:4] == ["1.00 ± 0.00", "4", "1.00 ± 0.00"]
    assert rows[f"{LAST} − the periodic uniform mean"][3] == "–"


def test_an_accuracy_out_of_range_has_a_note_and_no_verdict(report):
    notes = [note for note in report.notes if note.startswith(f"{LAST}, compared with")]
    assert len(notes) == 7
    assert "at 4 of 4 seeds there is no point of equal ID (at 4, its ID is above" in notes[0]
    assert not [c for c in report.claims if c.text.startswith(f"{LAST} without tuning")]
    assert [c for c in report.claims if c.text.startswith(f"{EVERY} without tuning")]


def test_an_additional_anchor_has_verdicts_and_no_variants(report):
    measurements = CARRIED.measurements(SETUP._replace(additional_anchor=True))
    assert not [key for key in measurements if key[0] == "variant"]
    assert len(measurements) < len(CARRIED.measurements(SETUP))
    assert len(report.tables) == 3
