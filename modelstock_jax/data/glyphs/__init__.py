"""The glyph world: characters in 22 fonts, a broad world, a narrow one, and shifts of it."""

from modelstock_jax.data.glyphs.captions import CLASS_NAMES, TEMPLATES, pretraining_batch
from modelstock_jax.data.glyphs.sets import GlyphSets, make_sets

__all__ = ["CLASS_NAMES", "TEMPLATES", "GlyphSets", "make_sets", "pretraining_batch"]
