"""Turns a set into ArrayRecord in the format of TensorFlow Datasets, without TensorFlow.

Shard by shard, in as many processes as wanted: what is finished is not written again.
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
from modelstock_jax.data.records import FACTS, LABELS, facts
from modelstock_jax.data.transforms import Unreadable, decode, image_size
from modelstock_jax.errors import UserError

VERSION = "1.0.0"
PER_SHARD = 4096  # images: about half a gigabyte as ImageNet stores them


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
    """Writes OUT/DATASET/1.0.0, which `tfds.data_source` and `read_records` read.

    Called again after an interruption, it goes on with the shards that are missing. The directory
    gets its name when the number of records in every shard has been read back.

    Args:
      image_set: encoded images; they are written in its order.
      class_names: K names, by label; of `groups`, if the set has them.
      out: made if missing.
      dataset: the directory's name, as that of a Python module.
      split: 'train', 'validation' or 'test'.
      resize: the short side of a larger image becomes so many pixels (see `shrink`); 0 keeps the
        bytes as they are.
      workers: processes.
      per_shard: images in a file.

    Returns:
      The directory.

    Raises:
      UserError: another preparation lies there, an image that cannot be read, or a full disk.
    """
    plan = _plan(image_set, split, resize, per_shard)
    directory = Path(out) / dataset / VERSION
    if directory.exists():
        if facts(directory) != plan:
            raise UserError(f"{directory}: another preparation lies there; choose another --out")
        return directory
    unfinished = directory.with_name(VERSION + ".incomplete")
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        if not (unfinished / FACTS).exists():
            (unfinished / FACTS).write_text(json.dumps(plan))
        if facts(unfinished) != plan:
            raise UserError(
                f"{unfinished}: holds the beginning of another preparation; remove it, or choose "
                "another --out"
            )
        shards = _shards(image_set, class_names, unfinished, dataset, split, resize, per_shard)
        # Its import is not safe beside other threads, such as the progress bar's.
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
    """One file to write: `images[first : first + len(labels)]`."""

    images: EncodedImages
    labels: np.ndarray
    first: int
    class_names: Sequence[str]
    resize: int
    border: int
    path: Path


def _plan(image_set: ImageSet, split: str, resize: int, per_shard: int) -> dict[str, Any]:
    """What tells one preparation from another, and what a reader must know besides."""
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
        # A border is cut before resizing; bytes that are kept still have it.
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
            image_set.encoded,
            image_set.labels[start : start + per_shard],
            start,
            class_names,
            resize,
            image_set.crop_border,
            directory / f"{dataset}-{split}.array_record-{number:05d}-of-{len(starts):05d}",
        )
        for number, start in enumerate(starts)
    ]


def _run(shards: list[Shard], workers: int) -> Iterator[int]:
    """Writes the shards that are not there; the number of images of each as it is finished."""
    if workers <= 1:
        for shard in shards:
            yield write_shard(shard)
        return
    # Not forked: threads of the parent could hold a lock.
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
    """Writes one file beside its place and renames it, unless it is there; returns its count."""
    from array_record.python.array_record_module import ArrayRecordWriter

    count = len(shard.labels)
    if shard.path.exists() and _num_records(shard.path) == count:
        return count
    features = _features(shard.class_names)
    temporary = shard.path.with_name("." + shard.path.name)
    # One record a group: random access reads what it needs, no more.
    writer = ArrayRecordWriter(str(temporary), "group_size:1")
    for place, label in enumerate(shard.labels, shard.first):
        image, name = shard.images[place], shard.images.name(place)
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
        return 0  # Not a whole file.
    return count


def _describe(
    directory: Path, shards: list[Shard], class_names: Sequence[str], split: str
) -> None:  # fmt: skip
    """Checks the number of records in each file and writes the description of the whole."""
    import tensorflow_datasets as tfds

    for shard in shards:
        if (found := _num_records(shard.path)) != len(shard.labels):
            raise UserError(
                f"{shard.path}: {found} records, not {len(shard.labels)}; remove it and run again"
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


# Smaller copies of large images, still encoded.

QUALITY = 95  # of JPEG


def shrink(
    encoded: bytes | np.ndarray, short_side: int, border: int = 0, name: str = "image"
) -> bytes | np.ndarray:
    """Cuts the border, then brings the short side down to `short_side` (bicubic, antialiased).

    An image that is small enough and has no border is returned as it is.

    Args:
      encoded: as a file holds it, or pixels uint8 [H, W, 3].
      short_side: pixels.
      border: pixels to cut from each side.
      name: of the image, for the message.

    Returns:
      The same, or an RGB JPEG of quality 95 without chroma subsampling.

    Raises:
      UserError: not an image, or a truncated one.
    """
    try:
        if not border and min(image_size(encoded)) <= short_side:
            return encoded
        image = Image.fromarray(decode(encoded))
    except Unreadable as error:
        raise UserError(f"{name}: not a whole image ({error}); replace or remove it") from error
    image = image.crop((border, border, image.width - border, image.height - border))
    scale = min(1.0, short_side / min(image.size))
    size = round(image.width * scale), round(image.height * scale)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY, subsampling=0)
    return file.getvalue()
