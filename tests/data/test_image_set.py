"""`ImageSet`: what it rejects, and how it is split."""

from __future__ import annotations

import numpy as np
import pytest

from modelstock_jax.data.image_set import EncodedImages, ImageSet
from modelstock_jax.errors import UserError

IMAGES, LABELS = np.zeros((3, 4, 4, 3), np.uint8), np.array([1, 5, 5], np.int32)


class Numbers(EncodedImages):
    """Image i is the text of i."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> bytes:
        return str(range(self._count)[index]).encode()

    def name(self, index: int) -> str:
        return f"file {index}"


@pytest.mark.parametrize(
    ("images", "labels", "classes", "message"),
    [
        (IMAGES.astype(np.float32), LABELS, None, "some: .*uint8 .* float32"),
        (IMAGES[..., 0], LABELS, None, r" uint8 \(3, 4, 4\)"),
        (IMAGES, LABELS[:2], None, r"3 images .*labels .*\[3\], .*\[2\]"),
        (IMAGES, LABELS.astype(np.int64), None, "labels .*int32.* int64"),
        (IMAGES, LABELS - 2, None, "label -1 "),
        (IMAGES, LABELS, (1, 2), "label 5 .*2 classes"),
        (Numbers(4), LABELS, None, r"4 images .*labels .*\[4\], .*\[3\]"),
    ],
)
def test_rejects(images, labels, classes, message):
    with pytest.raises(UserError, match=message):
        ImageSet("some", images, labels, classes)


def test_pixels_need_an_array_and_encoded_needs_encoded_images():
    array, encoded = ImageSet("some", IMAGES, LABELS), ImageSet("other", Numbers(3), LABELS)
    assert array.pixels is IMAGES and encoded.encoded is encoded.images
    with pytest.raises(UserError, match="some: .*array .*encoded"):
        _ = array.encoded
    with pytest.raises(UserError, match="other: encoded .*array"):
        _ = encoded.pixels


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"groups": ((0,),) * 5}, "label 5 .*5 groups"),
        ({"groups": ((0,), (), *[(1,)] * 4)}, "group 1 "),
        ({"label_sets": ((1,), ())}, "3 images .*label sets.* 2"),
        ({"classes": (1, 5), "groups": ((0,),) * 6}, "classes, groups and label_sets"),
    ],
)
def test_rejects_inconsistent_scoring_rules(rules, message):
    with pytest.raises(UserError, match=message):
        ImageSet("some", IMAGES, LABELS, **rules)


def test_first():
    images = ImageSet("some", IMAGES, LABELS, (1, 5))
    assert len(images) == 3 and len(images.first(2)) == 2 and len(images.first(9)) == 3
    assert images.first(2).classes == (1, 5) and images.first(2).name == "some"
    np.testing.assert_array_equal(images.first(2).labels, LABELS[:2])


def test_first_and_select_of_encoded_images_select_labels_and_label_sets_too():
    """Encoded images are sorted by class, so `first` takes images at even distances."""
    count = 10
    full = ImageSet(
        "real",
        Numbers(count),
        np.arange(count, dtype=np.int32),
        label_sets=tuple((i, 100 + i) for i in range(count)),
        crop_border=2,
    )
    for part, expected in [
        (full.first(4), [0, 2, 5, 7]),
        (full.select(np.array([9, 3])), [9, 3]),
        (full.select(np.array([9, 3, 5])).select(np.array([2, 0])), [5, 9]),
    ]:
        assert list(part.images) == [str(i).encode() for i in expected]
        assert [part.images.name(i) for i in range(len(part))] == [f"file {i}" for i in expected]
        assert part.labels.tolist() == expected and part.crop_border == 2
        assert part.label_sets == tuple((i, 100 + i) for i in expected)


@pytest.mark.parametrize(("per_class", "counts"), [(2, [2, 2, 2]), (0.25, [1, 2, 3])])
def test_hold_out_is_a_fixed_part_of_each_class(per_class, counts):
    labels = np.random.default_rng(0).permutation([0] * 3 + [1] * 8 + [7] * 12).astype(np.int32)
    full = ImageSet("train", Numbers(len(labels)), labels)
    train, validation = full.hold_out(per_class)
    assert np.unique(validation.labels, return_counts=True)[1].tolist() == counts
    assert (train.name, validation.name) == ("train", "validation")
    parts = [[int(image) for image in part.images] for part in (train, validation)]
    assert sorted(sum(parts, [])) == list(range(len(labels)))
    assert parts == [sorted(part) for part in parts], "each part preserves the order"
    for part, indices in zip((train, validation), parts, strict=True):
        np.testing.assert_array_equal(part.labels, labels[indices])
    repeated = full.hold_out(per_class)[1]
    assert list(repeated.images) == list(validation.images)
    assert list(full.hold_out(per_class, seed=1)[1].images) != list(validation.images)


def test_hold_out_leaves_an_image_to_train_on():
    full = ImageSet("train", IMAGES, LABELS)
    with pytest.raises(UserError, match="train: class 1 .*1 images, .* 1 "):
        full.hold_out(1)
    train, validation = full.hold_out(0)
    assert len(train) == 3 and len(validation) == 0
