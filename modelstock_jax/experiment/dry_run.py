"""Plan a run without running it: sizes, steps, memory, disk and missing inputs."""

from __future__ import annotations

import math
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from modelstock_jax.data import benchmark
from modelstock_jax.data.prompts import read_class_names, read_templates
from modelstock_jax.errors import UserError
from modelstock_jax.experiment.abstract_run import (
    FRACTION,
    MemoryPlan,
    abstract_step_functions,
    memory_fraction,
)
from modelstock_jax.experiment.setup import check_and_set_up, missing_checkpoint, tensor_names
from modelstock_jax.models.config import DualEncoderConfig, ModelConfig
from modelstock_jax.models.model import abstract_params
from modelstock_jax.models.published import Sizes
from modelstock_jax.training.batch_norm import check_statistics
from modelstock_jax.training.cost_analysis import Memory, memory, sent_across, sent_bytes
from modelstock_jax.training.launcher import cpu_devices_are_set, simulate_cpu_devices
from modelstock_jax.training.merge_step import steps_between_merges
from modelstock_jax.training.optimizer import warmup_steps
from modelstock_jax.training.step_fns import StepFunctions

# Largest useful fraction of a GPU's memory.
_MAX_FRACTION = 0.9


def dry_run(
    config: ConfigDict, workdir: str | Path, device_memory: float | None = None
) -> list[str]:
    """Print missing inputs, and a run's sizes, steps, memory and disk; train nothing.

    Args:
      config: see `configs/default.py`
      workdir: output directory of the run; nothing is written
      device_memory: memory of the device that will train, in GB. On a machine without accelerator
        nothing is then compiled.

    Returns:
      missing inputs, each with how to fix it; also that the run does not fit in `device_memory`

    Raises:
      UserError: an option is out of its range, or options contradict each other
    """
    memory_fraction()  # an error before minutes of compiling
    devices_are_chosen = _simulate_mesh(config, device_memory)
    check_and_set_up(config)
    if config.task == "pretrain":
        raise UserError("--dry-run supports only fine-tuning, not task='pretrain'")
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120  # A file or a pipe has no fixed width.
    missing = missing_checkpoint(config.pretrained) + benchmark.missing(config.data)
    _print_missing(console, missing)
    if config.data.name == "folder" and benchmark.missing(config.data):
        console.print("the images determine all sizes: pass --config.data.root to print them")
        return missing
    programs, outline = abstract_step_functions(config)
    check_statistics(config, programs.task.params)
    disk = disk_use(config, programs, outline.model)
    more = missing_head(config, outline.model) + missing_lists(config.data)
    more += missing_space(workdir, disk)
    _print_missing(console, more, first=len(missing) + 1)
    missing += more
    if not missing:
        console.print("nothing is missing")
    mesh = (1, 1)
    if devices_are_chosen or jax.default_backend() != "cpu":
        mesh = programs.mesh.shape["replica"], programs.mesh.shape["data"]
    plan = MemoryPlan(config, programs, outline.image_size, mesh)
    _print_sizes(console, config, programs, outline, plan if device_memory else None)
    _print(console, "disk, before compression by Orbax", _disk(disk), justify="right")
    batch = programs.abstract_batch(outline.image_size)
    use = _print_memory(console, programs, plan, batch, device_memory)
    too_large = _print_fit(console, plan, use, device_memory)
    if missing:
        console.print(f"{len(missing)} missing input{'s' * (len(missing) > 1)}, listed above")
    return missing + too_large


def _simulate_mesh(config: ConfigDict, device_memory: float | None) -> bool:
    """Create CPU devices for the mesh of the config; return whether the user chose the devices."""
    if cpu_devices_are_set():
        return True
    sizes = config.mesh.replica, config.mesh.data
    if device_memory or max(sizes) > 0:
        simulate_cpu_devices(math.prod(max(size, 1) for size in sizes))
    return max(sizes) > 0


def _print_missing(console: Console, missing: list[str], first: int = 1) -> None:
    for number, line in enumerate(missing, first):
        console.print(f"missing {number}: {line}", markup=False, soft_wrap=True)


