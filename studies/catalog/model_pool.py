"""The models that most studies share: pairs of independently fine-tuned replicas of many seeds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, TypeVar

from studies.expressions import Mean, Model, Replica
from studies.runs import Run

Item = TypeVar("Item")
# Options of two replicas: without merging, and with merging at the end of every epoch.
PAIR: dict[str, Any] = {"merge.every": "never", "num_replicas": 2}
MERGING: dict[str, Any] = {"merge.every": "epoch", "num_replicas": 2}

# The paper's second setup (*): longer training and strong augmentation. The values are those of
# configs/imagenet.py:strong. The glyphs have a separate augmentation and use only label smoothing
# and mixup.
STRONG: dict[str, Any] = {
    "label_smoothing": 0.1,
    "data.augment.crop_area": (0.08, 1.0),
    "data.augment.flip": True,
    "data.augment.randaugment_ops": 2,
    "data.augment.randaugment_magnitude": 10,
    "data.augment.mixup": 0.4,
}
STRONG_LENGTH = 1.6


def pool(seeds: Sequence[int]) -> tuple[Replica, ...]:
    """Return two independently fine-tuned replicas per seed."""
    return tuple(Replica(Run.of(seed, PAIR), r) for seed in seeds for r in (0, 1))


def groups(items: Sequence[Item], size: int) -> list[tuple[Item, ...]]:
    """Return disjoint groups of adjacent items, so that their results are independent.

    >>> groups("abcde", 2)
    [('a', 'b'), ('c', 'd')]
    """
    last = len(items) - size + 1
    return [tuple(items[i : i + size]) for i in range(0, last, size)]


def disjoint_pairs(values: Sequence[Item], count: int) -> list[Item]:
    """Select the values of pairs (0, 1), (2, 3), ... from those of all pairs i < j of models.

    Pairs that share a model are not independent; the selected ones are.

    Args:
      values: of all pairs, in row-major order.
      count: number of models.

    >>> disjoint_pairs(["01", "02", "03", "12", "13", "23"], 4)
    ['01', '23']
    """
    by_pair = dict(zip(combinations(range(count), 2), values, strict=True))
    return [by_pair[i, i + 1] for i in range(0, count - 1, 2)]


def halves(seeds: Sequence[int]) -> tuple[tuple[Replica, ...], tuple[Replica, ...]]:
    """Split the pool into two equal parts: models to measure, and models for a center."""
    models = pool(seeds)
    half = len(models) // 2
    return models[:half], models[half:]


def averages(seeds: Sequence[int], sizes: Sequence[int] = (1, 2, 3, 5)) -> dict[int, list]:
    """Return N -> disjoint groups of N models of the first half, for each size and for all."""
    first, _ = halves(seeds)
    return {n: groups(first, n) for n in [*(n for n in sizes if n < len(first)), len(first)]}


def mean(models: Sequence[Model]) -> Model:
    """Return the uniform mean of models, or the model if there is only one."""
    return models[0] if len(models) == 1 else Mean(tuple(models))
