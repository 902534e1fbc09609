"""What a run leaves on disk, before it is run."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import jax
from ml_collections import ConfigDict

from modelstock_jax.models.clip import abstract_params
from modelstock_jax.models.config import CLIPConfig
from modelstock_jax.training.merge_step import steps_between_merges
from modelstock_jax.training.step_fns import Programs


@dataclass(frozen=True)
class DiskUse:
    """Bytes on disk.

    Attributes:
      state: one checkpoint of the training state.
      merged: one merged model; also the anchor's size.
      model: the exported model.
      run: all of it at the run's end, and one state more while it is being saved.
    """

    state: int
    merged: int
    model: int
    run: int


def disk_use(config: ConfigDict, programs: Programs, clip: CLIPConfig) -> DiskUse:
    """What the run of a config leaves in its workdir, logs and tables apart."""
    task = programs.task
    state = sum(_bytes(leaf) for leaf in jax.tree.leaves(programs.abstract_state))
    merged = sum(_bytes(leaf) for leaf in jax.tree.leaves(task.params))
    others = {} if "text_tower" in task.params else abstract_params(clip)["text_tower"]
    tower = sum(_bytes(leaf) for leaf in jax.tree.leaves(others))
    merges = num_merges(config, programs)
    # A trainer keeps the newest states, and one more while it writes the next.
    saves = math.ceil(task.num_steps / config.checkpoint.every) + merges
    states = min(config.checkpoint.keep or saves, saves) + 1
    kept = min(config.checkpoint.keep_merged or merges, merges)
    arms = bool(merges) + bool(config.compare or not merges)
    run = config.num_seeds * (arms * (merged + states * state) + kept * merged)
    model = merged + tower if merges else 0
    return DiskUse(state, merged, model, run + model)


def num_merges(config: ConfigDict, programs: Programs) -> int:
    """Merges in all; the run's end is one of them."""
    task = programs.task
    every = steps_between_merges(str(config.merge.every), task.steps_per_epoch, task.num_steps)
    return math.ceil(task.num_steps / every) if every else 0


def missing_space(workdir: str | Path, disk: DiskUse) -> list[str]:
    """The disk that a run's directory lacks, with the way out; none if it has enough."""
    there = next(path for path in (Path(workdir).absolute(), *Path(workdir).absolute().parents)
                 if path.is_dir())  # fmt: skip
    free = shutil.disk_usage(there).free
    if free >= disk.run:
        return []
    return [
        f"{as_text(disk.run)} of disk for --workdir={workdir}, where {as_text(free)} are free; "
        "choose another, or lower --config.checkpoint.keep and --config.checkpoint.keep_merged"
    ]


def as_text(count: float) -> str:
    """Bytes for a reader.

    >>> as_text(3.14e9), as_text(2.7e6)
    ('3.14 GB', '2.7 MB')
    """
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _bytes(leaf) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize
