"""Captions are correct, and leave out the stated fractions of the information."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from modelstock_jax.data.glyphs import CLASS_NAMES, TEMPLATES, pretraining_batch
from modelstock_jax.data.glyphs import captions as captions_module
from modelstock_jax.data.glyphs.captions import captions
from modelstock_jax.data.glyphs.render import (
    CHARACTERS,
    FONTS,
    HELD_OUT_FONTS,
    PRETRAINING,
    STYLES,
    render,
)

COUNT = 4096


@pytest.fixture(scope="module")
def captioned():
    labels = np.arange(COUNT) % 62
    _, scenes = render(jax.random.key(0), np.arange(COUNT), labels, PRETRAINING)
    return scenes, captions(np.random.default_rng(0), scenes)


def words(character: str, text: str) -> bool:
    """Return whether the text names this character, with or without its case."""
    text = f" {text.rstrip('.').replace(',', ' ')} "
    kind = "digit" if character.isdigit() else "letter"
    return f" {kind} {character.lower()} " in text


def close_to(fraction: float, expected: float, count: int) -> bool:
    """Return whether a binomial fraction is within five standard errors."""
    return abs(fraction - expected) < 5 * np.sqrt(expected * (1 - expected) / count)


def test_class_names_differ_after_lower_casing():
    assert len({name.lower() for name in CLASS_NAMES}) == 62
    assert CLASS_NAMES[0] == "uppercase letter a"
    assert CLASS_NAMES[26] == "lowercase letter a"
    assert CLASS_NAMES[59] == "digit 7"
    assert all(template.count("{}") == 1 for template in TEMPLATES)


def test_captions_name_the_class_and_never_the_other_case(captioned):
    scenes, texts = captioned
    for label, text in zip(scenes.label, texts, strict=True):
        character = CHARACTERS[label]
        assert words(character, text), text
        assert character.isupper() or "uppercase" not in text
        assert character.islower() or "lowercase" not in text


def test_case_is_left_out_for_some_letters_only(captioned):
    scenes, texts = captioned
    letters = [text for label, text in zip(scenes.label, texts, strict=True) if label < 52]
    without = np.mean(["case letter" not in text for text in letters])
    assert close_to(without, 0.15, len(letters))


def test_captions_state_the_style(captioned):
    scenes, texts = captioned
    for i, text in enumerate(texts):
        outlined = scenes.style[i] == STYLES.index("outline")
        style = ("outlined " if outlined else "") + FONTS[scenes.font[i]].words
        assert style in text
        assert outlined or "outlined" not in text
        assert f"{'a' if style[0] in 'io' else 'an'} {style}" not in text


def test_captions_state_colors_sometimes(captioned):
    _, texts = captioned
    paper = np.mean([" paper" in text for text in texts])
    assert close_to(paper, 0.25, COUNT)
    colors = ("black", "grey", "white", *captions_module.HUES)
    ink = np.mean([any(f" in {word}" in text for word in colors) for text in texts])
    assert close_to(ink, 0.30, COUNT)


def test_color_words_match_the_pixels():
    labels = np.full(512, CHARACTERS.index("M"))
    images, scenes = render(jax.random.key(2), np.arange(512), labels, PRETRAINING)
    corner = np.median(images[:, [0, 0, -1, -1], [0, -1, 0, -1]].astype(float), axis=1)
    for i in range(512):
        word = captions_module.color_word(scenes.paper_hue[i], scenes.paper_light[i])
        # Clutter, texture and patches may hide the corners: only plain papers are checked.
        if scenes.wave[i, 0] or scenes.clutter[i, 0] or scenes.patch[i, 0]:
            continue
        red, green, blue = corner[i]
        slack = 60  # For noise of up to 0.12, and for light or dark paper with little hue.
        ruled_out = {
            "red": red < max(green, blue) - slack,
            "green": green < max(red, blue) - slack,
            "blue": blue < max(red, green) - slack,
            "yellow": blue > min(red, green) + slack,
            "cyan": red > min(green, blue) + slack,
            "purple": green > min(red, blue) + slack,
            "black": max(corner[i]) > 76 + slack,
            "white": min(corner[i]) < 191 - slack,
            "grey": np.ptp(corner[i]) > 2 * slack,
        }
        assert not ruled_out[word], (word, corner[i])


def test_about_twelve_words(captioned):
    assert 11 < np.mean([len(text.split()) for text in captioned[1]]) < 14


def test_held_out_fonts_are_never_in_a_caption():
    words_of = {font.name: font.words for font in FONTS}
    assert len(set(words_of.values())) == 22
    _, texts = pretraining_batch(1, COUNT)
    for name in HELD_OUT_FONTS:
        phrase = words_of[name] if words_of[name].startswith("bold") else f" {words_of[name]} "
        matches = [t for t in texts if phrase in t.replace("bold " + words_of[name], "") + " "]
        assert not matches, name


def test_batches_depend_only_on_the_seed():
    images, texts = pretraining_batch(3, 20)
    again, same = pretraining_batch(3, 20)
    other, others = pretraining_batch(4, 20)
    np.testing.assert_array_equal(images, again)
    assert texts == same and texts != others and not np.array_equal(images, other)
    assert images.shape == (20, 24, 24, 3) and images.dtype == np.uint8 and len(texts) == 20
