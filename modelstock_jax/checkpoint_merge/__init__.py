"""`modelstock merge`: merge checkpoints of any model by tensor, without loading a model."""
