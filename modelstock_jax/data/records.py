"""Datasets prepared by TensorFlow Datasets as ArrayRecord, read without TensorFlow."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from modelstock_jax.data import caches
from modelstock_jax.data.image_folder import LabeledImages
from modelstock_jax.data.image_set import EncodedImages
from modelstock_jax.errors import UserError
from modelstock_jax.tensor_files.reader import read_json

INFO = "dataset_info.json"
LABELS = "{split}.labels.npy"
"""Labels in the order of the records, written by `prepare` next to them."""
METADATA = "modelstock.json"
"""Further metadata written by `prepare`, such as groups of classes."""

# The process that runs the reader threads. A fork has none and would wait for them forever.
_reader_process: int | None = None

# Held while the files are opened: otherwise each decoding thread would open all of them.
_opening = threading.Lock()

_VERSION = re.compile(r"\d+(\.\d+)*")


def find_records(path: str | os.PathLike[str]) -> Path | None:
    """Return the directory with dataset_info.json: `path` or its newest version; None if neither.

    Args:
      path: a directory such as ~/tensorflow_datasets/imagenet2012 or .../imagenet2012/5.1.0
    """
    path = Path(path)
    if (path / INFO).is_file():
        return path
    # Looks only into directories named like a version, not into a thousand class folders.
    versions = [child for child in path.glob("[0-9]*") if _VERSION.fullmatch(child.name)]
    return max(
        (version for version in versions if (version / INFO).is_file()),
        key=lambda version: [int(n) for n in version.name.split(".")],
        default=None,
    )


class RecordImages(EncodedImages):
    """The records of one split; the files are opened in the process that reads them."""

    def __init__(self, directory: str | os.PathLike[str], split: str) -> None:
        """Open the description of the dataset.

        Raises:
          UserError: it has no images, is not prepared as ArrayRecord, or has no such split
        """
        self._directory, self._split = str(directory), split
        self._source: Any = None
        info = read_json(Path(directory) / INFO)
        file_format = info.get("fileFormat", "tfrecord")
        if file_format != "array_record":
            raise UserError(
                f"{directory}: prepared as {file_format}, but random access needs array_record; "
                "with TensorFlow installed: tfds build --file_format=array_record, or tfds "
                f"convert_format --dataset_version_dir={directory} --out_file_format=array_record "
                "--out_dir=DIR"
            )
        splits = {entry["name"]: entry for entry in info.get("splits", ())}
        if split not in splits:
            raise UserError(
                f"{directory}: no split {split!r}; it has {', '.join(sorted(splits)) or 'none'}"
            )
        self._length = sum(int(count) for count in splits[split].get("shardLengths", ()))
        if "image" not in self.features:
            raise UserError(
                f"{directory}: no feature 'image' among {', '.join(sorted(self.features))}; check "
                "the version of the dataset"
            )

    @property
    def features(self) -> Any:
        """The features of an example, as described by TensorFlow Datasets."""
        return self._builder().info.features

    def sizes(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Return heights and widths if all images have one shape, as those of CIFAR."""
        sides = self.features["image"].shape[:2]
        if None in sides:
            return None
        height, width = (np.full(len(self), side) for side in sides)
        return height, width

    def example(self, index: int) -> dict[str, Any]:
        """Return one example with its image still encoded."""
        if not 0 <= index < self._length:
            raise IndexError(index)
        _claim_process()
        source = self._open() if self._source is None else self._source
        return source[index]

    def _open(self) -> Any:
        with _opening:
            import tensorflow_datasets as tfds

            if self._source is None:
                decoders = {"image": tfds.decode.SkipDecoding()}
                self._source = self._builder().as_data_source(self._split, decoders=decoders)
            return self._source

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> bytes:
        return self.example(index)["image"]

    def name(self, index: int) -> str:
        """Return the number of the record and the name of its original file."""
        file = self.example(index).get("file_name", b"").decode(errors="replace")
        return f"{self._directory}, split {self._split}, record {index}" + f" ({file})" * bool(file)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_source": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Import in a worker process before its threads start: this import is not thread-safe.
        import tensorflow_datasets as _  # noqa: F401

        self.__dict__.update(state)

    def _builder(self) -> Any:
        import tensorflow_datasets as tfds  # The import takes a second.

        try:
            return tfds.builder_from_directory(self._directory)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{self._directory}: cannot be opened ({reason})") from error


def read_records(
    path: str | os.PathLike[str], split: str | None = None, label: str = "label"
) -> LabeledImages[RecordImages]:
    """Open a prepared dataset; its images are in the order of the records.

    The records contain the labels. If the dataset was not prepared by this package and is large,
    all records are read once, with a progress bar, and the labels are stored in the user's cache
    directory.

    Args:
      path: a directory with dataset_info.json, or with versions that have one
      split: 'train', 'validation' or 'test'; None if there is only one
      label: name of the label feature

    Raises:
      UserError: there is no such dataset, or its format or version is wrong
    """
    directory = find_records(path)
    if directory is None:
        raise UserError(f"{path}: no {INFO}; not a dataset prepared by TensorFlow Datasets")
    split = split or _only_split(directory)
    images = RecordImages(directory, split)
    features = images.features
    if not hasattr(features[label] if label in features else None, "names"):
        raise UserError(
            f"{directory}: no class label {label!r} among its features "
            f"({', '.join(sorted(features))}); check the version of the dataset"
        )
    labels = _labels(directory, images, split, label)
    if len(labels) != len(images):
        raise UserError(f"{directory}: {len(images)} records, but {len(labels)} stored labels")
    return LabeledImages(
        images, labels, tuple(features[label].names), f"{directory}, split {split}"
    )


def read_label_sets(images: RecordImages, feature: str) -> tuple[tuple[int, ...], ...]:
    """Return the labels in `feature` of each record, such as ReaL's label sets."""
    return tuple(
        tuple(int(label) for label in images.example(i)[feature]) for i in range(len(images))
    )


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the metadata that `prepare` wrote; empty for datasets prepared by other tools."""
    file = Path(path) / METADATA
    return read_json(file) if file.is_file() else {}


def _claim_process() -> None:
    global _reader_process
    if _reader_process not in (None, os.getpid()):
        raise RuntimeError(
            "records were read before this process was forked and cannot be read in the fork; "
            "start worker processes with 'spawn', as Grain does"
        )
    _reader_process = os.getpid()


def _only_split(directory: Path) -> str:
    splits = [entry["name"] for entry in read_json(directory / INFO).get("splits", ())]
    if len(splits) != 1:
        raise UserError(
            f"{directory}: has the splits {', '.join(splits)}; prepare each one separately"
        )
    return splits[0]


def _labels(directory: Path, images: RecordImages, split: str, label: str) -> np.ndarray:
    labels_file = directory / LABELS.format(split=split)
    if label == "label" and labels_file.is_file():
        return np.load(labels_file, allow_pickle=False)
    cache_key = directory / f"{split}.{label}"
    changed = np.array((directory / INFO).stat().st_mtime_ns, np.int64)
    cached = caches.load_arrays("labels", cache_key)
    if "changed" not in cached or not np.array_equal(cached["changed"], changed):
        indices = track(
            range(len(images)),
            f"labels of {directory.parent.name} {split} (once)",
            transient=True,
            disable=len(images) < caches.MIN_ENTRIES,
        )
        labels = np.array([images.example(i)[label] for i in indices], np.int32)
        cached = {"changed": changed, "labels": labels}
        if len(labels) >= caches.MIN_ENTRIES:
            caches.save_arrays("labels", cache_key, **cached)
    return cached["labels"]
