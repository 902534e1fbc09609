"""Images per second and core of this package's readers and of PyTorch's DataLoader with Pillow.

    .venv-parity/bin/python benchmarks/input.py

Writes --images synthetic photographs (500 x 375, about 110 kB, JPEG of quality 90) to a temporary
directory as folders, as ArrayRecord and as a cache, and reads each with one thread of one process;
the folders and the cache also with the resize on the device, whose own time is not counted. The
readers take turns of two batches. The lower quartile of a reader's turns counts, because other
load makes turns longer. Time is CPU time, including DataLoader's worker process. Linux only. Needs
torch (`make test-parity` creates .venv-parity).
"""

import dataclasses
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# One thread per reader, as next to a training step that uses the other cores.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from absl import app, flags, logging  # noqa: E402
from PIL import Image  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.operations import MEAN, STD, operations  # noqa: E402
from benchmarks.photographs import photograph  # noqa: E402
from modelstock_jax.data.caches import write_cache  # noqa: E402
from modelstock_jax.data.image_folder import read_folders  # noqa: E402
from modelstock_jax.data.image_set import ImageSet  # noqa: E402
from modelstock_jax.data.loader import LoaderOptions, train_batches  # noqa: E402
from modelstock_jax.data.prepare import prepare  # noqa: E402
from modelstock_jax.data.records import read_records  # noqa: E402
from modelstock_jax.data.transforms import TrainTransform, random_crop  # noqa: E402

FLAGS = flags.FLAGS
flags.DEFINE_integer("images", 256, "Number of images (default: 256).")
flags.DEFINE_integer("size", 224, "Image size of the model (default: 224).")
flags.DEFINE_integer("batch_size", 64, "Images per batch (default: 64).")
flags.DEFINE_integer("rounds", 15, "Turns of each reader (default: 15).")
flags.DEFINE_float(
    "step_ms", 0, "Also measure how long a step of this time waits, with all cores (0: off)."
)


@dataclasses.dataclass
class PillowFolder(torch.utils.data.Dataset):
    """The operations of torchvision's ImageFolder with RandomResizedCrop, without torchvision.

    Opens, converts, crops and resizes (bicubic; Pillow always antialiases) an image, and converts
    it to a tensor: normalized on the host as usual, or as bytes as in this package.
    """

    paths: list[str]
    size: int
    area: tuple[float, float]
    normalize: bool

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        with open(self.paths[index], "rb") as file:
            image = Image.open(file).convert("RGB")
        rng = np.random.default_rng((0, index))
        top, left, height, width = random_crop(
            rng, image.height, image.width, self.area, (3 / 4, 4 / 3)
        )
        image = image.crop((left, top, left + width, top + height))
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        if not self.normalize:
            return pixels, index
        pixels = pixels.to(torch.float32).div(255)  # ToTensor, then Normalize
        return pixels.sub_(torch.from_numpy(MEAN)[:, None, None]).div_(
            torch.from_numpy(STD)[:, None, None]
        ), index


class Reader:
    """An endless reader with its CPU time, in this process and in its worker."""

    def __init__(self, batches: Iterator, worker: int | None = None) -> None:
        self._batches, self._worker = batches, worker

    def cpu_seconds(self) -> float:
        used = time.process_time()
        if self._worker is not None:  # Linux's id of the CPU clock of another process.
            used += time.clock_gettime((~self._worker << 3) | 2)
        return used

    def settle(self) -> float:
        """Wait until prefetching has stopped; return the CPU time until then."""
        used, quiet = self.cpu_seconds(), 0
        while quiet < 6:  # A thread that waits for a busy core is not done.
            time.sleep(0.05)
            before, used = used, self.cpu_seconds()
            quiet = quiet + 1 if used - before < 0.001 else 0
        return used

    def turn(self, count: int) -> float:
        """Return CPU seconds per batch; prefetched batches are refilled by the end of a turn."""
        start = self.settle()
        for _ in range(count):
            next(self._batches)
        return (self.settle() - start) / count


def dataloader(paths: list[str], area: tuple[float, float], normalize: bool) -> Reader:
    """Return torch's DataLoader with one worker process and one thread."""
    dataset = PillowFolder(paths, FLAGS.size, area, normalize)
    endless = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=10**9)
    loader = torch.utils.data.DataLoader(dataset, FLAGS.batch_size, sampler=endless, num_workers=1)
    before = {process.pid for process in multiprocessing.active_children()}
    batches = iter(loader)
    (worker,) = {process.pid for process in multiprocessing.active_children()} - before
    return Reader(batches, worker)


