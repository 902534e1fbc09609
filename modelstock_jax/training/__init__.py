"""The replicated training loop: state, step, merge, checkpoints."""