def _print_sizes(
    console: Console,
    config: ConfigDict,
    programs: StepFunctions,
    outline: Sizes,
    plan: MemoryPlan | None,
) -> None:
    # A DINOv2's own size is that of its position embeddings, not of the images of the run.
    sized = outline.model.with_image_size(outline.image_size)
    _print(console, "model", _model(config, programs, outline.model, sized.describe()))
    rows = _run(config, programs, programs.abstract_batch(outline.image_size))
    if plan and jax.default_backend() == "cpu":
        rows["mesh"] = f"{plan.describe()}; no accelerator on this machine"
    _print(console, "run", rows)


def _print_memory(
    console: Console,
    programs: StepFunctions,
    plan: MemoryPlan,
    batch: dict[str, jax.ShapeDtypeStruct],
    device_memory: float | None,
) -> Memory:
    """Print the memory of a device, and what it sends; return the memory.

    Without an accelerator, the returned memory is the estimate for one.
    """
    device, on_cpu = programs.mesh.devices.flat[0], jax.default_backend() == "cpu"
    estimated = plan.memory()
    if on_cpu:
        title = f"memory per GPU or TPU, estimated for {plan.describe()}"
        _print(console, title, _memory(estimated), justify="right")
        if device_memory:
            return estimated
        console.print("below: the plan of XLA for this CPU; pass --device_memory=GB to omit it")
    compiled = _compile(console, programs.lower(batch), programs.mesh.devices.size)
    use = memory(programs, compiled, batch)
    title = f"memory per device, compiled for {device.device_kind}"
    title += " (says little about a GPU or TPU)" * on_cpu
    _print(console, title, _memory(use), justify="right")
    if programs.mesh.devices.size > 1:
        communication = _communication(compiled, programs.mesh.shape["data"])
        _print(console, "communication per device (sent and received)", communication)
    return estimated if on_cpu else use


def _print_fit(
    console: Console, plan: MemoryPlan, use: Memory, device_memory: float | None
) -> list[str]:
    """Print whether the run fits in a device, and options with which it fits; return a problem."""
    fraction = memory_fraction()
    if device_memory:
        limit, device = 1e9 * fraction * device_memory, f"{device_memory:g} GB"
    else:
        limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        device = "this device"
    if not limit:  # a CPU
        return []
    allocated = f"needs {as_text(use.peak)}; JAX allocates {as_text(limit)} ({FRACTION}="
    allocated += f"{fraction:g})"
    if use.peak <= limit:
        console.print(f"fits in {device}: {allocated}")
        return []
    problem = f"does not fit in {device}: {allocated}"
    console.print(problem)
    changes, with_more = plan.changes_that_fit(limit), ""
    if not changes and fraction < _MAX_FRACTION:
        changes = plan.changes_that_fit(limit / fraction * _MAX_FRACTION)
        with_more = f"{FRACTION}={_MAX_FRACTION:g} "
    for change in changes:
        options = f"{with_more}{change.options}".strip()
        line = f"  fits with {options}: {as_text(change.memory.peak)}"
        console.print(line, markup=False, soft_wrap=True)
    if not changes:
        console.print("  no option was found: use more or larger devices, or a smaller batch_size")
    return [problem]


def _compile(
    console: Console, lowered: dict[str, jax.stages.Lowered], devices: int
) -> dict[str, jax.stages.Compiled]:
    """Compile all programs at the same time, and print how long each takes."""

    def compile_one(name: str) -> jax.stages.Compiled:
        start = time.monotonic()
        compiled = lowered[name].compile()
        console.print(f"compiled the {name} in {time.monotonic() - start:.0f} s", style="dim")
        return compiled

    names = list(lowered)
    programs = " and the ".join(names).replace("step", "train step")
    console.print(f"compiling the {programs} for {devices} device{'s' * (devices > 1)} ...")
    with ThreadPoolExecutor(len(names)) as pool:  # XLA compiles without Python's lock.
        return dict(zip(names, pool.map(compile_one, names), strict=True))


