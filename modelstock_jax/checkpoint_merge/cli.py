"""`modelstock`: the command line. Heavy imports wait until a command runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from modelstock_jax.checkpoint_merge.arguments import parsers
from modelstock_jax.errors import UserError

INTERRUPTED = 130  # As a shell reports a process that Ctrl-C ended.


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      argv: what was typed after `modelstock`; by default the process's own.

    Returns:
      The exit status: 0; 1 for a mistake (one line on standard error says which); 130 when
      interrupted. Mistakes in the options themselves exit with 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    top, commands = parsers()
    if not argv or argv[0] not in commands or {"-h", "--help"} & set(argv):
        top.parse_args(argv or ["--help"])  # Help, the version, or a mistake: it exits.
    arguments = commands[argv[0]].parse(argv[1:])
    try:
        from modelstock_jax.checkpoint_merge import commands as run

        getattr(run, argv[0])(arguments, argv)
        sys.stdout.flush()
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `modelstock compare ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"error: {error.filename or 'files'}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
