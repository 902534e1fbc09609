"""Fine-tuning replicas of a classifier: the task of the loop, its batches and its trainer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from modelstock_jax.data.augment import mixup
from modelstock_jax.data.benchmark import Benchmark
from modelstock_jax.data.image_set import ImageSet
from modelstock_jax.data.loader import Batch, LoaderOptions, steps_per_epoch, train_batches
from modelstock_jax.data.transforms import MAX_MAGNITUDE, TrainTransform
from modelstock_jax.errors import UserError, check_choice
from modelstock_jax.reporting.timeline import Timeline
from modelstock_jax.training.classifier import Classifier, TextSide, require_text, with_captions
from modelstock_jax.training.losses import (
    Apply,
    Loss,
    Normalize,
    car_ft,
    cross_entropy,
    flyp,
    l2_sp,
)
from modelstock_jax.training.projections import NORMS
from modelstock_jax.training.sharding import batch_sharding, local_indices
from modelstock_jax.training.state import IsTrained, biases_and_head, freeze, head_only
from modelstock_jax.training.step_fns import StepFunctions, Task
from modelstock_jax.training.train_step import Augment
from modelstock_jax.training.trainer import Trainer

AugmentImages = Callable[..., jax.Array]
OBJECTIVES = ("cross_entropy", "car_ft", "flyp", "l2_sp", "linear_probe", "lp_ft", "bitfit")
HEADS = ("zero_shot", "random")
PROJECTIONS = ("none", "ftp", "tpgm")
TRAINED: dict[str, IsTrained] = {"linear_probe": head_only, "bitfit": biases_and_head}


def make_trainer(
    config: ConfigDict,
    anchor: Classifier,
    data: Benchmark,
    workdir: str | Path,
    name: str,
    *,
    step_functions: StepFunctions | None = None,
    timeline: Timeline | None = None,
    title: str | None = None,
) -> Trainer:
    """Makes one fine-tuning of `anchor` on the training set of `data`.

    Args:
      config: the run's options.
      anchor: what every replica starts from.
      data: its training set.
      workdir: see `Trainer`.
      name: see `Trainer`.
      programs: those of an earlier trainer whose options differ in `seed`, `merge.every` and
        `checkpoint` alone; None makes them.
      timeline: see `Trainer`.
      title: see `Trainer`.

    Raises:
      UserError: if an option is out of its range, or options do not fit together.
    """
    if step_functions is None:
        programs = StepFunctions(config, make_task(config, anchor, len(data.train), data.augment))
    size = anchor.normalize.image_size
    batches = partial(_batches, config, data.train, size, batch_sharding(programs.mesh))
    return Trainer(config, programs, batches, workdir, name, timeline, title)


def _batches(
    config: ConfigDict, train: ImageSet, image_size: int, sharding: NamedSharding, start: int
) -> Iterator[Batch]:
    """The batches that this process's devices hold, from step `start` on."""
    replicas, examples = local_indices(sharding, (config.num_replicas, config.batch_size))
    return train_batches(
        train,
        batch_size=config.batch_size,
        seed=config.seed,
        num_replicas=config.num_replicas,
        start_step=start,
        replicas=replicas.tolist(),
        examples=examples.tolist(),
        transform=train_transforms(config, image_size),
        loader=LoaderOptions(**config.data.loader),
    )


