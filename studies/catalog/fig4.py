"""Figure 4: accuracy of random weights near the center."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from studies import figures
from studies.catalog.model_pool import averages, mean, pool
from studies.curves import mean_cell
from studies.expressions import Noisy
from studies.measurements import Distance, Measurement, Score
from studies.study import Claim, Setup, Study, StudyReport, Table, Values

_SCALES = (0.25, 0.5, 0.75, 1.0, 1.5)
_NUM_DRAWS = 8
# Number of averaged models, or scale of the noise -> (distance to the center, accuracy) of each.
_Points = Mapping[Any, Sequence[tuple[float, float]]]


def _measurements(setup: Setup) -> dict[Any, Measurement]:
    models = pool(setup.seeds)
    center = mean(models)
    measurements: dict[Any, Measurement] = {"center": Score(center, shifts=False)}
    for scale in _SCALES:
        for seed in range(_NUM_DRAWS):
            noisy = Noisy(models, scale, seed)
            measurements["noise", scale, seed] = Score(noisy, shifts=False)
            measurements["noise distance", scale, seed] = Distance(noisy, center)
    for n, members in averages(setup.seeds).items():
        for i, group in enumerate(members):
            measurements["score", n, i] = Score(mean(group))
            measurements["distance", n, i] = Distance(mean(group), center)
    return measurements


def _summarize(setup: Setup, values: Values) -> StudyReport:
    models = {
        n: [(values["distance", n, i], values["score", n, i]["id"]) for i in range(len(members))]
        for n, members in averages(setup.seeds).items()
    }
    noise = {
        scale: [
            (values["noise distance", scale, seed], values["noise", scale, seed]["id"])
            for seed in range(_NUM_DRAWS)
        ]
        for scale in _SCALES
    }
    center = values["center"]["id"]
    return StudyReport(
        [Table(["weights", "L2 distance to center", "ID"], _rows(models, noise, center))],
        _claims(models, noise, center),
        {"fig4": lambda path: figures.near_the_center(models, noise, center, path)},
        [
            "The center is one model, the mean of all fine-tuned ones. Error bars do not include "
            "its randomness."
        ],
    )


def _claims(models: _Points, noise: _Points, center: float) -> list[Claim]:
    fine_tuned = float(np.mean([score for _, score in models[1]]))
    return [
        Claim(
            "random weights at the distance of fine-tuned models are as accurate (within 1 point)",
            "Figure 4",
            [abs(score - fine_tuned) for _, score in noise[1.0]],
            within=1,
        ),
        Claim(
            "random weights at half that distance are more accurate",
            "Figure 4",
            [near[1] - far[1] for near, far in zip(noise[0.5], noise[1.0], strict=True)],
        ),
        Claim(
            "the center is more accurate than a fine-tuned model",
            "Figure 4",
            [center - score for _, score in models[1]],
        ),
    ]


def _rows(models: _Points, noise: _Points, center: float) -> list[list[str]]:
    rows = [["center", "0", mean_cell([center])]]
    rows += [
        [
            "single fine-tuned model" if n == 1 else f"uniform mean of {n}",
            mean_cell([d for d, _ in points], 3),
            mean_cell([score for _, score in points]),
        ]
        for n, points in models.items()
    ]
    rows += [
        [
            f"center + noise × {scale:g}",
            mean_cell([d for d, _ in points], 3),
            mean_cell([score for _, score in points]),
        ]
        for scale, points in noise.items()
    ]
    return rows


FIGURE_4 = Study(
    "fig4",
    "Figure 4: weights near the center",
    "In-distribution accuracy of fine-tuned models, of their uniform means, and of the center plus "
    "Gaussian noise, whose scale is that of the fine-tuned models in each tensor.",
    _measurements,
    _summarize,
    num_seeds=16,
)
