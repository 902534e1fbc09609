"""The models that most studies share: pairs of replicas, fine-tuned apart, over many seeds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, TypeVar

from studies.expressions import Mean, Model, Replica
from studies.runs import Run

One = TypeVar("One")
# Options of two replicas: never merged, and merged at every epoch's end.
PAIR: dict[str, Any] = {"merge.every": "never", "num_replicas": 2}
MERGING: dict[str, Any] = {"merge.every": "epoch", "num_replicas": 2}

# The paper's second set-up, with an asterisk: longer, and with strong augmentation. The numbers are
# those of configs/imagenet.py:strong; the glyphs have an augmentation of their own, and take
# smoothing and mixup alone.
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
    """Two replicas a seed, none of which has seen another."""
    return tuple(Replica(Run.of(seed, PAIR), r) for seed in seeds for r in (0, 1))


def groups(models: Sequence[One], size: int) -> list[tuple[One, ...]]:
    """Disjoint groups of neighbors, so that their results are independent.

    >>> groups("abcde", 2)
    [('a', 'b'), ('c', 'd')]
    """
    last = len(models) - size + 1
    return [tuple(models[i : i + size]) for i in range(0, last, size)]


def own_pairs(values: Sequence[One], count: int) -> list[One]:
    """Of values of all pairs i < j of models, in the order of rows, those of (0, 1), (2, 3), ...

    Pairs that share a model are not independent; these are.

    >>> own_pairs(["01", "02", "03", "12", "13", "23"], 4)
    ['01', '23']
    """
    found = dict(zip(combinations(range(count), 2), values, strict=True))
    return [found[i, i + 1] for i in range(0, count - 1, 2)]


def halves(seeds: Sequence[int]) -> tuple[tuple[Replica, ...], tuple[Replica, ...]]:
    """The pool's models in two parts of equal size: to measure, and to make a center of."""
    models = pool(seeds)
    half = len(models) // 2
    return models[:half], models[half:]


def averages(seeds: Sequence[int], sizes: Sequence[int] = (1, 2, 3, 5)) -> dict[int, list]:
    """N -> disjoint groups of N models of the first half, up to all of them."""
    first, _ = halves(seeds)
    return {n: groups(first, n) for n in [*(n for n in sizes if n < len(first)), len(first)]}


def mean(models: Sequence[Model]) -> Model:
    """Their uniform mean; one model is its own."""
    return models[0] if len(models) == 1 else Mean(tuple(models))
