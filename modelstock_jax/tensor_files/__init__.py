"""Directories of safetensors files: reading, writing, digests; NumPy alone."""
