"""What `config.objective` trains: a loss, the leaves that it moves, and where they start."""

from __future__ import annotations

from typing import NamedTuple

from ml_collections import ConfigDict

from modelstock_jax.errors import UserError
from modelstock_jax.training.methods.objectives import (
    Apply,
    Loss,
    Normalize,
    context_aware,
    contrastive,
    cross_entropy,
    with_l2_sp,
)
from modelstock_jax.training.methods.projections import NORMS
from modelstock_jax.training.methods.text_side import TextSide, needed
from modelstock_jax.training.methods.trained import Trained, biases_and_head, freeze, head_only

OBJECTIVES = ("cross_entropy", "car_ft", "flyp", "l2_sp", "linear_probe", "lp_ft", "bitfit")
HEADS = ("zero_shot", "random")
PROJECTIONS = ("none", "ftp", "tpgm")
TRAINED: dict[str, Trained] = {"linear_probe": head_only, "bitfit": biases_and_head}


class Method(NamedTuple):
    """A way to fine-tune.

    Attributes:
      loss_fn: see `objectives`.
      trained: which leaves move, by name; None for all.
      reads_pretrained: whether the loss compares with the pretrained weights.
    """

    loss_fn: Loss
    trained: Trained | None
    reads_pretrained: bool


def make_method(
    config: ConfigDict, apply: Apply, normalize: Normalize, text: TextSide | None = None
) -> Method:
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
        side = needed(text, rules.name)
        loss_fn = contrastive(side.encode_image, side.encode_text, normalize)
    elif rules.name == "car_ft":
        contexts = needed(text, rules.name).contexts
        loss_fn = context_aware(
            apply, normalize, contexts, alpha=rules.car_ft_alpha, label_smoothing=smoothing
        )
    else:
        loss_fn = cross_entropy(apply, normalize, label_smoothing=smoothing)
    if rules.name == "l2_sp":
        loss_fn = with_l2_sp(loss_fn, alpha=rules.l2_sp_alpha, beta=rules.l2_sp_beta)
    trained = TRAINED.get(rules.name)
    return Method(_frozen(loss_fn, trained), trained, rules.name in ("car_ft", "l2_sp"))


def check_method(config: ConfigDict) -> None:
    """Raises a UserError for the first option of the method that is out of its range."""
    rules, projection = config.objective, config.optimizer.projection
    for name, value, known in (
        ("objective.name", rules.name, OBJECTIVES),
        ("objective.head", rules.head, HEADS),
        ("optimizer.projection.name", projection.name, PROJECTIONS),
        ("optimizer.projection.norm", projection.norm, NORMS),
    ):
        if value not in known:
            raise UserError(f"{name}={value!r}: choose one of {', '.join(known)}")
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
    if config.accumulate_steps != 1:
        raise UserError(
            f"accumulate_steps={config.accumulate_steps}: FLYP compares every image with every "
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
    """What a row of one trained replica is called: a key of `reporting.style.METHODS`.

    >>> from configs.default import get_config
    >>> config = get_config()
    >>> method_name(config)
    'replica'
    >>> config.objective.name, config.optimizer.projection.name = "l2_sp", "ftp"
    >>> method_name(config)
    'l2_sp+ftp'
    """
    parts = [config.objective.name] if config.objective.name != "cross_entropy" else []
    if config.optimizer.projection.name != "none":
        parts.append(config.optimizer.projection.name)
    if config.optimizer.decay_to_pretrained:
        parts.append("decay_to_pretrained")
    return "+".join(parts) or "replica"


def _frozen(loss_fn: Loss, trained: Trained | None) -> Loss:
    if trained is None:
        return loss_fn
    return lambda params, *rest: loss_fn(freeze(params, trained), *rest)
