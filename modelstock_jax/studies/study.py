"""A study: what it measures, and what it says of the paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from modelstock_jax.studies.measuring.measurements import Measurement
from modelstock_jax.studies.report.claims import Claim


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


Values = Mapping[Any, Any]
Draw = Callable[[Path], Figure]


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


@dataclass(frozen=True)
class Report:
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
class Study:
    """A table or figure of the paper.

    Attributes:
      name: on the command line.
      title: what it is in the paper.
      about: what is measured, in a sentence or two.
      measurements: setup -> {a name: Measurement}; none is made yet.
      summarise: (setup, values by the same names) -> Report.
      num_seeds: how many it takes unless asked for more.
    """

    name: str
    title: str
    about: str
    measurements: Callable[[Setup], Mapping[Any, Measurement]]
    summarise: Callable[[Setup, Values], Report]
    num_seeds: int = 4
