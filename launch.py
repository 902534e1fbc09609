"""Trains, merges and evaluates: `python launch.py --config=configs/glyphs.py --workdir=DIR`.

Evaluates any checkpoint: `python launch.py --mode=eval --checkpoint=DIR`.
"""

import shlex
import sys

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from modelstock_jax.errors import UserError

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", "configs/glyphs.py", "The experiment; see configs/.")
flags.DEFINE_string("workdir", "runs/glyphs", "Where everything of the run is written.")
flags.DEFINE_enum("mode", "train", ["train", "eval"], "Train, or evaluate --checkpoint.")
flags.DEFINE_string("checkpoint", None, "With --mode=eval: a checkpoint's directory.")


def parse(argv: list[str]) -> list[str]:
    """Reads the flags; a misspelt config key names its neighbours instead of a traceback."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(getattr(error.args[0], "args", error.args)[0]).split())
        sys.exit(f"error: no such option in the config: {reason}")


def load_config() -> ConfigDict:
    """The config, with the overrides of the command line."""
    try:
        return FLAGS.config
    except OSError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise UserError(f"--config: {lines[-1]}") from error


def main(argv: list[str]) -> None:
    """One run; a user's mistake is one line and exit code 1."""
    logging.set_verbosity(logging.ERROR)
    from modelstock_jax import experiment  # jax takes a second: --help need not wait for it.

    try:
        if len(argv) > 1:
            raise UserError(f"unknown argument {argv[1]!r}; every option starts with --")
        if FLAGS.mode == "eval":
            experiment.evaluate_checkpoint(load_config(), FLAGS.checkpoint)
        else:
            experiment.run(load_config(), FLAGS.workdir, shlex.join(["python", *sys.argv]))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
