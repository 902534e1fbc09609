"""The pretrained model as a classifier: what every replica starts from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from modelstock_jax.data.benchmark import Benchmark
from modelstock_jax.errors import UserError
from modelstock_jax.models.checkpoint import Checkpoint
from modelstock_jax.models.clip import classifier
from modelstock_jax.models.config import CLIPConfig, Preprocessor
from modelstock_jax.models.transformer import Compute
from modelstock_jax.training.methods.text_side import TextSide, needed, text_head

PyTree = Any


@dataclass(frozen=True)
class Classifier:
    """The pretrained model as a classifier: the anchor of every merge.

    Attributes:
      params: {"image_tower", "head"}, the head from text prompts.
      apply: (params, images float [B, H, W, 3]) -> logits [B, K].
      normalize: images uint8 -> float, by the checkpoint's mean and standard deviation; knows
        their size.
      num_heads: attention heads of the image tower.
      fingerprint: of the checkpoint that it comes from; "" where there is none.
      text: the checkpoint's text side, where it has one.
    """

    params: PyTree
    apply: Callable[[PyTree, jax.Array], jax.Array]
    normalize: Preprocessor
    num_heads: int
    fingerprint: str = ""
    text: TextSide | None = None

    def start(self, config: ConfigDict) -> PyTree:
        """What `config.objective` trains, at its start: FLYP's towers and scale, or `params`."""
        if config.objective.name != "flyp":
            return self.params
        text = needed(self.text, config.objective.name)
        return {"image_tower": self.params["image_tower"], **text.params}

    def classify(self, params: PyTree) -> PyTree:
        """{"image_tower", "head"} of what was trained: FLYP's head is made by its text tower."""
        if "head" in params:
            return params
        text = needed(self.text, "flyp")
        return {"image_tower": params["image_tower"], "head": text.head(params)}


def anchor_classifier(
    config: ConfigDict, checkpoint: Checkpoint, data: Benchmark, heads: Path | None = None
) -> Classifier:
    """The image tower of `checkpoint` under its own head, the zero-shot one or a random one.

    A random head is N(0, 1 / E) and, as all seeds of a run share their anchor, of `config.seed`.

    Args:
      config: the run's options.
      checkpoint: the model.
      data: its class names and templates make the zero-shot head.
      heads: where heads of the text tower are kept from run to run; None makes them each time.

    Raises:
      UserError: if the checkpoint's head has other classes than the data.
    """
    head = checkpoint.head
    if config.objective.head == "random":
        size = checkpoint.config.projection_dim, len(data.class_names)
        drawn = np.random.default_rng(config.seed).standard_normal(size) / size[0] ** 0.5
        head = {"kernel": drawn.astype(np.float32), "bias": np.zeros(size[1], np.float32)}
    elif head is None:
        head = text_head(
            "zero_shot",
            checkpoint,
            data.class_names,
            data.templates,
            heads,
            allow_repeats=_repeats(config),
        )
    elif head["bias"].shape != (len(data.class_names),):
        raise UserError(
            f"{checkpoint.directory}: its head has {head['bias'].shape[0]} classes, the data "
            f"{len(data.class_names)}"
        )
    params = {"image_tower": checkpoint.params["image_tower"], "head": head}
    made = make_classifier(config, checkpoint.config, params, checkpoint.preprocessor)
    text = TextSide(
        checkpoint,
        data.class_names,
        data.templates,
        Compute.of(config.compute),
        allow_repeats=_repeats(config),
        heads=heads,
    )
    return replace(made, fingerprint=checkpoint.fingerprint, text=text)


def _repeats(config: ConfigDict) -> bool:
    # A published list may give two classes one name, as ImageNet's does; a user's may not.
    return not config.data.class_names


def make_classifier(
    config: ConfigDict, clip: CLIPConfig, params: PyTree, normalize: Preprocessor
) -> Classifier:
    """A classifier that computes as `config.compute` says; its weights may be shapes alone."""
    return Classifier(
        params=params,
        apply=classifier(clip, Compute.of(config.compute)),
        normalize=normalize,
        num_heads=clip.vision.num_attention_heads,
    )
