"""Safetensors files and directories: read, write and checksum them with NumPy only."""
