"""A labeled set of images."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from modelstock_jax.data.published_sets import Published
from modelstock_jax.errors import UserError, listed

_CHECKSUM_SAMPLES = 16
_MAX_NAMES = 5  # in an error message


class EncodedImages(abc.ABC):
    """Stored images, read one by one: `images[i]` is the bytes of a JPEG or PNG.

    A decoded cache returns pixels, uint8 [H, W, 3], instead of bytes; `transforms.decode` accepts
    both. An instance is cheap to open and to pickle, and keeps no file open across a fork, so that
    each worker process gets its own.
    """

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> bytes | np.ndarray: ...

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """Return the location of image `index` (a file, or a record in a file) for messages."""

    def sizes(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Return heights and widths in pixels, int [M] each, if they are known without decoding."""
        return None

    def select(self, indices: np.ndarray) -> EncodedImages:
        """Return the images at `indices`, int [K], in that order."""
        return _Selected(self, np.asarray(indices))


def images_checksum(images: np.ndarray | EncodedImages) -> str:
    """Return a checksum of 64 hexadecimal digits that identifies the images.

    It is the SHA-256 of sixteen of them.
    """
    checksum = hashlib.sha256()
    for index in np.unique(np.linspace(0, len(images) - 1, _CHECKSUM_SAMPLES, dtype=int)):
        if len(images):
            image = images[int(index)]
            checksum.update(image if isinstance(image, bytes) else image.tobytes())
    return checksum.hexdigest()


