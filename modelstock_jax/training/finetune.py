"""Fine-tuning of replicas of a classifier: task, method, per-replica options and trainer."""

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
from modelstock_jax.data.device_resize import resize_batch
from modelstock_jax.data.image_set import ImageSet
from modelstock_jax.data.loader import Batch, LoaderOptions, steps_per_epoch, train_batches
from modelstock_jax.data.randaugment import MAX_MAGNITUDE
from modelstock_jax.data.transforms import BICUBIC, TrainTransform
from modelstock_jax.errors import UserError, check_choice
from modelstock_jax.merging.trees import PyTree
from modelstock_jax.reporting.timeline import Timeline
from modelstock_jax.training.classifier import Classifier, TextSide, require_text, with_captions
from modelstock_jax.training.losses import (
    Apply,
    Loss,
    Normalize,
    car_ft,
    cross_entropy,
    flyp,
    flyp_sigmoid,
    l2_sp,
)
from modelstock_jax.training.projections import NORMS
from modelstock_jax.training.sharding import batch_sharding, local_indices
from modelstock_jax.training.state import (
    IsTrained,
    biases_and_head,
    freeze,
    head_only,
    without_statistics,
)
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
    """Return a trainer that fine-tunes `anchor` on the training set of `data`.

    Args:
      config: options of the run
      anchor: the model that every replica starts from
      data: provides the training set
      workdir: see `Trainer`
      name: see `Trainer`
      step_functions: those of an earlier trainer whose options differ only in `seed`, `merge.every`
        and `checkpoint`; None creates them
      timeline: see `Trainer`
      title: see `Trainer`

    Raises:
      UserError: if an option is out of range, or options are inconsistent
    """
    fns, normalize = step_functions, anchor.normalize
    if fns is None:
        fns = StepFunctions(config, make_task(config, anchor, len(data.train), data.augment))
    size, resample, sharding = normalize.image_size, normalize.resample, batch_sharding(fns.mesh)
    transforms = train_transforms(config, size, resample, config.data.resize_on)
    batches = partial(_batches, config, data.train, transforms, sharding)
    resize = partial(resize_batch, sharding=sharding, size=size, resample=resample)
    return Trainer(config, fns, batches, workdir, name, timeline, title, resize)


def _batches(
    config: ConfigDict,
    train: ImageSet,
    transforms: list[TrainTransform],
    sharding: NamedSharding,
    start_step: int,
) -> Iterator[Batch]:
    """Yield this process's part of the batches from step `start_step` on."""
    replicas, examples = local_indices(sharding, (config.num_replicas, config.batch_size))
    return train_batches(
        train,
        batch_size=config.batch_size,
        seed=config.seed,
        num_replicas=config.num_replicas,
        start_step=start_step,
        replicas=replicas.tolist(),
        examples=examples.tolist(),
        transform=transforms,
        loader=LoaderOptions(**config.data.loader),
    )


def make_task(
    config: ConfigDict, anchor: Classifier, num_train: int, augment: AugmentImages
) -> Task:
    """Return the task of fine-tuning replicas of `anchor` on `num_train` images.

    Args:
      config: options of the run
      anchor: the model that every replica starts from
      num_train: number of training images
      augment: augmentation in the train step, (key, images uint8 [B, H, W, 3]) -> images uint8; if
        its strength differs between replicas, (key, images, strength)

    Raises:
      UserError: if an option of the objective or of `per_replica` is out of range
    """
    epoch_steps = steps_per_epoch(num_train, config.batch_size)
    params = anchor.initial_params(config)
    method = make_method(config, anchor.apply, anchor.normalize, anchor.text, params)
    hyper = hyper_parameters(config, epoch_steps)
    prompts = None
    if config.objective.name == "flyp":
        prompts = require_text(anchor.text, "flyp").prompts
    return Task(
        params=params,
        augment=_batch_augment(augment, config.data.augment.mixup, "mixup" in hyper, prompts),
        loss_fn=method.loss_fn,
        steps_per_epoch=epoch_steps,
        num_steps=config.epochs * epoch_steps,
        num_heads=anchor.num_heads,
        checksum=anchor.checksum,
        trained=method.trained,
        reads_pretrained=method.reads_pretrained,
        hyper=hyper,
        convolutional=anchor.model is not None and anchor.model.is_convolutional,
    )


def _batch_augment(
    augment: AugmentImages, alpha: float, per_replica_mixup: bool, prompts: np.ndarray | None
) -> Augment:
    def augment_images(key, batch):
        strength = [batch["augment_strength"]] if "augment_strength" in batch else []
        return batch | {"image": augment(key, batch["image"], *strength)}

    def augment_and_mix(key, batch):
        image_key, mixup_key = jax.random.split(key)
        return mixup(mixup_key, augment_images(image_key, batch), batch.get("mixup", alpha))

    def augment_and_caption(prompts, key, batch):
        image_key, caption_key = jax.random.split(key)
        return with_captions(caption_key, augment_images(image_key, batch), prompts)

    if prompts is not None:
        return partial(augment_and_caption, prompts)
    return augment_and_mix if alpha or per_replica_mixup else augment_images


