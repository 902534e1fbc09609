"""A labeled set of images."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from modelstock_jax.data.published_sets import Published
from modelstock_jax.errors import UserError, listed

_PROBES = 16
_MOST = 5  # names in a message


class EncodedImages(abc.ABC):
    """Images as they are stored, read one by one: `images[i]` is the bytes of a JPEG or PNG.

    A cache gives pixels, uint8 [H, W, 3], in the place of bytes; `transforms.decode` takes both. An
    instance is cheap to open and to pickle, and holds no file open across a fork: worker processes
    each get their own.
    """

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> bytes | np.ndarray: ...

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """Where image `index` lies (a file, or a record of a file), for messages."""

    def select(self, indices: np.ndarray) -> EncodedImages:
        """Those images, in that order; `indices` is int [K]."""
        return _Selected(self, np.asarray(indices))


def fingerprint(images: np.ndarray | EncodedImages) -> str:
    """64 hexadecimal digits of sixteen of the images, by which a source is known again."""
    digest = hashlib.sha256()
    for index in np.unique(np.linspace(0, len(images) - 1, _PROBES, dtype=int)):
        if len(images):
            stored = images[int(index)]
            digest.update(stored if isinstance(stored, bytes) else stored.tobytes())
    return digest.hexdigest()


class _Selected(EncodedImages):
    """Some images of a set, or all in another order."""

    def __init__(self, images: EncodedImages, indices: np.ndarray) -> None:
        self._images, self._indices = images, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> bytes | np.ndarray:
        return self._images[int(self._indices[index])]

    def name(self, index: int) -> str:
        return self._images.name(int(self._indices[index]))

    def select(self, indices: np.ndarray) -> EncodedImages:
        return _Selected(self._images, self._indices[indices])


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
    """Images with labels, and how a prediction on them is scored.

    The prediction is the class of the largest logit, among `classes` where they are given. With
    `groups`, the prediction is the group that holds the largest logit. It is right if it equals
    the label, or, with `label_sets`, if it is one of the image's set.

    Attributes:
      name: as in tables, 'id' or 'sketch' say.
      images: uint8 [M, H, W, 3], or `EncodedImages` of any sizes.
      labels: int32 [M]; with `groups`, which group.
      classes: class ids that the logits are restricted to, ascending; None means all. The
        paper's R and A hold 200 of ImageNet's 1,000 classes, and are scored among those.
      groups: class ids of each group (ObjectNet: an object has up to three ImageNet classes).
      label_sets: for each image the class ids that are right (ReaL); an image with none is not
        counted. `labels` are then not used for scoring.
      crop_border: pixels to cut from each side before anything else (ObjectNet: 2).

    Raises:
      UserError: images that are neither, as many labels as images wanting, a label outside
        `classes` or `groups`, or two ways of scoring at once.

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
        """Checks shapes, dtypes and labels."""
        if not isinstance(self.images, EncodedImages):
            shape, dtype = np.shape(self.images), self.images.dtype
            if len(shape) != 4 or shape[-1] != 3 or dtype != np.uint8:
                raise UserError(f"{self.name}: images are uint8 [M, H, W, 3], not {dtype} {shape}")
        count = len(self.images)
        if np.shape(self.labels) != (count,):
            raise UserError(
                f"{self.name}: {count} images need labels of shape [{count}], not "
                f"{list(np.shape(self.labels))}"
            )
        if self.labels.dtype != np.int32:
            raise UserError(f"{self.name}: labels are int32, not {self.labels.dtype}")
        if count and self.labels.min() < 0:
            raise UserError(f"{self.name}: label {self.labels.min()} is below 0")
        if sum(rule is not None for rule in (self.classes, self.groups, self.label_sets)) > 1:
            raise UserError(f"{self.name}: give one of classes, groups and label_sets, not more")
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
        """M, the number of images."""
        return len(self.labels)

    @property
    def pixels(self) -> np.ndarray:
        """The images of a set that is an array; of another one, a UserError."""
        if isinstance(self.images, EncodedImages):
            raise UserError(f"{self.name}: encoded images, of any sizes; an array is needed here")
        return self.images

    @property
    def encoded(self) -> EncodedImages:
        """The images of a set that is encoded; of another one, a UserError."""
        if not isinstance(self.images, EncodedImages):
            raise UserError(f"{self.name}: an array of images; encoded ones are needed here")
        return self.images

    def select(self, indices: np.ndarray) -> ImageSet:
        """Those images, in that order; `indices` is int [K]."""
        images, sets = self.images, self.label_sets
        return dataclasses.replace(
            self,
            images=images.select(indices) if isinstance(images, EncodedImages) else images[indices],
            labels=self.labels[indices],
            label_sets=None if sets is None else tuple(sets[int(i)] for i in indices),
        )

    def first(self, count: int) -> ImageSet:
        """`count` images, or all where there are fewer.

        The first ones of an array; of encoded images, in whose sets a class lies together, ones at
        even distances.
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
        """Splits off some images of each class, drawn by (seed, class) alone.

        Model Soups holds out 26 training images a class to choose the members of a greedy soup.

        Args:
          per_class: how many; a float is a share of each class, of at least one image.
          name: of the set that is split off.
          seed: another one draws others.
          class_names: the labels' own, for what is raised.

        Returns:
          What remains, and what was held out; both in the order of the set.

        Raises:
          UserError: a class with no image left to train on.
        """
        order = np.argsort(self.labels, kind="stable")
        classes, starts, counts = np.unique(
            self.labels[order], return_index=True, return_counts=True
        )
        held = np.zeros(len(self), bool)
        for label, start, count in zip(classes, starts, counts, strict=True):
            share = isinstance(per_class, float)
            wanted = max(1, round(per_class * count)) if share else per_class
            if wanted >= count:
                called = repr(class_names[label]) if class_names else label
                raise UserError(
                    f"{self.name}: class {called} has {count} images, too few to hold out {wanted} "
                    f"for {name}; add images, or hold out fewer"
                )
            drawn = np.random.default_rng((seed, int(label))).permutation(count)[:wanted]
            held[order[start + drawn]] = True
        validation = dataclasses.replace(self.select(np.flatnonzero(held)), name=name)
        return self.select(np.flatnonzero(~held)), validation


# Is a set whole: as many classes and images as its authors published?


def check_counts(
    name: str,
    place: str,
    labels: np.ndarray,
    published: Published,
    class_name: Callable[[int], str],
    classes: Sequence[int] | None = None,
) -> None:
    """Compares a set with its published counts.

    Args:
      name: of the set, for the message.
      place: where it lies, for the message.
      labels: int32 [M].
      published: what should be there.
      class_name: label -> what a message calls the class.
      classes: labels that should be there; None means 0 to the published number of classes - 1.

    Raises:
      UserError: one line with everything that is too few, too many or missing.

    Example:
      >>> labels = np.array([0, 0, 1], np.int32)
      >>> check_counts("pets", "DIR", labels, Published(2, 3), "class {}".format)
      >>> check_counts("pets", "DIR", labels, Published(2, 4, even=True), "class {}".format)
      Traceback (most recent call last):
      ...
      modelstock_jax.errors.UserError: DIR: not the whole set 'pets': 3 images of 4, 1 too few
      (class 1 should have 2); complete it, or read it as it is with
      --config.data.check_counts=False
    """
    wanted = list(range(published.classes) if classes is None else classes)
    counts = np.bincount(labels, minlength=max(wanted) + 1)

    def some(labels: Sequence[int]) -> str:
        return listed(map(class_name, labels), _MOST)

    found = []
    if missing := [label for label in wanted if not counts[label]]:
        found.append(
            f"{len(wanted) - len(missing):,} of {len(wanted):,} classes ({some(missing)} missing)"
        )
    if extra := np.setdiff1d(np.flatnonzero(counts), wanted).tolist():
        found.append(f"{some(extra)}, none of its {len(wanted)} classes")
    if len(labels) != published.images:
        few = "few" if len(labels) < published.images else "many"
        text = (
            f"{len(labels):,} images of {published.images:,}, "
            f"{abs(len(labels) - published.images):,} too {few}"
        )
        each = published.images // published.classes
        if published.even and (odd := [k for k in wanted if counts[k] not in (0, each)]):
            text += f" ({some(odd)} should have {each})"
        found.append(text)
    if found:
        raise UserError(
            f"{place}: not the whole set {name!r}: {'; '.join(found)}; complete it, or read it as "
            "it is with --config.data.check_counts=False"
        )
