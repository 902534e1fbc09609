"""`python -m modelstock_jax`: the command `modelstock`, where it is not installed as a script."""

import sys

from modelstock_jax.checkpoint_merge.cli import main

sys.exit(main())
