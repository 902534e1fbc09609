"""Tables 2, 3 and 4: Model Stock compared with Model Soups and other fine-tuning methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from studies.catalog.compared_methods import NAMES, is_single, model_by, rates_of, single
from studies.catalog.paper_numbers import TABLE_2, TABLE_3, TABLE_3_SHIFTS, TABLE_4, Result
from studies.catalog.soup_search import SIZE
from studies.curves import average_shifts, mean_cell, paper_cell, shift_name
from studies.measurements import HeldOut, Measurement, Score
from studies.study import Claim, Setup, Study, StudyReport, Table, Values


def _measure(methods: Sequence[str]) -> Callable[[Setup], dict[Any, Measurement]]:
    """Return the function of a study's measurements."""

    def measurements(setup: Setup) -> dict[Any, Measurement]:
        by_name: dict[Any, Measurement] = {}
        for method in methods:
            for seed in setup.seeds:
                by_name[method, seed] = Score(model_by(setup, method, seed))
                if is_single(method):
                    candidates = single(setup, method, seed)
                    by_name |= {
                        (method, seed, i): HeldOut(model) for i, model in enumerate(candidates)
                    }
        return by_name

    return measurements


def _summarize(
    methods: Sequence[str],
    paper: Mapping[str, Result],
    where: str,
    shifts: Sequence[str] | None = None,
    costs: Mapping[str, str] | None = None,
    initializations: Sequence[str] = ("zero_shot",),
) -> Callable[[Setup, Values], StudyReport]:
    """Return the function of a study's report.

    Args:
      methods: rows of the table.
      paper: method -> row of the paper.
      where: the table's name.
      shifts: the shifts that are averaged, if the data has them; by default all.
      costs: method -> fine-tuning runs.
      initializations: rows that other methods start from; no claim compares with them.
    """

    def summarize(setup: Setup, values: Values) -> StudyReport:
        first = values[methods[0], setup.seeds[0]]["shifts"]
        # The paper's Table 3 omits ObjectNet. Data without these shifts uses all it has.
        names = shifts if shifts and set(shifts) <= first.keys() else None
        accuracies = {
            method: [
                (score["id"], average_shifts(score, names))
                for score in (values[method, seed] for seed in setup.seeds)
            ]
            for method in methods
        }
        rows = [
            [
                NAMES[method],
                *(mean_cell(column) for column in zip(*accuracies[method], strict=True)),
                *([costs[method]] if costs else []),
                _chosen_rates(setup, values, method),
                paper_cell(paper[method].id),
                paper_cell(paper[method].shifts),
            ]
            for method in methods
        ]
        claims = [
            claim
            for rival in methods
            if not rival.startswith("model_stock") and rival not in initializations
            for claim in _claims(accuracies, paper, rival, where)
        ]
        columns = ["method", "ID", "avg. shifts", *(["fine-tuning runs"] if costs else [])]
        columns += ["learning rates chosen", "paper: ImageNet", "paper: avg. shifts"]
        return StudyReport(
            [Table(columns, rows)],
            claims,
            notes=[
                "Learning rates chosen: for each seed of a single-model method, the learning rate "
                "with the best validation accuracy, divided by the config's. Model Stock uses the "
                "config's. † marks the minimum or maximum of the learning rates that were tried.",
                "\\* is the paper's second setup: 1.6 times the epochs, label smoothing and mixup "
                "(for stored images also strong augmentation).",
                f"avg. shifts is the mean over {', '.join(map(shift_name, names or first))}.",
            ],
        )

    return summarize


def _claims(
    accuracies: Mapping[str, Sequence[tuple[float, float]]],
    paper: Mapping[str, Result],
    rival: str,
    where: str,
) -> list[Claim]:
    """Return the claims of the paper's rows on a rival and the Model Stock of its setup."""
    # The paper compares soups from LP initialization with Model Stock*.
    stock = "model_stock*" if rival.endswith("*") else "model_stock"
    paper_differences = (
        paper[stock].id - paper[rival].id,
        paper[stock].shifts - paper[rival].shifts,
    )
    claims = []
    for i, (place, in_paper) in enumerate(
        zip(("in distribution", "out of distribution"), paper_differences, strict=True)
    ):
        if not in_paper:
            continue  # Equal in the paper, so there is no claim.
        # The method with the higher accuracy in the paper is named first.
        better, worse = (stock, rival) if in_paper > 0 else (rival, stock)
        pairs = zip(accuracies[better], accuracies[worse], strict=True)
        claims.append(
            Claim(
                f"{NAMES[better]} beats {NAMES[worse]}, {place} (paper: {abs(in_paper):+.2f})",
                where,
                [a[i] - b[i] for a, b in pairs],
            )
        )
    return claims


def _chosen_rates(setup: Setup, values: Values, method: str) -> str:
    """Return the learning rate of each seed that validation chose, marked at the ends."""
    if not is_single(method):
        return "–"
    rates = rates_of(method)
    chosen = []
    for seed in setup.seeds:
        candidates = range(len(single(setup, method, seed)))
        best = max(candidates, key=lambda i, seed=seed: values[method, seed, i])
        rate = rates[best % len(rates)]
        chosen.append(f"{rate:.2g}" + "†" * (rate in (min(rates), max(rates))))
    return ", ".join(chosen)


_TABLE_2 = (
    "zero_shot",
    "vanilla",
    "uniform_soup",
    "greedy_soup",
    "model_stock",
    "lp",
    "vanilla*",
    "uniform_soup*",
    "greedy_soup*",
    "model_stock*",
)
_COSTS = {
    "zero_shot": "0",
    "vanilla": "1",
    "uniform_soup": str(SIZE),
    "greedy_soup": str(SIZE),
    "model_stock": "2",
    "lp": "α",
    "vanilla*": "1.6",
    "uniform_soup*": f"{SIZE} + α",
    "greedy_soup*": f"{SIZE} + α",
    "model_stock*": "3.2",
}
_TABLE_3 = (
    "zero_shot",
    "vanilla",
    "vanilla*",
    "lp",
    "lp_ft",
    "car_ft",
    "ftp",
    "flyp",
    "model_stock",
    "model_stock*",
)
_TABLE_4 = ("zero_shot", "vanilla", "vanilla*", "tpgm", "car_ft", "model_stock", "model_stock*")

TABLE_2_STUDY = Study(
    "table2",
    "Table 2: Model Stock and Model Soups",
    f"A soup has {SIZE} models of Model Soups' random search over learning rate, weight decay, "
    "epochs, label smoothing and mixup. The Greedy Model Soup is selected on validation images. "
    "Fine-tuning runs are counted in trainings of the first setup; α is the cost of the linear "
    "probe.",
    _measure(_TABLE_2),
    _summarize(_TABLE_2, TABLE_2, "Table 2", costs=_COSTS, initializations=("zero_shot", "lp")),
    num_seeds=3,
)
TABLE_3_STUDY = Study(
    "table3",
    "Table 3: Model Stock and other fine-tuning methods",
    "One model of each method, and Model Stock of two replicas merged at every epoch.",
    _measure(_TABLE_3),
    _summarize(_TABLE_3, TABLE_3, "Table 3", TABLE_3_SHIFTS),
    num_seeds=3,
)
TABLE_4_STUDY = Study(
    "table4",
    "Table 4: the methods of the paper's largest model",
    "Model Stock compared with TPGM and CAR-FT. configs/vitl14.py uses the paper's model, CLIP "
    "ViT-L/14; the synthetic benchmark uses its small model.",
    _measure(_TABLE_4),
    _summarize(_TABLE_4, TABLE_4, "Table 4"),
    num_seeds=3,
)
