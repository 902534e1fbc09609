"""Datasets, the input pipeline, and the synthetic benchmark."""
