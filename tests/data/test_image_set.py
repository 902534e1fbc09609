"""What an image set refuses."""

from __future__ import annotations

import numpy as np
import pytest

from modelstock_jax.data.image_set import ImageSet
from modelstock_jax.errors import UserError

IMAGES, LABELS = np.zeros((3, 4, 4, 3), np.uint8), np.array([1, 5, 5], np.int32)


@pytest.mark.parametrize(
    ("images", "labels", "classes", "message"),
    [
        (IMAGES.astype(np.float32), LABELS, None, "some: images are uint8"),
        (IMAGES[..., 0], LABELS, None, r"not uint8 \(3, 4, 4\)"),
        (IMAGES, LABELS[:2], None, r"3 images need labels of shape \[3\], not \[2\]"),
        (IMAGES, LABELS.astype(np.int64), None, "labels are int32, not int64"),
        (IMAGES, LABELS - 2, None, "label -1 is below 0"),
        (IMAGES, LABELS, (1, 2), "label 5 is not among its 2 classes"),
    ],
)
def test_refuses(images, labels, classes, message):
    with pytest.raises(UserError, match=message):
        ImageSet("some", images, labels, classes)


def test_take():
    whole = ImageSet("some", IMAGES, LABELS, (1, 5))
    assert len(whole) == 3 and len(whole.take(2)) == 2 and len(whole.take(9)) == 3
    assert whole.take(2).classes == (1, 5) and whole.take(2).name == "some"