def single_replica_config(config: ConfigDict) -> ConfigDict:
    """Return a copy of the config for one model, without merging and per-replica options."""
    single = config.copy_and_resolve_references()
    single.num_replicas, single.mesh.replica, single.mesh.data = 1, 0, 0
    single.merge.every, single.merge.carry_noise = "never", "off"
    single.per_replica.update(dict.fromkeys(single.per_replica, ()))
    return single


class FinetuningMethod(NamedTuple):
    """A fine-tuning method.

    Attributes:
      loss_fn: see `losses`
      trained: predicate on the leaf name; None trains all leaves
      reads_pretrained: whether the loss reads the pretrained parameters
    """

    loss_fn: Loss
    trained: IsTrained | None
    reads_pretrained: bool


def make_method(
    config: ConfigDict,
    apply: Apply,
    normalize: Normalize,
    text: TextSide | None = None,
    params: PyTree = None,
) -> FinetuningMethod:
    """Return the fine-tuning method that the config selects.

    Args:
      config: options of the run
      apply: (params, images float [B, H, W, 3]) -> logits [B, K]
      normalize: images with values 0 to 255 -> images float
      text: the text tower, required by `car_ft` and `flyp`
      params: parameters of a replica, or their shapes; statistics of batch norms among them are
        not trained

    Raises:
      UserError: if an option is unknown or out of range, or options are inconsistent
    """
    check_method(config)
    objective, smoothing = config.objective, config.label_smoothing
    if objective.name == "flyp":
        side = require_text(text, objective.name)
        contrastive = flyp_sigmoid if side.config.sigmoid else flyp
        loss_fn = contrastive(side.encode_image, side.encode_text, normalize)
    elif objective.name == "car_ft":
        contexts = require_text(text, objective.name).contexts
        loss_fn = car_ft(
            apply, normalize, contexts, alpha=objective.car_ft_alpha, label_smoothing=smoothing
        )
    else:
        loss_fn = cross_entropy(apply, normalize, label_smoothing=smoothing)
    if objective.name == "l2_sp":
        loss_fn = l2_sp(loss_fn, alpha=objective.l2_sp_alpha, beta=objective.l2_sp_beta)
    trained = without_statistics(params, TRAINED.get(objective.name))
    reads_pretrained = objective.name in ("car_ft", "l2_sp")
    return FinetuningMethod(_freeze_in_loss(loss_fn, trained), trained, reads_pretrained)


def check_method(config: ConfigDict) -> None:
    """Raise a UserError for the first option of the method that is unknown or out of range."""
    objective, projection = config.objective, config.optimizer.projection
    for name, value, choices in (
        ("objective.name", objective.name, OBJECTIVES),
        ("objective.head", objective.head, HEADS),
        ("optimizer.projection.name", projection.name, PROJECTIONS),
        ("optimizer.projection.norm", projection.norm, NORMS),
    ):
        check_choice(name, value, choices)
    for name in ("car_ft_alpha", "l2_sp_alpha", "l2_sp_beta", "probe_learning_rate"):
        if objective[name] < 0:
            raise UserError(f"objective.{name} is {objective[name]}; it must be >= 0")
    if not 0 <= config.label_smoothing < 1:
        raise UserError(f"label_smoothing is {config.label_smoothing}; it must be in [0, 1)")
    if objective.probe_epochs < 1:
        raise UserError(f"objective.probe_epochs is {objective.probe_epochs}; it must be >= 1")
    if projection.steps < 1:
        raise UserError(f"optimizer.projection.steps is {projection.steps}; it must be >= 1")
    if objective.name == "flyp":
        _check_flyp(config)
    if objective.head == "random" and projection.name != "none":
        raise UserError(
            f"optimizer.projection.name={projection.name!r} needs a pretrained head, and "
            "objective.head='random' is not pretrained; set objective.head='zero_shot'"
        )


def _check_flyp(config: ConfigDict) -> None:
    if config.gradient_accumulation_steps != 1:
        raise UserError(
            f"gradient_accumulation_steps={config.gradient_accumulation_steps}: FLYP compares "
            "every image with every text of a batch, so the batch cannot be split; set "
            "gradient_accumulation_steps=1"
        )
    smoothing, mixup = config.per_replica.label_smoothing, config.per_replica.mixup
    if config.label_smoothing or config.data.augment.mixup or smoothing or mixup:
        raise UserError(
            "objective.name='flyp' uses texts as labels: set label_smoothing, data.augment.mixup, "
            "per_replica.label_smoothing and per_replica.mixup to 0"
        )
    if config.objective.head != "zero_shot":
        raise UserError(
            f"objective.head={config.objective.head!r}: FLYP computes its head with the text "
            "tower; set objective.head='zero_shot'"
        )
    if config.optimizer.projection.name == "tpgm":
        raise UserError(
            "optimizer.projection.name='tpgm' needs a head in training, and FLYP has none; choose "
            "another objective.name or projection"
        )


