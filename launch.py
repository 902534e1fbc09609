"""Train, merge and evaluate: `python launch.py --config=configs/glyphs.py --workdir=DIR`.

--config is the config file (default: configs/glyphs.py); --config.epochs=4 overrides an option
(docs/configuration.md). --mode=eval --checkpoint=DIR evaluates any checkpoint. --dry-run prints
sizes, memory and missing inputs. On several hosts, run it on every host (docs/scale.md).
"""

import sys

from modelstock_jax.extras import require

require("train", is_program=True)
from absl import app, flags, logging  # noqa: E402

from modelstock_jax.flags import parse, run_name  # noqa: E402

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "Output directory of the run (default: runs/CONFIG).")
flags.DEFINE_enum("mode", "train", ["train", "eval"], "Train, or evaluate --checkpoint.")
flags.DEFINE_string("checkpoint", None, "Directory or hub id to evaluate with --mode=eval.")
flags.DEFINE_bool("dry-run", False, "Print sizes, memory, missing inputs (if any, exit code 1).")
flags.DEFINE_bool(
    "allow_config_change",
    False,
    "Resume even if options that affect only rounding (mesh.*) or paths (data.root) differ.",
)
flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0 (detected on Slurm, Open MPI, Cloud TPU)."
)
flags.DEFINE_integer("num_processes", None, "Number of processes that run this command together.")
flags.DEFINE_integer("process_id", None, "Index of this process, 0 to num_processes - 1.")


def main(argv: list[str]) -> None:
    """Run once; a user error is one line and exit code 1."""
    logging.set_verbosity(logging.FATAL)  # Libraries also raise what they log.
    if len(argv) > 1:
        sys.exit(f"error: unknown argument {argv[1]!r}; every option starts with --")
    if FLAGS.checkpoint and FLAGS.mode == "train":
        sys.exit(
            f"error: --checkpoint is for evaluation: pass --mode=eval"
            f" --checkpoint={FLAGS.checkpoint}; training starts from --config.pretrained"
        )
    workdir = FLAGS.workdir or f"runs/{run_name(FLAGS['config'].config_filename)}"
    # Importing jax takes a second, which --help does not need.
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
