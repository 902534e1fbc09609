"""Outputs of a run: metrics, tables, figures, model card. Imports no jax."""
