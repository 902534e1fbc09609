"""Datasets, the input pipeline, and the synthetic benchmark."""

from modelstock_jax.extras import require

require("train", ["jax", "ml_collections"])
