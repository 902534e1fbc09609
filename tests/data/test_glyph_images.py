"""Masks and images are legible, independent of the batch, and equal in every process."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from modelstock_jax.data.glyphs import make_sets, pretraining_batch
from modelstock_jax.data.glyphs.render import (
    CHARACTERS,
    FONTS,
    HELD_OUT_FONTS,
    PRETRAINING,
    STYLES,
    Domain,
    font_indices,
    masks,
    render,
)
from modelstock_jax.errors import UserError

ROOT = Path(__file__).parents[2]


def checksum() -> str:
    """Return a checksum of a small benchmark and one pretraining batch."""
    small = make_sets(train_size=5, validation_size=5, test_size=5, shift_size=5)
    images, texts = pretraining_batch(7, 40)
    parts = [small.train, small.validation, small.test, *small.shifts.values()]
    arrays = [part.images for part in parts] + [part.labels for part in parts] + [images]
    data = b"".join(array.tobytes() for array in arrays) + "\n".join(texts).encode()
    return hashlib.sha256(data).hexdigest()


def test_masks_are_distinct_characters_inside_the_page():
    pages = masks()
    fill = pages[STYLES.index("fill")]
    assert pages.shape == (4, 22, 62, 40, 40) and pages.dtype == np.uint8
    assert len({page.tobytes() for page in fill.reshape(-1, 40 * 40)}) == 22 * 62
    # Sampling would smear or crop ink on the border of a page.
    assert fill[..., 0, :].max() == fill[..., -1, :].max() == 0
    assert (
        fill.sum(axis=(-2, -1)).min() > 40 * 255
    )  # At least 40 pixels of ink: 'l' in thin italic.


def test_styles_change_the_weight_of_strokes():
    fill, thick, thin, outline = masks().astype(np.int64)
    ink = fill.sum(axis=(-2, -1))
    assert (thick >= fill).all() and (thick.sum(axis=(-2, -1)) > 1.2 * ink).all()
    assert (thin <= fill).all() and (thin.sum(axis=(-2, -1)) < 0.95 * ink).all()
    # An outline excludes the inside of a stroke.
    bold = FONTS.index(next(font for font in FONTS if font.name == "DejaVuSans-Bold"))
    inside = thin[bold] > 250
    assert outline[bold][inside].mean() < 40


def test_baseline_is_shared():
    fill = masks()[0]
    flat = [CHARACTERS.index(character) for character in "AEFHILTXfhikmnrxz"]
    upright = font_indices(["DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "cmss10"])
    for font in upright:
        rows = {int(np.flatnonzero((page > 127).any(axis=1))[-1]) for page in fill[font][flat]}
        assert len(rows) == 1, FONTS[font].name


def test_an_image_does_not_depend_on_its_batch():
    key, labels = jax.random.key(3), np.arange(600) % 62
    everything, _ = render(key, np.arange(600), labels, PRETRAINING)
    some = np.array([599, 3, 511, 512])
    np.testing.assert_array_equal(render(key, some, labels[some], PRETRAINING)[0], everything[some])
    assert not np.array_equal(render(jax.random.key(4), some, labels[some], PRETRAINING)[0],
                              everything[some])  # fmt: skip


def test_plain_domain_renders_the_mask_itself():
    plain = Domain(fonts=("DejaVuSans",), contrast=(1.0, 1.0), paper=(1.0, 1.0))
    labels = np.arange(62)
    images, scenes = render(jax.random.key(0), labels, labels, plain)
    assert (scenes.font == 0).all() and (scenes.style == 0).all()
    assert (images == images[..., :1]).all()
    ink = (255 - images[..., 0].astype(np.float64)).sum(axis=(1, 2))
    expected = masks()[0, 0].astype(np.float64).sum(axis=(1, 2)) * (24 / 40) ** 2
    # Sampling at 24 points per side is not an exact integral: the stem of 'I' loses 11 %.
    np.testing.assert_allclose(ink, expected, rtol=0.15)


@pytest.mark.parametrize(
    ("change", "test"),
    [
        ({"noise": 0.2}, lambda a, b: (np.ptp(a, axis=-1) > 0).mean() > 0.5),
        (
            {"color_prob": 1.0, "paper": (0.6, 0.6)},
            lambda a, b: (np.ptp(a, axis=-1).max(axis=(1, 2)) > 20).all(),
        ),
        ({"inversion_prob": 1.0}, lambda a, b: a.mean() < 80),
        ({"shift": 0.2}, lambda a, b: not np.array_equal(a, b)),
        ({"rotation": 40.0}, lambda a, b: not np.array_equal(a, b)),
        ({"perspective": 0.3}, lambda a, b: not np.array_equal(a, b)),
        ({"elastic": 0.05}, lambda a, b: not np.array_equal(a, b)),
        ({"blur": 1.0}, lambda a, b: a.min(axis=(1, 2, 3)).mean() > b.min(axis=(1, 2, 3)).mean()),
        ({"clutter_prob": 1.0}, lambda a, b: a.mean() < b.mean()),
        ({"texture_prob": 1.0}, lambda a, b: a[:, 0].std() > b[:, 0].std()),
        ({"occlusion_prob": 1.0}, lambda a, b: (a != b).any(axis=(1, 2, 3)).mean() > 0.95),
        ({"scale": (1.2, 1.2)}, lambda a, b: a.mean() < b.mean()),
    ],
)
def test_every_parameter_changes_the_images_as_named(change, test):
    plain = Domain(fonts=("DejaVuSans-Bold",))
    labels = np.arange(124) % 62
    images = [
        render(jax.random.key(1), labels, labels, domain)[0]
        for domain in (dataclasses.replace(plain, **change), plain)
    ]
    assert test(*images)


def test_pretraining_has_all_classes_and_styles_but_no_held_out_font():
    labels = np.arange(4096) % 62
    _, scenes = render(jax.random.key(5), np.arange(4096), labels, PRETRAINING)
    held_out = set(font_indices(HELD_OUT_FONTS))
    assert set(scenes.font.tolist()) == set(range(22)) - held_out
    assert set(scenes.style.tolist()) == {0, 1, 2, 3}
    # Probabilities scale with a uniform difficulty: half of the domain's, within 5 standard errors.
    outlined = (scenes.style == STYLES.index("outline")).mean()
    assert abs(outlined - PRETRAINING.outline_prob / 2) < 5 * np.sqrt(0.125 * 0.875 / 4096)


def test_another_process_renders_identical_images():
    code = "from tests.data.test_glyph_images import checksum; print(checksum())"
    plain = {k: v for k, v in os.environ.items() if k != "JAX_ENABLE_X64"}
    # One device instead of eight. XLA's optimization flags stay, because they may change a bit.
    plain["XLA_FLAGS"] = plain["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=plain, check=True,
                          capture_output=True, text=True)  # fmt: skip
    assert done.stdout.strip() == checksum()


@pytest.mark.parametrize(("seed", "n"), [(-1, 4), (0, 0)])
def test_pretraining_batch_rejects(seed, n):
    with pytest.raises(UserError, match="seed >= 0 and n >= 1"):
        pretraining_batch(seed, n)


def test_error_says_how_to_install_missing_fonts(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        masks.__wrapped__()
