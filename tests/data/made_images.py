"""Writes small datasets in the directory formats that users have on disk."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from modelstock_jax.data.imagenet import CLASSES, WNIDS
from modelstock_jax.data.published_sets import IMAGENET

SIZES = ((40, 30), (25, 60), (48, 48))
KINDS = ("jpeg", "gray", "cmyk", "png")  # ImageNet has all four; every file is named .JPEG.


def encoded(seed: int) -> bytes:
    """Return a smooth image; the seed determines its size and kind."""
    rng = np.random.default_rng(seed)
    (width, height), kind = SIZES[seed % 3], KINDS[seed % 4]
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8))
    image = coarse.resize((width, height), Image.BICUBIC)
    if kind in ("gray", "cmyk"):
        image = image.convert({"gray": "L", "cmyk": "CMYK"}[kind])
    file = io.BytesIO()
    image.save(file, "PNG" if kind == "png" else "JPEG")
    return file.getvalue()


def write_folders(
    root: Path, folders: Iterable[str], each: int = 2, seed: int = 0, suffix: str = ".JPEG"
) -> list[bytes]:
    """Write ROOT/FOLDER/FOLDER_0.JPEG and so on; return the images in the order of `folders`."""
    written = []
    for folder in folders:
        (root / folder).mkdir(parents=True)
        for number in range(each):
            written.append(encoded(seed + len(written)))
            (root / folder / f"{folder}_{number}{suffix}").write_bytes(written[-1])
    return written


def write_mappings(directory: Path, folders: list[str]) -> dict[str, tuple[int, ...]]:
    """Write ObjectNet's four files: 113 folders with one to three classes each.

    Returns:
      The classes of each of the 113 folders (`folders` and others), in alphabetical order.
    """
    others = [f"zz_other_{i:03d}" for i in range(113 - len(folders))]
    ids = iter(np.random.default_rng(0).permutation(1000).tolist())
    classes = {
        folder: tuple(sorted(next(ids) for _ in range(1 + index % 3)))
        for index, folder in enumerate([*folders, *others])
    }
    line_of = np.random.default_rng(1).permutation(1000).tolist()
    lines = [""] * 1000
    for label, line in enumerate(line_of):
        lines[line] = f"name {label}, of class {label}"
    objects = {folder: folder.replace("_", " ").title() for folder in classes}
    overlap = {
        objects[folder]: "; ".join(lines[line_of[label]] for label in labels)
        for folder, labels in classes.items()
    }
    directory.mkdir(parents=True)
    texts = {
        "folder_to_objectnet_label.json": json.dumps(objects | {"air_freshener": "Air freshener"}),
        "objectnet_to_imagenet_1k.json": json.dumps(overlap),
        "pytorch_to_imagenet_2012_id.json": json.dumps(dict(enumerate(line_of))),
        "imagenet_to_label_2012_v2": "\n".join(lines) + "\n",
    }
    for name, text in texts.items():
        (directory / name).write_text(text)
    return dict(sorted(classes.items()))


def write_imagenet(root: Path, labels: tuple[int, ...] = (0, 2, 10, 207), each: int = 3) -> Path:
    """Write ImageNet and its shifts as their authors distribute them, with a few of their classes.

    Args:
      root: directory of `train`, `val`, `imagenet-r` and the others
      labels: classes of train, val, V2 and Sketch; datasets with a subset of the classes, such as R
        and A, have the first of their classes
      each: images per class; the training set has twice as many
    """
    wnids = [WNIDS[label] for label in labels]
    write_folders(root / "train", wnids, 2 * each, seed=0)
    number, real = 0, [[] for _ in range(50_000)]
    for label, wnid in zip(labels, wnids, strict=True):
        (root / "val" / wnid).mkdir(parents=True)
        for index in range(each):
            number += 1
            file = root / "val" / wnid / f"ILSVRC2012_val_{number:08d}.JPEG"
            file.write_bytes(encoded(100 + number))
            # The first image of a class has no reassessed label, the others one or two.
            real[number - 1] = [[], [label], [label, labels[0]]][index % 3]
    (root / "real.json").write_text(json.dumps(real))
    v2 = root / "imagenetv2-matched-frequency-format-val"
    write_folders(v2, map(str, labels), each, seed=200, suffix=".jpeg")
    write_folders(root / "sketch", wnids, each, seed=300)
    for name, classes in CLASSES.items():
        folder = root / IMAGENET[name].locations[0]
        folders = [WNIDS[label] for label in classes[: len(labels)]]
        write_folders(folder, folders, each, seed=400, suffix=".jpg")
        (folder / "README.txt").write_text("as in the archive")
    objects = ["alarm_clock", "bench", "t-shirt"]
    write_folders(root / "objectnet-1.0" / "images", objects, each, seed=500, suffix=".png")
    write_folders(root / "objectnet-1.0" / "images", ["air_freshener"], each, seed=600)
    write_mappings(root / "objectnet-1.0" / "mappings", objects)
    return root
