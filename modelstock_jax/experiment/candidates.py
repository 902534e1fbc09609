"""The models that a run compares, each made from the anchor and the trained replicas."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
from ml_collections import ConfigDict

from modelstock_jax.merging import (
    Stats,
    constant_ratio,
    model_stock,
    total_distance,
    uniform_mean,
    weighted_model_stock,
    wise_ft,
)
from modelstock_jax.training.finetune import method_name

PyTree = Any


@dataclass(frozen=True)
class Candidate:
    """One model to evaluate.

    Attributes:
      method: a key of `reporting.style.METHODS`.
      params: its weights.
      cost: training spent, in fine-tunings of one model.
      predicted_distance: to the centre, from the angles alone; None where nothing predicts it.
      details: what else tells its row from others (alpha, of, unit, replica, num_replicas).
    """

    method: str
    params: PyTree
    cost: float
    predicted_distance: float | None = None
    details: dict[str, Any] = field(default_factory=dict)


def after_training(
    config: ConfigDict, anchor: PyTree, replicas: PyTree, num_heads: int
) -> tuple[Stats, Iterator[Candidate], int]:
    """Every model that can be made of replicas trained without a merge between them.

    Args:
      config: the run's options; its merge unit and WiSE-FT alphas are used.
      anchor: the pretrained weights.
      replicas: trained apart, [N, ...] a leaf.
      num_heads: for the merge unit `head`.

    Returns:
      The geometry of the replicas under `merge.unit`, the candidates one by one, and how many.
    """
    count = config.num_replicas
    options = {"unit": config.merge.unit, "num_heads": num_heads}
    stock, stats = model_stock(anchor, replicas, **options)
    expected = total_distance(stats)
    team = {"num_replicas": count}

    def candidates() -> Iterator[Candidate]:
        for r in range(count):
            one = jax.tree.map(lambda x, r=r: x[r], replicas)
            yield Candidate(method_name(config), one, 1, expected.replica, {"replica": r})
        first = jax.tree.map(lambda x: x[:1], replicas)
        for alpha in config.evaluation.wise_ft_alphas:
            curve = {"alpha": alpha}
            yield Candidate(
                "wise_ft", wise_ft(anchor, first, alpha)[0], 1, None, curve | {"of": "replica"}
            )
        mean, _ = uniform_mean(anchor, replicas)
        yield Candidate("mean", mean, count, expected.mean, team)
        for alpha in config.evaluation.wise_ft_alphas:
            details = team | {"alpha": alpha, "of": "mean"}
            yield Candidate("wise_ft", wise_ft(anchor, replicas, alpha)[0], count, None, details)
        shrunk, _ = constant_ratio(anchor, replicas, **options)
        yield Candidate("constant_ratio", shrunk, count, None, team)
        yield Candidate("model_stock", stock, count, expected.merged, team)
        weighted, _ = weighted_model_stock(anchor, replicas, **options)
        yield Candidate("weighted", weighted, count, None, team)
        for unit in config.evaluation.units:
            merged, by_unit = model_stock(anchor, replicas, unit=unit, num_heads=num_heads)
            predicted = total_distance(by_unit).merged
            yield Candidate("model_stock", merged, count, predicted, team | {"unit": unit})

    curves = 2 * len(config.evaluation.wise_ft_alphas)
    return stats, candidates(), count + curves + 4 + len(config.evaluation.units)
