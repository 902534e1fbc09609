"""A training run of a study (options and a seed), and the checksums that identify it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from modelstock_jax.data.benchmark import Benchmark
from modelstock_jax.data.image_set import ImageSet, images_checksum
from modelstock_jax.errors import UserError
from modelstock_jax.fileio import flatten, to_json_types
from modelstock_jax.flags import first_names


@dataclass(frozen=True)
class Run:
    """Replicas that are trained together.

    Attributes:
      seed: of the run.
      options: (dotted key, value) pairs that differ from the study's config.
      every_epoch: whether the replicas are saved at the end of every epoch, not only of the run.
      saves_per_epoch: with `every_epoch`, approximate number of saves per epoch.
    """

    seed: int
    options: tuple[tuple[str, Any], ...] = ()
    every_epoch: bool = False
    saves_per_epoch: int = 1

    @classmethod
    def of(
        cls,
        seed: int,
        options: Mapping[str, Any] | None = None,
        *,
        every_epoch: bool = False,
        saves_per_epoch: int = 1,
    ) -> Run:
        """Create a run from a mapping of options.

        >>> Run.of(3, {"merge.every": "never", "num_replicas": 4}).options
        (('merge.every', 'never'), ('num_replicas', 4))
        """
        return cls(seed, tuple(sorted((options or {}).items())), every_epoch, saves_per_epoch)

    def save_interval(self, steps_per_epoch: int) -> int:
        """Return the steps between two saves, with `every_epoch`.

        >>> every = Run(0, every_epoch=True, saves_per_epoch=8)
        >>> every.save_interval(32), Run(0, every_epoch=True).save_interval(32)
        (4, 32)
        """
        return max(1, steps_per_epoch // self.saves_per_epoch)

    def config(self, base: ConfigDict) -> ConfigDict:
        """Return the run's complete config.

        Raises:
          UserError: if `base` lacks an option.
        """
        config = base.copy_and_resolve_references()
        existing = flatten(config.to_dict())
        if unknown := [key for key, _ in self.options if key not in existing]:
            raise UserError(f"the study's config lacks {unknown[0]!r}")
        config.update_from_flattened_dict(dict(self.options))
        config.seed = self.seed
        return config


def runs_of(value: Any) -> Iterator[Run]:
    """Yield every run that a measurement needs, at any depth of its models."""
    if isinstance(value, Run):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from runs_of(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from runs_of(getattr(value, field.name))


def training_checksum(config: ConfigDict, anchor_checksum: str) -> str:
    """Return 16 hexadecimal digits of everything that a run's weights depend on, except its seed.

    Options enter with their first names, so that earlier measurements keep their keys.

    Args:
      config: of the run.
      anchor_checksum: of the pretrained weights.
    """
    # This imports the training loop, which a list of the studies does not need.
    from modelstock_jax.experiment.options import option

    options = {
        key: value
        for key, value in flatten(to_json_types(config.to_dict())).items()
        if (row := option(key)).in_checksum
        and (row.absent is None or value != to_json_types(row.absent))
    }
    return checksum([anchor_checksum, first_names(options)])


def checksum(value: Any) -> str:
    """Return 16 hexadecimal digits of a JSON value; equal values have equal digits.

    >>> checksum({"a": 1, "b": 2}) == checksum({"b": 2, "a": 1})
    True
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def identity(config: ConfigDict, pretrained: str, data: Benchmark) -> str:
    """Return digits that are equal if the same options train and measure the same.

    They are the first part of every key of a study. They identify the weights, the head and the
    images.

    Args:
      config: of the study.
      pretrained: checksum of the pretrained weights; the result, if nothing else can differ.
      data: result of opening `config.data`; its names and templates are compared, not file paths.
    """
    differences: dict[str, Any] = {}
    if config.objective.head != "zero_shot":
        differences["head"] = [config.objective.head, config.seed]
    if config.data.class_names or config.data.name == "folder":
        differences["class_names"] = list(data.class_names)
    if config.data.templates:
        differences["templates"] = list(data.templates)
    if config.compute.dtype != "float32":
        differences["dtype"] = config.compute.dtype
    if config.data.name == "folder":
        sets = {"train": data.train, "validation": data.validation, "test": data.test}
        differences["images"] = {
            name: _image_checksums(images) for name, images in (sets | data.shifts).items()
        }
    return checksum([pretrained, differences]) if differences else pretrained


def _image_checksums(images: ImageSet) -> list[str]:
    return [images_checksum(images.images), hashlib.sha256(images.labels.tobytes()).hexdigest()]
