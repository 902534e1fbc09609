"""Tables and figures of the paper: `python -m studies table1 fig2`.

Without a name it lists them; `all` takes every one. Finished measurements are read from --ledger,
finished runs from --workdir; interrupted, the same command goes on, and given again while it runs
(on another GPU, or on another machine with the same disk) it shares the work. With --anchors each
study is done again from other pretrained models, CLIPs or towers (`tower:resnet`), and has a page
of its own, NAME_anchors.md: a tower is pretrained when it is first named, be it with --dry-run,
for a study is of its weights.
"""

from __future__ import annotations

import difflib
import sys
from pathlib import Path

from absl import app, flags, logging

from modelstock_jax.flags import config_arguments, parse

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", "runs/studies", "Where trained runs are kept.")
flags.DEFINE_string("ledger", None, "Finished measurements (default: WORKDIR/measured.jsonl).")
flags.DEFINE_string("out", None, "Where tables and figures are written (default: WORKDIR).")
flags.DEFINE_integer("num_seeds", None, "Seeds of each study (default: its own number).")
flags.DEFINE_list("anchors", [], "Further pretrained models; every named study is done from each.")
flags.DEFINE_bool("dry-run", False, "Print what is missing (exit code 1) and how long it takes.")


def main(argv: list[str]) -> None:
    """Runs the named studies; a user's mistake is one line and exit code 1."""
    logging.set_verbosity(logging.FATAL)  # Libraries log what they also raise.
    from studies.catalog import STUDIES

    given = argv[1:]
    if not given:
        for study in STUDIES.values():
            print(f"{study.name:16} {study.title}")
        print(f"{'all':16} All of them")
        return
    names = list(dict.fromkeys([*STUDIES] if "all" in given else given))
    for name in names:
        if name not in STUDIES:
            close = difflib.get_close_matches(name, STUDIES, 1)
            meant = f"did you mean {close[0]}? There" if close else "there"
            sys.exit(f"error: no study {name!r}; {meant} are: {', '.join(STUDIES)}")
    from modelstock_jax.training.launcher import single_process_session
    from studies.ledger import Ledger
    from studies.pages import write_index
    from studies.runner import Runner

    workdir = Path(FLAGS.workdir)
    out = Path(FLAGS.out or workdir)
    with single_process_session():
        runner = Runner(
            FLAGS.config,
            workdir,
            Ledger(FLAGS.ledger or workdir / "measured.jsonl"),
            out,
            FLAGS.num_seeds,
            FLAGS.anchors,
            config_arguments(sys.argv[1:]),
        )
        missing = runner.plan([STUDIES[name] for name in names])
        if FLAGS["dry-run"].value:
            sys.exit(missing > 0)
        for name in names:
            runner.run(STUDIES[name])
            write_index(list(STUDIES.values()), out)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
