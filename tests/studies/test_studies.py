"""Every study from measurements to page: of drawn models, with nothing trained."""

from __future__ import annotations

import json
import zlib

import numpy as np
import pytest

from configs import imagenet
from modelstock_jax.fileio import flat
from modelstock_jax.reporting.figures import kind
from studies.catalog import STUDIES
from studies.catalog.model_pool import STRONG, STRONG_LENGTH
from studies.measurements import Score
from studies.pages import write
from studies.runs import runs_of
from studies.study import Setup
from tests.studies.bench import DrawnBench

SETUP = Setup(seeds=(0, 1, 2, 3), epochs=2, steps_per_epoch=10)


@pytest.fixture(scope="module")
def bench():
    return DrawnBench()


def value(measurement, bench):
    """As it is measured; accuracies are drawn, for they would need every merge compiled."""
    if not isinstance(measurement, Score):
        return measurement.measure(bench)
    rng = np.random.default_rng(zlib.crc32(repr(measurement.key(bench)).encode()))
    shifts = {name: 60 + rng.normal() for name in ("v2", "r") if measurement.shifts}
    return {"id": 80 + rng.normal(), "shifts": shifts}


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_makes_its_page(name, bench, tmp_path):
    study = STUDIES[name]
    wanted = study.measurements(SETUP)
    assert {run.seed for run in runs_of(tuple(wanted.values()))} <= set(SETUP.seeds)
    values = {key: value(one, bench) for key, one in wanted.items()}
    json.dumps(list(values.values()), allow_nan=False)  # As the ledger keeps them.
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


def test_the_claims_that_are_true_of_drawn_models_hold(bench):
    """The models lie on a shell by construction; accuracy is a function of the distance."""
    study, setup = STUDIES["table1"], SETUP._replace(seeds=tuple(range(8)))
    values = {key: one.measure(bench) for key, one in study.measurements(setup).items()}
    verdicts = {
        c.text.split("(within")[0]: c.verdict for c in study.summarize(setup, values).claims
    }
    assert verdicts.pop("(i) fine-tuned models lie at one distance from the center ") in (
        "holds",
        "not decided",  # 1 % is what a vector of 3,250 numbers varies by.
    )
    assert set(verdicts.values()) == {"holds"}, verdicts


@pytest.mark.parametrize("name", ["fig2", "generality"])
def test_a_tower_without_biases_is_asked_nothing_of_them(name, bench):
    """A ResNet's are those of its norms."""
    study = STUDIES[name]
    values = {key: value(one, bench) for key, one in study.measurements(SETUP).items()}
    for key in values:
        if "angles" in key:
            values[key] = {n: row for n, row in values[key].items() if kind(n) != "biases"}
    texts = [claim.text for claim in study.summarize(SETUP, values).claims]
    assert any("angles of kernels" in text for text in texts)
    assert not any("biases" in text for text in texts)


def test_what_is_level_in_the_paper_is_no_claim(bench):
    study = STUDIES["table4"]
    values = {key: value(one, bench) for key, one in study.measurements(SETUP).items()}
    texts = [claim.text for claim in study.summarize(SETUP, values).claims]
    # 87.0 and 87.0 on ImageNet, 71.6 and 69.4 on the shifts.
    assert [text.split(" (")[0] for text in texts if "TPGM" in text] == [
        "Model Stock beats TPGM, on the shifts"
    ]


def test_soups_from_a_probe_stand_beside_the_papers_second_set_up(bench):
    study = STUDIES["table2"]
    values = {key: value(one, bench) for key, one in study.measurements(SETUP).items()}
    texts = {claim.text for claim in study.summarize(SETUP, values).claims}
    assert not any("linear probe" in text for text in texts), "there it is what soups start from"
    assert {text for text in texts if "from LP" in text} == {
        "Model Stock* beats uniform soup from LP, in distribution (+1.22 there)",
        "Model Stock* is behind uniform soup from LP, on the shifts (-2.76 there)",
        "Model Stock* beats greedy soup from LP, in distribution (+0.16 there)",
        "Model Stock* is behind greedy soup from LP, on the shifts (-2.06 there)",
    }


def test_the_second_set_up_is_that_of_the_configs():
    plain, strong = (flat(imagenet.get_config(name).to_dict()) for name in ("plain", "strong"))
    changed = {key: strong[key] for key in plain if plain[key] != strong[key]}
    assert changed.pop("epochs") == STRONG_LENGTH * plain["epochs"]
    assert changed == STRONG


def test_a_rate_at_the_end_of_its_search_is_marked(bench):
    study = STUDIES["table4"]
    wanted = study.measurements(SETUP)
    values = {key: value(one, bench) for key, one in wanted.items()}
    for key in wanted:
        if key[0] == "tpgm" and len(key) == 3:
            _, seed, rate = key
            values[key] = 90.0 + (rate == min(seed, 2))  # The least, the middle, and the greatest.
    (table,) = study.summarize(SETUP, values).tables
    (row,) = [row for row in table.rows if row[0] == "TPGM"]
    assert row[table.columns.index("rates chosen")] == "0.33†, 1, 3†, 3†"
