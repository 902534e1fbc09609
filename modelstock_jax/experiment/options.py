"""What there is to say of a run's options beside their values and meanings: one row an option."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from ml_collections import ConfigDict

from modelstock_jax.data import benchmark
from modelstock_jax.data.loader import UNREADABLE, LoaderOptions
from modelstock_jax.errors import UserError, check_choice
from modelstock_jax.fileio import flat
from modelstock_jax.merging.units import UNITS
from modelstock_jax.models import formats
from modelstock_jax.models.transformer import ATTENTIONS, Compute
from modelstock_jax.training import finetune, merge_step, optimizer, projections
from modelstock_jax.training.step_fns import REPLICA_MODES
from modelstock_jax.training.train_step import ON_NON_FINITE


@dataclass(frozen=True)
class Option:
    """A row of the table; its defaults are those of a plain option.

    Attributes:
      choices: what the value, or each value of a tuple, is one of.
      least: the least that a number may be: less would divide by nothing, or leave nothing to train
        or to measure. What a module refuses by itself is not repeated here.
      resume: whether a started workdir goes on where the option has changed; None does not.
        "ignored": no bit of a weight, and no accuracy, depends on it, and it may change from start to
        start. "numerical": what is computed is the same but for rounding; the rest of the run would
        differ from the one of the old value in the last bits of its weights, and training carries
        that on. "path": the same weights, images and names may lie elsewhere now; weights and
        names are compared with the anchor's, that the images are the same is the user's word.
      in_checksum: whether a study's digest of a run holds it: whether a trained weight depends on it.
      absent: of an option that came after the first files were written: its value in a file that
        lacks it, which is what a run did without it. A study's digest leaves it out at this value,
        so that a new option does not have every study run again. None: every file has it.
    """

    choices: Collection[str] | None = None
    minimum: float | None = None
    resume: Literal["ignored", "numerical", "path"] | None = None
    in_checksum: bool = True
    absent: Any = None


# In the order of configs/default.py. `group.*` is the row of every option of a group that has none
# of its own; an option that is not here is plain. One that is added to configs/default.py has a row
# with `absent`.
OPTIONS = {
    "task": Option(choices=("finetune", "learning_rate", "pretrain"), in_checksum=False),
    "pretrained": Option(resume="path", in_checksum=False),
    "seed": Option(minimum=0, in_checksum=False),
    # Seeds may be added to a finished run.
    "num_seeds": Option(minimum=1, resume="ignored", in_checksum=False),
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
    # A study's keys hold what lies in these two.
    "data.class_names": Option(resume="path"),
    "data.templates": Option(resume="path"),
    "data.loader.threads": Option(resume="ignored", in_checksum=False),
    "data.loader.workers": Option(resume="ignored", in_checksum=False),
    "data.loader.prefetch": Option(resume="ignored", in_checksum=False),
    # Until an image cannot be decoded the two are the same, and then the run has stopped.
    "data.loader.unreadable": Option(choices=UNREADABLE, resume="ignored", in_checksum=False),
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
    # The policies compute the same until something is not finite; where 'stop' has stopped, another
    # one may go on.
    "monitor.on_non_finite": Option(choices=ON_NON_FINITE, resume="numerical", in_checksum=False),
    "monitor.max_non_finite_steps": Option(minimum=0, resume="ignored", in_checksum=False),
    "monitor.spike_deviations": Option(minimum=0, resume="ignored", in_checksum=False),
    "monitor.spike_window": Option(minimum=1, resume="ignored", in_checksum=False),
    "log_every_steps": Option(minimum=1, resume="ignored", in_checksum=False),
    "evaluation.batch_size": Option(minimum=1, resume="numerical", in_checksum=False),
    "evaluation.max_shift_images": Option(minimum=0, in_checksum=False),
    "evaluation.wise_ft_alphas": Option(in_checksum=False),
    "evaluation.units": Option(choices=UNITS, in_checksum=False),
    "export.formats": Option(choices=formats.WRITABLE, resume="ignored", in_checksum=False),
    # Rates may be added to a finished run: each is a run of its own.
    "search.learning_rates": Option(resume="ignored", in_checksum=False),
    "pretrain.num_steps": Option(minimum=1, in_checksum=False),
    "pretrain.tokenizer": Option(in_checksum=False),
    "pretrain.clip.*": Option(in_checksum=False),
}
_PLAIN = Option()


def option(name: str) -> Option:
    """The row of an option, or of a group.

    Args:
      name: from `config.` on.

    Example:
      >>> option("epochs").minimum, option("data.paths.v2").resume, option("label_smoothing")
      (1, 'path', Option(choices=None, minimum=None, resume=None, in_checksum=True, absent=None))
    """
    groups = (row for key, row in OPTIONS.items()
              if key.endswith(".*") and f"{name}.".startswith(key[:-1]))  # fmt: skip
    return OPTIONS.get(name) or next(groups, _PLAIN)


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
    for name, value in flat(config.to_dict()).items():
        row = option(name)
        if row.choices is not None:
            for one in value if isinstance(value, (tuple, list)) else [value]:
                check_choice(name, one, row.choices)
        if row.minimum is not None and value < row.minimum:
            raise UserError(f"{name} is {value}; it must be at least {row.minimum}")
    rates = config.search.learning_rates
    if min(rates, default=-1.0) < 0:
        raise UserError(f"search.learning_rates={rates}: give one rate or more, each >= 0")
    finetune.check_method(config)
    optimizer.check_optimizer(config.optimizer)
    merge_step.check_merge(config.merge)
    finetune.hyper_parameters(config, 1)
    Compute.of(config.compute)
    finetune.train_transforms(config, 1)
    LoaderOptions(**config.data.loader)
