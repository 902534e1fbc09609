"""The synthetic benchmark: characters in 22 fonts, to pretrain, fine-tune and evaluate on.

The test sets include distribution shifts of the fine-tuning distribution.
"""

from modelstock_jax.data.glyphs.captions import CLASS_NAMES, TEMPLATES, pretraining_batch
from modelstock_jax.data.glyphs.sets import GlyphSets, make_sets

__all__ = ["CLASS_NAMES", "TEMPLATES", "GlyphSets", "make_sets", "pretraining_batch"]
