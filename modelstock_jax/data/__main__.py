"""Convert a dataset to ArrayRecord: `python -m modelstock_jax.data prepare SOURCE --out DIR`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from modelstock_jax.data.image_folder import read_folders
from modelstock_jax.data.image_set import ImageSet
from modelstock_jax.data.imagenet import WNIDS, objectnet_classes, open_set
from modelstock_jax.data.prepare import prepare
from modelstock_jax.data.published_sets import IMAGENET
from modelstock_jax.errors import UserError
from modelstock_jax.machine import usable_cores

# Datasets whose classes are not ImageNet's come last.
SETS = sorted(
    (name for name in IMAGENET if IMAGENET[name].prepared), key=lambda name: IMAGENET[name].groups
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; a user error prints one line and exits with code 1."""
    options = _parser().parse_args(argv)
    try:
        image_set, names, dataset, split = _source(options)
        directory = prepare(
            image_set,
            names,
            options.out,
            dataset=dataset,
            split=split,
            resize=options.resize,
            workers=options.workers,
        )
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"{directory}: {len(image_set):,} images of {len(np.unique(image_set.labels)):,} classes")


def _source(options: argparse.Namespace) -> tuple[ImageSet, Sequence[str], str, str]:
    source = Path(options.source).expanduser()
    if options.set == "folder":
        stored = read_folders(source)
        dataset = options.name or source.resolve().name.replace("-", "_")
        return ImageSet(dataset, stored.images, stored.labels), stored.names, dataset, options.split
    image_set = open_set(options.set, source, check_counts=options.check_counts)
    info = IMAGENET[options.set]
    names = tuple(objectnet_classes(source / "mappings")) if info.groups else WNIDS
    return image_set, names, options.name or info.prepared, info.split


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m modelstock_jax.data", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="prepare")
    command = commands.add_parser(
        "prepare",
        help="convert a dataset to ArrayRecord in the format of TensorFlow Datasets",
        description="Writes DIR/NAME/1.0.0. If interrupted, run the same command again to resume.",
    )
    command.add_argument("source", metavar="SOURCE", help="directory of the dataset")
    command.add_argument("--out", required=True, metavar="DIR", help="output directory")
    command.add_argument(
        "--set",
        choices=["folder", *SETS],
        default="folder",
        help="dataset to convert; 'folder' is your own class folders (default: folder)",
    )
    command.add_argument(
        "--resize",
        type=int,
        default=0,
        metavar="N",
        help="resize the short side of larger images to N pixels, e.g. 256 (default: 0, which "
        "copies the files)",
    )
    command.add_argument(
        "--name", help="name of the dataset's directory in DIR (default: the name of the dataset)"
    )
    command.add_argument(
        "--split",
        choices=["train", "validation", "test"],
        default="train",
        help="split of a 'folder' dataset (default: train)",
    )
    command.add_argument(
        "--workers",
        type=int,
        default=usable_cores(),
        metavar="N",
        help="number of processes (default: one per core)",
    )
    command.add_argument(
        "--no-check-counts",
        dest="check_counts",
        action="store_false",
        help="accept a dataset without the published number of classes and images",
    )
    return parser


if __name__ == "__main__":
    main()
