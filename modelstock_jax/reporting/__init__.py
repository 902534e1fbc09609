"""What a run leaves behind: metrics, tables, figures, a model card. Imports no jax."""
