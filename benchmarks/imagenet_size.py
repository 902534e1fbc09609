"""Listing, memory, first batch, iteration and resume with as many files as ImageNet has.

    python benchmarks/imagenet_size.py --json imagenet_size.json    # 1,281,167 files: 7 minutes
    python benchmarks/imagenet_size.py --fraction 0.1 --drop-caches

Writes a tree of small JPEGs (32 x 32, less than 1 kB; `imagenet_tree.py`) with the folder names of
ImageNet, and its ArrayRecord. At full size they need 6 GB and 1.3 million inodes. Each measurement
is a new process; its imports are not measured. The user's cache of listings is in the directory of
the benchmark. Linux only.

- Listing: `list_folders` with and without its cache, and a sorted `os.walk` that returns a list of
  paths and classes, as torchvision's ImageFolder does. `equal` compares the paths. With
  --drop-caches, `cold` is measured after the kernel has dropped its caches (as root; this slows
  other programs down).
- Memory: `peak` and `kept` are the growth of the resident memory during and after a call.
- First batch: from opening the dataset to the first batch of --batch images per replica, at step 0
  and in the middle of the third epoch. The listing is cached.
- Iteration: the decoded stream of the 100 steps before the middle of the third epoch; the stream
  of orders and labels, without images, from step 0 to the same step; and 50 steps of images that
  need no reading and no decoding. The first batch after resuming in the middle of the third epoch
  must be bitwise identical to that of the uninterrupted streams.
- Time to write: 0 for datasets that are already in the directory.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import hashlib
import os
import pickle
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import imagenet_tree, turns  # noqa: E402
from modelstock_jax.data import caches  # noqa: E402
from modelstock_jax.data.image_folder import list_folders  # noqa: E402
from modelstock_jax.data.image_set import EncodedImages, ImageSet  # noqa: E402
from modelstock_jax.data.imagenet import WNIDS, open_set  # noqa: E402
from modelstock_jax.data.loader import (  # noqa: E402
    LoaderOptions,
    epoch_order,
    steps_per_epoch,
    train_batches,
)
from modelstock_jax.data.prepare import prepare  # noqa: E402
from modelstock_jax.data.transforms import TrainTransform  # noqa: E402
from modelstock_jax.machine import usable_cores  # noqa: E402

SOURCES = {"folder": "train", "ArrayRecord": "imagenet2012_train"}
PACKAGES = ("array_record", "grain", "numpy", "simplejpeg", "tensorflow-datasets")
EPOCH = 2  # The third one.
DECODED_STEPS = 100  # Steps of the decoded stream before the middle of that epoch.
CHANGE_STEPS = 20  # Steps with pauses before and after the start of that epoch.
BLANK_STEPS = 50  # Steps of images that need no decoding.
STEP_MS = 50  # Time of a training step in the measurement of waits.
DROP = Path("/proc/sys/vm/drop_caches")


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is measured.

    Attributes:
      root: directory of both datasets and of the cache of listings
      images: number of images
      folders: number of classes
      batch: images per replica and step
      replicas: number of replicas
      threads: decoding threads; 0 uses one per core
    """

    root: Path
    images: int
    folders: int
    batch: int
    replicas: int
    threads: int

    def training_set(self, source: str) -> ImageSet:
        """Open a dataset and hold out images, as a training run does."""
        complete = (self.images, self.folders) == (imagenet_tree.IMAGES, imagenet_tree.CLASSES)
        opened = open_set("train", self.root / SOURCES[source], check_counts=complete)
        return opened.hold_out(min(26, self.images // self.folders // 10))[0]

    def stream(
        self, images: ImageSet, start: int = 0, transform: Sequence[Callable] = ()
    ) -> Iterator[dict[str, np.ndarray]]:
        """Return the batches from a step on."""
        return train_batches(
            images,
            batch_size=self.batch,
            seed=0,
            num_replicas=self.replicas,
            start_step=start,
            transform=transform,
            loader=LoaderOptions(threads=self.threads),
        )

    def decoded(self, images: ImageSet, start: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """Return the batches of a stored dataset from a step on."""
        return self.stream(images, start, [TrainTransform(imagenet_tree.SIDE)])

    def epoch(self, images: ImageSet) -> tuple[int, int]:
        """Return the first step of the third epoch and the step in its middle."""
        steps = steps_per_epoch(len(images), self.batch)
        return EPOCH * steps, EPOCH * steps + steps // 2


class BlankImages(EncodedImages):
    """Images that need no reading."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> np.ndarray:
        return np.zeros((1, 1, 3), np.uint8)

    def name(self, index: int) -> str:
        return f"blank image {index}"


class NoTransform:
    """A transform that returns the stored pixels."""

    size, resize_on, randaugment_ops = 1, "host", 0

    def __call__(self, stored: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return stored


def memory(field: str) -> float:
    """Return VmRSS or VmHWM (the peak) of this process in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError(f"/proc/self/status: no {field}")


def measured(function: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Return the result of a function, and its seconds and MB."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # Resets the peak.
    before = memory("VmRSS")
    result, seconds = turns.timed(function)
    peak = memory("VmHWM") - before
    gc.collect()
    kept = memory("VmRSS") - before
    return result, {**seconds, "peak_mb": peak, "kept_mb": kept}


def drop_caches() -> None:
    """Drop the kernel's caches of files, directories and inodes."""
    os.sync()
    DROP.write_text("3")


def paths_checksum(paths: list[str]) -> str:
    """Return a checksum of paths in their order."""
    return hashlib.sha256("\n".join(paths).encode()).hexdigest()


def measure_walk(setup: Setup) -> dict[str, Any]:
    """List the files like torchvision's ImageFolder."""
    root = setup.root / SOURCES["folder"]

    def walk() -> list[tuple[str, int]]:
        found = []
        for label, folder in enumerate(sorted(e.name for e in os.scandir(root) if e.is_dir())):
            for directory, _, names in sorted(os.walk(root / folder)):
                found += [(os.path.join(directory, name), label) for name in sorted(names)]
        return found

    found, result = measured(walk)
    return result | {"checksum": paths_checksum([path for path, _ in found])}


def measure_listing(setup: Setup, cold: bool) -> dict[str, Any]:
    """List the files by `list_folders`."""
    if cold:
        drop_caches()
    root = setup.root / SOURCES["folder"]
    listing, result = measured(lambda: list_folders(root))
    folders = [listing.folders[index] for index in listing.folder_of]
    names = [os.fsdecode(name) for name in listing.names]
    paths = [os.path.join(root, *both) for both in zip(folders, names, strict=True)]
    return result | {"checksum": paths_checksum(paths)}


def measure_open(setup: Setup, source: str) -> dict[str, Any]:
    """Open a dataset; also measure its pickle, which each worker process gets."""
    train, result = measured(lambda: setup.training_set(source))
    pickled, pickle_seconds = turns.timed(lambda: pickle.dumps(train))
    _, unpickle_seconds = turns.timed(lambda: pickle.loads(pickled))
    seconds = pickle_seconds["wall"] + unpickle_seconds["wall"]
    return result | {"images": len(train), "pickle_mb": len(pickled) / 1e6, "pickle": seconds}


def checksum(batch: dict[str, np.ndarray]) -> str:
    """Return a checksum of a batch."""
    digest = hashlib.sha256()
    for name in sorted(batch):
        digest.update(np.ascontiguousarray(batch[name]).data)
    return digest.hexdigest()


def step_seconds(stream: Iterator, steps: int, pause: float = 0) -> list[float]:
    """Return the time that each step waits for its batch; a step takes `pause` seconds."""
    waits = []
    for _ in range(steps):
        start = time.perf_counter()
        next(stream)
        waits.append(time.perf_counter() - start)
        time.sleep(pause)
    return waits


def measure_first_batch(setup: Setup, source: str, resume: bool, cold: bool) -> dict[str, Any]:
    """Open a dataset and read one batch: the first, or the one in the middle of epoch 3."""
    if cold:
        drop_caches()

    def first() -> tuple[int, dict[str, np.ndarray], Iterator]:
        train = setup.training_set(source)
        step = setup.epoch(train)[1] if resume else 0
        stream = setup.decoded(train, step)
        return step, next(stream), stream  # Closing the stream is not measured.

    (step, batch, _), result = measured(first)
    return result | {"step": step, "checksum": checksum(batch)}


def measure_stream(setup: Setup, source: str) -> dict[str, Any]:
    """Read the decoded stream before the middle of epoch 3."""
    train = setup.training_set(source)
    _, middle = setup.epoch(train)
    start = max(0, middle - DECODED_STEPS)
    stream = setup.decoded(train, start)
    next(stream)  # Opens files.
    seconds, used = turns.timed(lambda: step_seconds(stream, middle - start - 1))
    return {
        "steps": len(seconds),
        "seconds": statistics.median(seconds),
        "cpu": used["cpu"] / len(seconds),
        "checksum": checksum(next(stream)),
    }


def measure_iteration(setup: Setup, images: int) -> dict[str, Any]:
    """Read the stream without images from step 0 to the middle of epoch 3, and resume there."""
    pixels = np.broadcast_to(np.zeros((1, 1, 3), np.uint8), (images, 1, 1, 3))
    indices = ImageSet("indices", pixels, np.arange(images, dtype=np.int32))
    start, middle = setup.epoch(indices)
    stream = setup.stream(indices)
    seconds = step_seconds(stream, middle)
    uninterrupted, resumed = next(stream), next(setup.stream(indices, middle))
    before = setup.stream(indices, max(0, start - CHANGE_STEPS))
    waits = step_seconds(before, 2 * CHANGE_STEPS, STEP_MS / 1000)
    _, orders = turns.timed(
        lambda: [epoch_order(0, replica, 0, images) for replica in range(setup.replicas)]
    )
    blank = dataclasses.replace(indices, images=BlankImages(images))
    blank_seconds = step_seconds(setup.stream(blank, transform=[NoTransform()]), BLANK_STEPS)
    return {
        "steps": middle,
        "seconds": statistics.median(seconds),
        "blank": statistics.median(blank_seconds),
        "epoch_change": max(seconds[epoch * start // EPOCH] for epoch in range(1, EPOCH + 1)),
        "epoch_change_wait": max(waits[1:]),
        "orders": orders["wall"],
        "equal": checksum(uninterrupted) == checksum(resumed),
    }


def write_folder(setup: Setup) -> dict[str, float]:
    """Write the tree if it is missing; return the seconds."""
    tree = setup.root / SOURCES["folder"]
    _, seconds = turns.timed(lambda: imagenet_tree.write_tree(tree, setup.images, setup.folders))
    if (count := len(list_folders(tree).names)) != setup.images:
        raise SystemExit(f"{tree}: {count:,} images, not {setup.images:,}; remove it")
    return seconds


def write_records(setup: Setup) -> dict[str, float]:
    """Write the tree's ArrayRecord if it is missing; return the seconds."""
    train = open_set("train", setup.root / SOURCES["folder"], check_counts=False)
    options: dict[str, Any] = {"dataset": SOURCES["ArrayRecord"], "workers": usable_cores()}
    return turns.timed(lambda: prepare(train, WNIDS, setup.root, split="train", **options))[1]


def measure_listings(setup: Setup, cold: bool) -> dict[str, dict[str, Any]]:
    """Return the measurement of each way to list the files."""
    run = turns.in_new_process
    results = {"sorted os.walk": run(measure_walk, setup)}
    for name in [*["cold"] * cold, "warm", "cached"]:
        print(f"listing, {name}", file=sys.stderr, flush=True)
        if name != "cached":  # Forget the listing that an earlier measurement cached.
            shutil.rmtree(caches.cache_directory(), ignore_errors=True)
        results[name] = run(measure_listing, setup, name == "cold")
    return results


def measure_source(setup: Setup, source: str, cold: bool) -> dict[str, Any]:
    """Return the measurements of one format, by name."""
    run = turns.in_new_process
    first = {"start": (False, False), "resume": (True, False), "cold": (False, True)}
    result = {"open": run(measure_open, setup, source)}
    for name, arguments in first.items():
        if cold or name != "cold":
            print(f"first batch of {source}, {name}", file=sys.stderr, flush=True)
            result[name] = run(measure_first_batch, setup, source, *arguments)
    print(f"stream of {source}", file=sys.stderr, flush=True)
    result["stream"] = run(measure_stream, setup, source)
    return result


LISTINGS = {
    "sorted os.walk": "sorted `os.walk`, a list of paths",
    "cold": "`list_folders`, the kernel's caches dropped",
    "warm": "`list_folders`",
    "cached": "`list_folders` with its cache",
}


def listing_cells(results: dict[str, Any]) -> list[dict[str, str]]:
    """Return the rows of the table of listings."""
    reference = results["listing"]["sorted os.walk"]["checksum"]
    return [
        {
            "listing": LISTINGS[name],
            "wall time, s": f"{row['wall']:.2f}",
            "CPU time, s": f"{row['cpu']:.2f}",
            "peak memory, MB": f"{row['peak_mb']:.0f}",
            "kept memory, MB": f"{row['kept_mb']:.0f}",
            "equal": "yes" if row["checksum"] == reference else "NO",
        }
        for name, row in results["listing"].items()
    ]


def source_cells(results: dict[str, Any]) -> list[dict[str, str]]:
    """Return the rows of the table of formats."""

    def row(name: str, cell: Callable[[dict], str]) -> dict[str, str]:
        return {"dataset": name} | {source: cell(results[source]) for source in SOURCES}

    step = results["folder"]["resume"]["step"]
    written = {source: f"{results[f'write {source}']['wall']:.0f}" for source in SOURCES}
    rows = [
        {"dataset": "time to write, s"} | written,
        row("time to open, s", lambda r: f"{r['open']['wall']:.2f}"),
        row("peak memory of opening, MB", lambda r: f"{r['open']['peak_mb']:.0f}"),
        row("kept memory of the open dataset, MB", lambda r: f"{r['open']['kept_mb']:.0f}"),
        row("sent to each worker process, MB", lambda r: f"{r['open']['pickle_mb']:.1f}"),
        row("time to send it, ms", lambda r: f"{1000 * r['open']['pickle']:.0f}"),
        row("first batch at step 0, s", lambda r: f"{r['start']['wall']:.2f}"),
        row(f"first batch at step {step:,}, s", lambda r: f"{r['resume']['wall']:.2f}"),
        row("kept memory after this batch, MB", lambda r: f"{r['resume']['kept_mb']:.0f}"),
        row("resumed batch is equal", lambda r: "yes" if resumed_is_equal(r) else "NO"),
        row("decoded stream, wall ms per step", lambda r: f"{1000 * r['stream']['seconds']:.0f}"),
        row("decoded stream, CPU ms per step", lambda r: f"{1000 * r['stream']['cpu']:.0f}"),
    ]
    if "cold" in results["folder"]:
        cold = row("first batch at step 0, caches dropped, s", lambda r: f"{r['cold']['wall']:.2f}")
        rows.insert(6, cold)
    return rows


def resumed_is_equal(result: dict[str, Any]) -> bool:
    """Return whether the first batch after resuming is that of the uninterrupted stream."""
    return result["resume"]["checksum"] == result["stream"]["checksum"]


def iteration_cells(results: dict[str, Any]) -> list[dict[str, str]]:
    """Return the rows of the table of the iteration without images."""
    row = results["iteration"]
    names = {
        "seconds": "a step of orders and labels",
        "blank": "a step of images that need no reading and no decoding",
        "orders": f"orders of an epoch, {results['setup']['replicas']} replicas",
        "epoch_change": "first step of an epoch, if training takes no time",
        "epoch_change_wait": f"longest wait at a change of epoch, training steps of {STEP_MS} ms",
    }
    cells = [{"iteration": name, "ms": f"{1000 * row[key]:.2f}"} for key, name in names.items()]
    return [
        *cells,
        {"iteration": "resumed batch is equal", "ms": "yes" if row["equal"] else "NO"},
    ]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default, text in (
        ("images", imagenet_tree.IMAGES, "number of images"),
        ("folders", imagenet_tree.CLASSES, "number of folders, at most 1000"),
        ("fraction", 1.0, "fraction of --images"),
        ("batch", 512, "images per replica and step"),
        ("replicas", 2, "number of replicas"),
        ("threads", 0, "decoding threads; 0 uses one per core"),
    ):
        text += " (default: %(default)s)"
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    parser.add_argument(
        "--directory",
        type=Path,
        metavar="DIR",
        help="write the datasets to DIR, or reuse those in DIR (default: a temporary directory, "
        "removed at the end)",
    )
    parser.add_argument(
        "--drop-caches",
        action="store_true",
        help="also measure after the kernel has dropped its caches; needs root",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    return parser.parse_args(argv)


# Both datasets are written before the kernel's caches are dropped.
PARTS = ("write folder", "write ArrayRecord", "listing", "folder", "ArrayRecord", "iteration")


def measure_part(part: str, setup: Setup, results: dict[str, Any], cold: bool) -> dict[str, Any]:
    """Return the measurements of one of `PARTS`."""
    if part == "write folder":
        return turns.in_new_process(write_folder, setup)
    if part == "write ArrayRecord":
        return turns.in_new_process(write_records, setup)
    if part == "listing":
        return measure_listings(setup, cold)
    if part == "iteration":
        images = results["folder"]["open"]["images"]
        return turns.in_new_process(measure_iteration, setup, images)
    return measure_source(setup, part, cold)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = parse_arguments(argv)
    if args.drop_caches and not os.access(DROP, os.W_OK):
        raise SystemExit(f"--drop-caches: {DROP} is not writable; run as root, or leave it out")
    with contextlib.ExitStack() as stack:
        root = args.directory
        if root is None:
            root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            stack.callback(imagenet_tree.remove_tree, root / SOURCES["folder"])
        os.environ["XDG_CACHE_HOME"] = str(root / "user_cache")
        sizes = {name: getattr(args, name) for name in ("folders", "batch", "replicas", "threads")}
        sizes["images"] = round(args.fraction * args.images)
        setup = Setup(root=root.resolve(), **sizes)
        results = turns.conditions("CPU", PACKAGES) | {"setup": sizes}
        for part in PARTS:
            print(part, file=sys.stderr, flush=True)
            results[part] = measure_part(part, setup, results, args.drop_caches)
            turns.write_json(args.json, results)
        for cells in (listing_cells, source_cells, iteration_cells):
            print(turns.table(cells(results)), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