def ours(image_set: ImageSet, transform: TrainTransform) -> Reader:
    """Return this package's reader with one thread."""
    return Reader(
        train_batches(
            image_set,
            batch_size=FLAGS.batch_size,
            seed=0,
            num_replicas=1,
            transform=transform,
            loader=LoaderOptions(threads=1),
        )
    )


def transforms(
    sets: dict[str, ImageSet], area: tuple[float, float]
) -> dict[str, tuple[ImageSet, TrainTransform]]:
    """Return the images and the transform of each of our readers."""
    host = TrainTransform(FLAGS.size, area)
    device = dataclasses.replace(host, resize_on="device")
    return {name: (images, host) for name, images in sets.items()} | {
        f"{name}, resize on the device": (images, device)
        for name, images in sets.items()
        if "ArrayRecord" not in name
    }


def measure(readers: dict[str, Reader]) -> dict[str, float]:
    """Return the images per CPU second of each reader: the lower quartile of its turns."""
    turns = {name: [] for name in readers}
    for _ in range(FLAGS.rounds + 1):  # The first turn opens files.
        for name, reader in readers.items():
            turns[name].append(reader.turn(2))
    return {name: FLAGS.batch_size / np.quantile(t[1:], 0.25) for name, t in turns.items()}


def print_table(title: str, rates: dict[str, float], reference: str) -> None:
    print(f"\n{title}\n\n| reader | images/s per core | relative to {reference} |\n|---|---:|---:|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:.0f} | {rate / rates[reference]:.2f} |", flush=True)


def waits(readers: dict[str, tuple[ImageSet, TrainTransform]]) -> None:
    """Print how long a step of --step_ms on the accelerator waits for its batch."""
    print(f"\n| reader | wait per step of {FLAGS.step_ms:.0f} ms, ms |\n|---|---:|")
    for name, (image_set, transform) in readers.items():
        stream = train_batches(
            image_set, batch_size=FLAGS.batch_size, seed=0, num_replicas=1, transform=transform
        )
        wait_times = []
        for _ in range(12):
            start = time.perf_counter()
            next(stream)
            wait_times.append(time.perf_counter() - start)
            time.sleep(FLAGS.step_ms / 1000)
        stream.close()
        print(f"| {name} | {1000 * np.median(wait_times[3:]):.0f} |", flush=True)


def main(_) -> None:
    logging.set_verbosity(logging.WARNING)  # TensorFlow Datasets logs every opened file.
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "folder"
        for number in range(FLAGS.images):
            path = folder / f"class_{number % 4}"
            path.mkdir(parents=True, exist_ok=True)
            (path / f"{number:05d}.JPEG").write_bytes(photograph(number))
        stored = read_folders(folder)
        image_set = ImageSet("train", stored.images, stored.labels)
        paths = [stored.images.name(index) for index in range(len(image_set))]
        sizes = [os.path.getsize(path) for path in paths]
        print(f"{len(paths)} JPEGs of 500 x 375, {np.mean(sizes) / 1000:.0f} kB on average")
        directory = prepare(image_set, stored.names, root, dataset="made_up", split="train",
                            resize=0, workers=1)  # fmt: skip
        records = read_records(directory, "train")
        cached = write_cache(stored.images, Path(root) / "cache", short_side=256)
        sets = {
            "folder of JPEGs": image_set,
            "ArrayRecord of JPEGs": ImageSet("train", records.images, records.labels),
            "cache": dataclasses.replace(image_set, images=cached),
        }
        for area in ((0.9, 1.0), (0.08, 1.0)):
            readers = {
                "DataLoader, Pillow, normalized": dataloader(paths, area, True),
                "DataLoader, Pillow, bytes": dataloader(paths, area, False),
            }
            readers |= {name: ours(*reader) for name, reader in transforms(sets, area).items()}
            title = f"Random crop of {area[0]:.0%} to {area[1]:.0%} of the area, to {FLAGS.size}"
            print_table(title, measure(readers), "DataLoader, Pillow, normalized")
        operations(cached[0], FLAGS.size, FLAGS.batch_size)
        if FLAGS.step_ms:
            waits(transforms(sets, (0.9, 1.0)))


if __name__ == "__main__":
    app.run(main)