def _model(
    config: ConfigDict, programs: StepFunctions, model: ModelConfig, tower: str
) -> dict[str, str]:
    params, features = programs.task.params, model.feature_size
    classes = benchmark.summarize(config.data).num_classes
    rows = {
        "pretrained": config.pretrained + _sizes_note(config),
        "image tower": f"{_count(params['image_tower'])} parameters: {tower}",
        "head": f"{(features + 1) * classes:,} parameters: {features} features, {classes} classes",
    }
    if isinstance(model, DualEncoderConfig):
        text = model.text
        rows["text tower"] = (
            f"{_count(abstract_params(model)['text_tower'])} parameters: {text.num_hidden_layers} "
            f"layers of width {text.hidden_size}; computes the head; "
            f"{'trained' if 'text_tower' in params else 'not trained'}"
        )
    return rows | {"replica": f"{_count(params)} parameters"}


def _sizes_note(config: ConfigDict) -> str:
    return (
        " (not on this machine; published sizes)" if missing_checkpoint(config.pretrained) else ""
    )


def _run(config: ConfigDict, programs: StepFunctions, batch) -> dict[str, str]:
    outline, task, optimizer = benchmark.summarize(config.data), programs.task, config.optimizer
    warmup = warmup_steps(optimizer, task.num_steps)
    mesh, device = programs.mesh, programs.mesh.devices.flat[0]
    parts, image = config.gradient_accumulation_steps, batch["image"]
    return {
        "data": f"{config.data.name}: {outline.num_train:,} training images, "
        f"{outline.num_classes:,} classes ({outline.source})",
        "batch": ", ".join(f"{k} {v.dtype} {list(v.shape)}" for k, v in batch.items()),
        "batch per device": f"image {list(image.sharding.shard_shape(image.shape))}"
        + (f" in {parts} micro-batches" if parts > 1 else ""),
        "mesh": f"replica {mesh.shape['replica']} x data {mesh.shape['data']} on "
        f"{mesh.devices.size} {device.platform} device(s) ({device.device_kind}); replica mode "
        f"{programs.replica_mode}",
        "compute": f"{config.compute.dtype}, attention {config.compute.attention_impl}, "
        f"remat {config.compute.remat}; weights and optimizer state float32",
        "sharding": _sharding(programs),
        "steps": f"{task.steps_per_epoch:,} per epoch, {task.num_steps:,} in {config.epochs} "
        f"epochs; {num_merges(config, programs)} merges, merge unit {config.merge.unit}",
        "schedule": f"learning rate 0 to {optimizer.learning_rate:g} in {warmup:,} steps, then "
        f"cosine decay to {optimizer.final_lr_fraction * optimizer.learning_rate:g}; weight decay "
        f"{optimizer.weight_decay:g}",
    }


def _sharding(programs: StepFunctions) -> str:
    leaves = jax.tree.leaves(programs.abstract_anchor)
    sharded = [leaf for leaf in leaves if not leaf.sharding.is_fully_replicated]
    if not sharded:
        return "weights and optimizer state replicated"
    fraction = sum(leaf.size for leaf in sharded) / sum(leaf.size for leaf in leaves)
    data = programs.mesh.shape["data"]
    return (
        f"1/{data} of {len(sharded)} large tensors per device, {100 * fraction:.1f} % of the "
        "weights (FSDP)"
    )


def _memory(use: Memory) -> dict[str, str]:
    rows = {
        "anchor": use.anchor,
        "weights of the replicas": use.params,
        "optimizer state": use.opt_state,
        "last merged model": use.merged,
        "two batches": 2 * use.batch,
        "gradients": use.gradients,
        "activations and other temporaries": use.step_temporary - use.gradients,
        "peak of a step": use.step,
        "peak of a merge": use.merge,
    }
    return {name: as_text(value) for name, value in rows.items()}


def _communication(compiled: dict[str, jax.stages.Compiled], data: int) -> dict[str, str]:
    rows = {}
    for name, program in compiled.items():
        by_collective = sent_bytes(program)
        parts = ", ".join(f"{kind} {as_text(size)}" for kind, size in by_collective.most_common())
        rows[name] = as_text(by_collective.total()) + (f" ({parts})" if parts else "")
        rows[f"{name}, between replicas"] = as_text(sent_across(program, data))
    return rows


def _disk(disk: DiskUse) -> dict[str, str]:
    rows = {
        "training state": disk.state,
        "merged model, or anchor": disk.merged,
        "exported model": disk.model,
        "complete run": disk.run,
    }
    return {name: as_text(value) for name, value in rows.items()}


