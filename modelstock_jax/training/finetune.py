"""Fine-tuning replicas of a classifier: the task of the loop, its batches and its trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from modelstock_jax.data.augment import mixup
from modelstock_jax.data.benchmark import Benchmark
from modelstock_jax.data.loader import Batch, Loading, steps_per_epoch, train_batches
from modelstock_jax.reporting.timeline import Timeline
from modelstock_jax.training.classifier import Classifier
from modelstock_jax.training.hosts.feed import held
from modelstock_jax.training.loop import Trainer
from modelstock_jax.training.methods.method import make_method
from modelstock_jax.training.methods.per_replica import hyper_parameters, train_views
from modelstock_jax.training.methods.text_side import needed, with_captions
from modelstock_jax.training.programs import Programs, Task
from modelstock_jax.training.sharding import batch_sharding
from modelstock_jax.training.step import Augment

AugmentImages = Callable[..., jax.Array]


def finetuning_task(
    config: ConfigDict, anchor: Classifier, num_train: int, augment: AugmentImages
) -> Task:
    """Replicas of `anchor`, each with its own augmentation of `num_train` images.

    Args:
      config: the run's options.
      anchor: what every replica starts from.
      num_train: images of the training set.
      augment: (key, images uint8 [B, H, W, 3]) -> images uint8, in the step; where replicas differ
        in its strength, (key, images, strength).

    Raises:
      UserError: if an option of the objective or of `per_replica` is out of its range.
    """
    epoch = steps_per_epoch(num_train, config.batch_size)
    method = make_method(config, anchor.apply, anchor.normalize, anchor.text)
    hyper = hyper_parameters(config, epoch)
    prompts = None
    if config.objective.name == "flyp":
        prompts = needed(anchor.text, "flyp").prompts
    return Task(
        params=anchor.start(config),
        augment=_batch_augment(augment, config.data.augment.mixup, "mixup" in hyper, prompts),
        loss_fn=method.loss_fn,
        steps_per_epoch=epoch,
        num_steps=config.epochs * epoch,
        num_heads=anchor.num_heads,
        fingerprint=anchor.fingerprint,
        trained=method.trained,
        reads_pretrained=method.reads_pretrained,
        hyper=hyper,
    )


def _batch_augment(
    augment: AugmentImages, alpha: float, own_mixup: bool, prompts: np.ndarray | None
) -> Augment:
    def of_images(key, batch):
        strength = [batch["augment_strength"]] if "augment_strength" in batch else []
        return batch | {"image": augment(key, batch["image"], *strength)}

    def mixed(key, batch):
        first, second = jax.random.split(key)
        return mixup(second, of_images(first, batch), batch.get("mixup", alpha))

    def captioned(texts, key, batch):
        first, second = jax.random.split(key)
        return with_captions(second, of_images(first, batch), texts)

    if prompts is not None:
        return partial(captioned, prompts)
    return mixed if alpha or own_mixup else of_images


def finetuning_batches(
    config: ConfigDict, data: Benchmark, image_size: int, start: int, *, mesh: Mesh | None = None
) -> Iterator[Batch]:
    """This process's batches from step `start` on, in the order of `config.seed`.

    Args:
      config: the run's options.
      data: its training set.
      image_size: side of the model's input; stored images are cropped and resized to it.
      start: the first batch's step.
      mesh: that the batches are placed on; this process draws what its devices hold. None draws
        all.
    """
    share: dict[str, list[int]] = {}
    if mesh is not None:
        replicas, examples = held(batch_sharding(mesh), (config.num_replicas, config.batch_size))
        share = {"replicas": replicas.tolist(), "examples": examples.tolist()}
    return train_batches(
        data.train,
        batch_size=config.batch_size,
        seed=config.seed,
        num_replicas=config.num_replicas,
        start_step=start,
        replicas=share.get("replicas"),
        examples=share.get("examples"),
        view=train_views(config, image_size),
        loading=Loading(**config.data.loading),
    )


def finetuning_programs(config: ConfigDict, anchor: Classifier, data: Benchmark) -> Programs:
    """The programs of a fine-tuning of `anchor` on the training set of `data`.

    Raises:
      UserError: if an option is out of its range, or options do not fit together.
    """
    return Programs(config, finetuning_task(config, anchor, len(data.train), data.augment))


def finetuning_trainer(
    config: ConfigDict,
    anchor: Classifier,
    data: Benchmark,
    programs: Programs,
    workdir: str | Path,
    name: str,
    timeline: Timeline | None = None,
    title: str | None = None,
) -> Trainer:
    """One such fine-tuning, as `programs` compute it.

    Args:
      config: the run's options; its seed and `merge.every` are this run's own.
      anchor: what every replica starts from.
      data: its training set.
      programs: as `finetuning_programs` makes them, of this config or of one with another seed.
      workdir: see `Trainer`, as the other arguments.
      name: see `Trainer`.
      timeline: see `Trainer`.
      title: see `Trainer`.

    Raises:
      UserError: as `Trainer`.
    """
    size = anchor.normalize.image_size
    batches = partial(finetuning_batches, config, data, size, mesh=programs.mesh)
    return Trainer(config, programs, batches, workdir, name, timeline, title)


def alone(config: ConfigDict) -> ConfigDict:
    """A copy of the options for one model: none to merge it with, nothing of its own."""
    one = config.copy_and_resolve_references()
    one.num_replicas, one.mesh.replica, one.mesh.data = 1, 0, 0
    one.merge.every, one.merge.carry_noise = "never", "off"
    one.per_replica.update(dict.fromkeys(one.per_replica, ()))
    return one
