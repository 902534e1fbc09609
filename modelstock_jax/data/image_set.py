"""A labelled set of images."""

from __future__ import annotations

import dataclasses

import numpy as np

from modelstock_jax.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
    """Images with labels, and the classes that a prediction is chosen from.

    Attributes:
      name: as in tables, 'id' or 'sketch' say.
      images: uint8 [M, H, W, 3].
      labels: int32 [M].
      classes: class ids that the logits are restricted to, ascending; None means all. The
        paper's R and A hold 200 of ImageNet's 1,000 classes, and are scored among those.

    Raises:
      UserError: images that are not uint8 [M, H, W, 3], as many labels as images wanting, or a
        label outside `classes`.

    >>> len(ImageSet("one", np.zeros((1, 24, 24, 3), np.uint8), np.zeros(1, np.int32)))
    1
    """

    name: str
    images: np.ndarray
    labels: np.ndarray
    classes: tuple[int, ...] | None = None

    def __post_init__(self):
        """Checks shapes, dtypes and classes."""
        shape, dtype = np.shape(self.images), self.images.dtype
        if len(shape) != 4 or shape[-1] != 3 or dtype != np.uint8:
            raise UserError(f"{self.name}: images are uint8 [M, H, W, 3], not {dtype} {shape}")
        if np.shape(self.labels) != shape[:1]:
            raise UserError(
                f"{self.name}: {shape[0]} images need labels of shape [{shape[0]}], not "
                f"{list(np.shape(self.labels))}"
            )
        if self.labels.dtype != np.int32:
            raise UserError(f"{self.name}: labels are int32, not {self.labels.dtype}")
        if shape[0] and self.labels.min() < 0:
            raise UserError(f"{self.name}: label {self.labels.min()} is below 0")
        if self.classes is not None:
            outside = np.setdiff1d(self.labels, self.classes)
            if outside.size:
                raise UserError(
                    f"{self.name}: label {outside[0]} is not among its {len(self.classes)} classes"
                )

    def __len__(self) -> int:
        """M, the number of images."""
        return len(self.labels)

    def take(self, count: int) -> ImageSet:
        """The first `count` images, or all where there are fewer."""
        return dataclasses.replace(self, images=self.images[:count], labels=self.labels[:count])
