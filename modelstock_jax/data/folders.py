"""Images in plain class folders."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from modelstock_jax.data.image_set import EncodedImages
from modelstock_jax.data.listing import Listing, list_folders
from modelstock_jax.errors import UserError

Images_co = TypeVar("Images_co", bound=EncodedImages, covariant=True)


class Labelled(NamedTuple, Generic[Images_co]):
    """Images and labels as they are stored, before a data set says what the labels mean.

    Attributes:
      images: M images.
      labels: int32 [M], places in `names`.
      names: of the classes: folder names, or the names in a prepared set's description.
      place: where they lie, for messages.
    """

    images: Images_co
    labels: np.ndarray
    names: tuple[str, ...]
    place: str


class FileImages(EncodedImages):
    """The files of a listing; bytes are read as they are asked for."""

    def __init__(self, listing: Listing) -> None:
        """Opens nothing."""
        self._listing = listing

    def __len__(self) -> int:
        return len(self._listing.names)

    def __getitem__(self, index: int) -> bytes:
        try:
            with open(self.name(index), "rb") as file:
                return file.read()
        except OSError as error:
            raise UserError(f"{self.name(index)}: cannot be read ({error.strerror})") from error

    def name(self, index: int) -> str:
        """The file's path."""
        listing = self._listing
        folder = listing.folders[listing.folder_of[index]]
        return os.path.join(listing.root, folder, os.fsdecode(listing.names[index]))


def read_folders(
    root: str | os.PathLike[str], only: Collection[str] | None = None
) -> Labelled[FileImages]:
    """The images of ROOT/CLASS/*.JPEG, in the order of the folders' names, then the files'.

    Args:
      root: a directory with a folder for each class.
      only: names of the folders to read; all, if None.

    Raises:
      UserError: no such directory, no folders, or a folder without an image.
    """
    listing = list_folders(root, only)
    return Labelled(FileImages(listing), listing.folder_of, listing.folders, str(root))
