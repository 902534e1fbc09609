"""A study's page (tables, figures, verdicts; one or more anchors), and the page of all results."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from modelstock_jax.fileio import write_json, write_text
from studies import findings
from studies.study import Claim, Study, StudyReport, Verdict, cell


def write(
    study: Study, reports: Mapping[str, StudyReport], directory: Path, details: Mapping[str, Any]
) -> Path:
    """Write NAME.json, NAME.md and the figures; for several anchors NAME_anchors.json and .md.

    Args:
      study: the study.
      reports: name of an anchor -> report from it; the config's anchor comes first.
      directory: of all studies.
      details: seeds, commits, data and command, for the JSON file and the last line of the page.

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
                "here": [claim.result() if claim else "–" for claim in joint.claims.values()],
                "verdict": joint.verdict,
            }
            for text, joint in joint_claims(reports).items()
        ]
    write_json(directory / f"{stem}.json", document)
    lines = [f"# {study.title}{_anchors(len(reports))}", "", study.about, ""]
    if further and any(report.claims for report in reports.values()):
        lines += _joint_table(reports)
    for number, (name, report) in enumerate(reports.items(), 1):
        if further:
            lines += [f"## Anchor `{name}`", ""]
        # The config's anchor has the same file names with and without other anchors.
        suffix = "" if number == 1 else f"_anchor_{number}"
        lines += _section(study, report, directory, suffix)
    lines += [_last_line(list(reports), details), ""]
    return write_text(directory / f"{stem}.md", "\n".join(lines))


def _last_line(anchors: Sequence[str], details: Mapping[str, Any]) -> str:
    seeds = details["seeds"]
    seed_text = f"Seeds {seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"Seed {seeds[0]}"
    anchor_text = f"anchor{'s' * (len(anchors) > 1)} {', '.join(f'`{name}`' for name in anchors)}"
    max_images = details.get("max_shift_images")
    images = f" (at most {max_images:,} images of each shift)" if max_images else ""
    commits = details["commits"]
    commit_text = f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}"
    return (
        f"{seed_text}; {anchor_text}; data `{details['data']}`{images}; measured at "
        f"{commit_text}. Command: `{details['command']}`"
    )


def stems(study: Study) -> tuple[str, str]:
    """Return the file stems of a study's two pages: the config's anchor, and several anchors.

    The first page is separate, so that it can be written without the other anchors.
    """
    return study.name, f"{study.name}_anchors"


class JointClaim(NamedTuple):
    """A claim that was measured from several anchors.

    Attributes:
      where: table, figure or section of the paper.
      claims: name of an anchor -> its claim, None if it does not apply there.
    """

    where: str
    claims: Mapping[str, Claim | None]

    @property
    def verdict(self) -> Verdict:
        """The verdict of all anchors that have the claim if they agree, else inconclusive.

        Seeds of different anchors are not pooled, because seeds of one anchor contain no
        information about another.
        """
        first, *others = {claim.verdict for claim in self.claims.values() if claim}
        return "inconclusive" if others else first


def joint_claims(reports: Mapping[str, StudyReport]) -> dict[str, JointClaim]:
    """Return the claims that were measured from more than one anchor, by their text.

    >>> first = StudyReport(claims=[Claim("a", "", [1.0, 1.1])])
    >>> second = StudyReport(claims=[Claim("a", "", [1.0, -1.0]), Claim("b", "", [1.0])])
    >>> joint = joint_claims({"one": first, "two": second})
    >>> {text: claim.verdict for text, claim in joint.items()}
    {'a': 'inconclusive'}
    """
    by_text: dict[str, dict[str, Claim]] = {}
    for name, report in reports.items():
        for claim in report.claims:
            by_text.setdefault(claim.text, {})[name] = claim
    return {
        text: JointClaim(
            next(iter(claims.values())).where, {name: claims.get(name) for name in reports}
        )
        for text, claims in by_text.items()
        if len(claims) > 1
    }


def _document(report: StudyReport) -> dict[str, Any]:
    return {
        "tables": [{"columns": t.columns, "rows": t.rows} for t in report.tables],
        "claims": [
            {
                "text": claim.text,
                "where": claim.where,
                "here": claim.result(),
                "differences": claim.differences,
                "unit": claim.unit,
                "verdict": claim.verdict,
            }
            for claim in report.claims
        ],
    }


def _section(study: Study, report: StudyReport, directory: Path, suffix: str) -> list[str]:
    lines = []
    for stem, draw in report.figures.items():
        draw(directory / f"{stem}{suffix}.png")
        lines += [f"![{study.title}]({stem}{suffix}.png)", ""]
    for table in report.tables:
        lines += [table.markdown(), ""]
    if report.claims:
        lines += ["| claim | source | ours | verdict |", "|---|---|---:|---|"]
        lines += [claim.row() for claim in report.claims]
        lines.append("")
    return lines + [f"- {note}" for note in report.notes] + [""] * bool(report.notes)


