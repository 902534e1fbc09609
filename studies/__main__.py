"""Reproduce tables and figures of the paper: `python -m studies table1 fig2`.

Without a name, list the studies. `all` runs every study. Finished measurements are read from
`--ledger`, finished runs from `--workdir`. Run the same command again to resume an interrupted
one. Run it several times at once (on several GPUs, or on several machines with a shared disk) to
split the work. With `--anchors`, each study is repeated from other pretrained models (CLIPs, or
towers such as `tower:resnet`) and written to a separate page, NAME_anchors.md. A tower is
pretrained when a measurement first needs its weights.

`--config FILE` sets the settings of all studies (default: configs/glyphs.py); `--config.x=...`
overrides an option.
"""

from __future__ import annotations

import difflib
import shlex
import sys
from pathlib import Path

from absl import app, flags

from modelstock_jax.flags import config_arguments, parse

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", "runs/studies", "Directory of trained runs.")
flags.DEFINE_string(
    "ledger", None, "File of finished measurements (default: WORKDIR/measured.jsonl)."
)
flags.DEFINE_string("out", None, "Directory of tables and figures (default: WORKDIR).")
flags.DEFINE_integer("num_seeds", None, "Seeds per study (default: set by each study).")
flags.DEFINE_list("anchors", [], "More pretrained models; each study is repeated from each one.")
flags.DEFINE_bool(
    "dry-run", False, "Print missing measurements and their time; exit code 1 if any is missing."
)


def main(argv: list[str]) -> None:
    """Run the named studies; a user error prints one line and exits with code 1."""
    from studies.catalog import GROUPS, STUDIES

    arguments = argv[1:]
    if not arguments:
        for study in STUDIES.values():
            print(f"{study.name:24} {study.title}")
        print(f"{'all':24} All studies")
        return
    names = list(dict.fromkeys([*STUDIES] if "all" in arguments else arguments))
    for name in names:
        if name not in STUDIES:
            close = difflib.get_close_matches(name, STUDIES, 1)
            hint = f"did you mean {close[0]}? Choose" if close else "choose"
            sys.exit(f"error: no study {name!r}; {hint} one of {', '.join(STUDIES)}")
    from modelstock_jax.training.launcher import single_process_session
    from studies.ledger import Ledger
    from studies.pages import write_index
    from studies.runner import Runner

    workdir = Path(FLAGS.workdir)
    out = Path(FLAGS.out or workdir)
    if FLAGS.ledger and not Path(FLAGS.ledger).exists():
        print(f"no ledger at {FLAGS.ledger} yet; it will be created", flush=True)
    paths = {"ledger": FLAGS.ledger, "out": FLAGS.out}
    with single_process_session():
        runner = Runner(
            FLAGS.config,
            workdir,
            Ledger(FLAGS.ledger or workdir / "measured.jsonl"),
            out,
            FLAGS.num_seeds,
            FLAGS.anchors,
            config_arguments(sys.argv[1:]),
            [shlex.quote(f"--{name}={path}") for name, path in paths.items() if path],
        )
        num_missing = runner.plan([STUDIES[name] for name in names])
        if FLAGS["dry-run"].value:
            sys.exit(num_missing > 0)
        for name in names:
            runner.run(STUDIES[name])
            write_index(GROUPS, out)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
