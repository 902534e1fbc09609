"""The table of the main findings, at the top of the page of all results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from studies import findings
from studies.catalog import GROUPS, STUDIES
from studies.pages import write_index
from studies.study import Claim
from tests.experiment import small_run
from tests.studies.test_command import PROGRAM

RESULTS = Path(__file__).parents[2] / "docs/results"
NAMES = sorted({finding.study for finding in findings.FINDINGS})
_ROW = re.compile(r"^\| \[(.*)\]\((\w+)\.md\) \| (.*) \((.*)\) \| (.*) \| \*\*(.*)\*\* \|$")


def rows(page: Path) -> list[tuple[str, ...]]:
    """Return (claim, study, paper, place in the paper, ours, verdict) of each finding of a page."""
    first, _, _ = page.read_text().partition("## All claims")
    return [match.groups() for line in first.splitlines() if (match := _ROW.match(line))]


def claims(directory: Path) -> dict[str, list[dict]]:
    return {name: json.loads((directory / f"{name}.json").read_text())["claims"] for name in NAMES}


def test_the_committed_page_has_the_findings_of_the_committed_studies():
    found = rows(RESULTS / "README.md")
    assert len(found) == len(findings.FINDINGS) == 6
    pages = claims(RESULTS)
    for finding, row in zip(findings.FINDINGS, found, strict=True):
        assert row[:4] == (finding.text, finding.study, finding.paper, finding.where)
        (claim,) = [c for c in pages[finding.study] if c["text"].startswith(finding.claim)]
        # The value is that of the paired differences, and the verdict that of their interval.
        limits = re.search(r"within (\d+) %", claim["text"])
        again = Claim(
            claim["text"],
            claim["where"],
            claim["differences"],
            claim["unit"],
            within=int(limits[1]) / 100 if limits else None,
        )
        assert again.result().startswith(row[4].removesuffix(")")) and " (n = " in row[4]
        assert (again.result(), again.verdict) == (claim["here"], row[5])
    assert {row[5] for row in found} == {"reproduced", "not reproduced", "inconclusive"}


def test_values_of_the_paper():
    """From the paper's Tables 1, 7, 5 and 2, by hand."""
    assert [finding.paper for finding in findings.FINDINGS[1:]] == [
        "2.3 %",  # |9.192 √2 / 13.133 − 1|, 7.439 √3, 5.633 √5: 1.0, 1.9 and 4.1 %
        "+1.39 points",  # 47.76 − 46.37
        "+2.6 points",  # 50.4 − 47.8
        "+0.4 points",  # 80.1 − 79.7
        "+0.16 points",  # 50.99 − 50.83
    ]


def test_a_finding_without_its_study_has_no_row(tmp_path):
    page = write_index(GROUPS, tmp_path)
    assert not rows(page) and "| claim | paper |" not in page.read_text()
    (tmp_path / "table5.json").write_text((RESULTS / "table5.json").read_text())
    assert [row[1] for row in rows(write_index(GROUPS, tmp_path))] == ["table5"]


def test_every_study_is_in_one_group():
    assert sorted(study.name for group in GROUPS.values() for study in group) == sorted(STUDIES)


@pytest.mark.slow  # Opens the data of the studies.
def test_the_findings_are_those_of_the_ledger(tmp_path):
    """Nothing is trained or measured: the ledger has every value."""
    ledger = (RESULTS / "measured.jsonl").read_bytes()
    code, output = small_run.finish(
        *NAMES,
        f"--workdir={tmp_path / 'runs'}",
        f"--out={tmp_path}",
        f"--ledger={RESULTS / 'measured.jsonl'}",
        program=PROGRAM,
    )
    assert code == 0 and re.search("^0 of .*: 0 runs to train", output, re.MULTILINE), output
    assert (RESULTS / "measured.jsonl").read_bytes() == ledger
    assert claims(tmp_path) == claims(RESULTS)
    assert rows(tmp_path / "README.md") == rows(RESULTS / "README.md")
