"""Class folders of the size of ImageNet's training set, filled with small images."""

from __future__ import annotations

import io
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from modelstock_jax.data.imagenet import WNIDS
from modelstock_jax.data.published_sets import IMAGENET

CLASSES, IMAGES = IMAGENET["train"].published[:2]
SIDE = 32  # pixels
_DISTINCT = 64  # Images; the files repeat them.
_THREADS = 16  # Remove folders in parallel: 30 times as fast on a disk mounted with `discard`.
_NUMBERS = 23  # Distance of two file numbers: names have 2 to 5 digits, as in ImageNet.


def small_jpeg(seed: int) -> bytes:
    """Return a smooth JPEG of SIDE x SIDE pixels and less than 1 kB."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    image = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return file.getvalue()


def write_tree(root: Path, images: int = IMAGES, folders: int = CLASSES) -> None:
    """Write ROOT/WNID/WNID_NUMBER.JPEG; folders that an earlier call has finished are kept.

    Args:
      root: the directory of the class folders, created if missing
      images: number of files in all folders
      folders: number of folders; they have equally many files, up to one
    """
    stored = [small_jpeg(seed) for seed in range(_DISTINCT)]
    root.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    for number in track(range(folders), f"writing {images:,} files", console=console):
        first, stop = (images * n // folders for n in (number, number + 1))
        if not (root / WNIDS[number]).exists():
            # Hidden until it is complete: an interrupted call leaves no incomplete class.
            unfinished = root / f".{WNIDS[number]}"
            unfinished.mkdir(exist_ok=True)
            _write_files(unfinished, WNIDS[number], stored, range(first, stop))
            unfinished.rename(root / WNIDS[number])


def _write_files(folder: Path, wnid: str, stored: list[bytes], indices: range) -> None:
    prefix, flags = os.path.join(folder, wnid), os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for position, index in enumerate(indices, 1):
        file = os.open(f"{prefix}_{_NUMBERS * position}.JPEG", flags)
        os.write(file, stored[index % len(stored)])
        os.close(file)


def remove_tree(root: Path) -> None:
    """Remove the directory of the class folders, if it exists."""
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(shutil.rmtree, root.glob("*")))
    shutil.rmtree(root, ignore_errors=True)
