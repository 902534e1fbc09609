"""Run the command `modelstock` as `python -m modelstock_jax`, without an installed script."""

import sys

from modelstock_jax.checkpoint_merge.cli import main

sys.exit(main())