def make_task(
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
        prompts = require_text(anchor.text, "flyp").prompts
    return Task(
        params=anchor.initial_params(config),
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


def single_replica_config(config: ConfigDict) -> ConfigDict:
    """A copy of the options for one model: none to merge it with, nothing of its own."""
    one = config.copy_and_resolve_references()
    one.num_replicas, one.mesh.replica, one.mesh.data = 1, 0, 0
    one.merge.every, one.merge.carry_noise = "never", "off"
    one.per_replica.update(dict.fromkeys(one.per_replica, ()))
    return one


class FinetuningMethod(NamedTuple):
    """A way to fine-tune.

    Attributes:
      loss_fn: see `losses`.
      trained: which leaves move, by name; None for all.
      reads_pretrained: whether the loss compares with the pretrained weights.
    """

    loss_fn: Loss
    trained: IsTrained | None
    reads_pretrained: bool


def make_method(
    config: ConfigDict, apply: Apply, normalize: Normalize, text: TextSide | None = None
) -> FinetuningMethod:
    """The loss and the trained leaves that the config names.

    Args:
      config: the run's options.
      apply: (params, images float [B, H, W, 3]) -> logits [B, K].
      normalize: images of 0 to 255 -> images float.
      text: the text side, which `car_ft` and `flyp` need.

    Raises:
      UserError: if a name is unknown, a number out of its range, or options do not go together.
    """
    check_method(config)
    rules, smoothing = config.objective, config.label_smoothing
    if rules.name == "flyp":
        side = require_text(text, rules.name)
        loss_fn = flyp(side.encode_image, side.encode_text, normalize)
    elif rules.name == "car_ft":
        contexts = require_text(text, rules.name).contexts
        loss_fn = car_ft(
            apply, normalize, contexts, alpha=rules.car_ft_alpha, label_smoothing=smoothing
        )
    else:
        loss_fn = cross_entropy(apply, normalize, label_smoothing=smoothing)
    if rules.name == "l2_sp":
        loss_fn = l2_sp(loss_fn, alpha=rules.l2_sp_alpha, beta=rules.l2_sp_beta)
    trained = TRAINED.get(rules.name)
    return FinetuningMethod(_frozen(loss_fn, trained), trained, rules.name in ("car_ft", "l2_sp"))


def check_method(config: ConfigDict) -> None:
    """Raises a UserError for the first option of the method that is out of its range."""
    rules, projection = config.objective, config.optimizer.projection
    for name, value, known in (
        ("objective.name", rules.name, OBJECTIVES),
        ("objective.head", rules.head, HEADS),
        ("optimizer.projection.name", projection.name, PROJECTIONS),
        ("optimizer.projection.norm", projection.norm, NORMS),
    ):
        check_choice(name, value, known)
    for name in ("car_ft_alpha", "l2_sp_alpha", "l2_sp_beta", "probe_learning_rate"):
        if rules[name] < 0:
            raise UserError(f"objective.{name} is {rules[name]}; it must be >= 0")
    if not 0 <= config.label_smoothing < 1:
        raise UserError(f"label_smoothing is {config.label_smoothing}; it must be in [0, 1)")
    if rules.probe_epochs < 1:
        raise UserError(f"objective.probe_epochs is {rules.probe_epochs}; it must be at least 1")
    if projection.steps < 1:
        raise UserError(f"optimizer.projection.steps is {projection.steps}; it must be at least 1")
    if rules.name == "flyp":
        _check_flyp(config)
    if rules.head == "random" and projection.name != "none":
        raise UserError(
            f"optimizer.projection.name={projection.name!r} holds weights near the pretrained "
            "ones, and objective.head='random' has none; use 'zero_shot'"
        )


def _check_flyp(config: ConfigDict) -> None:
    if config.gradient_accumulation_steps != 1:
        raise UserError(
            f"gradient_accumulation_steps={config.gradient_accumulation_steps}: FLYP compares every image with every "
            "text of a batch, which parts of it cannot; use 1"
        )
    smoothing, mixup = config.per_replica.label_smoothing, config.per_replica.mixup
    if config.label_smoothing or config.data.augment.mixup or smoothing or mixup:
        raise UserError(
            "objective.name='flyp' has texts for labels: set label_smoothing, data.augment.mixup "
            "and those of per_replica to 0"
        )
    if config.objective.head != "zero_shot":
        raise UserError(
            f"objective.head={config.objective.head!r}: FLYP makes its head from the text tower; "
            "use 'zero_shot'"
        )
    if config.optimizer.projection.name == "tpgm":
        raise UserError("optimizer.projection.name='tpgm' needs a head; use another than flyp")


def method_name(config: ConfigDict) -> str:
    """What a row of one trained replica is called: a key of `registry.ROWS`.

    >>> from configs.default import get_config
    >>> config = get_config()
    >>> method_name(config)
    'single_model'
    >>> config.objective.name, config.optimizer.projection.name = "l2_sp", "ftp"
    >>> method_name(config)
    'l2_sp+ftp'
    """
    parts = [config.objective.name] if config.objective.name != "cross_entropy" else []
    if config.optimizer.projection.name != "none":
        parts.append(config.optimizer.projection.name)
    if config.optimizer.decay_to_pretrained:
        parts.append("decay_to_pretrained")
    return "+".join(parts) or "single_model"


def _frozen(loss_fn: Loss, trained: IsTrained | None) -> Loss:
    if trained is None:
        return loss_fn
    return lambda params, *rest: loss_fn(freeze(params, trained), *rest)


# Numbers of each replica's own: learning rates, decays, lengths, augmentations.


class _Range(NamedTuple):
    """What a number may be: `most` only where `closed`, and whole where `whole`."""

    min: float
    max: float = np.inf
    inclusive: bool = True
    is_integer: bool = False


_RANGES = {
    "learning_rate": _Range(0.0),
    "weight_decay": _Range(0.0),
    "epochs": _Range(1, is_integer=True),
    "label_smoothing": _Range(0.0, 1.0, inclusive=False),
    "mixup": _Range(0.0),
    "augment_strength": _Range(0.0, 1.0),
    "randaugment_ops": _Range(0, is_integer=True),
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


def train_transforms(config: ConfigDict, size: int) -> list[TrainTransform]:
    """What each replica sees of a stored image: `data.augment`, with what is its own.

    Args:
      config: the run's options.
      size: side of a view, pixels.

    Returns:
      R views.

    Raises:
      UserError: as `hyper_parameters`, or an option of `data.augment` is out of its range.
    """
    view, own = TrainTransform.of(config.data.augment, size), _own(config)
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
