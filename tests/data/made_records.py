"""Writes small datasets as TensorFlow Datasets prepares them, in ArrayRecord."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from modelstock_jax.data.cifar import CLASS_NAMES


def write_set(
    directory: Path, features: dict, examples: dict[str, list[dict]], name: str = ""
) -> Path:
    """Write a prepared dataset like TensorFlow Datasets does: NAME/VERSION, two files per split.

    With `name`, the directory is NAME/CONFIG/VERSION.
    """
    directory.mkdir(parents=True)
    name, splits = name or directory.parent.name, []
    features_dict = tfds.features.FeaturesDict(features)
    for split, rows in examples.items():
        parts = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
        for number, part in enumerate(parts):
            file = directory / f"{name}-{split}.array_record-{number:05d}-of-00002"
            writer = ArrayRecordWriter(str(file), "group_size:1")
            for row in part:
                writer.write(features_dict.serialize_example(features_dict.encode_example(row)))
            writer.close()
        template = tfds.core.ShardedFileTemplate(
            data_dir=directory, dataset_name=name, split=split, filetype_suffix="array_record"
        )
        lengths = [len(part) for part in parts]
        splits.append(tfds.core.SplitInfo(split, lengths, 1, filename_template=template))
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features=features_dict,
        split_infos=splits,
        version=directory.name,
        check_data=False,
    )
    return directory


def colored(label: int, number: int, size: int = 32) -> bytes:
    """Return a noisy PNG whose mean color is that of its class."""
    rng = np.random.default_rng((label, number))
    color = np.random.default_rng(label).integers(40, 216, (1, 1, 3))
    pixels = color + rng.integers(-30, 31, (size, size, 3))
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def cifar_set(
    directory: Path,
    class_names: Sequence[str],
    each: dict[str, int],
    *,
    name: str = "",
    named: bool = True,
    size: int = 32,
) -> Path:
    """Write a dataset with the features of cifar10 and cifar100, or of CIFAR-10's shifts.

    Args:
      directory: NAME/VERSION or, with `name`, NAME/CONFIG/VERSION
      class_names: class names as stored
      each: {split: images per class}; the classes alternate
      name: name of a dataset with configs
      named: whether classes have names and images an id; in the shifts they do not
      size: side in pixels
    """
    count = len(class_names)
    features = {
        "image": tfds.features.Image(shape=(size, size, 3)),
        "label": tfds.features.ClassLabel(names=class_names)
        if named
        else tfds.features.ClassLabel(num_classes=count),
    }
    if named:
        features["id"] = tfds.features.Text()
    examples = {
        split: [
            {"image": colored(index % count, 100 * number + index, size), "label": index % count}
            | ({"id": f"{split}_{index:05d}"} if named else {})
            for index in range(images * count)
        ]
        for number, (split, images) in enumerate(each.items())
    }
    return write_set(directory, features, examples, name)


def write_cifar10(root: Path, each: int = 3) -> Path:
    """Write cifar10, cifar10_1/v6 and cifar10_corrupted/fog_5 with a few images per class."""
    names = CLASS_NAMES["cifar10"]
    cifar_set(root / "cifar10" / "3.0.2", names, {"train": each, "test": 2})
    for name, config, version in (
        ("cifar10_1", "v6", "1.1.0"),
        ("cifar10_corrupted", "fog_5", "1.0.0"),
    ):
        directory = root / name / config / version
        cifar_set(directory, names, {"test": 1}, name=name, named=False)
    return root
