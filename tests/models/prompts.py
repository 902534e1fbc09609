"""Class names, templates, and captions that contain each of their words."""

from __future__ import annotations

CLASSES = ("uppercase letter a", "digit 7", "small cat")
TEMPLATES = ("a photo of the {}.", "the {} in a {} font", "{}")
CAPTIONS = [t.replace("{}", c) for t in TEMPLATES for c in CLASSES] * 2
# Vocabulary size of the tokenizer trained on them.
BOS, EOS, UNKNOWN = 0, 1, 2
