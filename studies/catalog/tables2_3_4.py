"""Tables 2, 3 and 4: Model Stock beside soups and other ways to fine-tune."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from studies.catalog.compared_methods import NAMES, is_single, model_by, rates_of, single
from studies.catalog.paper_numbers import TABLE_2, TABLE_3, TABLE_3_SHIFTS, TABLE_4, Result
from studies.catalog.soup_search import SIZE
from studies.curves import average, shown, theirs
from studies.measurements import HeldOut, Measurement, Score
from studies.study import Claim, Setup, Study, StudyReport, Table, Values


def _wanted(methods: Sequence[str]) -> Callable[[Setup], dict[Any, Measurement]]:
    def measurements(setup: Setup) -> dict[Any, Measurement]:
        wanted: dict[Any, Measurement] = {}
        for method in methods:
            for seed in setup.seeds:
                wanted[method, seed] = Score(model_by(setup, method, seed))
                if is_single(method):
                    tried = single(setup, method, seed)
                    wanted |= {(method, seed, i): HeldOut(one) for i, one in enumerate(tried)}
        return wanted

    return measurements


def _say(
    methods: Sequence[str],
    paper: Mapping[str, Result],
    where: str,
    shifts: Sequence[str] | None = None,
    costs: Mapping[str, str] | None = None,
    starts: Sequence[str] = ("zero_shot",),
):
    """A table's report; `starts` are rows of it that others begin from, and no rivals."""

    def summarize(setup: Setup, values: Values) -> StudyReport:
        first = values[methods[0], setup.seeds[0]]["shifts"]
        # The paper leaves ObjectNet out there; data without its shifts takes all that it has.
        names = shifts if shifts and set(shifts) <= first.keys() else None
        found = {
            method: [
                (score["id"], average(score, names))
                for score in (values[method, seed] for seed in setup.seeds)
            ]
            for method in methods
        }
        rows = [
            [
                NAMES[method],
                *(shown(column) for column in zip(*found[method], strict=True)),
                *([costs[method]] if costs else []),
                _chosen(setup, values, method),
                theirs(paper[method].id),
                theirs(paper[method].shifts),
            ]
            for method in methods
        ]
        claims = [
            claim
            for rival in methods
            if not rival.startswith("model_stock") and rival not in starts
            for claim in _claims(found, paper, rival, where)
        ]
        columns = ["", "ID", "avg shifts", *(["cost"] if costs else []), "rates chosen"]
        averaged = ", ".join(names or first)
        return StudyReport(
            [Table([*columns, "paper: ImageNet", "avg shifts"], rows)],
            claims,
            notes=[
                "Rates chosen: of each seed's single model, the learning rate that was best on "
                "validation, in units of the config's, which Model Stock takes as it is; † where "
                "it is the least or the greatest that was tried.",
                "* is the paper's second set-up: 1.6 times the epochs, label smoothing and mixup "
                "(on stored images strong augmentation too).",
                f"The shifts' mean is over {averaged}.",
            ],
        )

    return summarize


def _claims(
    found: Mapping[str, Sequence[tuple[float, float]]],
    paper: Mapping[str, Result],
    rival: str,
    where: str,
) -> list[Claim]:
    """What the paper's rows say of a rival and the Model Stock of its set-up."""
    # Soups from a linear probe stand beside Model Stock* there.
    mine = "model_stock*" if rival.endswith("*") else "model_stock"
    claims = []
    for i, place in enumerate(("in distribution", "on the shifts")):
        said = (paper[mine].id - paper[rival].id, paper[mine].shifts - paper[rival].shifts)[i]
        if not said:
            continue  # They are level there: nothing is claimed.
        verb, sign = ("beats", 1) if said > 0 else ("is behind", -1)
        pairs = zip(found[mine], found[rival], strict=True)
        claims.append(
            Claim(
                f"{NAMES[mine]} {verb} {NAMES[rival]}, {place} ({said:+.2f} there)",
                where,
                [sign * (a[i] - b[i]) for a, b in pairs],
            )
        )
    return claims


def _chosen(setup: Setup, values: Values, method: str) -> str:
    """The learning rates that validation chose, one a seed, with a mark at the ends."""
    if not is_single(method):
        return "–"
    rates = rates_of(method)
    chosen = []
    for seed in setup.seeds:
        tried = range(len(single(setup, method, seed)))
        best = max(tried, key=lambda i, seed=seed: values[method, seed, i])
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
    f"Soups of {SIZE} models of Model Soups' random search over learning rate, weight decay, "
    "epochs, label smoothing and mixup; the greedy one is chosen on validation images. Costs are "
    "in trainings of the first set-up; α is that of the linear probe.",
    _wanted(_TABLE_2),
    _say(_TABLE_2, TABLE_2, "Table 2", costs=_COSTS, starts=("zero_shot", "lp")),
    num_seeds=3,
)
TABLE_3_STUDY = Study(
    "table3",
    "Table 3: Model Stock and other ways to fine-tune",
    "One model by each method, and Model Stock of two replicas merged at every epoch.",
    _wanted(_TABLE_3),
    _say(_TABLE_3, TABLE_3, "Table 3", TABLE_3_SHIFTS),
    num_seeds=3,
)
TABLE_4_STUDY = Study(
    "table4",
    "Table 4: the methods that the paper runs on its largest model",
    "TPGM and CAR-FT beside Model Stock. With configs/vitl14.py it is the paper's own; on the "
    "glyphs the model is the small one.",
    _wanted(_TABLE_4),
    _say(_TABLE_4, TABLE_4, "Table 4"),
    num_seeds=3,
)
