"""Fine-tuning replicas of a classifier, as a `Task` of the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from modelstock_jax.clip.checkpoint import Checkpoint
from modelstock_jax.clip.model import classifier
from modelstock_jax.clip.transformer import Compute
from modelstock_jax.clip.zero_shot import zero_shot_head
from modelstock_jax.data import glyphs
from modelstock_jax.data.augment import shift_and_jitter
from modelstock_jax.data.image_set import ImageSet
from modelstock_jax.data.pipeline import Batch, steps_per_epoch, train_batches
from modelstock_jax.errors import UserError
from modelstock_jax.training.objectives import cross_entropy
from modelstock_jax.training.programs import Task

PyTree = Any


@dataclass(frozen=True)
class Benchmark:
    """The data of a study: where to train, where to choose, where to measure.

    Attributes:
      train: what replicas see.
      validation: what choices (the learning rate) may look at.
      test: the in-distribution test set.
      shifts: the out-of-distribution test sets by name.
      class_names: in the order of the labels.
      templates: prompts for the zero-shot head, {} stands for the class name.
      augment: (key, images uint8) -> images uint8, run on the device in the step.
    """

    train: ImageSet
    validation: ImageSet
    test: ImageSet
    shifts: dict[str, ImageSet]
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    augment: Callable[[jax.Array, jax.Array], jax.Array]


def load_benchmark(name: str) -> Benchmark:
    """The data set that `data.name` names.

    Raises:
      UserError: if there is none of that name.
    """
    if name != "glyphs":
        raise UserError(f"data.name={name!r}: the data sets are: glyphs")
    world = glyphs.world()
    return Benchmark(
        world.train,
        world.validation,
        world.test,
        world.shifts,
        glyphs.CLASS_NAMES,
        glyphs.TEMPLATES,
        shift_and_jitter,
    )


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
    compute = Compute(
        dtype=jnp.dtype(config.compute.dtype),
        attention=config.compute.attention,
        remat=config.compute.remat,
    )
    return Classifier(
        params={"image_tower": checkpoint.params["image_tower"], "head": head},
        apply=classifier(checkpoint.config, compute),
        normalize=checkpoint.preprocessor,
        num_heads=checkpoint.config.vision.num_attention_heads,
    )


def finetuning_task(config: ConfigDict, anchor: Classifier, data: Benchmark) -> Task:
    """Replicas of `anchor`, each with its own augmentation of `data.train`."""

    def prepare(key, images):
        return anchor.normalize(data.augment(key, images))

    return Task(
        params=anchor.params,
        loss_fn=cross_entropy(anchor.apply, prepare, label_smoothing=config.label_smoothing),
        steps_per_epoch=steps_per_epoch(len(data.train), config.batch_size),
        num_steps=config.epochs * steps_per_epoch(len(data.train), config.batch_size),
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
