"""Trains, merges and evaluates: `python launch.py --config=configs/glyphs.py --workdir=DIR`.

--config names a file (by default configs/glyphs.py), and --config.epochs=4 or the like overrides
one of its options (docs/configuration.md). Evaluates any checkpoint: `python launch.py --mode=eval
--checkpoint=DIR`. With --dry-run it says what a run takes and what is missing. On many hosts, the
same command on each (docs/scale.md).
"""

import sys

from absl import app, flags, logging

from modelstock_jax.flags import parse, run_name

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "Where the run is written (default: runs/CONFIG).")
flags.DEFINE_enum("mode", "train", ["train", "eval"], "Train, or evaluate --checkpoint.")
flags.DEFINE_string("checkpoint", None, "With --mode=eval: a directory or a hub id.")
flags.DEFINE_bool("dry-run", False, "Print sizes, memory and what is missing; exit 1 if any is.")
flags.DEFINE_bool(
    "allow_config_change", False, "Go on though options changed that only round, or are places."
)
flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0; clusters tell it.")
flags.DEFINE_integer("num_processes", None, "How many processes run this command together.")
flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")


def main(argv: list[str]) -> None:
    """One run; a user's mistake is one line and exit code 1."""
    logging.set_verbosity(logging.FATAL)  # Libraries log what they also raise.
    if len(argv) > 1:
        sys.exit(f"error: unknown argument {argv[1]!r}; every option starts with --")
    if FLAGS.checkpoint and FLAGS.mode == "train":
        sys.exit(
            f"error: to evaluate it: --mode=eval --checkpoint={FLAGS.checkpoint}; a training"
            " begins from --config.pretrained"
        )
    workdir = FLAGS.workdir or f"runs/{run_name(FLAGS['config'].config_filename)}"
    # jax takes a second: --help need not wait for it.
    from modelstock_jax.training.launcher import distributed_session

    with distributed_session(FLAGS.coordinator_address, FLAGS.num_processes, FLAGS.process_id):
        from modelstock_jax import experiment

        if FLAGS.mode == "eval":
            experiment.evaluate_checkpoint(FLAGS.config, FLAGS.checkpoint)
        elif FLAGS["dry-run"].value:
            sys.exit(1 if experiment.dry_run(FLAGS.config, workdir) else 0)
        else:
            experiment.run(FLAGS.config, workdir, sys.argv, FLAGS.allow_config_change)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
