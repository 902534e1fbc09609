"""Table 1: the thin shell, its center, and what nearness to it is worth."""

from __future__ import annotations

from typing import Any

import numpy as np

from studies.catalog.model_pool import averages, groups, halves, mean, own_pairs
from studies.catalog.paper_numbers import TABLE_1
from studies.curves import average, both, shown, theirs
from studies.measurements import Measurement, Score, Shell
from studies.study import Claim, Setup, Study, StudyReport, Table, Values


def _wanted(setup: Setup) -> dict[Any, Measurement]:
    wanted: dict[Any, Measurement] = {}
    _, others = halves(setup.seeds)
    for n, members in averages(setup.seeds).items():
        means = tuple(mean(group) for group in members)
        wanted["shell", n] = Shell(means, others)
        wanted |= {("score", n, i): Score(model) for i, model in enumerate(means)}
    return wanted


def _scores(setup: Setup, values: Values, n: int):
    return [values["score", n, i] for i in range(len(averages(setup.seeds)[n]))]


def _say(setup: Setup, values: Values) -> StudyReport:
    columns = ["", "to the center", "by 1/√N", "ID", "avg shifts"]
    columns += ["paper: to the center", "ImageNet", "avg shifts"]
    note = (
        "The center is the mean of models that are in none of the rows; the distance that its own "
        "noise adds is taken off. The paper's center is the mean of 50 models, those of the rows "
        "among them."
    )
    claims = [*_shell_claims(setup, values), *_accuracy_claims(setup, values)]
    return StudyReport([Table(columns, _rows(setup, values))], claims, notes=[note])


def _rows(setup: Setup, values: Values) -> list[list[str]]:
    radius = np.mean(values["shell", 1]["distance"])
    rows = []
    for n in averages(setup.seeds):
        distances, scores = values["shell", n]["distance"], _scores(setup, values, n)
        paper = TABLE_1.get(n)
        rows.append(
            [
                "one model" if n == 1 else f"mean of {n}",
                shown(distances, 3),
                f"{radius / np.sqrt(n):.3f}",
                *both(scores),
                *(
                    ["–"] * 3
                    if paper is None
                    else [theirs(paper.distance, 3), theirs(paper.id), theirs(paper.shifts)]
                ),
            ]
        )
    return rows


def _shell_claims(setup: Setup, values: Values) -> list[Claim]:
    members, shell = averages(setup.seeds), values["shell", 1]
    radius = np.mean(shell["distance"])
    # The means of all N are of the same models: one number each.
    law = [
        abs(np.mean(values["shell", n]["distance"]) * np.sqrt(n) / radius - 1)
        for n in members
        if n > 1
    ]
    return [
        Claim(
            "(i) fine-tuned models lie at one distance from the center (within 1 %)",
            "Section 2.1",
            [abs(d / radius - 1) for d in shell["distance"]],
            unit="",
            within=0.01,
        ),
        *(
            Claim(f"{text} are orthogonal (|cos| < 0.05)", "Section 2.1", cosines, "", within=0.05)
            for text, cosines in (
                ("(ii) w0 − μ and w_i − μ", shell["to_anchor"]),
                ("(iii) w_i − μ and w_j − μ", own_pairs(shell["between"], len(members[1]))),
            )
        ),
        Claim(
            "the distance falls as 1/√N (within 3 %)",
            "Section 2.3",
            law,
            unit="",
            within=0.03,
        ),
    ]


def _accuracy_claims(setup: Setup, values: Values) -> list[Claim]:
    pairs, twos = groups(_scores(setup, values, 1), 2), _scores(setup, values, 2)
    return [
        Claim(
            "the mean of two is better than one, in distribution",
            "Table 1",
            [two["id"] - (a["id"] + b["id"]) / 2 for two, (a, b) in zip(twos, pairs, strict=True)],
        ),
        Claim(
            "the mean of two is better than one, on the shifts",
            "Table 1",
            [
                average(two) - (average(a) + average(b)) / 2
                for two, (a, b) in zip(twos, pairs, strict=True)
            ],
        ),
    ]


TABLE_1_STUDY = Study(
    "table1",
    "Table 1: distance to the center and accuracy",
    "Means of N models fine-tuned with different seeds: how far they lie from the center, and how "
    "accurate they are.",
    _wanted,
    _say,
    num_seeds=16,
)
