"""Files in this directory that are not tests."""

# A program for a separate interpreter; --doctest-modules would import it.
collect_ignore = ["open_clip_reader.py"]
