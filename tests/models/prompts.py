"""Class names and templates, and captions that hold every word of them."""

from __future__ import annotations

CLASSES = ("uppercase letter a", "digit 7", "small cat")
TEMPLATES = ("a photo of the {}.", "the {} in a {} font", "{}")
CAPTIONS = [t.replace("{}", c) for t in TEMPLATES for c in CLASSES] * 2
# Of the tokenizer that build_tokenizer makes of them.
BOS, EOS, UNKNOWN = 0, 1, 2
