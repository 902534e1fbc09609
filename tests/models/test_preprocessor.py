"""Preprocessing from each checkpoint's file: bitwise the pixels of transformers' processors."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor

from modelstock_jax.errors import UserError
from modelstock_jax.models.preprocessor import (
    CLIP_MEAN,
    CLIP_STD,
    PREPROCESSOR_FILE,
    Preprocessor,
)

HALF = (0.5,) * 3
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STEPS = {"do_normalize": True, "do_resize": True}
RESCALED = {**STEPS, "do_rescale": True, "rescale_factor": 0.00392156862745098}
BY_HALF = {"image_mean": [*HALF], "image_std": [*HALF]}
BY_IMAGENET = {"image_mean": [*IMAGENET_MEAN], "image_std": [*IMAGENET_STD]}
CONVNEXT = {
    **STEPS,
    **BY_IMAGENET,
    "crop_pct": 0.875,
    "feature_extractor_type": "ConvNextFeatureExtractor",
    "resample": 3,
}
SIGLIP = {
    **RESCALED,
    **BY_HALF,
    "do_convert_rgb": None,
    "image_processor_type": "SiglipImageProcessor",
    "processor_class": "SiglipProcessor",
}
# Name on the hub -> its preprocessor_config.json.
FILES = {
    "openai/clip-vit-base-patch32": {
        **STEPS,
        "crop_size": 224,
        "do_center_crop": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [*CLIP_MEAN],
        "image_std": [*CLIP_STD],
        "resample": 3,
        "size": 224,
    },
    "google/siglip2-base-patch16-224": {
        **SIGLIP,
        "resample": 2,
        "size": {"height": 224, "width": 224},
    },
    "google/siglip-so400m-patch14-384": {
        **SIGLIP,
        "resample": 3,
        "size": {"height": 384, "width": 384},
    },
    "google/vit-base-patch16-224-in21k": {
        **STEPS,
        **BY_HALF,
        "feature_extractor_type": "ViTFeatureExtractor",
        "resample": 2,
        "size": 224,
    },
    "google/vit-base-patch16-224": {
        **RESCALED,
        **BY_HALF,
        "image_processor_type": "ViTImageProcessor",
        "resample": 2,
        "size": {"height": 224, "width": 224},
    },
    "facebook/deit-base-distilled-patch16-224": {
        **STEPS,
        **BY_IMAGENET,
        "crop_size": 224,
        "do_center_crop": True,
        "feature_extractor_type": "DeiTFeatureExtractor",
        "resample": 3,
        "size": 256,
    },
    "facebook/dinov2-base": {
        **RESCALED,
        **BY_IMAGENET,
        "crop_size": {"height": 224, "width": 224},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "image_processor_type": "BitImageProcessor",
        "resample": 3,
        "size": {"shortest_edge": 256},
    },
    "facebook/convnext-base-224-22k": {**CONVNEXT, "size": 224},
    "facebook/convnext-base-384": {**CONVNEXT, "size": 384},
    "facebook/convnextv2-base-22k-224": {
        **RESCALED,
        **BY_IMAGENET,
        "crop_pct": 0.875,
        "image_processor_type": "ConvNextImageProcessor",
        "resample": 3,
        "size": {"shortest_edge": 224},
    },
    "microsoft/resnet-50": {**CONVNEXT, "size": 224},
}
BILINEAR = 2
by_half = partial(Preprocessor, HALF, HALF)
by_imagenet = partial(Preprocessor, IMAGENET_MEAN, IMAGENET_STD)
CONVNEXT_224 = by_imagenet(224, short_side=256, image_processor_type="ConvNextImageProcessor")
SIGLIP_CLASS, VIT_CLASS = "SiglipImageProcessor", "ViTImageProcessor"
VIT_224 = by_half(224, None, resample=BILINEAR, image_processor_type=VIT_CLASS)
MEANINGS = {
    "openai/clip-vit-base-patch32": Preprocessor(CLIP_MEAN, CLIP_STD, 224),
    "google/siglip2-base-patch16-224": by_half(
        224, None, resample=BILINEAR, image_processor_type=SIGLIP_CLASS
    ),
    "google/siglip-so400m-patch14-384": by_half(384, None, image_processor_type=SIGLIP_CLASS),
    "google/vit-base-patch16-224-in21k": VIT_224,
    "google/vit-base-patch16-224": VIT_224,
    "facebook/deit-base-distilled-patch16-224": by_imagenet(
        224, None, square_side=256, image_processor_type="DeiTImageProcessor"
    ),
    "facebook/dinov2-base": by_imagenet(
        224, short_side=256, image_processor_type="BitImageProcessor"
    ),
    "facebook/convnext-base-224-22k": CONVNEXT_224,
    "facebook/convnext-base-384": by_imagenet(
        384, None, image_processor_type="ConvNextImageProcessor"
    ),
    "facebook/convnextv2-base-22k-224": CONVNEXT_224,
    "microsoft/resnet-50": CONVNEXT_224,
}
CLASSES = sorted({meaning.image_processor_type for meaning in MEANINGS.values()})
# Height and width: odd sides, smaller than any target, near it, elongated.
SHAPES = ((37, 61), (61, 37), (300, 200), (257, 256), (224, 224), (5, 3), (40, 333))


def write(directory, raw):
    (directory / PREPROCESSOR_FILE).write_text(json.dumps(raw))
    return directory


def assert_same_pixels(preprocessor, directory, shapes=SHAPES):
    """Compare with the processor that transformers opens: uint8 bitwise, then normalized."""
    processor = AutoImageProcessor.from_pretrained(directory, backend="pil")
    for shape in shapes:
        image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
        ours = preprocessor.eval_transform()(image)
        opened = partial(processor, Image.fromarray(image), return_tensors="np")
        (pixels,) = opened(do_rescale=False, do_normalize=False)["pixel_values"]
        np.testing.assert_array_equal(ours, pixels.transpose(1, 2, 0), err_msg=str(shape))
        (theirs,) = opened()["pixel_values"]
        # Two float32 rounding errors of values up to 2.7.
        np.testing.assert_allclose(preprocessor(ours), theirs.transpose(1, 2, 0), atol=1e-6)


@pytest.mark.parametrize("name", FILES)
def test_files_of_the_hub(tmp_path, name):
    preprocessor = Preprocessor.read(write(tmp_path, FILES[name]))
    assert preprocessor == MEANINGS[name]
    assert_same_pixels(preprocessor, tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_round_trip(tmp_path, name):
    meaning = MEANINGS[name]
    raw = meaning.to_dict()
    assert raw["image_processor_type"] == meaning.image_processor_type
    assert Preprocessor.read(write(tmp_path, raw)) == meaning
    assert_same_pixels(meaning, tmp_path)
    # What transformers itself saves, and the newer file with several processors.
    AutoImageProcessor.from_pretrained(tmp_path, backend="pil").save_pretrained(tmp_path)
    assert Preprocessor.read(tmp_path) == meaning
    saved = json.loads((tmp_path / PREPROCESSOR_FILE).read_text())
    (tmp_path / PREPROCESSOR_FILE).unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": saved}))
    assert Preprocessor.read(tmp_path) == meaning


def test_the_file_of_a_clip_keeps_its_text(tmp_path):
    """Exports of earlier versions are bitwise identical."""
    assert json.dumps(Preprocessor(HALF, HALF, 224).to_dict()) == (
        '{"image_processor_type": "CLIPImageProcessor", "do_convert_rgb": true, '
        '"do_resize": true, "size": {"shortest_edge": 224}, "resample": 3, '
        '"do_center_crop": true, "crop_size": {"height": 224, "width": 224}, '
        '"do_rescale": true, "rescale_factor": 0.00392156862745098, "do_normalize": true, '
        '"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
    )


@pytest.mark.parametrize("kind", CLASSES)
def test_absent_keys_get_the_defaults_of_the_class(tmp_path, kind):
    preprocessor = Preprocessor.read(write(tmp_path, {"image_processor_type": kind}))
    assert preprocessor.image_processor_type == kind
    assert_same_pixels(preprocessor, tmp_path, SHAPES[:3])


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("CLIPImageProcessor", {"size": {"shortest_edge": 50}, "crop_size": 31}),
        ("CLIPImageProcessor", {"size": {"height": 30, "width": 30}, "do_center_crop": False}),
        ("BitImageProcessor", {"size": {"height": 37, "width": 37}, "do_center_crop": None}),
        ("BitImageProcessor", {"size": {"height": 37, "width": 37}, "crop_size": 30}),
        ("DeiTImageProcessor", {"do_center_crop": False, "size": 40}),
        ("ViTImageProcessor", {"do_center_crop": True, "size": 40, "crop_size": 33}),
        ("ViTImageProcessor", {"crop_size": 33, "do_pad": False}),  # not cropped
        ("SiglipImageProcessor", {"crop_size": None, "do_center_crop": None, "do_pad": None}),
        ("ConvNextImageProcessor", {"size": 97, "crop_pct": 0.9}),
        ("ConvNextImageProcessor", {"size": 383, "crop_pct": 1}),
        ("ConvNextImageProcessor", {"size": 390, "crop_pct": 0.5}),
    ],
)
def test_other_steps_of_each_class(tmp_path, kind, changes):
    raw = {"image_processor_type": kind, **changes}
    preprocessor = Preprocessor.read(write(tmp_path, raw))
    assert_same_pixels(preprocessor, tmp_path)
    assert Preprocessor.read(write(tmp_path, preprocessor.to_dict())) == preprocessor
    assert_same_pixels(preprocessor, tmp_path)


@pytest.mark.parametrize("resample", range(6))
def test_every_filter_of_pillow(tmp_path, resample):
    raw = {"image_processor_type": "BitImageProcessor", "size": 60, "crop_size": 50}
    preprocessor = Preprocessor.read(write(tmp_path, {**raw, "resample": resample}))
    assert preprocessor.resample == resample
    assert_same_pixels(preprocessor, tmp_path)


@pytest.mark.parametrize("suffix", ["ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor"])
def test_other_names_of_a_class(tmp_path, suffix):
    raw = {**FILES["facebook/dinov2-base"], "image_processor_type": f"Bit{suffix}"}
    assert Preprocessor.read(write(tmp_path, raw)) == MEANINGS["facebook/dinov2-base"]


def test_null_crop_pct_is_the_default(tmp_path):
    """As transformers 4 wrote it; transformers 5 divides by it."""
    raw = {**FILES["microsoft/resnet-50"], "crop_pct": None}
    assert Preprocessor.read(write(tmp_path, raw)) == CONVNEXT_224


def test_a_file_without_a_class_has_that_of_its_keys(tmp_path):
    statistics = BY_IMAGENET
    for keys, expected in (
        ({"size": 24, "crop_size": 20}, ("CLIPImageProcessor", 20, 24)),
        ({"size": {"shortest_edge": 24}, "crop_size": 24}, ("CLIPImageProcessor", 24, 0)),
        ({"size": 24}, ("ViTImageProcessor", 24, None)),
        ({"size": {"height": 24, "width": 24}}, ("ViTImageProcessor", 24, None)),
        ({"size": 224, "crop_pct": 0.875}, ("ConvNextImageProcessor", 224, 256)),
    ):
        p = Preprocessor.read(write(tmp_path, {**statistics, **keys}))
        assert (p.image_processor_type, p.image_size, p.short_side) == expected
    with pytest.raises(UserError, match="image_mean, image_std and image_processor_type"):
        Preprocessor.read(write(tmp_path, {"size": 24}))
    with pytest.raises(UserError, match="NaFlex"):
        Preprocessor.read(write(tmp_path, {**statistics, "max_num_patches": 256}))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("size", [32, 224, 518])
def test_another_input_size_keeps_the_fraction_that_is_cropped(tmp_path, name, size):
    meaning = MEANINGS[name]
    changed = meaning.with_image_size(size)
    assert changed.image_size == size and changed.mean == meaning.mean
    assert (changed.short_side is None) == (meaning.short_side is None)
    for before, after in (
        (meaning.short_side, changed.short_side),
        (meaning.square_side, changed.square_side),
    ):
        # Rounded to a pixel.
        assert after == (before and pytest.approx(before * size / meaning.image_size, abs=0.5))
    assert meaning.with_image_size(meaning.image_size) == meaning
    # ConvNextImageProcessor warps from 384 pixels on and crops below: another class is written.
    raw = changed.to_dict()
    other = name.startswith("facebook/convnext") or name == "microsoft/resnet-50"
    other &= (size < 384) != (meaning.image_size < 384)
    kind = "BitImageProcessor" if other else meaning.image_processor_type
    assert raw["image_processor_type"] == kind
    assert_same_pixels(changed, write(tmp_path, raw), SHAPES[:3])


def test_every_crop_of_a_convnext_can_be_written(tmp_path):
    """Division and truncation give the same short side again, whatever the rounding."""
    for size in (7, 49, 224, 383):
        for short in range(size, 3 * size):
            side = 0 if short == size else short
            meaning = by_half(size, side, image_processor_type="ConvNextImageProcessor")
            raw = meaning.to_dict()
            assert int(size / raw["crop_pct"]) == short
    assert Preprocessor.read(write(tmp_path, raw)) == meaning


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("Siglip2ImageProcessor", {}, "Siglip2ImageProcessor .*NaFlex.*fixed resolution"),
        ("Siglip2ImageProcessorFast", {}, "Siglip2ImageProcessorFast .*NaFlex"),
        ("BeitImageProcessor", {}, "BeitImageProcessor.*CLIPImageProcessor, .*ConvNext"),
        (["CLIP"], {}, "CLIP.* SiglipImageProcessor"),
        ("ViTImageProcessor", {"size": {"height": 224, "width": 196}}, "size .*196"),
        ("ViTImageProcessor", {"size": {"shortest_edge": 224}}, "do_center_crop"),
        ("SiglipImageProcessor", {"size": 224}, "do_center_crop"),
        ("ViTImageProcessor", {"size": {"longest_edge": 224}}, "size .*longest_edge"),
        ("ViTImageProcessor", {"size": {"height": 8, "width": 8, "depth": 8}}, "size .*depth"),
        ("ViTImageProcessor", {"size": None}, "size is None"),
        ("ViTImageProcessor", {"size": {}}, "size is {}"),
        ("ViTImageProcessor", {"size": "224"}, "size is '224'"),
        ("ViTImageProcessor", {"size": True}, "size is True"),
        ("ViTImageProcessor", {"size": 0}, "size is 0"),
        ("ViTImageProcessor", {"size": 10**400}, "size is 1000"),
        ("ViTImageProcessor", {"size": float("inf")}, "size is inf"),
        ("ViTImageProcessor", {"do_center_crop": True}, "crop_size is None"),
        ("CLIPImageProcessor", {"crop_size": {"height": 8, "width": 9}}, "crop_size .*9"),
        ("CLIPImageProcessor", {"crop_size": {"shortest_edge": 9}}, "crop_size .*height"),
        ("CLIPImageProcessor", {"crop_size": None}, "crop_size is None"),
        ("CLIPImageProcessor", {"crop_size": 225}, "crop_size 225 .*224.*padding"),
        ("CLIPImageProcessor", {"do_center_crop": False}, "do_center_crop .*not be square"),
        ("CLIPImageProcessor", {"do_center_crop": None}, "do_center_crop .*not be square"),
        ("CLIPImageProcessor", {"do_resize": False}, "do_resize is False"),
        ("CLIPImageProcessor", {"do_normalize": False}, "do_normalize is False"),
        ("CLIPImageProcessor", {"do_rescale": None}, "do_rescale is None"),
        ("CLIPImageProcessor", {"do_pad": True}, "do_pad"),
        ("CLIPImageProcessor", {"rescale_factor": 1 / 127.5}, "rescale_factor .*1 / 255"),
        ("CLIPImageProcessor", {"rescale_factor": None}, "rescale_factor .*1 / 255"),
        ("CLIPImageProcessor", {"rescale_factor": float("nan")}, "rescale_factor .*1 / 255"),
        ("CLIPImageProcessor", {"resample": 6}, "resample is 6"),
        ("CLIPImageProcessor", {"resample": -1}, "resample is -1"),
        ("CLIPImageProcessor", {"resample": "bicubic"}, "resample is 'bicubic'"),
        ("CLIPImageProcessor", {"resample": None}, "resample is None"),
        ("CLIPImageProcessor", {"resample": 3.0}, "resample is 3.0"),
        ("CLIPImageProcessor", {"resample": True}, "resample is True"),
        ("CLIPImageProcessor", {"image_mean": 0.5}, "image_mean and image_std .*lists"),
        ("CLIPImageProcessor", {"image_std": None}, "image_mean and image_std .*lists"),
        ("CLIPImageProcessor", {"image_std": [0.5, 0.5, 0]}, "std > 0"),
        ("ConvNextImageProcessor", {"size": {"height": 9, "width": 9}}, "shortest_edge"),
        ("ConvNextImageProcessor", {"do_center_crop": True, "crop_size": 9}, "crop_size"),
        ("ConvNextImageProcessor", {"size": 224, "crop_pct": 0}, "crop_pct is 0;"),
        ("ConvNextImageProcessor", {"size": 224, "crop_pct": 1e-320}, "crop_pct is 1e-320;"),
        ("ConvNextImageProcessor", {"size": 224, "crop_pct": 1.1}, "crop_pct is 1.1;"),
        ("ConvNextImageProcessor", {"size": 224, "crop_pct": "1"}, "crop_pct is '1';"),
    ],
)
def test_errors_name_the_file_and_the_key(tmp_path, kind, changes, message):
    write(tmp_path, {"image_processor_type": kind, **changes})
    with pytest.raises(UserError, match=f"{PREPROCESSOR_FILE}: .*{message}") as error:
        Preprocessor.read(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("raw", ["[]", "3", '{"image_processor": [1]}', "{"])
def test_files_that_are_no_image_processor(tmp_path, raw):
    (tmp_path / "processor_config.json").write_text(raw)
    with pytest.raises(UserError, match=r"processor_config.json: .*(dictionary|JSON)"):
        Preprocessor.read(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 0}, "image_size is 0;"),
        ({"short_side": 23}, "short_side is 23;.* 24 "),
        ({"short_side": -1}, "short_side is -1;"),
        ({"short_side": 10**6}, "short_side is 1000000;"),
        ({"short_side": None, "square_side": 23}, "square_side is 23;"),
        ({"square_side": 30}, "square_side 30 .*short_side=None"),
        ({"resample": 7}, "resample is 7"),
        ({"image_processor_type": "Siglip"}, "'Siglip'.*SiglipImageProcessor"),
    ],
)
def test_fields_out_of_range(changes, message):
    with pytest.raises(UserError, match=message):
        Preprocessor(**{"mean": HALF, "std": HALF, "image_size": 24, **changes})
