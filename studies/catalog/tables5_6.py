"""Merging during training: Tables 5 and 6, and the optimizer state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from studies.catalog.model_pool import MERGING, PAIR, pool
from studies.catalog.paper_numbers import TABLE_5, TABLE_6, Result
from studies.curves import accuracy_cells, average_shifts, mean_cell, paper_cell
from studies.expressions import Merged, Replica
from studies.measurements import Measurement, Score, Shell
from studies.runs import Run
from studies.study import Claim, Setup, Study, StudyReport, Table, Values


def _others(setup: Setup, seed: int):
    """Return the pool without this seed, whose data order the measured models share."""
    return tuple(model for model in pool(setup.seeds) if model.run.seed != seed)


def _long(setup: Setup, seed: int) -> Replica:
    """Return one model fine-tuned for twice the epochs: the training compute of two replicas."""
    return Replica(Run.of(seed, PAIR | {"epochs": 2 * setup.epochs}))


def _table_5(setup: Setup) -> dict[Any, Measurement]:
    measurements: dict[Any, Measurement] = {}
    for seed in setup.seeds:
        models = {1: _long(setup, seed)} | {
            n: Merged(Run.of(seed, {"merge.every": "epoch", "num_replicas": n}))
            for n in TABLE_5
            if n > 1
        }
        measurements |= {(n, seed): Score(model) for n, model in models.items()}
        measurements["shell", seed] = Shell(tuple(models.values()), _others(setup, seed))
    return measurements


def _summarize_table_5(setup: Setup, values: Values) -> StudyReport:
    rows = []
    for index, (n, paper) in enumerate(TABLE_5.items()):
        scores = [values[n, seed] for seed in setup.seeds]
        rows.append(
            [
                f"single fine-tuned model, {2 * setup.epochs} epochs" if n == 1 else f"N = {n}",
                *accuracy_cells(scores),
                mean_cell([values["shell", seed]["distance"][index] for seed in setup.seeds], 3),
                paper_cell(paper.id, 1),
                paper_cell(paper.shifts, 1),
                paper_cell(paper.distance),
            ]
        )
    single = "N = 2 beats a single fine-tuned model of the same training compute"
    claims = [
        _better(setup, values, 2, 1, "id", single, "Table 5"),
        _better(setup, values, 2, 1, "shifts", single, "Table 5"),
        _better(setup, values, 4, 2, "id", "N = 4 beats N = 2", "Table 5"),
        _better(setup, values, 4, 2, "shifts", "N = 4 beats N = 2", "Table 5"),
        Claim(
            "N = 4 is closer to the center than N = 2",
            "Table 5",
            [
                values["shell", seed]["distance"][1] - values["shell", seed]["distance"][3]
                for seed in setup.seeds
            ],
            "in L2 distance",
        ),
    ]
    columns = ["periodic merging", "ID", "avg. shifts", "L2 distance to center"]
    columns += ["paper: ImageNet", "paper: avg. shifts", "paper: L2 distance to center"]
    return StudyReport([Table(columns, rows)], claims)


def _better(setup: Setup, values: Values, a, b, metric: str, text: str, where: str) -> Claim:
    read: Callable[[Mapping[str, Any]], float] = average_shifts if metric == "shifts" else _id
    place = "out of distribution" if metric == "shifts" else "in distribution"
    return Claim(
        f"{text}, {place}",
        where,
        [read(values[a, seed]) - read(values[b, seed]) for seed in setup.seeds],
    )


def _id(score: Mapping[str, Any]) -> float:
    return score["id"]


def period_options(setup: Setup, period: float) -> dict[str, Any]:
    """Return the options of two replicas merged every `period` epochs."""
    return MERGING | {"merge.every": str(max(1, round(period * setup.steps_per_epoch)))}


def _table_6(setup: Setup) -> dict[Any, Measurement]:
    return {
        (period, seed): Score(Merged(Run.of(seed, period_options(setup, period))))
        for period in TABLE_6
        for seed in setup.seeds
    }


def _summarize_table_6(setup: Setup, values: Values) -> StudyReport:
    rows = _rows(setup, values, {p: f"{p:g} epochs" for p in sorted(TABLE_6)}, TABLE_6)
    claims = [
        Claim(
            f"merging every {period:g} epochs is as good as every epoch (within 1 point), {place}",
            "Table 6",
            [abs(read(values[period, seed]) - read(values[1.0, seed])) for seed in setup.seeds],
            within=1,
        )
        for period in TABLE_6
        if period != 1
        for read, place in ((_id, "in distribution"), (average_shifts, "out of distribution"))
    ]
    columns = ["merging period", "ID", "avg. shifts", "paper: ImageNet", "paper: avg. shifts"]
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
        row = [name, *accuracy_cells(scores)]
        if paper is not None:
            row += [paper_cell(paper[key].id, 1), paper_cell(paper[key].shifts, 1)]
        rows.append(row)
    return rows


_STATES = {
    "keep": "each replica keeps its state",
    "average": "all replicas get the mean",
    "reset": "all replicas are reset",
}


def _optimizer_state(setup: Setup) -> dict[Any, Measurement]:
    return {
        (state, seed): Score(Merged(Run.of(seed, MERGING | {"merge.opt_state": state})))
        for state in _STATES
        for seed in setup.seeds
    }


def _summarize_optimizer_state(setup: Setup, values: Values) -> StudyReport:
    claims = [
        _better(setup, values, state, "keep", metric, f"`{state}` beats `keep`", "this project")
        for state in ("average", "reset")
        for metric in ("id", "shifts")
    ]
    names = {state: f"`{state}`: {text}" for state, text in _STATES.items()}
    table = Table(
        ["optimizer state (Adam's moments)", "ID", "avg. shifts"], _rows(setup, values, names)
    )
    return StudyReport([table], claims)


TABLE_5_STUDY = Study(
    "table5",
    "Table 5: the number of replicas",
    "Periodic merging of N replicas, compared with a single fine-tuned model of twice the epochs.",
    _table_5,
    _summarize_table_5,
)
TABLE_6_STUDY = Study(
    "table6",
    "Table 6: the merging period",
    "Two replicas merged every 0.4, 1 and 2 epochs.",
    _table_6,
    _summarize_table_6,
)
OPTIMIZER_STATE = Study(
    "optimizer_state",
    "The optimizer state at a merge",
    "The paper does not specify whether Adam's moments are kept, averaged or reset at a merge.",
    _optimizer_state,
    _summarize_optimizer_state,
)
