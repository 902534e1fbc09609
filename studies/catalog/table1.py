"""Table 1: the thin shell, its center, and accuracy as a function of the distance to it."""

from __future__ import annotations

from typing import Any

import numpy as np

from studies import figures
from studies.catalog.model_pool import averages, disjoint_pairs, groups, halves, mean
from studies.catalog.paper_numbers import TABLE_1
from studies.curves import accuracy_cells, average_shifts, mean_cell, paper_cell
from studies.measurements import Measurement, Score, Shell
from studies.study import Claim, Setup, Study, StudyReport, Table, Values


def _measurements(setup: Setup) -> dict[Any, Measurement]:
    measurements: dict[Any, Measurement] = {}
    _, others = halves(setup.seeds)
    for n, members in averages(setup.seeds).items():
        means = tuple(mean(group) for group in members)
        measurements["shell", n] = Shell(means, others)
        measurements |= {("score", n, i): Score(model) for i, model in enumerate(means)}
    return measurements


def _scores(setup: Setup, values: Values, n: int):
    return [values["score", n, i] for i in range(len(averages(setup.seeds)[n]))]


def _summarize(setup: Setup, values: Values) -> StudyReport:
    columns = ["model", "L2 distance to center", "predicted by 1/√N", "ID", "avg. shifts"]
    columns += ["paper: L2 distance to center", "paper: ImageNet", "paper: avg. shifts"]
    note = (
        "The center is the mean of models that are in none of the rows. Distances are corrected "
        "for the center's own noise. The paper's center is the mean of 50 models, which include "
        "those of the rows."
    )
    claims = [*_shell_claims(setup, values), *_accuracy_claims(setup, values)]
    distances = {n: values["shell", n]["distance"] for n in averages(setup.seeds)}
    radius = float(np.mean(distances[1]))
    return StudyReport(
        [Table(columns, _rows(setup, values))],
        claims,
        {"table1": lambda path: figures.distances(distances, radius, path)},
        [note],
    )


def _rows(setup: Setup, values: Values) -> list[list[str]]:
    radius = np.mean(values["shell", 1]["distance"])
    rows = []
    for n in averages(setup.seeds):
        distances, scores = values["shell", n]["distance"], _scores(setup, values, n)
        paper = TABLE_1.get(n)
        rows.append(
            [
                "single fine-tuned model" if n == 1 else f"uniform mean of {n}",
                mean_cell(distances, 3),
                f"{radius / np.sqrt(n):.3f}",
                *accuracy_cells(scores),
                *(
                    ["–"] * 3
                    if paper is None
                    else [
                        paper_cell(paper.distance, 3),
                        paper_cell(paper.id),
                        paper_cell(paper.shifts),
                    ]
                ),
            ]
        )
    return rows


def _shell_claims(setup: Setup, values: Values) -> list[Claim]:
    members, shell = averages(setup.seeds), values["shell", 1]
    radius = np.mean(shell["distance"])
    # Means of different N share models, so each N contributes one deviation.
    deviations = [
        abs(np.mean(values["shell", n]["distance"]) * np.sqrt(n) / radius - 1)
        for n in members
        if n > 1
    ]
    return [
        Claim(
            "(i) all fine-tuned models have the same distance to the center (within 1 %)",
            "Section 2.1",
            [abs(d / radius - 1) for d in shell["distance"]],
            unit="fraction",
            within=0.01,
        ),
        *(
            Claim(f"{text} are orthogonal (|cos| < 0.05)", "Section 2.1", cosines, "", within=0.05)
            for text, cosines in (
                ("(ii) w0 − μ and w_i − μ", shell["to_anchor"]),
                ("(iii) w_i − μ and w_j − μ", disjoint_pairs(shell["between"], len(members[1]))),
            )
        ),
        Claim(
            "the distance of a mean of N models to the center decreases as 1/√N (within 3 %)",
            "Section 2.3",
            deviations,
            unit="fraction",
            within=0.03,
        ),
    ]


def _accuracy_claims(setup: Setup, values: Values) -> list[Claim]:
    pairs, means = groups(_scores(setup, values, 1), 2), _scores(setup, values, 2)
    return [
        Claim(
            "the uniform mean of 2 beats a single fine-tuned model, in distribution",
            "Table 1",
            [m["id"] - (a["id"] + b["id"]) / 2 for m, (a, b) in zip(means, pairs, strict=True)],
        ),
        Claim(
            "the uniform mean of 2 beats a single fine-tuned model, out of distribution",
            "Table 1",
            [
                average_shifts(m) - (average_shifts(a) + average_shifts(b)) / 2
                for m, (a, b) in zip(means, pairs, strict=True)
            ],
        ),
    ]


TABLE_1_STUDY = Study(
    "table1",
    "Table 1: distance to the center and accuracy",
    "Uniform means of N models fine-tuned with different seeds: their distance to the center and "
    "their accuracy.",
    _measurements,
    _summarize,
    num_seeds=16,
)
