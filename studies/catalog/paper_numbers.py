"""The values of the paper's tables (Jang, Yun, Han 2024)."""

from __future__ import annotations

from typing import NamedTuple


class Result(NamedTuple):
    """A row of the paper: ImageNet accuracy, avg. shifts, and distance to the center."""

    id: float
    shifts: float
    distance: float | None = None


# Number of averaged models -> row. The center is the pseudo-center of 50 models.
TABLE_1 = {
    1: Result(79.72, 46.37, 13.133),
    2: Result(80.24, 47.76, 9.192),
    3: Result(80.35, 48.18, 7.439),
    5: Result(80.47, 48.53, 5.633),
    50: Result(80.59, 48.85, 0.0),
}
# ViT-B/32. Rows with *: strong augmentation, and soups from LP initialization.
TABLE_2 = {
    "zero_shot": Result(63.34, 48.51),
    "vanilla": Result(78.35, 47.03),
    "uniform_soup": Result(79.76, 52.08),
    "greedy_soup": Result(80.42, 50.83),
    "model_stock": Result(79.89, 50.99),
    "lp": Result(75.57, 47.21),
    "vanilla*": Result(79.72, 46.37),
    "uniform_soup*": Result(79.97, 51.45),
    "greedy_soup*": Result(81.03, 50.75),
    "model_stock*": Result(81.19, 48.69),
}
# ViT-B/16. avg. shifts is over IN-V2, IN-R, IN-A and IN-Sketch, without ObjectNet.
TABLE_3 = {
    "zero_shot": Result(68.3, 59.5),
    "vanilla": Result(82.8, 57.7),
    "vanilla*": Result(83.7, 57.4),
    "lp": Result(79.7, 48.1),
    "lp_ft": Result(81.7, 60.5),
    "car_ft": Result(83.2, 59.4),
    "ftp": Result(84.2, 49.7),
    "flyp": Result(82.6, 60.5),
    "model_stock": Result(84.1, 62.4),
    "model_stock*": Result(85.2, 60.1),
}
TABLE_3_SHIFTS = ("v2", "r", "a", "sketch")
# ViT-L/14.
TABLE_4 = {
    "zero_shot": Result(75.0, 63.0),
    "vanilla": Result(85.8, 66.8),
    "vanilla*": Result(87.1, 68.0),
    "tpgm": Result(87.0, 69.4),
    "car_ft": Result(87.1, 67.8),
    "model_stock": Result(87.0, 71.6),
    "model_stock*": Result(87.7, 73.5),
}
# N = 1: a single fine-tuned model, 16 epochs. N > 1: N replicas with periodic merging, 8 epochs.
TABLE_5 = {
    1: Result(79.7, 46.7, 13.13),
    2: Result(80.1, 48.8, 10.01),
    3: Result(80.2, 48.8, 9.05),
    4: Result(80.4, 48.9, 8.45),
}
# Merging period in epochs (an epoch is about 2,500 iterations) -> row.
TABLE_6 = {0.4: Result(79.8, 48.7), 2.0: Result(79.9, 48.5), 1.0: Result(80.1, 48.8)}
# Merging after training: N -> (uniform mean, Model Stock).
TABLE_7 = {
    2: (Result(80.2, 47.8, 9.19), Result(80.3, 50.4, 7.62)),
    3: (Result(80.4, 48.2, 7.44), Result(80.4, 50.2, 6.49)),
    4: (Result(80.5, 48.5, 5.63), Result(80.5, 49.8, 5.16)),
}
