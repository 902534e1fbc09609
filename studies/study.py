"""A study: what it measures, its report, and the paper's claims with their verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from matplotlib.figure import Figure

from modelstock_jax.reporting.tables import mean_and_error
from studies.measurements import Measurement

Verdict = Literal["holds", "does not hold", "not decided"]
Values = Mapping[Any, Any]
Draw = Callable[[Path], Figure]


@dataclass(frozen=True)
class Study:
    """A table or figure of the paper.

    Attributes:
      name: on the command line.
      title: what it is in the paper.
      about: what is measured, in a sentence or two.
      measurements: setup -> {a name: Measurement}; none is made yet.
      summarize: (setup, values by the same names) -> Report.
      num_seeds: how many it takes unless asked for more.
    """

    name: str
    title: str
    about: str
    measurements: Callable[[Setup], Mapping[Any, Measurement]]
    summarize: Callable[[Setup, Values], StudyReport]
    num_seeds: int = 4


class Setup(NamedTuple):
    """What a study may know before anything is measured.

    Attributes:
      seeds: of its runs.
      epochs: of the base config.
      steps_per_epoch: of the base config.
      learning_rate: of the base config.
      shifts: whether the data has any.
      further: whether the anchor is another than the base config's, on which a study may measure
        less.
      stored: whether training images are stored ones, which `data.augment` is of.
    """

    seeds: Sequence[int]
    epochs: int
    steps_per_epoch: int
    learning_rate: float = 1e-3
    shifts: bool = True
    further: bool = False
    stored: bool = False


@dataclass(frozen=True)
class StudyReport:
    """What a study found.

    Attributes:
      tables: ours beside the paper's.
      claims: of the paper, each with its verdict here.
      figures: a file's stem -> draws it.
      notes: what a reader must know to read them.
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
        """GitHub's table.

        >>> print(Table(["method", "ID"], [["mean", "80.2"]]).markdown())
        | method | ID |
        |---|---:|
        | mean | 80.2 |
        """
        lines = ["| " + " | ".join(self.columns) + " |"]
        lines.append("|---|" + "---:|" * (len(self.columns) - 1))
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join(lines)


# Whether a claim of the paper holds here: paired differences and their standard error.


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper, and by how much it is true, once a seed.

    Attributes:
      text: what the paper says, in a few words.
      where: table, figure or section of the paper.
      differences: one a seed, pair or tensor, positive where the claim is true; with `within`,
        deviations that it bounds.
      unit: of the differences.
      within: the largest mean deviation at which the claim is true; single ones may lie beyond.
      margin: how far below zero the mean difference may lie.
    """

    text: str
    where: str
    differences: Sequence[float]
    unit: str = "points"
    within: float | None = None
    margin: float = 0.0

    @property
    def verdict(self) -> Verdict:
        """By the 95 % interval of Student's t: above zero, below zero, or neither.

        >>> Claim("the mean is better", "Table 1", [1.0, 1.2, 0.9]).verdict
        'holds'
        >>> Claim("the mean is better", "Table 1", [1.0, -1.2, 0.3]).verdict
        'not decided'
        >>> Claim("they agree", "Table 1", [0.01, 0.02], within=0.5).verdict
        'holds'
        >>> Claim("hardly worse", "Table 1", [-0.1, -0.2], margin=1).verdict
        'holds'
        """
        signed = [one + self.margin for one in self.differences]
        if self.within is not None:
            signed = [self.within - abs(one) for one in signed]
        mean, error = mean_and_error(signed)
        if error is None:
            return "not decided"
        reach = student(len(signed) - 1) * error
        if mean - reach > 0:
            return "holds"
        return "does not hold" if mean + reach < 0 else "not decided"

    def here(self) -> str:
        """By how much it is true.

        >>> Claim("the mean is better", "Table 1", [1.0, 1.2, 0.9]).here()
        '+1.03 ± 0.09 points (n = 3)'
        >>> Claim("hardly worse", "Table 1", [-0.1, -0.3], margin=0.5).here()
        '-0.20 ± 0.10 points, at least -0.5 (n = 2)'
        >>> Claim("they agree", "Table 1", [0.01, 0.02, 0.06], "", within=0.05).here()
        '0.030 ± 0.015, at most 0.05 (n = 3, 1 beyond)'
        """
        sizes = self.differences if self.within is None else [abs(d) for d in self.differences]
        mean, error = mean_and_error(sizes)
        digits = 2 if abs(mean) >= 0.1 or mean == 0 else 1 - math.floor(math.log10(abs(mean)))
        shown = f"{mean:.{digits}f}" if self.within is not None else f"{mean:+.{digits}f}"
        if error is not None:
            shown += f" ± {error:.{digits}f}"
        if self.unit:
            shown += f" {self.unit}"
        if self.within is not None:
            shown += f", at most {self.within:g}"
        if self.margin:
            shown += f", at least {-self.margin:g}"
        return f"{shown} (n = {len(sizes)}{self._beyond()})"

    def _beyond(self) -> str:
        beyond = sum(abs(one) > self.within for one in self.differences) if self.within else 0
        return f", {beyond} beyond" if beyond else ""

    def line(self) -> str:
        """One line of Markdown.

        >>> Claim("the mean is better", "Table 1", [1.0, 1.2, 0.9]).line()
        '| the mean is better | Table 1 | +1.03 ± 0.09 points (n = 3) | **holds** |'
        """
        return f"| {cell(self.text)} | {self.where} | {self.here()} | **{self.verdict}** |"


def cell(text: str) -> str:
    r"""Text for a cell of a Markdown table, where a bar would end it.

    >>> print(cell("|cos| < 0.05"))
    \|cos\| < 0.05
    """
    return text.replace("|", "\\|")


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t with so many degrees of freedom.

    >>> round(student(3), 2)
    3.18
    """
    from scipy.stats import t  # Half a second: only where a verdict is asked for.

    return float(t.ppf(0.975, freedom))
