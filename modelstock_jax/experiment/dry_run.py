"""What a run takes, and what it still lacks, without running it."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from modelstock_jax.data import benchmark
from modelstock_jax.errors import UserError
from modelstock_jax.experiment.setup import check_and_set_up, missing_checkpoint, sizes
from modelstock_jax.models.checkpoint import Checkpoint
from modelstock_jax.models.clip import abstract_params
from modelstock_jax.models.config import CLIPConfig, Preprocessor
from modelstock_jax.models.transformer import Compute
from modelstock_jax.training.classifier import AbstractTextSide, make_classifier
from modelstock_jax.training.cost_analysis import Memory, memory, sent_across, sent_bytes
from modelstock_jax.training.finetune import make_task
from modelstock_jax.training.merge_step import steps_between_merges
from modelstock_jax.training.optimizer import warmup_steps
from modelstock_jax.training.step_fns import StepFunctions


def dry_run(config: ConfigDict, workdir: str | Path) -> list[str]:
    """Prints a run's sizes, steps, memory and disk, and what is missing; trains nothing.

    Args:
      config: see `configs/default.py`.
      workdir: where the run would be written; nothing is.

    Returns:
      What is missing, each with the way out.

    Raises:
      UserError: if an option is out of its range, or options do not fit together.
    """
    check_and_set_up(config)
    if config.task == "pretrain":
        raise UserError("--dry-run knows fine-tuning; task='pretrain' has none")
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120  # A file or a pipe has no width to fit in.
    programs, clip = abstract_programs(config)
    batch = programs.abstract_batch(clip.vision.image_size)
    disk = disk_use(config, programs, clip)
    _print(console, "model", _model(config, programs, clip))
    _print(console, "run", _run(config, programs, batch))
    compiled = {}
    for name, lowered in programs.lower(batch).items():
        began = time.monotonic()
        with console.status(f"compiling the {name} ..."):
            compiled[name] = lowered.compile()
        console.print(f"compiled the {name} in {time.monotonic() - began:.0f} s", style="dim")
    device = programs.mesh.devices.flat[0]
    _print(
        console,
        f"memory of each device, as compiled for {device.device_kind}",
        _memory(memory(programs, compiled, batch)),
        justify="right",
    )
    if programs.mesh.devices.size > 1:
        sent = _sent(compiled, programs.mesh.shape["data"])
        _print(console, "what a device sends, and receives", sent)
    _print(console, "disk, before Orbax compresses", _disk(disk), justify="right")
    found = missing_checkpoint(config.pretrained) + benchmark.missing(config.data)
    found += missing_space(workdir, disk)
    for number, line in enumerate(found, 1):
        console.print(f"missing {number}: {line}", markup=False, soft_wrap=True)
    if not found:
        console.print("nothing is missing")
    return found


def _model(config: ConfigDict, programs: StepFunctions, clip: CLIPConfig) -> dict[str, str]:
    vision, text, params = clip.vision, clip.text, programs.task.params
    side, classes = vision.image_size, benchmark.summarize(config.data).num_classes
    fate = "is trained too" if "text_tower" in params else "is not trained"
    return {
        "pretrained": config.pretrained + _assumed(config),
        "image tower": f"{_count(params['image_tower'])} parameters: {vision.num_hidden_layers} "
        f"layers of width {vision.hidden_size}, {side} x {side} px in patches of "
        f"{vision.patch_size}, {vision.num_tokens} tokens",
        "head": f"{(clip.projection_dim + 1) * classes:,} parameters: {clip.projection_dim} "
        f"features, {classes} classes",
        "text tower": f"{_count(abstract_params(clip)['text_tower'])} parameters: "
        f"{text.num_hidden_layers} layers of width {text.hidden_size}; makes the head, {fate}",
        "a replica": f"{_count(params)} parameters",
    }


def _assumed(config: ConfigDict) -> str:
    return " (not here: sizes as published)" if missing_checkpoint(config.pretrained) else ""


def abstract_programs(config: ConfigDict) -> tuple[StepFunctions, CLIPConfig]:
    """The programs of a run for shapes alone, and the sizes of its model.

    Raises:
      UserError: if the options do not fit together, or the model's sizes are not known.
    """
    clip, outline = sizes(config), benchmark.summarize(config.data)
    head = {
        "kernel": jax.ShapeDtypeStruct((clip.projection_dim, outline.num_classes), jnp.float32),
        "bias": jax.ShapeDtypeStruct((outline.num_classes,), jnp.float32),
    }
    params = {"image_tower": abstract_params(clip)["image_tower"], "head": head}
    pixels = Preprocessor((0.5,) * 3, (0.5,) * 3, clip.vision.image_size)
    names, compute = ("",) * outline.num_classes, Compute.of(config.compute)
    text = AbstractTextSide(Checkpoint(clip, abstract_params(clip), pixels), names, (), compute)
    anchor = replace(make_classifier(config, clip, params, pixels), text=text)
    # The images come augmented: what a data set does on the device is small beside the towers.
    task = make_task(config, anchor, outline.num_train, lambda key, images: images)
    return StepFunctions(config, task), clip


def _run(config: ConfigDict, programs: StepFunctions, batch) -> dict[str, str]:
    outline, task, optimizer = benchmark.summarize(config.data), programs.task, config.optimizer
    warmup = warmup_steps(optimizer, task.num_steps)
    mesh, device = programs.mesh, programs.mesh.devices.flat[0]
    parts = config.gradient_accumulation_steps
    return {
        "data": f"{config.data.name}: {outline.num_train:,} training images, "
        f"{outline.num_classes:,} classes ({outline.source})",
        "batch": ", ".join(f"{k} {v.dtype} {list(v.shape)}" for k, v in batch.items()),
        "on a device": f"image {list(batch['image'].sharding.shard_shape(batch['image'].shape))}"
        + (f" in {parts} parts, one after the other" if parts > 1 else ""),
        "mesh": f"replica {mesh.shape['replica']} x data {mesh.shape['data']} on "
        f"{mesh.devices.size} {device.platform} device(s) ({device.device_kind}); replicas run by "
        f"{programs.replica_mode}",
        "arithmetic": f"{config.compute.dtype}, attention {config.compute.attention_impl}, "
        f"remat {config.compute.remat}; weights and moments float32",
        "weights": _lying(programs),
        "steps": f"{task.steps_per_epoch:,} an epoch, {task.num_steps:,} in {config.epochs} "
        f"epochs; {num_merges(config, programs)} merges by unit {config.merge.unit}",
        "schedule": f"learning rate 0 to {optimizer.learning_rate:g} in {warmup:,} steps, then a "
        f"cosine to {optimizer.final_lr_fraction * optimizer.learning_rate:g}; weight decay "
        f"{optimizer.weight_decay:g}",
    }


def _lying(programs: StepFunctions) -> str:
    split = [
        leaf
        for leaf in jax.tree.leaves(programs.abstract_anchor)
        if not leaf.sharding.is_fully_replicated
    ]
    if not split:
        return "weights and moments whole"
    share = sum(leaf.size for leaf in split) / sum(
        leaf.size for leaf in jax.tree.leaves(programs.abstract_anchor)
    )
    data = programs.mesh.shape["data"]
    return f"1/{data} of {len(split)} large tensors, {100 * share:.1f} % of the weights (FSDP)"


def _memory(need: Memory) -> dict[str, str]:
    rows = {
        "anchor": need.anchor,
        "replicas' weights": need.params,
        "optimizer's moments": need.opt_state,
        "last merged model": need.merged,
        "batch, twice": 2 * need.batch,
        "gradients": need.gradients,
        "activations and other temporaries": need.step_temporary - need.gradients,
        "peak of a step": need.step,
        "peak of a merge": need.merge,
    }
    return {name: as_text(value) for name, value in rows.items()}


def _sent(compiled: dict[str, jax.stages.Compiled], data: int) -> dict[str, str]:
    rows = {}
    for name, program in compiled.items():
        kinds = sent_bytes(program)
        parts = ", ".join(f"{kind} {as_text(size)}" for kind, size in kinds.most_common())
        rows[f"a {name}"] = as_text(kinds.total()) + (f" ({parts})" if parts else "")
        rows[f"a {name}, between replicas"] = as_text(sent_across(program, data))
    return rows


def _disk(disk: DiskUse) -> dict[str, str]:
    rows = {
        "a training state": disk.state,
        "a merged model, or the anchor": disk.merged,
        "the exported model": disk.model,
        "the whole run": disk.run,
    }
    return {name: as_text(value) for name, value in rows.items()}


def _print(
    console: Console, title: str, rows: dict[str, str], justify: Literal["left", "right"] = "left"
) -> None:
    table = Table(box=None, show_header=False, title=title, title_justify="left", pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(justify=justify)
    for name, value in rows.items():
        table.add_row("  " + name, value)
    console.print(table)


def _count(tree) -> str:
    return f"{sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)):,}"


# What a run leaves on disk, before it is run.


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


def disk_use(config: ConfigDict, programs: StepFunctions, clip: CLIPConfig) -> DiskUse:
    """What the run of a config leaves in its workdir, logs and tables apart."""
    task = programs.task
    state = sum(_bytes(leaf) for leaf in jax.tree.leaves(programs.abstract_state))
    merged = sum(_bytes(leaf) for leaf in jax.tree.leaves(task.params))
    others = {} if "text_tower" in task.params else abstract_params(clip)["text_tower"]
    tower = sum(_bytes(leaf) for leaf in jax.tree.leaves(others))
    merges = num_merges(config, programs)
    # A trainer keeps the newest states, and one more while it writes the next.
    saves = math.ceil(task.num_steps / config.checkpoint.save_every_steps) + merges
    states = min(config.checkpoint.keep or saves, saves) + 1
    kept = min(config.checkpoint.keep_merged or merges, merges)
    arms = bool(merges) + bool(config.compare or not merges)
    run = config.num_seeds * (arms * (merged + states * state) + kept * merged)
    model = merged + tower if merges else 0
    return DiskUse(state, merged, model, run + model)


def num_merges(config: ConfigDict, programs: StepFunctions) -> int:
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
