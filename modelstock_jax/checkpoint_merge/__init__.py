"""`modelstock merge`: checkpoints of any model, merged tensor by tensor without loading a model."""