def method_name(config: ConfigDict) -> str:
    """Return the row name of a single fine-tuned replica: a key of `registry.ROWS`.

    Example:
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


def _freeze_in_loss(loss_fn: Loss, trained: IsTrained | None) -> Loss:
    if trained is None:
        return loss_fn
    return lambda params, *rest: loss_fn(freeze(params, trained), *rest)


class _Range(NamedTuple):
    """Allowed values of a per-replica option; `inclusive` is about `max`."""

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
# Options of the transforms on the host; the train step does not need them.
_TRANSFORM_OPTIONS = ("randaugment_ops", "randaugment_magnitude")


def hyper_parameters(config: ConfigDict, steps_per_epoch: int) -> dict[str, np.ndarray]:
    """Return the per-replica hyperparameters of the train step, for `StepConstants.hyper`.

    Args:
      config: options of the run; an option of `per_replica` has one value per replica, or none
      steps_per_epoch: converts `epochs` to "num_steps"

    Returns:
      {name: [R]} for the options that are set; the step is compiled for the names, not the values

    Raises:
      UserError: if the number of values is not R, a value is out of range, the dataset does not
        support the option, or the maximum of `epochs` is not `config.epochs`

    Example:
      >>> config = ConfigDict({"num_replicas": 2, "per_replica": {"epochs": (1, 3)}, "epochs": 3})
      >>> hyper_parameters(config, 10)["num_steps"].tolist()
      [10, 30]
    """
    hyper = {
        name: np.asarray(values)
        for name, values in _per_replica(config).items()
        if name not in _TRANSFORM_OPTIONS
    }
    if "epochs" in hyper:
        max_epochs = max(hyper["epochs"])
        if max_epochs != config.epochs:
            raise UserError(
                f"the maximum of per_replica.epochs is {max_epochs}, but epochs={config.epochs}; "
                f"set epochs={max_epochs}"
            )
        hyper["num_steps"] = hyper.pop("epochs") * steps_per_epoch
    return hyper


def train_transforms(
    config: ConfigDict, size: int, resample: int = BICUBIC, resize_on: str = "host"
) -> list[TrainTransform]:
    """Return the transform of each replica: `data.augment` with the replica's own options.

    Args:
      config: options of the run
      size: side length of the transformed images, in pixels
      resample: Pillow's code of the crop's resize filter
      resize_on: 'host' or 'device'

    Returns:
      R transforms

    Raises:
      UserError: see `hyper_parameters`; also if an option of `data.augment` is out of range
    """
    transform = TrainTransform.of(config.data.augment, size, resample, resize_on)
    per_replica = _per_replica(config)
    transforms = []
    for r in range(config.num_replicas):
        changes: dict[str, Any] = {
            name: per_replica[name][r] for name in _TRANSFORM_OPTIONS if name in per_replica
        }
        transforms.append(dataclasses.replace(transform, **changes))
    return transforms


def _per_replica(config: ConfigDict) -> dict[str, list[float]]:
    """Return the checked values of the `per_replica` options that are set."""
    checked = {}
    for name, values in config.per_replica.items():
        if not values:
            continue
        if len(values) != config.num_replicas:
            count, replicas = len(values), config.num_replicas
            example = [str(value) for value in (*values, *values[-1:] * replicas)][:replicas]
            tuple_text = ",".join(example) + "," * (replicas == 1)
            raise UserError(
                f"per_replica.{name} has {count} value{'s' * (count != 1)} for {replicas} "
                f"replica{'s' * (replicas != 1)}; set one value per replica, for example "
                f'--config.per_replica.{name}="({tuple_text})"'
            )
        if name == "augment_strength" and config.data.name != "glyphs":
            raise UserError(
                "per_replica.augment_strength applies only to data.name='glyphs'; for stored "
                "images, set per_replica.randaugment_ops and per_replica.randaugment_magnitude"
            )
        if name in _TRANSFORM_OPTIONS and config.data.name == "glyphs":
            raise UserError(
                f"per_replica.{name} applies only to stored images; for data.name='glyphs', set "
                "per_replica.augment_strength"
            )
        checked[name] = [_check_value(name, value) for value in values]
    return checked


def _check_value(name: str, value: float) -> float:
    low, high, inclusive, is_integer = _RANGES[name]
    if not low <= value <= high or (value == high and not inclusive):
        end = "]" if inclusive else ")"
        raise UserError(f"per_replica.{name} has {value}; it must be in [{low}, {high}{end}")
    if is_integer and not float(value).is_integer():
        raise UserError(f"per_replica.{name} has {value}; it must be an integer")
    return int(value) if is_integer else value
