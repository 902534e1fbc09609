"""Converts a dataset to ArrayRecord in the format of TensorFlow Datasets, without TensorFlow.

It writes one shard at a time per process. Finished shards are not written again.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from modelstock_jax.data.image_set import EncodedImages, ImageSet
from modelstock_jax.data.records import LABELS, METADATA, read_metadata
from modelstock_jax.data.transforms import Unreadable, decode, image_size
from modelstock_jax.errors import UserError

VERSION = "1.0.0"
PER_SHARD = 4096  # Images; about half a gigabyte of ImageNet's JPEGs.


def prepare(
    image_set: ImageSet,
    class_names: Sequence[str],
    out: str | os.PathLike[str],
    *,
    dataset: str,
    split: str,
    resize: int = 0,
    workers: int = 1,
    per_shard: int = PER_SHARD,
) -> Path:
    """Write OUT/DATASET/1.0.0, which `tfds.data_source` and `read_records` can read.

    After an interruption, another call resumes with the missing shards. The directory gets its
    final name after the number of records in every shard has been read back.

    Args:
      image_set: encoded images; they are written in its order
      class_names: K names by label, or by group if the dataset has `groups`
      out: output directory, created if missing
      dataset: name of the dataset's directory, a valid Python module name
      split: 'train', 'validation' or 'test'
      resize: short side in pixels to which larger images are resized (see `shrink`); 0 copies the
        bytes
      workers: number of processes
      per_shard: images per file

    Returns:
      The directory.

    Raises:
      UserError: the directory contains another dataset, an image cannot be read, or the disk is
        full
    """
    plan = _plan(image_set, split, resize, per_shard)
    directory = Path(out) / dataset / VERSION
    if directory.exists():
        if read_metadata(directory) != plan:
            raise UserError(f"{directory}: already contains another dataset; choose another --out")
        return directory
    unfinished = directory.with_name(VERSION + ".incomplete")
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        if not (unfinished / METADATA).exists():
            (unfinished / METADATA).write_text(json.dumps(plan))
        if read_metadata(unfinished) != plan:
            raise UserError(
                f"{unfinished}: contains another, unfinished dataset; remove it, or choose another "
                "--out"
            )
        shards = _shards(image_set, class_names, unfinished, dataset, split, resize, per_shard)
        # Imported before the progress bar starts its thread: this import is not thread-safe.
        import tensorflow_datasets as _  # noqa: F401

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(f"prepare {dataset} {split}", total=len(image_set))
            for count in _run(shards, workers):
                bar.advance(task, count)
        np.save(unfinished / LABELS.format(split=split), image_set.labels, allow_pickle=False)
        _describe(unfinished, shards, class_names, split)
        unfinished.rename(directory)
    except OSError as error:
        raise UserError(f"cannot write {unfinished}: {error.strerror or error}") from error
    return directory


class Shard(NamedTuple):
    """One file to write: images and their labels."""

    images: EncodedImages
    labels: np.ndarray
    class_names: Sequence[str]
    resize: int
    border: int
    path: Path


def _plan(image_set: ImageSet, split: str, resize: int, per_shard: int) -> dict[str, Any]:
    """Return the metadata that identifies the dataset, and what a reader needs in addition."""
    if resize < 0:
        raise UserError(f"resize is {resize}: it must be at least 0")
    if not len(image_set):
        raise UserError(f"{image_set.name}: no image to prepare")
    groups = image_set.groups
    return {
        "split": split,
        "images": len(image_set),
        "first": image_set.encoded.name(0),
        "labels": hashlib.sha256(np.ascontiguousarray(image_set.labels).data).hexdigest(),
        "resize": resize,
        "per_shard": per_shard,
        # Resized images are already cropped; copied bytes still have the border.
        "crop_border": 0 if resize else image_set.crop_border,
        "groups": None if groups is None else [list(group) for group in groups],
    }


def _shards(
    image_set: ImageSet,
    class_names: Sequence[str],
    directory: Path,
    dataset: str,
    split: str,
    resize: int,
    per_shard: int,
) -> list[Shard]:
    starts = range(0, len(image_set), per_shard)
    return [
        Shard(
            # A worker process gets only these images, not the names of all others.
            image_set.encoded.select(np.arange(start, min(start + per_shard, len(image_set)))),
            image_set.labels[start : start + per_shard],
            class_names,
            resize,
            image_set.crop_border,
            directory / f"{dataset}-{split}.array_record-{number:05d}-of-{len(starts):05d}",
        )
        for number, start in enumerate(starts)
    ]


def _run(shards: list[Shard], workers: int) -> Iterator[int]:
    """Write the missing shards; yield the number of images of each finished shard."""
    if workers <= 1:
        for shard in shards:
            yield write_shard(shard)
        return
    # Spawned, not forked: a thread of the parent could hold a lock.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context) as pool:
        pending = [pool.submit(write_shard, shard) for shard in shards]
        try:
            for done in as_completed(pending):
                yield done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def write_shard(shard: Shard) -> int:
    """Write one shard if it is missing, under a temporary name first; return its image count."""
    from array_record.python.array_record_module import ArrayRecordWriter

    count = len(shard.labels)
    if shard.path.exists() and _num_records(shard.path) == count:
        return count
    features = _features(shard.class_names)
    temporary = shard.path.with_name("." + shard.path.name)
    # One record per group, so that random access reads only the requested record.
    writer = ArrayRecordWriter(str(temporary), "group_size:1")
    for index, label in enumerate(shard.labels):
        image, name = shard.images[index], shard.images.name(index)
        if shard.resize:
            image = shrink(image, shard.resize, shard.border, name)
        example = {"image": image, "label": int(label), "file_name": Path(name).name}
        writer.write(features.serialize_example(features.encode_example(example)))
    writer.close()
    temporary.replace(shard.path)
    return count


def _features(class_names: Sequence[str]) -> Any:
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(),
            "label": tfds.features.ClassLabel(names=class_names),
            "file_name": tfds.features.Text(),
        }
    )


def _num_records(path: Path) -> int:
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        reader = ArrayRecordReader(str(path))
        count = reader.num_records()
        reader.close()
    except (ValueError, RuntimeError):
        return 0  # An incomplete file.
    return count


def _describe(
    directory: Path, shards: list[Shard], class_names: Sequence[str], split: str
) -> None:  # fmt: skip
    """Check the number of records in each file and write the dataset's description."""
    import tensorflow_datasets as tfds

    for shard in shards:
        if (count := _num_records(shard.path)) != len(shard.labels):
            raise UserError(
                f"{shard.path}: {count} records, not {len(shard.labels)}; remove it and run again"
            )
    template = tfds.core.ShardedFileTemplate(
        data_dir=directory,
        dataset_name=shards[0].path.name.rsplit(f"-{split}.", 1)[0],
        split=split,
        filetype_suffix="array_record",
    )
    info = tfds.core.SplitInfo(
        name=split,
        shard_lengths=[len(shard.labels) for shard in shards],
        num_bytes=sum(shard.path.stat().st_size for shard in shards),
        filename_template=template,
    )
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features=_features(class_names),
        split_infos=[info],
        version=VERSION,
        check_data=False,
    )


QUALITY = 95  # JPEG quality of resized images.


def shrink(
    encoded: bytes | np.ndarray, short_side: int, border: int = 0, name: str = "image"
) -> bytes | np.ndarray:
    """Crop the border, then downscale the short side to `short_side` (bicubic, antialiased).

    An image that is small enough and has no border is returned unchanged.

    Args:
      encoded: bytes of an image file, or pixels uint8 [H, W, 3]
      short_side: in pixels
      border: pixels to crop from each side
      name: name of the image, for the message

    Returns:
      The input, or an RGB JPEG of quality 95 without chroma subsampling.

    Raises:
      UserError: the data is not an image, or is truncated
    """
    try:
        if not border and min(image_size(encoded)) <= short_side:
            return encoded
        image = Image.fromarray(decode(encoded))
    except Unreadable as error:
        raise UserError(f"{name}: not a complete image ({error}); replace or remove it") from error
    image = image.crop((border, border, image.width - border, image.height - border))
    scale = min(1.0, short_side / min(image.size))
    size = round(image.width * scale), round(image.height * scale)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY, subsampling=0)
    return file.getvalue()
