"""Pages of studies, and the page of all claims."""

from __future__ import annotations

import json
import re

from studies.pages import joint_claims, write, write_index
from studies.study import Claim, Study, StudyReport, Table

STUDY = Study("some", "Some study", "About it.", None, None)
DETAILS = {
    "seeds": [0, 1],
    "commits": ["abc"],
    "pretrained": "one",
    "data": "glyphs",
    "command": "python -m studies some --num_seeds=2 --anchors=runs/two",
}
UP, DOWN, OPEN = [1.0, 1.1, 0.9], [-1.0, -1.1, -0.9], [1.0, -1.0, 0.2]


def report(**claims):
    return StudyReport(
        [Table(["", "ID"], [["a model", "80"]])],
        [Claim(text, "this project", differences) for text, differences in claims.items()],
        {"figure": lambda path: path.write_bytes(b"drawn")},
    )


def test_anchors_are_not_pooled():
    joint = joint_claims(
        {
            "one": report(both=UP, neither=DOWN, differs=UP, weak=UP, alone=UP),
            "two": report(both=UP, neither=DOWN, differs=DOWN, weak=OPEN, some=DOWN),
            "three": report(both=UP, neither=DOWN, differs=DOWN, weak=UP, some=DOWN),
        }
    )
    assert joint["some"].claims["one"] is None, "does not apply"
    assert {text: claim.verdict for text, claim in joint.items()} == {
        "both": "reproduced",
        "neither": "not reproduced",
        "differs": "inconclusive",
        "weak": "inconclusive",
        "some": "not reproduced",
    }


def test_a_page_of_two_anchors(tmp_path):
    reports = {"one": report(better=UP), "runs/two": report(better=OPEN)}
    text = write(STUDY, reports, tmp_path, DETAILS).read_text()
    first, second = "+1.00 ± 0.06 points (n = 3)", "+0.067 ± 0.581 points (n = 3)"
    cells = f"reproduced: {first} | inconclusive: {second}"
    assert f"| better | {cells} | **inconclusive** |" in text
    assert text.index("## Anchor `one`") < text.index("## Anchor `runs/two`")
    assert f"`{DETAILS['command']}`" in text
    assert (tmp_path / "figure.png").exists() and (tmp_path / "figure_anchor_2.png").exists()
    document = json.loads((tmp_path / "some_anchors.json").read_text())
    assert document["claims"][0]["verdict"] == "reproduced"
    assert document["further"]["runs/two"]["claims"][0]["verdict"] == "inconclusive"
    (joint,) = document["together"]
    assert joint["text"] == "better" and joint["verdict"] == "inconclusive"


def test_a_page_without_claims_has_no_table_of_them(tmp_path):
    text = write(STUDY, {"one": report(), "two": report()}, tmp_path, DETAILS).read_text()
    assert "claim" not in text and "| a model | 80 |" in text


def test_the_index_has_every_claim_and_joint_verdicts(tmp_path):
    reports = {"one": report(better=UP, **{"|worse|": DOWN}), "two": report(better=OPEN)}
    write(STUDY, reports, tmp_path, DETAILS)
    write(STUDY, {"one": reports["one"]}, tmp_path, DETAILS)
    never_run = Study("other", "Never run", "", None, None)
    text = write_index({"Models": [never_run], "Merges": [STUDY]}, tmp_path).read_text()
    assert "Never run" not in text
    line = "better | this project | +1.00 ± 0.06 points (n = 3) |"
    assert f"| [Some study](some.md) | {line} **reproduced** |" in text
    joint = "+1.00 ± 0.06 points (n = 3)<br>+0.067 ± 0.581 points (n = 3) | **inconclusive** |"
    assert (
        f"| [Some study, from 2 anchors](some_anchors.md) | better | this project | {joint}" in text
    )
    assert text.count("worse") == 1, "claims of one anchor are only on its page"
    row = r"|  | \|worse\| | this project | -1.00 ± 0.06 points (n = 3) | **not reproduced** |"
    assert row in text
    # Of the page of one anchor; groups without results have no block.
    blocks = re.findall("<summary>(.*)</summary>", text)
    assert blocks == ["Merges: 1 reproduced, 1 not reproduced, 0 inconclusive", "Verdicts by page"]
    assert text.count("<details>") == text.count("</details>") == 2
    summary = text[: text.index("## How to read")]
    for cells in (
        "**claims of this project: synthetic benchmark** | 1 | 1 | 0",
        "**claims of this project: synthetic benchmark, several anchors** | 0 | 0 | 1",
        "[Some study](some.md) | 1 | 1 | 0",
        "[Some study, from 2 anchors](some_anchors.md) | 0 | 0 | 1",
    ):
        assert f"| {cells} |" in summary


def test_verdicts_of_earlier_versions_have_current_names(tmp_path):
    verdicts = {
        "holds": "reproduced",
        "does not hold": "not reproduced",
        "not decided": "inconclusive",
    }
    for old, new in verdicts.items():
        claim = {"text": "better", "where": "Table 1", "here": "+1.00", "verdict": old}
        page = {"title": "Some study", "claims": [claim]}
        joint = page | {"further": {"two": {}}, "together": [claim | {"here": ["+1.00"]}]}
        (tmp_path / "some.json").write_text(json.dumps(page))
        (tmp_path / "some_anchors.json").write_text(json.dumps(joint))
        text = write_index({"Merges": [STUDY]}, tmp_path).read_text()
        assert text.count(f"| better | Table 1 | +1.00 | **{new}** |") == 2
        assert f"**{old}**" not in text


def test_an_unreadable_page_names_the_command_that_writes_it_again(tmp_path):
    old = {"title": "Some study", "claims": [{"text": "better", "verdict": "reproduced"}]}
    for content in (json.dumps(old), json.dumps([old]), '{"title": "Some'):
        for stem, options in (("some", ""), ("some_anchors", " --anchors=...")):
            (tmp_path / f"{stem}.json").write_text(content)
            text = write_index({"Merges": [STUDY]}, tmp_path).read_text()
            command = f"python -m studies some{options}"
            assert f"| {stem} | cannot be read: run `{command}` | | | |" in text
