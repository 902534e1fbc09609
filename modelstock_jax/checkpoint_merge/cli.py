"""`modelstock`: arguments, help and exit codes. Heavy imports wait until a command runs."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn, TextIO

from modelstock_jax import __version__
from modelstock_jax.checkpoint_merge.options import (
    ANCHOR_ROUNDING,
    CHECKSUMS,
    DTYPES,
    HEAD,
    MISSING_TENSORS,
    TIED_HEAD,
    VOCAB_MISMATCH,
    dtype_name,
    method_name,
)
from modelstock_jax.errors import UserError, listed, near
from modelstock_jax.merging.units import UNITS
from modelstock_jax.registry import COMMANDS

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
        print(
            f"{what} cannot be written to standard output ({error.strerror or error})",
            file=sys.stderr,
        )
    return 0 if made else 1


# What may be typed after `modelstock`. Imports nothing that is slow.

_SIZES = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}
_INPUTS = """\
BASE is the model that was fine-tuned; FT1, FT2, ... are its fine-tunes. Each is
  a directory with safetensors, a pipeline's directory, or a .safetensors file
  ORG/NAME or ORG/NAME@REVISION, a model of the Hugging Face hub
  a directory with a LoRA adapter of BASE, or MODEL+ADAPTER
"""
_EXAMPLES = {
    "merge": """\
examples:
  modelstock merge meta-llama/Llama-3.1-8B ./run1 ./run2 --out merged
  modelstock merge ./base ./lora1 ./lora2 --out merged --dtype bfloat16
  modelstock merge ./clip ./ft1 ./ft2 --out merged --include 'vision_model.*'
  modelstock merge mergekit.yml --out merged
""",
    "compare": """\
examples:
  modelstock compare ./base ./ft1 ./ft2 --plot angles.png
  modelstock compare ./base ./ft1 ./ft2 --json > angles.json
""",
}

# Options of mergekit, PyTorch and transformers -> the option here, or what to do.
_NEEDLESS = {
    "no accelerator is needed or used; leave it out": (
        "device", "devices", "cuda", "gpu", "gpus", "gpu-rich", "multi-gpu", "device-map", "cpu",
        "read-to-gpu"),
    "code of a checkpoint is never run; leave it out": ("trust-remote-code",),
    "tensors are always read in pieces; leave it out": (
        "lazy-unpickle", "lazy-loader", "low-cpu-memory", "low-cpu-mem-usage", "low-memory"),
    "tokenizer files are always copied; leave it out": ("copy-tokenizer",),
    "a model card is always written; leave it out": ("write-model-card",),
    "safetensors are always written; leave it out": ("safe-serialization",),
    "models that do not fit each other are an error; leave it out": ("allow-crimes",),
    "adapters are applied while they are read; leave it out": (
        "lora-merge-cache", "lora-merge-dtype"),
    "models of the hub are in Hugging Face's cache; set HF_HOME to move it": (
        "transformers-cache", "cache-dir"),
    "BASE is the first model given; give it before the others": ("base-model", "base"),
    "give the models one after the other: BASE FT1 FT2": ("models", "model", "finetuned"),
    "nothing is random in a merge; leave it out": ("random-seed", "seed"),
}  # fmt: skip
_RENAMED = {
    "--out": ("output", "o", "output-dir", "output-path", "out-path", "out-dir", "outdir",
              "save-path", "save-dir"),
    "--max-shard-size": ("out-shard-size", "shard-size"),
    "--threads": ("num-threads", "workers", "num-workers", "jobs", "j"),
    "--weights": ("weight",),
    "--scale": ("lambda", "lambd", "scaling"),
    "--method": ("merge-method",),
    "--recipe": ("yaml",),
    # Earlier versions of this command.
    "--unmerged-from": ("excluded",),
    "--tied-head": ("tied",),
    "--missing-tensors": ("missing",),
    "--vocab-mismatch": ("vocabulary",),
    "--checksum": ("digest",),
}  # fmt: skip


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """One line per option where that fits."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=26)


