"""Training of R replicas: train step, merge step, sharding, checkpoints, metrics."""
