"""A study: its measurements, its report, and the paper's claims with their verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from matplotlib.figure import Figure

from modelstock_jax.reporting.tables import mean_and_error
from studies.measurements import Measurement

Verdict = Literal["reproduced", "not reproduced", "inconclusive"]
Values = Mapping[Any, Any]
Draw = Callable[[Path], Figure]


@dataclass(frozen=True)
class Study:
    """A table or figure of the paper.

    Attributes:
      name: on the command line.
      title: its label and subject in the paper.
      about: what is measured, in one or two sentences.
      measurements: setup -> {name: Measurement}; measures nothing.
      summarize: (setup, values by the same names) -> StudyReport.
      num_seeds: default number of seeds.
      domain: in-distribution domain of the sentence benchmark; None for the images of a config.
      seed_offset: added to the config's seed, for seeds that no other study uses.
    """

    name: str
    title: str
    about: str
    measurements: Callable[[Setup], Mapping[Any, Measurement]]
    summarize: Callable[[Setup, Values], StudyReport]
    num_seeds: int = 4
    domain: str | None = None
    seed_offset: int = 0


class Setup(NamedTuple):
    """What determines a study's measurements.

    Attributes:
      seeds: of its runs.
      epochs: of the base config.
      steps_per_epoch: of the base config.
      learning_rate: of the base config.
      shifts: whether the data has any.
      additional_anchor: whether the anchor is not the base config's; a study may then measure less.
      stored_images: whether training images are stored ones, to which `data.augment` applies.
    """

    seeds: Sequence[int]
    epochs: int
    steps_per_epoch: int
    learning_rate: float = 1e-3
    shifts: bool = True
    additional_anchor: bool = False
    stored_images: bool = False


@dataclass(frozen=True)
class StudyReport:
    """The results of a study.

    Attributes:
      tables: our values next to the paper's.
      claims: of the paper, each with its verdict.
      figures: file stem -> draws it.
      notes: footnotes of the tables and claims.
    """

    tables: Sequence[Table] = ()
    claims: Sequence[Claim] = ()
    figures: Mapping[str, Draw] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Table:
    """Rows of texts under headings; the first column is text, the others are numbers."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """Return a GitHub Markdown table.

        >>> print(Table(["method", "ID"], [["mean", "80.2"]]).markdown())
        | method | ID |
        |---|---:|
        | mean | 80.2 |
        """
        lines = ["| " + " | ".join(self.columns) + " |"]
        lines.append("|---|" + "---:|" * (len(self.columns) - 1))
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join(lines)


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, with the paired differences that test it.

    Attributes:
      text: the claim, in a few words.
      where: table, figure or section of the paper.
      differences: one per seed, pair or tensor, positive if the claim is true; with `within`, the
        deviations that it bounds.
      unit: of the differences; a `fraction` is printed in percent.
      within: maximum mean deviation at which the claim is true; single deviations may exceed it.
      margin: how far below zero the mean difference may be.
    """

    text: str
    where: str
    differences: Sequence[float]
    unit: str = "points"
    within: float | None = None
    margin: float = 0.0

    @property
    def verdict(self) -> Verdict:
        """Whether the 95 % interval of Student's t is above zero, below zero, or contains it.

        >>> Claim("the mean is better", "Table 1", [1.0, 1.2, 0.9]).verdict
        'reproduced'
        >>> Claim("the mean is better", "Table 1", [-1.0, -1.2, -0.9]).verdict
        'not reproduced'
        >>> Claim("the mean is better", "Table 1", [1.0, -1.2, 0.3]).verdict
        'inconclusive'
        >>> Claim("they agree", "Table 1", [0.01, 0.02], within=0.5).verdict
        'reproduced'
        >>> Claim("hardly worse", "Table 1", [-0.1, -0.2], margin=1).verdict
        'reproduced'
        """
        signed = [difference + self.margin for difference in self.differences]
        if self.within is not None:
            signed = [self.within - abs(difference) for difference in signed]
        mean, error = mean_and_error(signed)
        if error is None:
            return "inconclusive"
        half_width = student_t_quantile(len(signed) - 1) * error
        if mean - half_width > 0:
            return "reproduced"
        return "not reproduced" if mean + half_width < 0 else "inconclusive"

    def result(self) -> str:
        """Return the mean difference with its error, its bound, and the number of samples.

        >>> Claim("the mean is better", "Table 1", [1.0, 1.2, 0.9]).result()
        '+1.03 ± 0.09 points (n = 3)'
        >>> Claim("the mean is better", "Table 1", [0.1, -0.3, 0.2]).result()
        '+0.00 ± 0.15 points (n = 3)'
        >>> Claim("hardly worse", "Table 1", [-0.1, -0.3], margin=0.5).result()
        '-0.20 ± 0.10 points, limit -0.5 (n = 2)'
        >>> Claim("they agree", "Table 1", [0.01, 0.02, 0.06], "", within=0.05).result()
        '0.030 ± 0.015, limit 0.05 (n = 3; 1 exceeds the limit)'
        >>> Claim("they agree", "Table 1", [0.01, 0.02, 0.06], "fraction", within=0.05).result()
        '3.0 % ± 1.5 %, limit 5 % (n = 3; 1 exceeds the limit)'
        """
        sizes = self.differences if self.within is None else [abs(d) for d in self.differences]
        mean, error = mean_and_error(sizes)
        size = abs(mean)
        if error is not None and size < error / 100:  # A zero that is rounded.
            size = error
        digits = 2 if size >= 0.1 or size == 0 else 1 - math.floor(math.log10(size))
        scale, symbol = 1, ""
        if self.unit == "fraction":
            scale, symbol, digits = 100, " %", max(digits - 2, 0)
        sign = "" if self.within is not None else "+"
        text = f"{scale * mean:{sign}.{digits}f}{symbol}"
        if error is not None:
            text += f" ± {scale * error:.{digits}f}{symbol}"
        if self.unit and not symbol:
            text += f" {self.unit}"
        if self.within is not None:
            text += f", limit {scale * self.within:g}{symbol}"
        if self.margin:
            text += f", limit {-self.margin:g}"
        return f"{text} (n = {len(sizes)}{self._exceeding()})"

    def _exceeding(self) -> str:
        count = sum(abs(d) > self.within for d in self.differences) if self.within else 0
        if not count:
            return ""
        return f"; {count} {'exceeds' if count == 1 else 'exceed'} the limit"

    def row(self) -> str:
        """Return the claim's row of a Markdown table.

        >>> Claim("the mean is better", "Table 1", [1.0, 1.2, 0.9]).row()
        '| the mean is better | Table 1 | +1.03 ± 0.09 points (n = 3) | **reproduced** |'
        """
        return f"| {cell(self.text)} | {self.where} | {self.result()} | **{self.verdict}** |"


def cell(text: str) -> str:
    r"""Escape text for a cell of a Markdown table, which a bar would end.

    >>> print(cell("|cos| < 0.05"))
    \|cos\| < 0.05
    """
    return text.replace("|", "\\|")


def student_t_quantile(degrees_of_freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t distribution.

    >>> round(student_t_quantile(3), 2)
    3.18
    """
    from scipy.stats import t  # Takes half a second; not every command needs it.

    return float(t.ppf(0.975, degrees_of_freedom))
