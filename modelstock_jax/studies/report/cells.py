"""Numbers of Scores, and the cells of tables that show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modelstock_jax.reporting.tables import Measured, mean_and_error


def average(score: Mapping[str, Any], names: Sequence[str] | None = None) -> float:
    """'Avg shifts' of a Score: the plain mean, of all or of some.

    >>> average({"id": 80.0, "shifts": {"v2": 70.0, "r": 60.0}})
    65.0
    """
    shifts = score["shifts"]
    chosen = [shifts[name] for name in names or shifts]
    return sum(chosen) / len(chosen)


def id_and_shifts(score: Mapping[str, Any]) -> tuple[float, float]:
    """The two numbers of a Score: accuracy in distribution, and 'avg shifts'."""
    return score["id"], average(score)


def shown(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± standard error, as a table's cell.

    >>> shown([1.0, 3.0]), shown([2.5]), shown([])
    ('2.00 ± 1.00', '2.50', '–')
    """
    return with_error(mean_and_error(values) if values else None, digits)


def with_error(found: Measured | None, digits: int = 2) -> str:
    """A mean and its error, where it has one."""
    if found is None:
        return "–"
    text = f"{found.mean:.{digits}f}"
    return text if found.error is None else f"{text} ± {found.error:.{digits}f}"


def both(scores: Sequence[Mapping[str, Any]]) -> list[str]:
    """Two cells of Scores: accuracy in distribution, and 'avg shifts'.

    >>> both([{"id": 80.0, "shifts": {"v2": 70.0, "r": 60.0}}])
    ['80.00', '65.00']
    """
    return [shown([score["id"] for score in scores]), shown([average(score) for score in scores])]


def theirs(value: float | None, digits: int = 2) -> str:
    """A number of the paper, as a table's cell."""
    return "–" if value is None else f"{value:.{digits}f}"