class Parser(argparse.ArgumentParser):
    """Mistakes are one line, and a misspelt option names the one that was meant."""

    others: Sequence[Parser] = ()  # Those of the other commands.

    def error(self, message: str) -> NoReturn:
        """Prints the mistake and where help is; exit status 2."""
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Reads options and inputs in any order."""
        values, unknown = self.parse_known_intermixed_args(arguments)
        if unknown:
            options = [option for action in self._actions for option in action.option_strings]
            wrong = next((text for text in unknown if text.startswith("-")), unknown[0])
            wrong = wrong.split("=")[0]
            if (advice := elsewhere(wrong, options)) is not None:
                self.error(f"{wrong}: {advice}")
            for command in self.others:
                if wrong in command._option_string_actions:
                    self.error(f"{wrong} is an option of {command.prog}")
            self.error(f"unknown option {listed([wrong])}{near(wrong, options)}")
        return values


def parsers() -> tuple[Parser, dict[str, Parser]]:
    """The parser of `modelstock`, and that of each command."""
    top = Parser(
        prog="modelstock", allow_abbrev=False,
        description="Merge fine-tuned models with their base by Model Stock (arXiv 2403.19522).",
    )  # fmt: skip
    top.add_argument("--version", action="version", version=f"modelstock {__version__}")
    listed = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands = {}
    for name, what in (
        ("merge", "merge fine-tunes of one base model into a new checkpoint"),
        ("compare", "angles, norms and ratios by layer; writes no model"),
    ):
        commands[name] = listed.add_parser(
            name, help=what, description=f"{what[0].upper()}{what[1:]}.\n\n{_INPUTS}",
            epilog=_EXAMPLES[name], formatter_class=_Formatter,
            usage=f"modelstock {name} BASE FT1 FT2 [FT3 ...] "
            + ("--out DIR [options]" if name == "merge" else "[options]"),
            allow_abbrev=False,
        )  # fmt: skip
    _add_merge(commands["merge"])
    commands["compare"].add_argument(
        "--plot", metavar="FILE", help="draw angles and norms over depth (.png)"
    )
    for parser in commands.values():
        _add_common(parser)
        parser.others = [other for other in commands.values() if other is not parser]
    return top, commands


def _add_common(parser: Parser) -> None:
    # Suppressed is left out of the namespace: what was not typed keeps the default of `Options`.
    parser.add_argument("models", nargs="*", metavar="BASE FT1 FT2", help=argparse.SUPPRESS)
    add = _adder(parser)
    add(
        "--unit",
        choices=UNITS,
        metavar="NAME",
        help=f"elements that share one angle: {', '.join(UNITS)} (tensor)",
    )
    add("--num-heads", metavar="N", help="for --unit head: 12, or vision_model=12,text_model=8")
    add(
        "--include",
        action="append",
        metavar="PATTERN",
        help="merge only matching tensors: 'model.layers.*'",
    )
    add("--exclude", action="append", metavar="PATTERN", help="do not merge matching tensors")
    add(
        "--vocab-mismatch",
        choices=VOCAB_MISMATCH,
        metavar="WHICH",
        help="embeddings of different sizes: merge common rows, take the rest from base or longest "
        "(error)",
    )
    add(
        "--tied-head",
        choices=TIED_HEAD,
        metavar="HOW",
        help="head tied to the embedding in some models: untie (keep)",
    )
    add(
        "--missing-tensors",
        choices=MISSING_TENSORS,
        metavar="HOW",
        help="tensors that some models lack: base (error)",
    )
    add(
        "--head",
        choices=HEAD,
        metavar="HOW",
        help="classifier that is new in the fine-tunes: take theirs, finetuned (error)",
    )
    add("--dequantize", action="store_true", help="read quantized weights as codes x scale")
    add(
        "--anchor-rounding",
        choices=ANCHOR_ROUNDING,
        metavar="HOW",
        help="correct the angles of a base that was rounded after training: correct (keep)",
    )
    add("--threads", type=int, metavar="N", help="worker threads (one per core)")
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else")


def _add_merge(parser: Parser) -> None:
    add = _adder(parser)
    parser.add_argument("--out", metavar="DIR", help="directory to write")
    parser.add_argument("--recipe", metavar="FILE", help="mergekit YAML instead of BASE FT1 FT2")
    add(
        "--method",
        type=_method,
        choices=COMMANDS,
        metavar="NAME",
        help=", ".join(method.command for method in COMMANDS.values()) + " (model-stock)",
    )
    add(
        "--dtype",
        type=dtype_name,
        choices=DTYPES,
        metavar="NAME",
        help="of the output: bfloat16, float16, ... (as in BASE)",
    )
    add(
        "--config-from", metavar="WHICH", help="config to write if models disagree: base or model:1"
    )
    add(
        "--tokenizer-from",
        metavar="WHICH",
        help="tokenizer, chat template and generation settings to write: base or model:1 (base)",
    )
    add(
        "--unmerged-from",
        metavar="WHICH",
        help="values of tensors that are not merged: base, mean or model:1 (base)",
    )
    add(
        "--weights",
        type=numbers,
        metavar="W,W",
        help="for linear, task-arithmetic, ties: one per fine-tune (1)",
    )
    add(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="divide weights by their sum (yes for linear, ties)",
    )
    add("--alpha", type=float, metavar="A", help="for wise-ft: 0 is BASE, 1 the fine-tunes' mean")
    add("--scale", type=float, metavar="S", help="lambda of task-arithmetic and ties (1)")
    add(
        "--density",
        type=numbers,
        metavar="D,D",
        help="for ties: fraction of each task vector to keep (1)",
    )
    add("--t", type=float, metavar="T", help="for slerp, in [0, 1]: how far along the arc")
    add(
        "--checksum",
        choices=CHECKSUMS,
        metavar="KIND",
        help="checksums in the report: crc32 or sha256 (crc32)",
    )
    add(
        "--max-shard-size",
        type=size,
        dest="max_shard_bytes",
        metavar="SIZE",
        help="of a file: 5GB, 500MB (5GB)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it exists")
    parser.add_argument("--dry-run", action="store_true", help="show the plan and stop")


def _adder(parser: Parser):
    def add(option: str, **how) -> None:
        parser.add_argument(option, default=argparse.SUPPRESS, **how)

    return add


def elsewhere(option: str, known: Iterable[str]) -> str | None:
    """What to do about an option of another tool; None for one that is not listed.

    Args:
      option: as it was typed, with its dashes.
      known: the options of this command.

    Example:
      >>> elsewhere("--device", []), elsewhere("--output", ["--out"])
      ('no accelerator is needed or used; leave it out', 'write --out')
    """
    word = option.strip("-").replace("_", "-").lower().removeprefix("no-")
    for advice, words in _NEEDLESS.items():
        if word in words:
            return advice
    known = set(known)
    return next(
        (f"write {ours}" for ours, words in _RENAMED.items() if word in words and ours in known),
        None,
    )


def _method(text: str) -> str:
    try:
        return method_name(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def numbers(text: str) -> tuple[float, ...]:
    """Numbers with commas between them.

    Example:
      >>> numbers("0.5,1")
      (0.5, 1.0)
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers like 0.5,1") from None


