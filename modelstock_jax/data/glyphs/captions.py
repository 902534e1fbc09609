"""Class names, prompts and captions of the 62 characters.

CLIP's tokenizers lower-case their input, so words state the case of a letter.
"""

from __future__ import annotations

import jax
import numpy as np

from modelstock_jax.data.glyphs.render import (
    CHARACTERS,
    FONTS,
    GRAY,
    HUES,
    PRETRAINING,
    STYLES,
    Scene,
    render,
)
from modelstock_jax.data.image_set import ImageSet
from modelstock_jax.errors import UserError


def _name(character: str, with_case: bool = True) -> str:
    if character.isdigit():
        return f"digit {character}"
    case = "uppercase " if character.isupper() else "lowercase "
    return f"{case if with_case else ''}letter {character.lower()}"


CLASS_NAMES = tuple(_name(character) for character in CHARACTERS)
_CASELESS_NAMES = tuple(_name(character, with_case=False) for character in CHARACTERS)

TEMPLATES = (
    "a picture of the {}.",
    "a small image of the {}.",
    "the {}.",
    "this is the {}.",
    "the {} in a plain font.",
    "a photo of the {} on grey paper.",
    "the {} printed in a serif font.",
    "the {} printed in a sans serif font.",
)
"""Prompts of the zero-shot head; {} is the class name."""

CASE_LEFT_OUT = 0.15
INK_NAMED = 0.30
PAPER_NAMED = 0.25

_CAPTIONS = (
    "a picture of the {name} in {article} {style} font{colors}.",
    "a small image of the {name} printed in {article} {style} font{colors}.",
    "the {name} in {article} {style} font{colors}.",
    "this is the {name} set in {article} {style} face{colors}.",
    "a photo of the {name}, {style} type{colors}.",
    "{article} {style} {name}{colors}, seen close.",
)


def color_word(hue: int, light: float) -> str:
    """Return the word for a color: its hue, or black, gray or white by its luminance.

    >>> color_word(GRAY, 0.1)
    'black'
    """
    if hue != GRAY:
        return HUES[hue]
    return "black" if light < 0.3 else "grey" if light < 0.75 else "white"


def captions(rng: np.random.Generator, scenes: Scene) -> list[str]:
    """Return one caption per image: class, case, font style, and sometimes the colors.

    15 % of the captions leave out the case of a letter, 70 % the ink's color and 75 % the paper's
    color, so that most of the information is in the words that distinguish the classes.

    Args:
      rng: draws the templates and what is left out
      scenes: NumPy leaves with leading axis M

    Returns:
      M strings of about 12 words.
    """
    count = len(scenes.label)
    templates = rng.integers(len(_CAPTIONS), size=count)
    case, ink, paper = rng.random((3, count))
    texts = []
    for i in range(count):
        names = _CASELESS_NAMES if case[i] < CASE_LEFT_OUT else CLASS_NAMES
        style = FONTS[scenes.font[i]].words
        if STYLES[scenes.style[i]] == "outline":
            style = f"outlined {style}"
        colors = ""
        if ink[i] < INK_NAMED:
            colors += f" in {color_word(int(scenes.ink_hue[i]), float(scenes.ink_light[i]))}"
        if paper[i] < PAPER_NAMED:
            paper_word = color_word(int(scenes.paper_hue[i]), float(scenes.paper_light[i]))
            colors += f" on {paper_word} paper"
        texts.append(
            _CAPTIONS[templates[i]].format(
                name=names[scenes.label[i]],
                article="an" if style[0] in "aeiou" else "a",
                style=style,
                colors=colors,
            )
        )
    return texts


# Separates these random numbers from those of the datasets.
_STREAM = 1
_LABELED = 101


def pretraining_batch(seed: int, n: int) -> tuple[np.ndarray, list[str]]:
    """Return a batch of image-text pairs of the pretraining distribution, without held-out fonts.

    Args:
      seed: any int >= 0; the same seed gives the same batch in every process
      n: number of pairs; multiples of 512 need no padding

    Returns:
      uint8 [n, 24, 24, 3], and n captions.

    Raises:
      UserError: n < 1 or seed < 0

    >>> images, texts = pretraining_batch(0, 2)
    >>> images.shape, len(texts)
    ((2, 24, 24, 3), 2)
    """
    if n < 1 or seed < 0:
        raise UserError(
            f"pretraining_batch: seed is {seed} and n is {n}; give seed >= 0 and n >= 1"
        )
    rng = np.random.default_rng([_STREAM, seed])
    labels = rng.integers(len(CHARACTERS), size=n)
    key = jax.random.key(int(rng.integers(2**31)), impl="threefry2x32")
    images, scenes = render(key, np.arange(n), labels, PRETRAINING)
    return images, captions(rng, scenes)


def pretraining_set(size: int) -> ImageSet:
    """Return labeled images of the pretraining distribution, to pretrain towers without text.

    >>> pretraining_set(3).images.shape
    (3, 24, 24, 3)
    """
    labels = (np.arange(size) % len(CHARACTERS)).astype(np.int32)
    key = jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), _LABELED)
    return ImageSet("broad", render(key, np.arange(size), labels, PRETRAINING)[0], labels)
