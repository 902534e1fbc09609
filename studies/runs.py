"""One training of a study (options and a seed), and the digests that identify it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from modelstock_jax.data.benchmark import Benchmark
from modelstock_jax.data.image_set import ImageSet, fingerprint
from modelstock_jax.errors import UserError
from modelstock_jax.fileio import flat, plain
from modelstock_jax.flags import first_names


@dataclass(frozen=True)
class Run:
    """Replicas that are trained together.

    Attributes:
      seed: of the run.
      options: (dotted key, value) pairs in which it differs from the study's config.
      every_epoch: whether the replicas of every epoch's end are kept, not only the last.
      per_epoch: with `every_epoch`, about how often they are kept in an epoch.
    """

    seed: int
    options: tuple[tuple[str, Any], ...] = ()
    every_epoch: bool = False
    per_epoch: int = 1

    @classmethod
    def of(
        cls,
        seed: int,
        options: Mapping[str, Any] | None = None,
        *,
        every_epoch: bool = False,
        per_epoch: int = 1,
    ) -> Run:
        """A run from a mapping of options.

        >>> Run.of(3, {"merge.every": "never", "num_replicas": 4}).options
        (('merge.every', 'never'), ('num_replicas', 4))
        """
        return cls(seed, tuple(sorted((options or {}).items())), every_epoch, per_epoch)

    def apart(self, steps_per_epoch: int) -> int:
        """Steps between two states that are kept, where every epoch is.

        >>> Run(0, every_epoch=True, per_epoch=8).apart(32), Run(0, every_epoch=True).apart(32)
        (4, 32)
        """
        return max(1, steps_per_epoch // self.per_epoch)

    def config(self, base: ConfigDict) -> ConfigDict:
        """The run's whole config.

        Raises:
          UserError: if `base` has no such option.
        """
        config = base.copy_and_resolve_references()
        known = flat(config.to_dict())
        if unknown := [key for key, _ in self.options if key not in known]:
            raise UserError(f"the study's config lacks {unknown[0]!r}")
        config.update_from_flattened_dict(dict(self.options))
        config.seed = self.seed
        return config


def runs_of(value: Any) -> Iterator[Run]:
    """Every run that a measurement needs, however deep it lies in its models."""
    if isinstance(value, Run):
        yield value
    elif isinstance(value, tuple):
        for one in value:
            yield from runs_of(one)
    elif dataclasses.is_dataclass(value):
        for one in dataclasses.fields(value):
            yield from runs_of(getattr(value, one.name))


def training_checksum(config: ConfigDict, fingerprint: str) -> str:
    """Sixteen hexadecimal digits of all that a run's weights depend on, but its seed.

    Options have the names in it that they had first, so that what was measured under them is found.

    Args:
      config: of the run.
      fingerprint: of the pretrained weights.
    """
    # Imports the training loop, for which a list of the studies need not wait.
    from modelstock_jax.experiment.options import option

    kept = {
        key: value
        for key, value in flat(plain(config.to_dict())).items()
        if (row := option(key)).in_checksum and (row.absent is None or value != plain(row.absent))
    }
    return checksum([fingerprint, first_names(kept)])


def checksum(value: Any) -> str:
    """Sixteen hexadecimal digits of a JSON value; equal values give equal digits.

    >>> checksum({"a": 1, "b": 2}) == checksum({"b": 2, "a": 1})
    True
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# What every key of a study begins with: the weights, the head and the images that it is of.


def identity(config: ConfigDict, pretrained: str, data: Benchmark) -> str:
    """Digits that are equal where the same options train and measure the same.

    Args:
      config: of the study.
      pretrained: a digest of the pretrained weights; where nothing else can differ, the result.
      data: what `config.data` opened; its names and templates are compared, not their files' paths.
    """
    apart: dict[str, Any] = {}
    if config.objective.head != "zero_shot":
        apart["head"] = [config.objective.head, config.seed]
    if config.data.class_names or config.data.name == "folder":
        apart["class_names"] = list(data.class_names)
    if config.data.templates:
        apart["templates"] = list(data.templates)
    if config.compute.dtype != "float32":
        apart["dtype"] = config.compute.dtype
    if config.data.name == "folder":
        sets = {"train": data.train, "validation": data.validation, "test": data.test}
        apart["images"] = {name: _images(one) for name, one in (sets | data.shifts).items()}
    return checksum([pretrained, apart]) if apart else pretrained


def _images(images: ImageSet) -> list[str]:
    return [fingerprint(images.images), hashlib.sha256(images.labels.tobytes()).hexdigest()]
