"""Numbers of each replica's own: learning rates, decays, lengths, augmentations."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from modelstock_jax.data.transforms import MAX_MAGNITUDE, TrainView
from modelstock_jax.errors import UserError


class _Range(NamedTuple):
    """What a number may be: `most` only where `closed`, and whole where `whole`."""

    least: float
    most: float = np.inf
    closed: bool = True
    whole: bool = False


_RANGES = {
    "learning_rate": _Range(0.0),
    "weight_decay": _Range(0.0),
    "epochs": _Range(1, whole=True),
    "label_smoothing": _Range(0.0, 1.0, closed=False),
    "mixup": _Range(0.0),
    "augment_strength": _Range(0.0, 1.0),
    "randaugment_ops": _Range(0, whole=True),
    "randaugment_magnitude": _Range(0.0, MAX_MAGNITUDE),
}
# Of the views of stored images, which the host draws: no program sees them.
_OF_VIEWS = ("randaugment_ops", "randaugment_magnitude")


def hyper_parameters(config: ConfigDict, steps_per_epoch: int) -> dict[str, np.ndarray]:
    """What of a run each replica has for itself in the step, for `Reference.hyper`.

    Args:
      config: the run's options; `per_replica` has a number a replica, or none.
      steps_per_epoch: `epochs` becomes "num_steps" by it.

    Returns:
      {name: [R]}, only of what differs; a program is compiled for the names, not for the numbers.

    Raises:
      UserError: if there are not as many numbers as replicas, one is out of its range or of no
        meaning for the data, or the longest replica does not take `config.epochs`.

    >>> config = ConfigDict({"num_replicas": 2, "per_replica": {"epochs": (1, 3)}, "epochs": 3})
    >>> hyper_parameters(config, 10)["num_steps"].tolist()
    [10, 30]
    """
    found = {
        name: np.asarray(given) for name, given in _own(config).items() if name not in _OF_VIEWS
    }
    if "epochs" in found:
        longest = max(found["epochs"])
        if longest != config.epochs:
            raise UserError(
                f"per_replica.epochs goes to {longest}; set epochs={longest}, the run's length"
            )
        found["num_steps"] = found.pop("epochs") * steps_per_epoch
    return found


def train_views(config: ConfigDict, size: int) -> list[TrainView]:
    """What each replica sees of a stored image: `data.augment`, with what is its own.

    Args:
      config: the run's options.
      size: side of a view, pixels.

    Returns:
      R views.

    Raises:
      UserError: as `hyper_parameters`, or an option of `data.augment` is out of its range.
    """
    view, own = TrainView.of(config.data.augment, size), _own(config)
    views = []
    for r in range(config.num_replicas):
        changes: dict[str, Any] = {name: own[name][r] for name in _OF_VIEWS if name in own}
        views.append(dataclasses.replace(view, **changes))
    return views


def _own(config: ConfigDict) -> dict[str, list[float]]:
    own = {}
    for name, given in config.per_replica.items():
        if not given:
            continue
        if len(given) != config.num_replicas:
            raise UserError(
                f"per_replica.{name} has {len(given)} numbers for {config.num_replicas} replicas; "
                "give one a replica"
            )
        if name == "augment_strength" and config.data.name != "glyphs":
            raise UserError(
                "per_replica.augment_strength is of the glyphs' own augmentation; stored images "
                "have per_replica.randaugment_ops and per_replica.randaugment_magnitude"
            )
        if name in _OF_VIEWS and config.data.name == "glyphs":
            raise UserError(
                f"per_replica.{name} is of stored images; the glyphs have "
                "per_replica.augment_strength"
            )
        own[name] = [_checked(name, number) for number in given]
    return own


def _checked(name: str, number: float) -> float:
    least, most, closed, whole = _RANGES[name]
    if not least <= number <= most or (number == most and not closed):
        end = "]" if closed else ")"
        raise UserError(f"per_replica.{name} has {number}; it must be in [{least}, {most}{end}")
    if whole and not float(number).is_integer():
        raise UserError(f"per_replica.{name} has {number}; it must be a whole number")
    return int(number) if whole else number
