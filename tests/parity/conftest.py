"""What in this folder is no test."""

# A program for an interpreter of its own; --doctest-modules would import it here.
collect_ignore = ["open_clip_reader.py"]