def _joint_table(reports: Mapping[str, StudyReport]) -> Sequence[str]:
    names = [f"`{name}`" for name in reports]
    lines = [
        f"| claim | {' | '.join(names)} | all anchors |",
        "|---|" + "---|" * (len(names) + 1),
    ]
    for text, joint in joint_claims(reports).items():
        cells = [
            f"{claim.verdict}: {claim.result()}" if claim else "–"
            for claim in joint.claims.values()
        ]
        lines.append(f"| {cell(text)} | {' | '.join(cells)} | **{joint.verdict}** |")
    return [*lines, ""]


PAGE = "README.md"
_TOP = (
    "Six main claims of the paper, measured on the synthetic benchmark of this project, whose "
    "accuracies are not those of ImageNet. Ours is the mean ± standard error of n samples, and the "
    "verdict uses the [95 % interval](#how-to-read-the-tables), which is wide for n = 3. OOD is "
    "the mean accuracy over the distribution shifts, ID the accuracy in distribution. [All "
    "claims](#all-claims) are below; [results.md](../results.md) explains them, and [a real "
    "sentence encoder](sentence_encoder.md) has the claims that were measured on real texts.",
    "",
)
_INTRODUCTION = (
    "## How to read the tables",
    "",
    "Pages of a real sentence encoder use real texts, all others the synthetic benchmark. Claims "
    "compare methods; absolute accuracies are not compared with the paper's. In the column "
    "*source*, *this project* marks claims that are not in the paper.",
    "",
    "A value is the mean of paired differences ± its standard error over n seeds or disjoint "
    "groups of models. For *A beats B* it is A − B, in the paper (*paper: +1.09*) and in the "
    "column *ours*: positive if the claim is true. The verdict uses the 95 % interval of "
    "Student's t:",
    "",
    "| verdict | interval of the difference |",
    "|---|---|",
    "| reproduced | is above zero |",
    "| not reproduced | is below zero |",
    "| inconclusive | contains zero |",
    "",
    "- A *limit* applies to the mean: it is the maximum of a mean deviation (*within 1 %*), or the "
    "minimum of a mean difference A − B (*A is at most 0.5 points behind B*). The interval is then "
    "that of the distance to the limit. n counts seeds, groups of models, tensors, epochs or draws "
    "of noise; single ones may exceed the limit. The limits are this project's: the paper has "
    "none.",
    "- Of 100 claims without a true difference, about 5 would be *reproduced* or *not reproduced* "
    "by chance. Tables 2 to 4 share runs, so some of their claims are the same comparison.",
    "- All seeds share the test images, so standard errors do not include test-set sampling noise.",
    "- For several anchors, the values are listed in the order of the anchors. A claim is "
    "*reproduced* or *not reproduced* if it is so from each anchor, and *inconclusive* otherwise.",
    "- IN-V2, IN-R, IN-A, IN-Sketch and ObjectNet are the synthetic counterparts of these shifts.",
    "",
    "`make studies` writes this page.",
    "",
    "### Terms",
    "",
    "| term | meaning |",
    "|---|---|",
    "| ID | in-distribution accuracy |",
    "| avg. shifts | mean accuracy over the shifts; claims call it *out of distribution* |",
    "| Vanilla FT | single fine-tuned model |",
    "| Model Stock\\*, Vanilla FT\\* | the paper's second setup: 1.6 times the epochs, label "
    "smoothing and mixup |",
    "| LP | linear probe: only the classifier is trained |",
    "| from LP init | fine-tuning starts from the linear probe, as in LP-FT |",
    "| α | position between the anchor and a model, w0 + α (w − w0) (WiSE-FT) |",
    "| at equal ID | avg. shifts, compared with the point of the named method's WiSE-FT curve that "
    "has the same ID |",
    "| without tuning | the model itself (α = 1) is compared with the other method's curve |",
    "| at the best α | curve compared with curve: mean difference over the upper half of the ID "
    "that both curves reach |",
    "| shrunk | pulled toward the anchor: the task vector is multiplied by a ratio t between 0 and "
    "1 |",
    "| `every`, `last` | values of `merge.carry_noise`, an extension of this project: carried "
    "noise shrinks the model at every merge, or at the last merge only. Claims of this study are "
    "at equal ID |",
    "| extension | not in the paper |",
    "| – | not applicable: this anchor does not have the claim |",
)
# Words of pages that earlier versions wrote -> words now.
_RENAMED_VERDICTS = {
    "holds": "reproduced",
    "does not hold": "not reproduced",
    "not decided": "inconclusive",
}
# Data of a study -> name of the benchmark.
_BENCHMARKS = {"glyphs": "synthetic benchmark", "vader": "real sentence encoder"}
_HEADER = ("| study | claim | source | ours | verdict |", "|---|---|---|---:|---|")


