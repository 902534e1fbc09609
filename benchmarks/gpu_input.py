"""Images per second of a training loop that reads, decodes, crops and transfers its images."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from benchmarks import models, step
from benchmarks.photographs import photograph
from modelstock_jax.data.caches import write_cache
from modelstock_jax.data.device_resize import resize_batch
from modelstock_jax.data.image_folder import read_folders
from modelstock_jax.data.image_set import ImageSet
from modelstock_jax.data.loader import train_batches
from modelstock_jax.data.resize import BICUBIC
from modelstock_jax.data.transforms import TrainTransform
from modelstock_jax.data.views import RESIZE_ON
from modelstock_jax.machine import usable_cores
from modelstock_jax.training.sharding import batch_sharding, put_batch

# Different photographs, and files of each: a batch has more images than can be drawn in time.
PHOTOGRAPHS, FILES_OF_EACH = 64, 32
WARM_UP_STEPS = 3


def image_sets(root: Path, photographs: int, files: int) -> dict[str, ImageSet]:
    """Return JPEGs in class folders, and the same images in a decoded cache."""
    with ThreadPoolExecutor() as pool:
        encoded = list(pool.map(photograph, range(photographs)))
    for number, data in enumerate(encoded * files):
        path = root / f"folder/class_{number % 2}/{number:05d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    stored = read_folders(root / "folder")
    jpegs = ImageSet("train", stored.images, stored.labels)
    cached = write_cache(stored.images, root / "cache", short_side=256)
    return {"decoded cache": replace(jpegs, images=cached), "JPEG": jpegs}


def measure(run: Any, batch_size: int, variant: step.Variant) -> Iterator[dict[str, Any]]:
    """Yield a row per source of images and device of the resize.

    Args:
      run: the part, see `gpu_parts.Run`
      batch_size: images per replica and step
      variant: the step to feed
    """
    size = run.size("b32")
    config = models.run_config(size, run.dtype)
    config.batch_size, config.compute.attention_impl = batch_size, variant.attention
    config.compute.replica_mode = "vmap"
    programs = models.make_programs(config, size, models.weights(size))
    constants, side = programs.step_constants(), models.SIZES[size][4]
    train_step, state = programs.train_step, programs.init_state(0)
    sharding = batch_sharding(programs.mesh)
    counts = (2, 8) if run.rehearse else (PHOTOGRAPHS, FILES_OF_EACH)
    with tempfile.TemporaryDirectory() as root:
        sources, alone = image_sets(Path(root), *counts), None
        for source, resize_on in itertools.product(sources, RESIZE_ON):
            batches = train_batches(
                sources[source], batch_size=batch_size, seed=0, num_replicas=2,
                transform=TrainTransform(side, resize_on=resize_on),
            )  # fmt: skip

            def next_batch(batches=batches):
                batch = put_batch(programs.mesh, next(batches))
                return resize_batch(batch, sharding, side, BICUBIC)

            if alone is None:
                batch = next_batch()
                state, alone = loop(train_step, state, constants, lambda batch=batch: batch, run)
            state, fed = loop(train_step, state, constants, next_batch, run)
            batches.close()
            count = 2 * batch_size
            yield {
                "source": source, "resize_on": resize_on, "size": size, "batch": batch_size,
                "cores": usable_cores(),
                "images_per_second": count / fed["step"],
                "step_images_per_second": count / alone["step"],
                "wait_seconds": fed["wait"], "step_seconds": alone["step"],
            }  # fmt: skip


def loop(train_step, state, constants, next_batch, run) -> tuple[Any, dict[str, float]]:
    """Train as the training loop does: read a step's metrics when the next step has started.

    Returns:
      the state, and the mean seconds per step and of waiting for a batch
    """
    steps, waits, metrics, end = [], [], None, 0.0
    while len(steps) < WARM_UP_STEPS + 2 or time.perf_counter() < end:
        start = time.perf_counter()
        if len(steps) == WARM_UP_STEPS:  # The first step compiles.
            end = start + 6 * run.seconds
        batch = next_batch()
        waits.append(time.perf_counter() - start)
        state, new_metrics = train_step(state, batch, constants)
        jax.block_until_ready(metrics)
        metrics = new_metrics
        steps.append(time.perf_counter() - start)
    jax.block_until_ready(state)
    return state, {
        "step": statistics.fmean(steps[WARM_UP_STEPS:]),
        "wait": statistics.fmean(waits[WARM_UP_STEPS:]),
    }