def _print(
    console: Console, title: str, rows: dict[str, str], justify: Literal["left", "right"] = "left"
) -> None:
    console.print(title, style="bold", soft_wrap=True)  # a table's title would wrap at its width
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(justify=justify)
    for name, value in rows.items():
        table.add_row("  " + name, value)
    console.print(table)


def _count(tree) -> str:
    return f"{sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)):,}"


@dataclass(frozen=True)
class DiskUse:
    """Bytes on disk.

    Attributes:
      state: one checkpoint of the training state
      merged: one merged model; the anchor has the same size
      model: the exported model
      run: everything at the end of the run, plus one state while it is being saved
    """

    state: int
    merged: int
    model: int
    run: int


def disk_use(config: ConfigDict, programs: StepFunctions, model: ModelConfig) -> DiskUse:
    """Return the disk use of a run's workdir, without logs and tables."""
    task = programs.task
    state = sum(_bytes(leaf) for leaf in jax.tree.leaves(programs.abstract_state))
    merged = sum(_bytes(leaf) for leaf in jax.tree.leaves(task.params))
    # The exported model also contains parts that are not trained, such as a text tower.
    copied = {k: x for k, x in abstract_params(model).items() if k not in task.params}
    copied_bytes = sum(_bytes(leaf) for leaf in jax.tree.leaves(copied))
    merges = num_merges(config, programs)
    # A trainer keeps the newest states, plus one while it writes the next.
    saves = math.ceil(task.num_steps / config.checkpoint.save_every_steps) + merges
    states = min(config.checkpoint.keep or saves, saves) + 1
    saved_merges = min(config.checkpoint.keep_merged or merges, merges)
    # One run with merging and one without.
    runs = bool(merges) + bool(config.compare or not merges)
    run = config.num_seeds * (runs * (merged + states * state) + saved_merges * merged)
    export = merged + copied_bytes if merges else 0
    return DiskUse(state, merged, export, run + export)


def num_merges(config: ConfigDict, programs: StepFunctions) -> int:
    """Return the number of merges, including the one at the end of the run."""
    task = programs.task
    every = steps_between_merges(str(config.merge.every), task.steps_per_epoch, task.num_steps)
    return math.ceil(task.num_steps / every) if every else 0


def missing_head(config: ConfigDict, model: ModelConfig) -> list[str]:
    """Return what the model lacks for its first head, with how to fix it; empty if nothing.

    Args:
      config: options of the run
      model: its model
    """
    if isinstance(model, DualEncoderConfig):
        return []
    if config.objective.head == "random" or config.objective.name == "lp_ft":
        return []
    names = tensor_names(config.pretrained)
    if names is None or model.stored_head(names):
        return []
    return [
        f"a classifier in pretrained={config.pretrained}; set --config.objective.head=random, or "
        "--config.objective.name=lp_ft to train a head first"
    ]


def missing_lists(data: ConfigDict) -> list[str]:
    """Return the errors of the files of class names and templates; empty if they can be read.

    Args:
      data: the `data` group of `configs/default.py`
    """
    num_classes = benchmark.summarize(data).num_classes
    issues = []
    for name, read in (
        ("class_names", lambda path: read_class_names(path, num_classes)),
        ("templates", read_templates),
    ):
        try:
            if data[name]:
                read(data[name])
        except UserError as error:
            issues.append(f"data.{name}: {error}; give --config.data.{name}=FILE")
    return issues


def missing_space(workdir: str | Path, disk: DiskUse) -> list[str]:
    """Return the missing disk space with how to fix it; empty if there is enough.

    Args:
      workdir: directory of the run
      disk: disk use of the run
    """
    existing = next(path for path in (Path(workdir).absolute(), *Path(workdir).absolute().parents)
                    if path.is_dir())  # fmt: skip
    free = shutil.disk_usage(existing).free
    if free >= disk.run:
        return []
    return [
        f"{as_text(disk.run)} of disk space in --workdir={workdir}; only {as_text(free)} free; "
        "choose another --workdir, or lower --config.checkpoint.keep and "
        "--config.checkpoint.keep_merged"
    ]


def as_text(count: float) -> str:
    """Format a number of bytes.

    Example:
      >>> as_text(3.14e9), as_text(2.7e6)
      ('3.14 GB', '2.7 MB')
    """
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _bytes(leaf) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize
