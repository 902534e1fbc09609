"""Train, merge and evaluate: `python launch.py --config=configs/glyphs.py --workdir=DIR`.

--config is the config file (default: configs/glyphs.py). --config.epochs=4 and the like override
its options (docs/configuration.md). To evaluate any checkpoint, run `python launch.py --mode=eval
--checkpoint=DIR`. --dry-run prints missing inputs, sizes and memory; with --device_memory=24, also
whether the run fits in 24 GB. On several hosts, run the same command on every host (docs/scale.md).
"""

import sys

from modelstock_jax.extras import require

require("train", is_program=True)
from absl import app, flags  # noqa: E402

from modelstock_jax.flags import check_command, parse, run_name  # noqa: E402

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "Output directory of the run (default: runs/CONFIG).")
flags.DEFINE_enum("mode", "train", ["train", "eval"], "Train, or evaluate --checkpoint.")
flags.DEFINE_string("checkpoint", None, "Directory or hub id to evaluate with --mode=eval.")
flags.DEFINE_bool("dry-run", False, "Print sizes, memory, missing inputs (if any, exit code 1).")
flags.DEFINE_float("device_memory", None, "GB per device, for --dry-run: does the run fit?", 0)
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
    check_command(argv[1:])
    workdir = FLAGS.workdir or f"runs/{run_name(FLAGS['config'].config_filename)}"
    # Importing jax takes a second, which --help does not need.
    from modelstock_jax.training.launcher import distributed_session

    with distributed_session(FLAGS.coordinator_address, FLAGS.num_processes, FLAGS.process_id):
        from modelstock_jax import experiment

        if FLAGS.mode == "eval":
            experiment.evaluate_checkpoint(FLAGS.config, FLAGS.checkpoint)
        elif FLAGS["dry-run"].value:
            sys.exit(bool(experiment.dry_run(FLAGS.config, workdir, FLAGS.device_memory)))
        else:
            experiment.run(FLAGS.config, workdir, sys.argv, FLAGS.allow_config_change)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
