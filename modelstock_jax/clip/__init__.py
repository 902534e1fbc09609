"""CLIP: towers, weights on disk, zero-shot heads."""