def write_index(groups: Mapping[str, Sequence[Study]], directory: Path) -> Path:
    """Write the main findings, and the verdicts of all pages in the directory, on one page.

    Args:
      groups: title of a group -> its studies, in the order of the page.
      directory: of all studies.

    Returns:
      The page's path.
    """
    summary = _Summary()
    claims: dict[str, list[dict[str, Any]]] = {}
    blocks: list[str] = []
    for title, studies in groups.items():
        rows: list[str] = []
        for study in studies:
            for stem in stems(study):
                path = directory / f"{stem}.json"
                if path.exists():
                    rows += _rows(study.name, path, summary, claims)
        if rows:
            counts = Counter(
                claim["verdict"] for study in studies for claim in claims.get(study.name, ())
            )
            blocks += _block(f"{title}: {_counted(counts)}", [*_HEADER, *rows, ""])
    lines = [
        "# Claims and verdicts",
        "",
        *_TOP,
        *findings.lines(claims),
        "## All claims",
        "",
        "Number of claims with each verdict. An anchor is a pretrained model; studies with several "
        "anchors repeat claims of the studies with one.",
        "",
        *summary.totals(),
        *blocks,
        *_block("Verdicts by page", summary.pages()),
        *_INTRODUCTION,
        "",
    ]
    return write_text(directory / PAGE, "\n".join(lines))


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in get_args(Verdict))


def _block(title: str, lines: Sequence[str]) -> list[str]:
    """Return a block that GitHub shows folded."""
    return ["<details>", f"<summary>{title}</summary>", "", *lines, "</details>", ""]


class _Summary:
    """Numbers of verdicts, by page and in total."""

    def __init__(self) -> None:
        self._pages: dict[str, Counter[str]] = {}
        self._totals: dict[str, Counter[str]] = {}

    def add(
        self, link: str, data: str, num_anchors: int, claims: Sequence[Mapping[str, Any]]
    ) -> None:
        """Count the claims of a page."""
        benchmark = _BENCHMARKS.get(data.partition(",")[0], data)
        if num_anchors > 1:
            benchmark += ", several anchors"
        for claim in claims:
            author = claim["where"] if claim["where"] == "this project" else "the paper"
            total = f"**claims of {author}: {benchmark}**"
            self._totals.setdefault(total, Counter())[claim["verdict"]] += 1
            self._pages.setdefault(link, Counter())[claim["verdict"]] += 1

    def totals(self) -> list[str]:
        """Return a Markdown table of the sums over pages."""
        return _verdict_table(dict(sorted(self._totals.items())))

    def pages(self) -> list[str]:
        """Return a Markdown table with a row for each page."""
        return _verdict_table(self._pages)


def _verdict_table(counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    verdicts = get_args(Verdict)
    lines = [f"| page | {' | '.join(verdicts)} |", "|---|" + "---:|" * len(verdicts)]
    for name, numbers in counts.items():
        lines.append(f"| {name} | {' | '.join(str(numbers[v]) for v in verdicts)} |")
    return [*lines, ""]


def _rows(
    name: str, path: Path, summary: _Summary, found: dict[str, list[dict[str, Any]]]
) -> list[str]:
    """Return the rows of a page; add its claims to `summary`, and to `found` by the file's stem."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        num_anchors = len(document.get("further", ())) + 1
        # Several anchors: only the claims of more than one; the others are on the first one's page.
        claims = [
            claim | {"verdict": _RENAMED_VERDICTS.get(claim["verdict"], claim["verdict"])}
            for claim in document["together" if num_anchors > 1 else "claims"]
        ]
        rows = _claim_rows(path.stem, document["title"], num_anchors, claims)
    # Written by an older version, or truncated.
    except (ValueError, KeyError, TypeError, AttributeError):
        command = f"python -m studies {name}"
        if path.stem != name:
            command += " --anchors=..."
        return [f"| {path.stem} | cannot be read: run `{command}` | | | |"]
    link = _link(path.stem, document["title"], num_anchors)
    summary.add(link, document.get("data", ""), num_anchors, claims)
    found[path.stem] = claims
    return rows


def _link(stem: str, title: str, num_anchors: int) -> str:
    return f"[{title}{_anchors(num_anchors)}]({stem}.md)"


def _anchors(number: int) -> str:
    return f", from {number} anchors" if number > 1 else ""


def _claim_rows(
    stem: str, title: str, num_anchors: int, claims: Sequence[Mapping[str, Any]]
) -> list[str]:
    link = _link(stem, title, num_anchors)
    if not claims:
        return [f"| {link} | | | | |"]
    rows = []
    for number, claim in enumerate(claims):
        result = claim["here"] if num_anchors == 1 else "<br>".join(claim["here"])
        first = "" if number else link
        row = [first, cell(claim["text"]), claim["where"], result, f"**{claim['verdict']}**"]
        rows.append(f"| {' | '.join(row)} |")
    return rows
