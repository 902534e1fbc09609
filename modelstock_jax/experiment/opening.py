"""What a run or an evaluation begins with: its data, its pretrained model, its classifier."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from modelstock_jax.data import benchmark
from modelstock_jax.data.benchmark import Benchmark
from modelstock_jax.errors import UserError
from modelstock_jax.experiment.pretrained import open_anchor
from modelstock_jax.models.checkpoint import Checkpoint
from modelstock_jax.training import multihost
from modelstock_jax.training.classifier import Classifier, anchor_classifier


class Opened(NamedTuple):
    """What a run begins with.

    Attributes:
      pretrained: the checkpoint of `config.pretrained`.
      data: where to train and to measure.
      anchor: the image tower under its head.
    """

    pretrained: Checkpoint
    data: Benchmark
    anchor: Classifier


def check_data(config: ConfigDict) -> None:
    """Refuses data that is not there: to be asked before a model is fetched.

    Raises:
      UserError: for the first set that is missing.
    """
    if lacking := benchmark.missing(config.data):
        more = f" ({len(lacking) - 1} more: --dry-run lists all)" if lacking[1:] else ""
        raise UserError(lacking[0] + more)


def open_data(config: ConfigDict) -> Benchmark:
    """The data of `config.data`; a cache of decoded images is written by process 0 alone."""
    load = partial(benchmark.load, config.data)
    return multihost.main_first(load) if config.data.cache else load()


def classify(
    config: ConfigDict, pretrained: Checkpoint, data: Benchmark, heads: Path | None
) -> Classifier:
    """`pretrained` as a classifier; a zero-shot head is made by process 0 and kept in `heads`."""
    make = partial(anchor_classifier, config, pretrained, data, heads)
    return multihost.main_first(make) if pretrained.head is None and heads else make()


def open_all(config: ConfigDict, heads: Path | None) -> Opened:
    """All that a run begins with.

    Args:
      config: the run's options.
      heads: where zero-shot heads are kept; None makes them each time.

    Raises:
      UserError: if something of it is not there, or does not fit.
    """
    check_data(config)
    pretrained = open_anchor(config)
    data = open_data(config)
    return Opened(pretrained, data, classify(config, pretrained, data, heads))
