"""A study's page (tables, figures, verdicts; one anchor or several), and the page of all claims."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from modelstock_jax.fileio import write_json, write_text
from studies.study import Claim, Study, StudyReport, Verdict, cell


def write(
    study: Study, reports: Mapping[str, StudyReport], directory: Path, details: Mapping[str, Any]
) -> Path:
    """Writes NAME.json, NAME.md and the figures; of several anchors NAME_anchors.json and .md.

    Args:
      study: what was studied.
      reports: an anchor's name -> what was found from it; the config's own comes first.
      directory: of all studies.
      details: seeds, commits, data and command, for the JSON file and the page's last line.

    Returns:
      The page's path.
    """
    parts = {name: _document(report) for name, report in reports.items()}
    first, *further = reports
    stem = stems(study)[bool(further)]
    document = {"title": study.title, **parts[first], **details}
    if further:
        document["further"] = {name: parts[name] for name in further}
        document["together"] = [
            {
                "text": text,
                "where": joint.where,
                "here": [claim.here() if claim else "–" for claim in joint.claims.values()],
                "verdict": joint.verdict,
            }
            for text, joint in together(reports).items()
        ]
    write_json(directory / f"{stem}.json", document)
    lines = [f"# {study.title}", "", study.about, ""]
    if further:
        lines += _together(reports)
    for number, (name, report) in enumerate(reports.items(), 1):
        if further:
            lines += [f"## Anchor `{name}`", ""]
        # The config's own anchor keeps the plain file names, with others beside it or without.
        ending = "" if number == 1 else f"_anchor_{number}"
        lines += _section(study, report, directory, ending)
    seeds, commits = details["seeds"], ", ".join(details["commits"])
    most = details.get("max_shift_images")
    images = f" (of each shift at most {most:,} images)" if most else ""
    lines += [
        f"{_seeds(seeds)}; anchor{'s' * bool(further)} "
        f"{', '.join(f'`{name}`' for name in reports)}, data `{details['data']}`{images}; "
        f"measured at {commits}. `{details['command']}`",
        "",
    ]
    return write_text(directory / f"{stem}.md", "\n".join(lines))


def _seeds(seeds: Sequence[int]) -> str:
    return f"Seeds {seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"Seed {seeds[0]}"


def stems(study: Study) -> tuple[str, str]:
    """Names of a study's two pages: of the config's own anchor, and of that beside others.

    They are apart, so that the one, for which nobody needs another anchor, is made again alone.
    """
    return study.name, f"{study.name}_anchors"


class Joint(NamedTuple):
    """A claim that was read from several anchors.

    Attributes:
      where: table, figure or section of the paper.
      claims: an anchor's name -> the claim there, None where it has no meaning.
    """

    where: str
    claims: Mapping[str, Claim | None]

    @property
    def verdict(self) -> Verdict:
        """Seeds of one anchor say nothing of another, so they are not pooled.

        Together a claim holds where it holds from each anchor that it was read from, does not
        where it does not from each, and is else not decided.
        """
        first, *others = {claim.verdict for claim in self.claims.values() if claim}
        return "not decided" if others else first


def together(reports: Mapping[str, StudyReport]) -> dict[str, Joint]:
    """The claims that were read from more than one anchor, by their text.

    >>> claims = [Claim("a", "", [1.0, 1.1])], [Claim("a", "", [1.0, -1.0]), Claim("b", "", [1.0])]
    >>> found = together({"one": Report(claims=claims[0]), "two": Report(claims=claims[1])})
    >>> {text: joint.verdict for text, joint in found.items()}
    {'a': 'not decided'}
    """
    found: dict[str, dict[str, Claim]] = {}
    for name, report in reports.items():
        for claim in report.claims:
            found.setdefault(claim.text, {})[name] = claim
    return {
        text: Joint(next(iter(claims.values())).where, {name: claims.get(name) for name in reports})
        for text, claims in found.items()
        if len(claims) > 1
    }


def _document(report: StudyReport) -> dict[str, Any]:
    return {
        "tables": [{"columns": t.columns, "rows": t.rows} for t in report.tables],
        "claims": [
            {
                "text": claim.text,
                "where": claim.where,
                "here": claim.here(),
                "differences": claim.differences,
                "unit": claim.unit,
                "verdict": claim.verdict,
            }
            for claim in report.claims
        ],
    }


def _section(study: Study, report: StudyReport, directory: Path, ending: str) -> list[str]:
    lines = []
    for stem, draw in report.figures.items():
        draw(directory / f"{stem}{ending}.png")
        lines += [f"![{study.title}]({stem}{ending}.png)", ""]
    for table in report.tables:
        lines += [table.markdown(), ""]
    if report.claims:
        lines += ["| claim | where | here | verdict |", "|---|---|---:|---|"]
        lines += [claim.line() for claim in report.claims]
        lines.append("")
    return lines + [f"- {note}" for note in report.notes] + [""] * bool(report.notes)


def _together(reports: Mapping[str, StudyReport]) -> Sequence[str]:
    names = [f"`{name}`" for name in reports]
    lines = [
        f"| from each anchor | {' | '.join(names)} | all |",
        "|---|" + "---|" * (len(names) + 1),
    ]
    for text, joint in together(reports).items():
        each = [
            f"{claim.verdict}: {claim.here()}" if claim else "–" for claim in joint.claims.values()
        ]
        lines.append(f"| {cell(text)} | {' | '.join(each)} | **{joint.verdict}** |")
    return [*lines, ""]


# All claims at a glance: a page over the pages of the studies that have been run.


PAGE = "README.md"


def write_index(studies: Sequence[Study], directory: Path) -> Path:
    """Writes the verdicts of every page in the directory.

    Args:
      studies: in the order of the page.
      directory: of all studies.

    Returns:
      The page's path.
    """
    lines = [
        "# Verdicts",
        "",
        "Whether what the paper says holds on the glyph world: orderings, never its absolute "
        "numbers; claims of ours are marked so. Paired differences, mean ± standard error over n "
        "seeds or disjoint groups of models; *holds* where the 95 % interval of Student's t lies "
        "above zero, *does not hold* where it lies below, *not decided* where it holds zero. With "
        "*at most*, the mean deviation is held against a bound, over n seeds, tensors, epochs or "
        "draws of noise, of which some may lie beyond it. All seeds meet the same test images: "
        "what chance there favors is in no error. Of several anchors, one under another, a claim "
        "holds where it holds from each. Written by `make studies`.",
        "",
        "| study | claim | where | here | verdict |",
        "|---|---|---|---:|---|",
    ]
    for study in studies:
        for stem in stems(study):
            path = directory / f"{stem}.json"
            if path.exists():
                lines += _rows(study.name, path)
    return write_text(directory / PAGE, "\n".join([*lines, ""]))


def _rows(name: str, path: Path) -> list[str]:
    try:
        return _claims(path.stem, json.loads(path.read_text(encoding="utf-8")))
    # Of an older version, or no longer whole.
    except (ValueError, KeyError, TypeError, AttributeError):
        command = f"python -m studies {name}"
        if path.stem != name:
            command += " --anchors=..."
        return [f"| {path.stem} | cannot be read: run `{command}` | | | |"]


def _claims(name: str, document: Mapping[str, Any]) -> list[str]:
    anchors = len(document.get("further", ())) + 1
    title = document["title"] + (f", from {anchors} anchors" if anchors > 1 else "")
    link = f"[{title}]({name}.md)"
    # Of several anchors, what all of them were asked: the rest is on the first one's own page.
    claims = document["together"] if anchors > 1 else document["claims"]
    if not claims:
        return [f"| {link} | | | | |"]
    rows = []
    for number, claim in enumerate(claims):
        here = claim["here"] if anchors == 1 else "<br>".join(claim["here"])
        first, verdict = "" if number else link, f"**{claim['verdict']}**"
        row = [first, cell(claim["text"]), claim["where"], here, verdict]
        rows.append(f"| {' | '.join(row)} |")
    return rows
