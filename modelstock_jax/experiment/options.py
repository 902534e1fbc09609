"""The options of a run, refused before anything of it is opened, made or written."""

from __future__ import annotations

from operator import attrgetter

from ml_collections import ConfigDict

from modelstock_jax.data import benchmark
from modelstock_jax.data.loader import Loading
from modelstock_jax.errors import UserError
from modelstock_jax.merging.units import UNITS
from modelstock_jax.models import formats
from modelstock_jax.models.transformer import Compute
from modelstock_jax.training.finetune import check_method, hyper_parameters, train_views
from modelstock_jax.training.merge_step import check_merge
from modelstock_jax.training.optimizer import check_optimizer
from modelstock_jax.training.step_fns import EXECUTIONS
from modelstock_jax.training.train_step import check_policy

TASKS = ("finetune", "learning_rate", "pretrain")
# Less would divide by nothing, or leave nothing to train or to measure.
LEAST = {
    "seed": 0,
    "num_seeds": 1,
    "num_replicas": 1,
    "epochs": 1,
    "batch_size": 1,
    "data.augment.mixup": 0,
    "mesh.fsdp_min_size": 0,
    "checkpoint.every": 1,
    "checkpoint.keep": 0,
    "checkpoint.keep_merged": 0,
    "watch.max_events": 0,
    "watch.spike_deviations": 0,
    "watch.spike_window": 1,
    "log_every": 1,
    "evaluation.batch_size": 1,
    "evaluation.max_shift_images": 0,
    "pretrain.num_steps": 1,
}


def check_options(config: ConfigDict) -> None:
    """Refuses a misspelt name, or a number out of its range, in no time.

    Each module refuses its own options when it is used, which may be after an hour: a zero-shot
    head is made by then, images are decoded. Here all of them are asked at once. What depends on
    the data or on the model is not seen here.

    Args:
      config: see `configs/default.py`.

    Raises:
      UserError: for the first option that cannot be meant; it names the choices.

    Example:
      >>> from configs.default import get_config
      >>> config = get_config()
      >>> check_options(config)
      >>> config.optimizer.name = "adam"
      >>> check_options(config)
      Traceback (most recent call last):
      ...
      modelstock_jax.errors.UserError: optimizer.name='adam': choose one of adamw, sgd
    """
    _one_of("task", config.task, TASKS)
    _one_of("data.name", config.data.name, benchmark.NAMES)
    _one_of("compute.execution", config.compute.execution, EXECUTIONS)
    for name, least in LEAST.items():
        if (value := attrgetter(name)(config)) < least:
            raise UserError(f"{name} is {value}; it must be at least {least}")
    rates = config.search.learning_rates
    if min(rates, default=-1.0) < 0:
        raise UserError(f"search.learning_rates={rates}: give one rate or more, each >= 0")
    check_method(config)
    check_optimizer(config.optimizer)
    check_merge(config.merge)
    check_policy(config.watch.policy)
    hyper_parameters(config, 1)
    Compute.of(config.compute)
    train_views(config, 1)
    Loading(**config.data.loading)
    for unit in config.evaluation.units:
        _one_of("evaluation.units", unit, UNITS)
    for layout in config.export.layouts:
        _one_of("export.layouts", layout, formats.WRITABLE)


def _one_of(name, value, known) -> None:
    if value not in known:
        raise UserError(f"{name}={value!r}: choose one of {', '.join(known)}")
