"""Merges during training: Tables 5 and 6, and the optimizer's state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from studies.catalog.model_pool import MERGING, PAIR, pool
from studies.catalog.paper_numbers import TABLE_5, TABLE_6, Result
from studies.curves import average, both, shown, theirs
from studies.expressions import Merged, Replica
from studies.measurements import Measurement, Score, Shell
from studies.runs import Run
from studies.study import Claim, Setup, Study, StudyReport, Table, Values


def _others(setup: Setup, seed: int):
    """The pool without this seed, so that no center shares data order with what it is for."""
    return tuple(one for one in pool(setup.seeds) if one.run.seed != seed)


def _long(setup: Setup, seed: int) -> Replica:
    """One model fine-tuned for twice the epochs: what two replicas cost."""
    return Replica(Run.of(seed, PAIR | {"epochs": 2 * setup.epochs}))


def _table_5(setup: Setup) -> dict[Any, Measurement]:
    wanted: dict[Any, Measurement] = {}
    for seed in setup.seeds:
        models = {1: _long(setup, seed)} | {
            n: Merged(Run.of(seed, {"merge.every": "epoch", "num_replicas": n}))
            for n in TABLE_5
            if n > 1
        }
        wanted |= {(n, seed): Score(model) for n, model in models.items()}
        wanted["at", seed] = Shell(tuple(models.values()), _others(setup, seed))
    return wanted


def _say_table_5(setup: Setup, values: Values) -> StudyReport:
    rows = []
    for place, (n, paper) in enumerate(TABLE_5.items()):
        scores = [values[n, seed] for seed in setup.seeds]
        rows.append(
            [
                f"one model, {2 * setup.epochs} epochs" if n == 1 else f"N = {n}",
                *both(scores),
                shown([values["at", seed]["distance"][place] for seed in setup.seeds], 3),
                theirs(paper.id, 1),
                theirs(paper.shifts, 1),
                theirs(paper.distance),
            ]
        )
    claims = [
        _better(setup, values, 2, 1, "id", "N = 2 beats one model of the same cost", "Table 5"),
        _better(setup, values, 2, 1, "shifts", "N = 2 beats one model of the same cost", "Table 5"),
        _better(setup, values, 4, 2, "id", "N = 4 beats N = 2", "Table 5"),
        _better(setup, values, 4, 2, "shifts", "N = 4 beats N = 2", "Table 5"),
        Claim(
            "N = 4 ends nearer to the center than N = 2",
            "Table 5",
            [
                values["at", seed]["distance"][1] - values["at", seed]["distance"][3]
                for seed in setup.seeds
            ],
            "of distance",
        ),
    ]
    columns = ["periodic merging", "ID", "avg shifts", "to the center"]
    columns += ["paper: ImageNet", "avg shifts", "to the center"]
    return StudyReport([Table(columns, rows)], claims)


def _better(setup: Setup, values: Values, a, b, what: str, text: str, where: str) -> Claim:
    of: Callable[[Mapping[str, Any]], float] = average if what == "shifts" else _id
    place = "on the shifts" if what == "shifts" else "in distribution"
    return Claim(
        f"{text}, {place}",
        where,
        [of(values[a, seed]) - of(values[b, seed]) for seed in setup.seeds],
    )


def _id(score: Mapping[str, Any]) -> float:
    return score["id"]


def period_options(setup: Setup, period: float) -> dict[str, Any]:
    """Two replicas merged every so many epochs."""
    return MERGING | {"merge.every": str(max(1, round(period * setup.steps_per_epoch)))}


def _table_6(setup: Setup) -> dict[Any, Measurement]:
    return {
        (period, seed): Score(Merged(Run.of(seed, period_options(setup, period))))
        for period in TABLE_6
        for seed in setup.seeds
    }


def _say_table_6(setup: Setup, values: Values) -> StudyReport:
    rows = _rows(setup, values, {p: f"{p:g} epochs" for p in sorted(TABLE_6)}, TABLE_6)
    claims = [
        Claim(
            f"merging every {period:g} epochs is as good as every epoch (within 1 point), {place}",
            "Table 6",
            [abs(of(values[period, seed]) - of(values[1.0, seed])) for seed in setup.seeds],
            within=1,
        )
        for period in TABLE_6
        if period != 1
        for of, place in ((_id, "in distribution"), (average, "on the shifts"))
    ]
    columns = ["period", "ID", "avg shifts", "paper: ImageNet", "avg shifts"]
    return StudyReport([Table(columns, rows)], claims)


def _rows(
    setup: Setup,
    values: Values,
    names: Mapping[Any, str],
    paper: Mapping[Any, Result] | None = None,
) -> Sequence[Sequence[str]]:
    rows = []
    for key, name in names.items():
        scores = [values[key, seed] for seed in setup.seeds]
        row = [name, *both(scores)]
        if paper is not None:
            row += [theirs(paper[key].id, 1), theirs(paper[key].shifts, 1)]
        rows.append(row)
    return rows


_STATES = {
    "keep": "each replica keeps its own",
    "average": "all get the mean",
    "reset": "all start anew",
}


def _optimizer_state(setup: Setup) -> dict[Any, Measurement]:
    return {
        (state, seed): Score(Merged(Run.of(seed, MERGING | {"merge.opt_state": state})))
        for state in _STATES
        for seed in setup.seeds
    }


def _say_optimizer_state(setup: Setup, values: Values) -> StudyReport:
    claims = [
        _better(setup, values, state, "keep", what, f"`{state}` beats `keep`", "an open choice")
        for state in ("average", "reset")
        for what in ("id", "shifts")
    ]
    names = {state: f"`{state}`: {text}" for state, text in _STATES.items()}
    table = Table(["Adam's moments at a merge", "ID", "avg shifts"], _rows(setup, values, names))
    return StudyReport([table], claims)


TABLE_5_STUDY = Study(
    "table5",
    "Table 5: the number of replicas",
    "Periodic merging of N replicas beside one model of twice the epochs.",
    _table_5,
    _say_table_5,
)
TABLE_6_STUDY = Study(
    "table6",
    "Table 6: the merging period",
    "Two replicas merged every 0.4, 1 and 2 epochs.",
    _table_6,
    _say_table_6,
)
OPTIMIZER_STATE = Study(
    "optimizer_state",
    "The optimizer's state at a merge",
    "What the paper leaves open: whether Adam's moments survive a merge.",
    _optimizer_state,
    _say_optimizer_state,
)
