"""Training of R replicas: train step, merge step, sharding, checkpoints, metrics."""

from modelstock_jax.extras import require

require("train", ["jax", "flax", "optax"])
