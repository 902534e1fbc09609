"""Images that TensorFlow Datasets prepared as ArrayRecord, read without TensorFlow."""

from __future__ import annotations

import os
import re
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
"""Labels in the order of the records, which our own preparation writes beside them."""
FACTS = "modelstock.json"
"""What our own preparation says of a set besides: groups of classes, label sets and the like."""

# The process whose reader threads run; a fork of it has none, and would wait for them for ever.
_reader_process: int | None = None

_VERSION = re.compile(r"\d+(\.\d+)*")


def find_records(path: str | os.PathLike[str]) -> Path | None:
    """The directory with dataset_info.json: `path` or its newest version, None if neither is.

    Args:
      path: such as ~/tensorflow_datasets/imagenet2012, or .../imagenet2012/5.1.0.
    """
    path = Path(path)
    if (path / INFO).is_file():
        return path
    versions = [one.parent for one in path.glob(f"*/{INFO}") if _VERSION.fullmatch(one.parent.name)]
    return max(versions, key=lambda one: [int(n) for n in one.name.split(".")], default=None)


class RecordImages(EncodedImages):
    """The records of one split; the files are opened in the process that reads them."""

    def __init__(self, directory: str | os.PathLike[str], split: str) -> None:
        """Opens the set's description.

        Raises:
          UserError: not a set of images, not prepared as ArrayRecord, or no such split.
        """
        self._directory, self._split = str(directory), split
        self._source = None
        info = read_json(Path(directory) / INFO)
        form = info.get("fileFormat", "tfrecord")
        if form != "array_record":
            raise UserError(
                f"{directory}: prepared as {form}, and reading at random needs array_record; with "
                "TensorFlow installed: tfds build --file_format=array_record, or tfds "
                f"convert_format --dataset_version_dir={directory} --out_file_format=array_record "
                "--out_dir=DIR"
            )
        splits = {one["name"]: one for one in info.get("splits", ())}
        if split not in splits:
            raise UserError(
                f"{directory}: no split {split!r}; it has {', '.join(sorted(splits)) or 'none'}"
            )
        self._length = sum(int(count) for count in splits[split].get("shardLengths", ()))
        if "image" not in self.features:
            raise UserError(
                f"{directory}: no feature 'image' but {', '.join(sorted(self.features))}; another "
                "version of the set?"
            )

    @property
    def features(self) -> Any:
        """The description of an example, as TensorFlow Datasets has it."""
        return self._builder().info.features

    def example(self, index: int) -> dict[str, Any]:
        """One example, its image still encoded."""
        if not 0 <= index < self._length:
            raise IndexError(index)
        _claim_process()
        if self._source is None:
            import tensorflow_datasets as tfds

            decoders = {"image": tfds.decode.SkipDecoding()}
            self._source = self._builder().as_data_source(self._split, decoders=decoders)
        return self._source[index]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> bytes:
        return self.example(index)["image"]

    def name(self, index: int) -> str:
        """The record's number, and the name of the file that it was made from."""
        file = self.example(index).get("file_name", b"").decode(errors="replace")
        return f"{self._directory}, split {self._split}, record {index}" + f" ({file})" * bool(file)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_source": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # In a worker process, before its threads start: this import is not safe beside others.
        import tensorflow_datasets as _  # noqa: F401

        self.__dict__.update(state)

    def _builder(self) -> Any:
        import tensorflow_datasets as tfds  # a second

        try:
            return tfds.builder_from_directory(self._directory)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{self._directory}: cannot be opened ({reason})") from error


def read_records(
    path: str | os.PathLike[str], split: str | None = None, label: str = "label"
) -> LabeledImages[RecordImages]:
    """The images of a prepared set, in the order of the records.

    Labels lie inside the records: of a large set that others prepared they are read once (all
    records, with a progress bar) and kept in the user's cache directory.

    Args:
      path: a directory with dataset_info.json, or with versions of such.
      split: 'train', 'validation' or 'test'; None where there is only one.
      label: the feature that holds the label.

    Raises:
      UserError: no such set, or it is of another form or version.
    """
    directory = find_records(path)
    if directory is None:
        raise UserError(f"{path}: no {INFO} there; not a set that TensorFlow Datasets prepared")
    split = split or _only_split(directory)
    images = RecordImages(directory, split)
    features = images.features
    if not hasattr(features[label] if label in features else None, "names"):
        raise UserError(
            f"{directory}: no class label {label!r} among its features "
            f"({', '.join(sorted(features))}); another version of the set?"
        )
    labels = _labels(directory, images, split, label)
    if len(labels) != len(images):
        raise UserError(f"{directory}: {len(images)} records, but {len(labels)} labels kept aside")
    return LabeledImages(
        images, labels, tuple(features[label].names), f"{directory}, split {split}"
    )


def read_label_sets(images: RecordImages, feature: str) -> tuple[tuple[int, ...], ...]:
    """The sets of labels in each record's `feature`, such as ReaL's."""
    return tuple(
        tuple(int(label) for label in images.example(i)[feature]) for i in range(len(images))
    )


def facts(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What our own preparation wrote down beside the records; empty for others' sets."""
    file = Path(path) / FACTS
    return read_json(file) if file.is_file() else {}


def _claim_process() -> None:
    global _reader_process
    if _reader_process not in (None, os.getpid()):
        raise RuntimeError(
            "records were read before this process was forked, and cannot be read after it; start "
            "worker processes by 'spawn', as Grain does"
        )
    _reader_process = os.getpid()


def _only_split(directory: Path) -> str:
    splits = [one["name"] for one in read_json(directory / INFO).get("splits", ())]
    if len(splits) != 1:
        raise UserError(f"{directory}: has the splits {', '.join(splits)}; prepare each for itself")
    return splits[0]


def _labels(directory: Path, images: RecordImages, split: str, label: str) -> np.ndarray:
    beside = directory / LABELS.format(split=split)
    if label == "label" and beside.is_file():
        return np.load(beside, allow_pickle=False)
    place = directory / f"{split}.{label}"
    changed = np.array((directory / INFO).stat().st_mtime_ns, np.int64)
    found = caches.load_arrays("labels", place)
    if "changed" not in found or not np.array_equal(found["changed"], changed):
        indices = track(
            range(len(images)),
            f"labels of {directory.parent.name} {split} (once)",
            transient=True,
            disable=len(images) < caches.WORTH_KEEPING,
        )
        labels = np.array([images.example(i)[label] for i in indices], np.int32)
        found = {"changed": changed, "labels": labels}
        if len(labels) >= caches.WORTH_KEEPING:
            caches.save_arrays("labels", place, **found)
    return found["labels"]
