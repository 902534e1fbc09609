"""The main findings: six claims of the paper in plain words, with its values and ours."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from studies.catalog.paper_numbers import TABLE_1, TABLE_2, TABLE_5, TABLE_7


class Finding(NamedTuple):
    """A main finding.

    Attributes:
      text: the claim, in plain words.
      paper: the paper's value.
      where: of that value, in the paper.
      study: whose page has the claim.
      claim: start of the claim's text on that page.
    """

    text: str
    paper: str
    where: str
    study: str
    claim: str


def _deviation_from_law() -> str:
    """Return the paper's mean deviation of the distance to the center from 1/√N, in percent."""
    first = TABLE_1[1].distance
    deviations = [
        abs(row.distance * n**0.5 / first - 1)
        for n, row in TABLE_1.items()
        if n > 1 and row.distance
    ]
    return f"{100 * sum(deviations) / len(deviations):.1f} %"


def _points(better: float, worse: float, digits: int) -> str:
    return f"{better - worse:+.{digits}f} points"


FINDINGS = (
    Finding(
        "Any two fine-tuned models have the same angle in a layer (kernels): mean deviation",
        "drawn, no number",
        "Figure 2",
        "fig2",
        "angles of kernels are the same",
    ),
    Finding(
        "The distance of the mean of N models to the center decreases as 1/√N: mean deviation",
        _deviation_from_law(),
        "Table 1",
        "table1",
        "the distance of a mean of N models to the center decreases",
    ),
    Finding(
        "Closer to the center is more accurate: mean of 2 models − single model, OOD",
        _points(TABLE_1[2].shifts, TABLE_1[1].shifts, 2),
        "Table 1",
        "table1",
        "the uniform mean of 2 beats a single fine-tuned model, out of distribution",
    ),
    Finding(
        "Model Stock of 2 models, merged after training, is better than their mean, OOD",
        _points(TABLE_7[2][1].shifts, TABLE_7[2][0].shifts, 1),
        "Table 7",
        "table7",
        "N = 2: Model Stock beats the uniform mean of the same models, out of distribution",
    ),
    Finding(
        "Model Stock of 2 models, merged every epoch, is better than one model trained twice as "
        "long, ID",
        _points(TABLE_5[2].id, TABLE_5[1].id, 1),
        "Table 5",
        "table5",
        "N = 2 beats a single fine-tuned model of the same training compute, in distribution",
    ),
    Finding(
        "Model Stock of 2 models, merged every epoch, is better than a greedy soup of many, OOD",
        _points(TABLE_2["model_stock"].shifts, TABLE_2["greedy_soup"].shifts, 2),
        "Table 2",
        "table2",
        "Model Stock beats Greedy Model Soup, out of distribution",
    ),
)


def lines(claims: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Return a Markdown table of the findings whose studies were measured.

    Args:
      claims: study -> claims of its page, each {"text", "here", "verdict"}.
    """
    rows = []
    for finding in FINDINGS:
        for claim in claims.get(finding.study, ()):
            if claim["text"].startswith(finding.claim):
                # The page says how many samples exceed the limit; here their number is enough.
                ours = re.sub(r"(\(n = \d+)[^)]*\)", r"\1)", claim["here"])
                cells = [
                    f"[{finding.text}]({finding.study}.md)",
                    f"{finding.paper} ({finding.where})",
                    ours,
                    f"**{claim['verdict']}**",
                ]
                rows.append(f"| {' | '.join(cells)} |")
    if not rows:
        return []
    return ["| claim | paper | ours | verdict |", "|---|---:|---:|---|", *rows, ""]
