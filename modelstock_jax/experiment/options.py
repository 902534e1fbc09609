"""Choices, ranges and resume rules of the options of a run: one row per option."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from ml_collections import ConfigDict

from modelstock_jax.data import benchmark
from modelstock_jax.data.loader import UNREADABLE, LoaderOptions
from modelstock_jax.data.views import RESIZE_ON
from modelstock_jax.errors import UserError, check_choice
from modelstock_jax.experiment import export
from modelstock_jax.fileio import flatten
from modelstock_jax.flags import current_names
from modelstock_jax.merging.units import UNITS
from modelstock_jax.models import formats
from modelstock_jax.models.compute import ATTENTIONS, Compute
from modelstock_jax.training import batch_norm, finetune, merge_step, optimizer, projections
from modelstock_jax.training.step_fns import REPLICA_MODES
from modelstock_jax.training.train_step import ON_NON_FINITE
from modelstock_jax.training.trainer import TRANSFER_GUARDS


@dataclass(frozen=True)
class Option:
    """The rules of one option; the defaults apply to an option without a row.

    Attributes:
      choices: allowed values of the option, or of each element of a tuple
      minimum: smallest number allowed; a smaller one would divide by zero, or leave nothing to
        train or to evaluate. Limits that a module checks itself are not repeated here
      resume: whether a run resumes after the option changed; None if it does not.
        "ignored": no bit of a weight and no accuracy depends on it; it may change at every start.
        "extends": the same, and another value adds results or exported models to a finished run.
        "numerical": it affects only rounding; with another value the rest of the run differs in the
        last bits of its weights, and training amplifies such differences.
        "path": the same weights, images and names may be located elsewhere. Weights and names are
        compared with those of the run; the user guarantees that the images are the same
      in_checksum: whether the checksum of a study's run includes it, because a trained weight
        depends on it
      absent: value of the option in a file that lacks it, for an option that was added after the
        first files were written; it reproduces the runs of that time. The checksum of a study's
        run omits the option at this value, so that a new option does not invalidate every study.
        None: every file has the option
    """

    choices: Collection[str] | None = None
    minimum: float | None = None
    resume: Literal["ignored", "extends", "numerical", "path"] | None = None
    in_checksum: bool = True
    absent: Any = None


# In the order of configs/default.py. `group.*` applies to every option of a group without its own
# row; an option without a row has the defaults. An option that is added to configs/default.py needs
# a row with `absent`.
OPTIONS = {
    "task": Option(choices=("finetune", "learning_rate", "pretrain"), in_checksum=False),
    "pretrained": Option(resume="path", in_checksum=False),
    "seed": Option(minimum=0, in_checksum=False),
    # Seeds can be added to a finished run.
    "num_seeds": Option(minimum=1, resume="extends", in_checksum=False),
    "num_replicas": Option(minimum=1),
    "compare": Option(in_checksum=False),
    "epochs": Option(minimum=1),
    "batch_size": Option(minimum=1),
    "gradient_accumulation_steps": Option(resume="numerical", in_checksum=False),
    "data.name": Option(choices=benchmark.NAMES),
    "data.root": Option(resume="path", in_checksum=False),
    "data.paths.*": Option(resume="path", in_checksum=False, absent=""),
    "data.check_counts": Option(resume="ignored", in_checksum=False),
    "data.shifts": Option(in_checksum=False),
    "data.real_labels": Option(in_checksum=False),
    # The keys of a study contain the contents of these two files.
    "data.class_names": Option(resume="path"),
    "data.templates": Option(resume="path"),
    "data.loader.threads": Option(resume="ignored", in_checksum=False),
    "data.loader.workers": Option(resume="ignored", in_checksum=False),
    "data.loader.prefetch": Option(resume="ignored", in_checksum=False),
    # The values differ only after an undecodable image, and 'error' has stopped the run there.
    "data.loader.unreadable": Option(choices=UNREADABLE, resume="ignored", in_checksum=False),
    # A gray level of some pixels, and so the rest of the run, differs.
    "data.resize_on": Option(choices=RESIZE_ON, absent="host"),
    "data.decoded_cache_dir": Option(in_checksum=False),
    "data.augment.mixup": Option(minimum=0),
    "objective.name": Option(choices=finetune.OBJECTIVES),
    "objective.head": Option(choices=finetune.HEADS),
    "optimizer.name": Option(choices=optimizer.OPTIMIZERS),
    "optimizer.projection.name": Option(choices=finetune.PROJECTIONS),
    "optimizer.projection.norm": Option(choices=projections.NORMS),
    "per_replica.randaugment_ops": Option(absent=()),
    "per_replica.randaugment_magnitude": Option(absent=()),
    "merge.method": Option(choices=merge_step.MERGES),
    "merge.unit": Option(choices=UNITS),
    "merge.opt_state": Option(choices=merge_step.OPT_STATE_POLICIES),
    "merge.carry_noise": Option(choices=merge_step.CARRY_NOISE),
    "merge.batch_norm_statistics": Option(
        choices=batch_norm.STATISTICS, in_checksum=False, absent="keep"
    ),
    "compute.attention_impl": Option(choices=ATTENTIONS, resume="numerical", in_checksum=False),
    "compute.remat": Option(resume="numerical", in_checksum=False),
    "compute.replica_mode": Option(choices=REPLICA_MODES, resume="numerical", in_checksum=False),
    "compute.compilation_cache": Option(resume="ignored", in_checksum=False),
    "mesh.replica": Option(resume="numerical", in_checksum=False),
    "mesh.data": Option(resume="numerical", in_checksum=False),
    "mesh.fsdp_min_size": Option(minimum=0, resume="numerical", in_checksum=False),
    "checkpoint.save_every_steps": Option(minimum=1, resume="ignored", in_checksum=False),
    "checkpoint.keep": Option(minimum=0, resume="ignored", in_checksum=False),
    "checkpoint.keep_merged": Option(minimum=0, resume="ignored", in_checksum=False),
    # The values differ only after a non-finite step; where 'stop' stopped, another can resume.
    "monitor.on_non_finite": Option(choices=ON_NON_FINITE, resume="numerical", in_checksum=False),
    "monitor.max_non_finite_steps": Option(minimum=0, resume="ignored", in_checksum=False),
    "monitor.spike_deviations": Option(minimum=0, resume="ignored", in_checksum=False),
    "monitor.spike_window": Option(minimum=1, resume="ignored", in_checksum=False),
    "monitor.transfer_guard": Option(
        choices=TRANSFER_GUARDS, resume="ignored", in_checksum=False, absent="allow"
    ),
    "log_every_steps": Option(minimum=1, resume="ignored", in_checksum=False),
    "evaluation.batch_size": Option(minimum=1, resume="numerical", in_checksum=False),
    "evaluation.max_shift_images": Option(minimum=0, in_checksum=False),
    "evaluation.wise_ft_alphas": Option(in_checksum=False),
    "evaluation.units": Option(choices=UNITS, in_checksum=False),
    "export.which": Option(
        choices=export.WHICH, resume="extends", in_checksum=False, absent="merged"
    ),
    "export.formats": Option(choices=formats.WRITABLE, resume="extends", in_checksum=False),
    # Learning rates can be added to a finished search: each is a separate run.
    "search.learning_rates": Option(resume="extends", in_checksum=False),
    "pretrain.num_steps": Option(minimum=1, in_checksum=False),
    "pretrain.tokenizer": Option(in_checksum=False),
    "pretrain.clip.*": Option(in_checksum=False),
}
_DEFAULT = Option()


def option(name: str) -> Option:
    """Return the rules of an option.

    Args:
      name: name without `config.`

    Example:
      >>> option("epochs").minimum, option("data.paths.v2").resume, option("label_smoothing")
      (1, 'path', Option(choices=None, minimum=None, resume=None, in_checksum=True, absent=None))
    """
    groups = (row for key, row in OPTIONS.items()
              if key.endswith(".*") and f"{name}.".startswith(key[:-1]))  # fmt: skip
    return OPTIONS.get(name) or next(groups, _DEFAULT)


def check_options(config: ConfigDict) -> None:
    """Check all choices and ranges at once, in milliseconds.

    Each module checks its own options when it is used. This can be an hour later, after a zero-shot
    head was computed and images were decoded. Checks that depend on the data or on the model are
    not made here.

    Args:
      config: see `configs/default.py`

    Raises:
      UserError: the first invalid option, with its choices

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
    for name, value in flatten(config.to_dict()).items():
        row = option(name)
        ((new_name, new_value),) = current_names({name: value}).items()
        if new_name != name:  # A config file that assigns it would change nothing.
            raise UserError(f"{name} is now {new_name}; rename it in the config file")
        if new_value != value:
            raise UserError(f"{name}={value!r} is now {new_value!r}")
        if row.choices is not None:
            for item in value if isinstance(value, (tuple, list)) else [value]:
                check_choice(name, item, row.choices)
        if row.minimum is not None and value < row.minimum:
            raise UserError(f"{name} is {value}; it must be at least {row.minimum}")
    rates = config.search.learning_rates
    if not rates or not all(isinstance(rate, (int, float)) and rate >= 0 for rate in rates):
        raise UserError(
            f"search.learning_rates={rates}: pass at least one learning rate, each >= 0"
        )
    _check_num_replicas(config)
    if config.task == "finetune":
        export.check_which(config)
    finetune.check_method(config)
    optimizer.check_optimizer(config.optimizer)
    merge_step.check_merge(config.merge)
    finetune.hyper_parameters(config, 1)
    Compute.of(config.compute)
    finetune.train_transforms(config, 1)
    _check_resize_on(config)
    LoaderOptions(**config.data.loader)


def _check_resize_on(config: ConfigDict) -> None:
    if config.data.resize_on == "device" and config.data.name == "glyphs":
        raise UserError(
            "data.resize_on='device' applies only to stored images; for data.name='glyphs', set "
            "data.resize_on='host'"
        )


def _check_num_replicas(config: ConfigDict) -> None:
    """Raise the error of `Trainer` for a single replica, before anything is opened."""
    merges = merge_step.steps_between_merges(str(config.merge.every), 1, 1)
    # The other tasks train one model and do not merge.
    if config.task == "finetune" and merges and config.num_replicas < 2:
        raise UserError(
            f"num_replicas={config.num_replicas}: a merge needs at least 2 replicas; "
            "set --config.num_replicas=2 or --config.merge.every=never"
        )
