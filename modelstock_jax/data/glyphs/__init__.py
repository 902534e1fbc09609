"""The glyph world: characters in 22 fonts, a broad world, a narrow one, and shifts of it."""

from modelstock_jax.data.glyphs.captions import CLASS_NAMES, TEMPLATES, pretraining_batch
from modelstock_jax.data.glyphs.sets import GlyphWorld, world

__all__ = ["CLASS_NAMES", "TEMPLATES", "GlyphWorld", "pretraining_batch", "world"]
