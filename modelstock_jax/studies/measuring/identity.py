"""What every key of a study begins with: the weights, the head and the images that it is of."""

from __future__ import annotations

import hashlib
from typing import Any

from ml_collections import ConfigDict

from modelstock_jax.data.benchmark import Benchmark
from modelstock_jax.data.image_set import ImageSet, fingerprint
from modelstock_jax.studies.measuring.runs import digest


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
    return digest([pretrained, apart]) if apart else pretrained


def _images(images: ImageSet) -> list[str]:
    return [fingerprint(images.images), hashlib.sha256(images.labels.tobytes()).hexdigest()]
