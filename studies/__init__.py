"""Each table and figure of the paper: its measurements and its summary."""

from modelstock_jax.extras import require

require("train")
