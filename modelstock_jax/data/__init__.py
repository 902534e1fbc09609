"""Image sets, the input pipeline, and the glyph world."""
