"""Every study from measurements to page, on random models without training."""

from __future__ import annotations

import json
import zlib

import numpy as np
import pytest

from configs import imagenet
from modelstock_jax.fileio import flatten
from modelstock_jax.reporting.figures import kind
from studies.catalog import STUDIES
from studies.catalog.model_pool import STRONG, STRONG_LENGTH
from studies.measurements import Score
from studies.pages import write
from studies.runs import runs_of
from studies.study import Setup
from tests.studies.context import DrawnContext

SETUP = Setup(seeds=(0, 1, 2, 3), epochs=2, steps_per_epoch=10)


@pytest.fixture(scope="module")
def context():
    return DrawnContext()


def value(measurement, context):
    """Measure; accuracies are random, because real ones would compile every merge."""
    if not isinstance(measurement, Score):
        return measurement.measure(context)
    rng = np.random.default_rng(zlib.crc32(repr(measurement.key(context)).encode()))
    shifts = {name: 60 + rng.normal() for name in ("v2", "r") if measurement.shifts}
    sets = {"drawn": 0.0, **shifts}
    # The sentence benchmark also measures these.
    more = {"balanced": sets, "auc": sets, "correct": {n: rng.bytes(100).hex() for n in sets}}
    return {"id": 80 + rng.normal(), "shifts": shifts, **more}


def test_a_sentence_study_of_two_seeds(context):
    """Two pairs are too few for means of 3 and 4 with a center of other models."""
    study, setup = STUDIES["sentence_encoder"], SETUP._replace(seeds=(0, 1))
    measurements = study.measurements(setup)
    values = {key: value(measurement, context) for key, measurement in measurements.items()}
    report = study.summarize(setup, values)
    rows = [row[0] for row in report.tables[-1].rows]
    assert rows == ["N = 1", "N = 2"]


def values_of(study, context):
    measurements = study.measurements(SETUP)
    return {key: value(measurement, context) for key, measurement in measurements.items()}


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_writes_its_page(name, context, tmp_path):
    study = STUDIES[name]
    measurements = study.measurements(SETUP)
    assert {run.seed for run in runs_of(tuple(measurements.values()))} <= set(SETUP.seeds)
    values = {key: value(measurement, context) for key, measurement in measurements.items()}
    json.dumps(list(values.values()), allow_nan=False)  # The format of the ledger.
    report = study.summarize(SETUP, values)
    details = {"seeds": SETUP.seeds, "commits": ["abc"], "pretrained": "drawn", "data": "drawn"}
    details["command"] = f"studies {study.name}"
    page = write(study, {"drawn": report}, tmp_path, details)
    text = page.read_text()
    for table in report.tables:
        assert {len(row) for row in table.rows} == {len(table.columns)}, name
    for claim in report.claims:
        assert f"**{claim.verdict}**" in text and len(claim.differences) > 1
    for stem in report.figures:
        assert (tmp_path / f"{stem}.png").stat().st_size > 5_000
    document = json.loads((tmp_path / f"{name}.json").read_text())
    assert len(document["claims"]) == len(report.claims)


def test_true_claims_are_reproduced(context):
    """The models are on a shell by construction; accuracy is a function of the distance."""
    study, setup = STUDIES["table1"], SETUP._replace(seeds=tuple(range(8)))
    measurements = study.measurements(setup)
    values = {key: measurement.measure(context) for key, measurement in measurements.items()}
    verdicts = {
        c.text.split("(within")[0]: c.verdict for c in study.summarize(setup, values).claims
    }
    assert verdicts.pop("(i) all fine-tuned models have the same distance to the center ") in (
        "reproduced",
        "inconclusive",  # The distance of a vector of 3,250 elements varies by 1 %.
    )
    assert set(verdicts.values()) == {"reproduced"}, verdicts


@pytest.mark.parametrize("name", ["fig2", "generality"])
def test_a_tower_without_biases_has_no_claim_on_them(name, context):
    """The only biases of a ResNet belong to its norms."""
    study = STUDIES[name]
    values = values_of(study, context)
    for key in values:
        if "angles" in key:
            values[key] = {n: row for n, row in values[key].items() if kind(n) != "biases"}
    texts = [claim.text for claim in study.summarize(SETUP, values).claims]
    assert any("angles of kernels" in text for text in texts)
    assert not any("biases" in text for text in texts)


def test_equal_results_in_the_paper_are_no_claim(context):
    study = STUDIES["table4"]
    values = values_of(study, context)
    texts = [claim.text for claim in study.summarize(SETUP, values).claims]
    # In the paper: 87.0 and 87.0 on ImageNet, 71.6 and 69.4 avg. shifts.
    assert [text.split(" (")[0] for text in texts if "TPGM" in text] == [
        "Model Stock beats TPGM, out of distribution"
    ]


def test_soups_from_lp_init_are_compared_with_the_second_setup(context):
    study = STUDIES["table2"]
    values = values_of(study, context)
    texts = {claim.text for claim in study.summarize(SETUP, values).claims}
    assert not any("LP," in text for text in texts), "LP is an initialization of soups"
    uniform, greedy = (f"{name} Model Soup (from LP init)" for name in ("Uniform", "Greedy"))
    assert {text for text in texts if "from LP" in text} == {
        f"Model Stock* beats {uniform}, in distribution (paper: +1.22)",
        f"{uniform} beats Model Stock*, out of distribution (paper: +2.76)",
        f"Model Stock* beats {greedy}, in distribution (paper: +0.16)",
        f"{greedy} beats Model Stock*, out of distribution (paper: +2.06)",
    }


def test_the_second_setup_equals_the_configs():
    plain, strong = (flatten(imagenet.get_config(name).to_dict()) for name in ("plain", "strong"))
    changed = {key: strong[key] for key in plain if plain[key] != strong[key]}
    assert changed.pop("epochs") == STRONG_LENGTH * plain["epochs"]
    assert changed == STRONG


def test_a_learning_rate_at_the_end_of_its_search_is_marked(context):
    study = STUDIES["table4"]
    measurements = study.measurements(SETUP)
    values = {key: value(measurement, context) for key, measurement in measurements.items()}
    for key in measurements:
        if key[0] == "tpgm" and len(key) == 3:
            _, seed, rate = key
            values[key] = 90.0 + (rate == min(seed, 2))  # The minimum, the middle, and the maximum.
    (table,) = study.summarize(SETUP, values).tables
    (row,) = [row for row in table.rows if row[0] == "TPGM"]
    assert row[table.columns.index("learning rates chosen")] == "0.33†, 1, 3†, 3†"
