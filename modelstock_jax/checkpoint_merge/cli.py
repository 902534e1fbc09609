"""`modelstock`: the command line. Heavy imports wait until a command runs."""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence

from modelstock_jax.checkpoint_merge.arguments import parsers
from modelstock_jax.checkpoint_merge.streams import guarded
from modelstock_jax.errors import UserError, listed

INTERRUPTED = 130  # As a shell reports a process that Ctrl-C ended.


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      argv: what was typed after `modelstock`; by default the process's own.

    Returns:
      The exit status: 0, also for a merge whose summary could not be printed; 1 for a mistake (one
      line on standard error says which), or where the output of another command could not be
      written; 130 when interrupted. Mistakes in the options themselves exit with 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    with guarded() as (output, _):
        top, commands = parsers()
        if not argv or argv[0] not in commands or {"-h", "--help"} & set(argv):
            top.parse_args(argv or ["--help"])  # Help, the version, or a mistake: it exits.
        arguments = commands[argv[0]].parse(argv[1:])
        status = _run(argv, arguments)
        output.flush()
        if status or output.error is None:
            return status
        return _unwritten(output.error, made=argv[0] == "merge" and not arguments.dry_run)


def _run(argv: list[str], arguments) -> int:
    try:
        from modelstock_jax.checkpoint_merge import commands as run

        getattr(run, argv[0])(arguments, argv)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        where = listed([str(error.filename or "files")])
        print(f"error: {where}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED


def _unwritten(error: OSError, *, made: bool) -> int:
    """The exit status of a command that did all but print its result."""
    if error.errno != errno.EPIPE:  # Else its reader has enough: `modelstock compare ... | head`
        what = "note: the merge is made, but its summary" if made else "error: the result"
        print(f"{what} cannot be written to standard output ({error.strerror or error})",
              file=sys.stderr)
    return 0 if made else 1


if __name__ == "__main__":
    sys.exit(main())