class _Selected(EncodedImages):
    """A subset or a reordering of encoded images."""

    def __init__(self, images: EncodedImages, indices: np.ndarray) -> None:
        self._images, self._indices = images, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> bytes | np.ndarray:
        return self._images[int(self._indices[index])]

    def name(self, index: int) -> str:
        return self._images.name(int(self._indices[index]))

    def sizes(self) -> tuple[np.ndarray, np.ndarray] | None:
        sizes = self._images.sizes()
        return None if sizes is None else (sizes[0][self._indices], sizes[1][self._indices])

    def select(self, indices: np.ndarray) -> EncodedImages:
        return _Selected(self._images, self._indices[indices])


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
    """Images with labels, and how predictions on them are scored.

    The prediction is the class with the largest logit, among `classes` if they are set. With
    `groups`, the prediction is the group that contains the class with the largest logit. A
    prediction is correct if it equals the label, or, with `label_sets`, if it is in the image's
    label set.

    Attributes:
      name: the name in tables, for example 'id' or 'sketch'
      images: uint8 [M, H, W, 3], or `EncodedImages` of any sizes
      labels: int32 [M]; with `groups`, the index of the group
      classes: class ids that the logits are restricted to, ascending; None means all. The
        paper's R and A contain 200 of ImageNet's 1,000 classes and are scored among those.
      groups: class ids of each group (ObjectNet: an object has up to three ImageNet classes)
      label_sets: the correct class ids of each image (ReaL); an image without any is not counted.
        `labels` are then not used for scoring.
      crop_border: pixels to crop from each side before any other transform (ObjectNet: 2)

    Raises:
      UserError: the type of the images is wrong, the number of labels differs from the number of
        images, a label is not in `classes` or `groups`, or more than one scoring rule is set

    >>> len(ImageSet("one", np.zeros((1, 24, 24, 3), np.uint8), np.zeros(1, np.int32)))
    1
    """

    name: str
    images: np.ndarray | EncodedImages
    labels: np.ndarray
    classes: tuple[int, ...] | None = None
    groups: tuple[tuple[int, ...], ...] | None = None
    label_sets: tuple[tuple[int, ...], ...] | None = None
    crop_border: int = 0

    def __post_init__(self):
        """Check shapes, dtypes and labels."""
        if not isinstance(self.images, EncodedImages):
            shape, dtype = np.shape(self.images), self.images.dtype
            if len(shape) != 4 or shape[-1] != 3 or dtype != np.uint8:
                raise UserError(
                    f"{self.name}: images must be uint8 [M, H, W, 3], not {dtype} {shape}"
                )
        count = len(self.images)
        if np.shape(self.labels) != (count,):
            raise UserError(
                f"{self.name}: {count} images need labels of shape [{count}], not "
                f"{list(np.shape(self.labels))}"
            )
        if self.labels.dtype != np.int32:
            raise UserError(f"{self.name}: labels must be int32, not {self.labels.dtype}")
        if count and self.labels.min() < 0:
            raise UserError(f"{self.name}: label {self.labels.min()} is below 0")
        if sum(rule is not None for rule in (self.classes, self.groups, self.label_sets)) > 1:
            raise UserError(f"{self.name}: give only one of classes, groups and label_sets")
        if self.classes is not None:
            outside = np.setdiff1d(self.labels, self.classes)
            if outside.size:
                raise UserError(
                    f"{self.name}: label {outside[0]} is not among its {len(self.classes)} classes"
                )
        if self.groups is not None:
            if not all(self.groups):
                raise UserError(f"{self.name}: group {self.groups.index(())} has no class")
            if count and self.labels.max() >= len(self.groups):
                raise UserError(
                    f"{self.name}: label {self.labels.max()} is not one of its {len(self.groups)} "
                    "groups"
                )
        if self.label_sets is not None and len(self.label_sets) != count:
            raise UserError(
                f"{self.name}: {count} images need as many label sets, not {len(self.label_sets)}"
            )

    def __len__(self) -> int:
        """Return M, the number of images."""
        return len(self.labels)

    @property
    def pixels(self) -> np.ndarray:
        """The images if they are an array; encoded images raise a UserError."""
        if isinstance(self.images, EncodedImages):
            raise UserError(f"{self.name}: encoded images; this requires an array of images")
        return self.images

    @property
    def encoded(self) -> EncodedImages:
        """The images if they are encoded; an array raises a UserError."""
        if not isinstance(self.images, EncodedImages):
            raise UserError(f"{self.name}: an array of images; this requires encoded images")
        return self.images

    def select(self, indices: np.ndarray) -> ImageSet:
        """Return the images at `indices`, int [K], in that order."""
        images, sets = self.images, self.label_sets
        return dataclasses.replace(
            self,
            images=images.select(indices) if isinstance(images, EncodedImages) else images[indices],
            labels=self.labels[indices],
            label_sets=None if sets is None else tuple(sets[int(i)] for i in indices),
        )

    def first(self, count: int) -> ImageSet:
        """Return `count` images, or all if there are fewer.

        From an array these are the first images. Encoded images are sorted by class; from these
        they are images at even distances.
        """
        if count >= len(self):
            return self
        if isinstance(self.images, EncodedImages):
            return self.select(np.arange(count) * len(self) // count)
        return self.select(np.arange(count))

    def hold_out(
        self,
        per_class: int | float,
        name: str = "validation",
        seed: int = 0,
        class_names: Sequence[str] = (),
    ) -> tuple[ImageSet, ImageSet]:
        """Hold out random images of each class; the choice depends only on (seed, class).

        Model Soups holds out 26 training images per class to select the members of a greedy soup.

        Args:
          per_class: number of images per class; a float is the fraction of each class, of which at
            least one image is held out
          name: name of the held-out set
          seed: random seed
          class_names: class names by label, for the error message

        Returns:
          (remaining images, held-out images), both in the order of this set.

        Raises:
          UserError: a class would have no image left
        """
        order = np.argsort(self.labels, kind="stable")
        classes, starts, counts = np.unique(
            self.labels[order], return_index=True, return_counts=True
        )
        held_out = np.zeros(len(self), bool)
        for label, start, count in zip(classes, starts, counts, strict=True):
            is_fraction = isinstance(per_class, float)
            num_held_out = max(1, round(per_class * count)) if is_fraction else per_class
            if num_held_out >= count:
                class_name = repr(class_names[label]) if class_names else label
                raise UserError(
                    f"{self.name}: class {class_name} has {count} images, too few to hold out "
                    f"{num_held_out} for {name}; add images, or hold out fewer"
                )
            rng = np.random.default_rng((seed, int(label)))
            held_out[order[start + rng.permutation(count)[:num_held_out]]] = True
        validation = dataclasses.replace(self.select(np.flatnonzero(held_out)), name=name)
        return self.select(np.flatnonzero(~held_out)), validation


def check_counts(
    name: str,
    source: str,
    labels: np.ndarray,
    published: Published,
    class_name: Callable[[int], str],
    classes: Sequence[int] | None = None,
) -> None:
    """Check that a dataset has its published number of classes and images.

    Args:
      name: name of the dataset, for the message
      source: path of the dataset, for the message
      labels: int32 [M]
      published: the published counts
      class_name: label -> name of the class in the message
      classes: expected labels; None means 0 to the published number of classes - 1

    Raises:
      UserError: one line that lists all missing classes and wrong counts

    Example:
      >>> labels = np.array([0, 0, 1], np.int32)
      >>> check_counts("pets", "DIR", labels, Published(2, 3), "class {}".format)
      >>> check_counts("pets", "DIR", labels, Published(2, 4, even=True), "class {}".format)
      Traceback (most recent call last):
      ...
      modelstock_jax.errors.UserError: DIR: not the complete dataset 'pets': 3 images of 4,
      1 too few (class 1 should have 2); complete it, or read it as it is with
      --config.data.check_counts=False
    """
    expected = list(range(published.classes) if classes is None else classes)
    counts = np.bincount(labels, minlength=max(expected) + 1)

    def class_names(labels: Sequence[int]) -> str:
        return listed(map(class_name, labels), _MAX_NAMES)

    issues = []
    if missing := [label for label in expected if not counts[label]]:
        issues.append(
            f"{len(expected) - len(missing):,} of {len(expected):,} classes "
            f"({class_names(missing)} missing)"
        )
    if extra := np.setdiff1d(np.flatnonzero(counts), expected).tolist():
        issues.append(f"{class_names(extra)}, none of its {len(expected)} classes")
    if len(labels) != published.images:
        few = "few" if len(labels) < published.images else "many"
        text = (
            f"{len(labels):,} images of {published.images:,}, "
            f"{abs(len(labels) - published.images):,} too {few}"
        )
        per_class = published.images // published.classes
        if published.even and (odd := [k for k in expected if counts[k] not in (0, per_class)]):
            text += f" ({class_names(odd)} should have {per_class})"
        issues.append(text)
    if issues:
        raise UserError(
            f"{source}: not the complete dataset {name!r}: {'; '.join(issues)}; complete it, or "
            "read it as it is with --config.data.check_counts=False"
        )
