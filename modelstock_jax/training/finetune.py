"""Fine-tuning replicas of a classifier, as a `Task` of the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from modelstock_jax.clip.checkpoint import Checkpoint
from modelstock_jax.clip.config import CLIPConfig
from modelstock_jax.clip.model import classifier
from modelstock_jax.clip.preprocessor import Preprocessor
from modelstock_jax.clip.transformer import Compute
from modelstock_jax.clip.zero_shot import zero_shot_head
from modelstock_jax.data.benchmark import Benchmark
from modelstock_jax.data.pipeline import Batch, steps_per_epoch, train_batches
from modelstock_jax.errors import UserError
from modelstock_jax.training.objectives import cross_entropy
from modelstock_jax.training.programs import Task

PyTree = Any
Augment = Callable[[jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True)
class Classifier:
    """The pretrained model as a classifier: the anchor of every merge.

    Attributes:
      params: {"image_tower", "head"}, the head from text prompts.
      apply: (params, images float [B, H, W, 3]) -> logits [B, K].
      normalize: images uint8 -> float, by the checkpoint's mean and standard deviation.
      num_heads: attention heads of the image tower.
    """

    params: PyTree
    apply: Callable[[PyTree, jax.Array], jax.Array]
    normalize: Callable[[jax.Array], jax.Array]
    num_heads: int


def anchor_classifier(config: ConfigDict, checkpoint: Checkpoint, data: Benchmark) -> Classifier:
    """The image tower of `checkpoint` under its own head, or under the zero-shot one.

    Raises:
      UserError: if the checkpoint's head has other classes than the data.
    """
    head = checkpoint.head
    if head is None:
        head = zero_shot_head(checkpoint, data.class_names, data.templates)
    elif head["bias"].shape != (len(data.class_names),):
        raise UserError(
            f"{checkpoint.directory}: its head has {head['bias'].shape[0]} classes, the data "
            f"{len(data.class_names)}"
        )
    params = {"image_tower": checkpoint.params["image_tower"], "head": head}
    return make_classifier(config, checkpoint.config, params, checkpoint.preprocessor)


def make_classifier(
    config: ConfigDict, clip: CLIPConfig, params: PyTree, normalize: Preprocessor
) -> Classifier:
    """A classifier that computes as `config.compute` says; its weights may be shapes alone."""
    compute = Compute(
        dtype=jnp.dtype(config.compute.dtype),
        attention=config.compute.attention,
        remat=config.compute.remat,
    )
    return Classifier(
        params=params,
        apply=classifier(clip, compute),
        normalize=normalize,
        num_heads=clip.vision.num_attention_heads,
    )


def finetuning_task(
    config: ConfigDict, anchor: Classifier, num_train: int, augment: Augment
) -> Task:
    """Replicas of `anchor`, each with its own augmentation of `num_train` images.

    Args:
      config: the run's options.
      anchor: what every replica starts from.
      num_train: images of the training set.
      augment: (key, images uint8 [B, H, W, 3]) -> images uint8, in the step.
    """
    return Task(
        params=anchor.params,
        augment=lambda key, batch: batch | {"image": augment(key, batch["image"])},
        loss_fn=cross_entropy(
            anchor.apply, anchor.normalize, label_smoothing=config.label_smoothing
        ),
        steps_per_epoch=steps_per_epoch(num_train, config.batch_size),
        num_steps=config.epochs * steps_per_epoch(num_train, config.batch_size),
        num_heads=anchor.num_heads,
    )


def finetuning_batches(config: ConfigDict, data: Benchmark, start: int) -> Iterator[Batch]:
    """This process's batches from step `start` on, in the order of `config.seed`."""
    return train_batches(
        data.train,
        batch_size=config.batch_size,
        seed=config.seed,
        num_replicas=config.num_replicas,
        start_step=start,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