def size(text: str) -> int:
    """Bytes, from `5GB`, `500MB`, `2GiB` or a plain number.

    Example:
      >>> size("5GB"), size("2GiB"), size("1000")
      (5000000000, 2147483648, 1000)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not found or found[2].upper() not in _SIZES or float(found[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size like 5GB or 500MB")
    return int(float(found[1]) * _SIZES[found[2].upper()])


# Standard output and error of a command: closed, full or not UTF-8, they never end a merge.


class Stream:
    r"""A text stream whose write errors are kept in `error`, not raised.

    Characters that its encoding lacks are written as escapes. Everything else is the stream's own.

    Args:
      stream: the stream, or None where it was closed before this process began.

    Example:
      >>> stream = Stream(io.TextIOWrapper(io.BytesIO(), "ascii"))
      >>> _ = stream.write("1–2"); stream.flush(); stream.buffer.getvalue()
      b'1\\u20132'
    """

    def __init__(self, stream: TextIO | None):
        self._stream = io.StringIO() if stream is None else stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """Writes text, or nothing after an error."""
        if self.error is None:
            try:
                self._stream.write(self._encodable(text))
            except OSError as error:
                self._fail(error)
        return len(text)

    def flush(self) -> None:
        """Flushes what was written, or nothing after an error."""
        if self.error is None:
            try:
                self._stream.flush()
            except OSError as error:
                self._fail(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _encodable(self, text: str) -> str:
        encoding = self._stream.encoding or "utf-8"
        try:
            text.encode(encoding, self._stream.errors or "strict")
        except UnicodeEncodeError:
            return text.encode(encoding, "backslashreplace").decode(encoding)
        return text

    def _fail(self, error: OSError) -> None:
        self.error = error
        # What is still buffered would fail again when Python exits, which changes its status.
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)


@contextlib.contextmanager
def guarded() -> Iterator[tuple[Stream, Stream]]:
    """Replaces standard output and error by `Stream`s while the block runs.

    Yields:
      Output and error.
    """
    # The next file to be opened would get the number of a closed one: a library's message on
    # standard error would be written into a model.
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # It gets the lowest free number.
    output, errors = Stream(sys.stdout), Stream(sys.stderr)
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):  # type: ignore
        try:
            yield output, errors
        finally:
            output.flush()
            errors.flush()


if __name__ == "__main__":
    sys.exit(main())
