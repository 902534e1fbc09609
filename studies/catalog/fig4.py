"""Figure 4: random weights near the center."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from studies import figures
from studies.catalog.model_pool import averages, mean, pool
from studies.curves import shown
from studies.expressions import Noisy
from studies.measurements import Distance, Measurement, Score
from studies.study import Claim, Setup, Study, StudyReport, Table, Values

_SCALES = (0.25, 0.5, 0.75, 1.0, 1.5)
_DRAWS = 8
# A number of models, or a scale of the noise -> (distance to the center, accuracy) of each.
_Points = Mapping[Any, Sequence[tuple[float, float]]]


def _wanted(setup: Setup) -> dict[Any, Measurement]:
    models = pool(setup.seeds)
    center = mean(models)
    wanted: dict[Any, Measurement] = {"center": Score(center, shifts=False)}
    for scale in _SCALES:
        for seed in range(_DRAWS):
            noisy = Noisy(models, scale, seed)
            wanted["noise", scale, seed] = Score(noisy, shifts=False)
            wanted["noise at", scale, seed] = Distance(noisy, center)
    for n, members in averages(setup.seeds).items():
        for i, group in enumerate(members):
            wanted["score", n, i] = Score(mean(group))
            wanted["at", n, i] = Distance(mean(group), center)
    return wanted


def _say(setup: Setup, values: Values) -> StudyReport:
    teams = {n: range(len(members)) for n, members in averages(setup.seeds).items()}
    models = {
        n: [(values["at", n, i], values["score", n, i]["id"]) for i in which]
        for n, which in teams.items()
    }
    noise = {
        scale: [
            (values["noise at", scale, seed], values["noise", scale, seed]["id"])
            for seed in range(_DRAWS)
        ]
        for scale in _SCALES
    }
    center = values["center"]["id"]
    return StudyReport(
        [Table(["", "to the center", "ID"], _rows(models, noise, center))],
        _claims(models, noise, center),
        {"fig4": lambda path: figures.near_the_center(models, noise, center, path)},
        ["The center is one model, and of all others: its own chance is in no error bar."],
    )


def _claims(models: _Points, noise: _Points, center: float) -> list[Claim]:
    tuned = float(np.mean([score for _, score in models[1]]))
    return [
        Claim(
            "random weights at the distance of fine-tuned ones are as good (within 1 point)",
            "Figure 4",
            [abs(score - tuned) for _, score in noise[1.0]],
            within=1,
        ),
        Claim(
            "random weights half as far are better",
            "Figure 4",
            [near[1] - far[1] for near, far in zip(noise[0.5], noise[1.0], strict=True)],
        ),
        Claim(
            "the center is better than a fine-tuned model",
            "Figure 4",
            [center - score for _, score in models[1]],
        ),
    ]


def _rows(models: _Points, noise: _Points, center: float) -> list[list[str]]:
    rows = [["center", "0", shown([center])]]
    rows += [
        [
            "one model" if n == 1 else f"mean of {n}",
            shown([d for d, _ in points], 3),
            shown([score for _, score in points]),
        ]
        for n, points in models.items()
    ]
    rows += [
        [
            f"center + noise × {scale:g}",
            shown([d for d, _ in points], 3),
            shown([score for _, score in points]),
        ]
        for scale, points in noise.items()
    ]
    return rows


FIGURE_4 = Study(
    "fig4",
    "Figure 4: weights near the center",
    "In-distribution accuracy of fine-tuned models, of their means, and of the center with "
    "Gaussian noise of each tensor's own size.",
    _wanted,
    _say,
    num_seeds=16,
)
