"""A page of several anchors."""

from __future__ import annotations

import json

from studies.pages import together, write, write_index
from studies.study import Claim, Study, StudyReport, Table

STUDY = Study("some", "Some study", "About it.", None, None)
DETAILS = {
    "seeds": [0, 1],
    "commits": ["abc"],
    "pretrained": "one",
    "data": "drawn",
    "command": "python -m studies some --num_seeds=2 --anchors=runs/two",
}
UP, DOWN, OPEN = [1.0, 1.1, 0.9], [-1.0, -1.1, -0.9], [1.0, -1.0, 0.2]


def report(**claims):
    return StudyReport(
        [Table(["", "ID"], [["a model", "80"]])],
        [Claim(text, "ours", differences) for text, differences in claims.items()],
        {"picture": lambda path: path.write_bytes(b"drawn")},
    )


def test_anchors_are_not_pooled():
    found = together(
        {
            "one": report(both=UP, neither=DOWN, differs=UP, weak=UP, alone=UP),
            "two": report(both=UP, neither=DOWN, differs=DOWN, weak=OPEN, some=DOWN),
            "three": report(both=UP, neither=DOWN, differs=DOWN, weak=UP, some=DOWN),
        }
    )
    assert found["some"].claims["one"] is None, "it has no meaning there"
    assert {text: joint.verdict for text, joint in found.items()} == {
        "both": "holds",
        "neither": "does not hold",
        "differs": "not decided",
        "weak": "not decided",
        "some": "does not hold",
    }


def test_a_page_of_two_anchors(tmp_path):
    reports = {"one": report(better=UP), "runs/two": report(better=OPEN)}
    text = write(STUDY, reports, tmp_path, DETAILS).read_text()
    each = "holds: +1.00 ± 0.06 points (n = 3) | not decided: +0.067 ± 0.581 points (n = 3)"
    assert f"| better | {each} | **not decided** |" in text
    assert text.index("## Anchor `one`") < text.index("## Anchor `runs/two`")
    assert f"`{DETAILS['command']}`" in text
    assert (tmp_path / "picture.png").exists() and (tmp_path / "picture_anchor_2.png").exists()
    document = json.loads((tmp_path / "some_anchors.json").read_text())
    assert document["claims"][0]["verdict"] == "holds"
    assert document["further"]["runs/two"]["claims"][0]["verdict"] == "not decided"
    (joint,) = document["together"]
    assert joint["text"] == "better" and joint["verdict"] == "not decided"


def test_the_index_has_every_claim_and_joint_verdicts(tmp_path):
    reports = {"one": report(better=UP, **{"|worse|": DOWN}), "two": report(better=OPEN)}
    write(STUDY, reports, tmp_path, DETAILS)
    write(STUDY, {"one": reports["one"]}, tmp_path, DETAILS)
    never_run = Study("other", "Never run", "", None, None)
    text = write_index([never_run, STUDY], tmp_path).read_text()
    assert "Never run" not in text
    line = "better | ours | +1.00 ± 0.06 points (n = 3) |"
    assert f"| [Some study](some.md) | {line} **holds** |" in text
    both = "+1.00 ± 0.06 points (n = 3)<br>+0.067 ± 0.581 points (n = 3) | **not decided** |"
    assert f"| [Some study, from 2 anchors](some_anchors.md) | better | ours | {both}" in text
    assert text.count("worse") == 1, "what one anchor alone was asked is on its own page"
    assert r"|  | \|worse\| | ours | -1.00 ± 0.06 points (n = 3) | **does not hold** |" in text


def test_a_page_of_an_older_version_is_asked_to_be_written_again(tmp_path):
    old = {"title": "Some study", "claims": [{"text": "better", "verdict": "holds"}]}
    for content in (json.dumps(old), json.dumps([old]), '{"title": "Some'):
        for stem, more in (("some", ""), ("some_anchors", " --anchors=...")):
            (tmp_path / f"{stem}.json").write_text(content)
            text = write_index([STUDY], tmp_path).read_text()
            command = f"python -m studies some{more}"
            assert f"| {stem} | cannot be read: run `{command}` | | | |" in text
