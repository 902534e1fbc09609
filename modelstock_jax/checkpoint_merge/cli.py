"""Command line of `modelstock`: arguments, help texts and exit codes.

Slow modules are imported only when a command runs.
"""

from __future__ import annotations

import argparse
import errno
import itertools
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

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
    invalid_choice,
    method_name,
)
from modelstock_jax.checkpoint_merge.streams import guarded
from modelstock_jax.errors import UserError, listed, suggest
from modelstock_jax.merging.units import UNITS
from modelstock_jax.registry import COMMANDS

INTERRUPTED = 130  # The exit status that a shell reports after Ctrl-C.

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
# Values that options expect, by the name of the value in the help.
_VALUES = {"DIR": "a directory", "FILE": "a file", "SIZE": "a size such as 5GB"}
_MODELS = """\
FT1 (model:1), FT2 (model:2), ... are fine-tunes of BASE. Each model is
  a directory with safetensors (or a pipeline), a .safetensors file, a hub id
  ORG/NAME or ORG/NAME@REVISION, or a LoRA adapter of BASE (also MODEL+ADAPTER).
"""
_INPUTS = {
    "merge": _MODELS,
    "compare": _MODELS,
    "average": """\
CKPT1, CKPT2, ... are checkpoints of one run: directories with safetensors, or
  .safetensors files. Numbers at the end of their names (checkpoint-500) are steps.
""",
}
_SUMMARIES = {
    "merge": "merge fine-tunes of one base model into a new checkpoint",
    "compare": "print angles, norms and ratios per tensor; write no model",
    "average": "average checkpoints of one run into a new checkpoint",
}
_USAGES = {
    "merge": "modelstock merge BASE FT1 FT2 [FT3 ...] --out DIR [options]",
    "compare": "modelstock compare BASE FT1 FT2 [FT3 ...] [options]",
    "average": "modelstock average CKPT1 CKPT2 [CKPT3 ...] --out DIR [options]",
}
_METHODS = textwrap.fill(
    ", ".join(method.command for method in COMMANDS.values()),
    width=78,
    initial_indent="  ",
    subsequent_indent="  ",
    break_on_hyphens=False,
)
_EXAMPLES = {
    "merge": """\
examples:
  modelstock merge meta-llama/Llama-3.1-8B ./run1 ./lora2 --out merged
  modelstock merge mergekit.yml --out merged
""",
    "compare": """\
examples:
  modelstock compare ./base ./ft1 ./ft2 --plot angles.png
  modelstock compare ./base ./ft1 ./ft2 --json > angles.json
""",
    "average": """\
examples:
  modelstock average run/checkpoint-* --out averaged
  modelstock average run/checkpoint-* --ema 0.9 --out averaged
  modelstock average run/checkpoint-* --schedule 1-sqrt:2000 --out averaged
""",
}

# Options of mergekit, PyTorch and transformers: what to do instead -> options.
_UNNECESSARY = {
    "no accelerator is used; remove this option": (
        "device", "devices", "cuda", "gpu", "gpus", "gpu-rich", "multi-gpu", "device-map", "cpu",
        "read-to-gpu"),
    "code of a checkpoint is never run; remove this option": ("trust-remote-code",),
    "tensors are always read in pieces; remove this option": (
        "lazy-unpickle", "lazy-loader", "low-cpu-memory", "low-cpu-mem-usage", "low-memory"),
    "tokenizer files are always copied; remove this option": ("copy-tokenizer",),
    "a model card is always written; remove this option": ("write-model-card",),
    "safetensors files are always written; remove this option": ("safe-serialization",),
    "models that do not match are an error; remove this option": ("allow-crimes",),
    "adapters are applied while they are read; remove this option": (
        "lora-merge-cache", "lora-merge-dtype"),
    "models of the hub are in the cache of Hugging Face; set HF_HOME to move it": (
        "transformers-cache", "cache-dir"),
    "BASE is the first model; pass it before the fine-tunes": ("base-model", "base"),
    "pass the models one after the other: BASE FT1 FT2": ("models", "model", "finetuned"),
}  # fmt: skip
_ALTERNATIVES = {
    "--out": ("output", "o", "output-dir", "output-path", "out-path", "out-dir", "outdir",
              "save-path", "save-dir"),
    "--max-shard-size": ("out-shard-size", "shard-size"),
    "--threads": ("num-threads", "workers", "num-workers", "jobs", "j"),
    "--weights": ("weight",),
    "--scale": ("lambda", "lambd", "scaling"),
    "--method": ("merge-method",),
    "--recipe": ("yaml",),
    "--seed": ("random-seed",),
}  # fmt: skip
# Options that earlier versions of this command had -> options now.
RENAMED = {
    "--excluded": "--unmerged-from",
    "--tied": "--tied-head",
    "--missing": "--missing-tensors",
    "--vocabulary": "--vocab-mismatch",
    "--digest": "--checksum",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
      argv: arguments after `modelstock`; by default those of this process

    Returns:
      The exit status: 0 for success, also if only the summary of a complete merge could not be
      printed; 1 for an error (one line on standard error), or if the output of another command
      could not be written; 130 after Ctrl-C. An unknown option, or a value that cannot be read,
      exits with 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    with guarded() as (output, _):
        top, commands = parsers()
        if not argv or argv[0] not in commands or {"-h", "--help"} & set(argv):
            top.parse_args(argv or ["--help"])  # Help, the version or an error: it exits.
        arguments = commands[argv[0]].parse(argv[1:])
        status = _run(argv, arguments)
        output.flush()
        if status or output.error is None:
            return status
        is_merged = argv[0] != "compare" and not arguments.dry_run
        return _report_output_error(output.error, is_merged=is_merged)


def _run(argv: list[str], arguments: argparse.Namespace) -> int:
    if "numpy" not in sys.modules:
        # Workers are threads already, and results must not depend on the number of cores. On busy
        # cores, threads of BLAS made the products of tall factors ten times as slow.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        from modelstock_jax.checkpoint_merge import commands

        getattr(commands, argv[0])(arguments, argv)
        return 0
    except UserError as error:
        from modelstock_jax.fileio import PYTHON_HINT

        print(f"error: {str(error).replace(PYTHON_HINT, '')}", file=sys.stderr)
        return 1
    except OSError as error:
        path = listed([str(error.filename or "files")])
        print(f"error: {path}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        resume = "" if argv[0] == "compare" else " to resume"
        print(f"interrupted; run the same command again{resume}", file=sys.stderr)
        return INTERRUPTED


def _report_output_error(error: OSError, *, is_merged: bool) -> int:
    """Print why standard output could not be written; return the exit status."""
    if error.errno != errno.EPIPE:  # A closed pipe is normal: `modelstock compare ... | head`.
        reason = error.strerror or error
        subject = (
            "note: the merge is complete, but its summary" if is_merged else "error: the result"
        )
        print(f"{subject} could not be written to standard output ({reason})", file=sys.stderr)
    return 0 if is_merged else 1


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Help with one line per option where it fits."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=26)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return f"{action.option_strings[0]}, --no-..."
        return super()._format_action_invocation(action)


class Parser(argparse.ArgumentParser):
    """Parser whose errors are one line and suggest the option that was probably meant."""

    others: Sequence[Parser] = ()  # Parsers of the other commands.
    _typed: Sequence[str] = ()  # Arguments as typed.

    def error(self, message: str) -> NoReturn:
        """Print the error and how to get help; exit with status 2."""
        message = message.removeprefix("argument ")
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse options and models in any order."""
        self._typed = arguments
        values, unknown = self.parse_known_intermixed_args(arguments)
        if unknown:
            option = next((text for text in unknown if text.startswith("-")), unknown[0])
            self._unknown_option(option.split("=")[0])
        return values

    def _unknown_option(self, option: str) -> NoReturn:
        options = [name for action in self._actions for name in action.option_strings]
        if (advice := advice_on(option, options)) is not None:
            self.error(f"{option}: {advice}")
        renamed = RENAMED.get(option, option)
        for command in self.others:
            if renamed in command._option_string_actions:
                now = f"now {renamed}, " if renamed != option else ""
                self.error(f"{option} is {now}an option of {command.prog}")
        self.error(f"unknown option {listed([option])}{suggest(option, options)}")

    def _match_argument(self, action: argparse.Action, arg_strings_pattern: str) -> int:
        try:
            return super()._match_argument(action, arg_strings_pattern)
        except argparse.ArgumentError:
            raise argparse.ArgumentError(action, self._missing_value(action)) from None

    def _missing_value(self, action: argparse.Action) -> str:
        """Return the error for an option that has no value."""
        for option, text in itertools.pairwise(self._typed):
            if option in action.option_strings and re.match(r"-[^-]", text):
                return f"a value that starts with - needs an equals sign: {option}={text}"
        metavar = str(action.metavar)
        return f"expected {_VALUES.get(metavar, f'a value: {action.option_strings[0]} {metavar}')}"

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = list(map(str, action.choices))
            if action.option_strings:
                message = f"{action.option_strings[0]}: {invalid_choice(value, choices)}"
            else:
                known = ", ".join(choices)
                message = (
                    f"unknown command {value!r}; choose one of {known}{suggest(value, choices)}"
                )
            raise argparse.ArgumentError(None, message)


def parsers() -> tuple[Parser, dict[str, Parser]]:
    """Return the parser of `modelstock` and the parser of each command."""
    top = Parser(
        prog="modelstock", allow_abbrev=False,
        description="Merge fine-tuned models with Model Stock (arXiv 2403.19522).",
        epilog="Run `modelstock COMMAND --help` for the options of a command.",
    )  # fmt: skip
    top.add_argument(
        "--version", action="version", version=f"modelstock {__version__}",
        help="show the version and exit",
    )  # fmt: skip
    subparsers = top.add_subparsers(
        title="commands", dest="command", metavar="COMMAND", required=True
    )
    commands = {
        name: subparsers.add_parser(
            name, help=summary, usage=_USAGES[name], epilog=_EXAMPLES[name],
            description=f"{summary[0].upper()}{summary[1:]}.\n\n{_INPUTS[name]}",
            formatter_class=_Formatter, allow_abbrev=False,
        )
        for name, summary in _SUMMARIES.items()
    }  # fmt: skip
    for name, parser in commands.items():
        parser._optionals.title = "options"
        parser.others = [other for other in commands.values() if other is not parser]
        parser.add_argument("models", nargs="*", metavar="BASE FT1 FT2", help=argparse.SUPPRESS)
        if name == "compare":
            parser.add_argument(
                "--plot", metavar="FILE", help="draw angles and norms by depth (.png)"
            )
        else:
            _add_output_options(parser, is_merge=name == "merge")
        parser.add_argument(
            "--json", action="store_true", help="print only JSON to standard output"
        )
        _adder(parser)(
            "--threads", type=integer, metavar="N", help="worker threads (default: one per core)"
        )
        if name == "average":
            _add_average_options(parser)
            continue
        if name == "merge":
            _add_method_options(parser)
        _add_tensor_options(parser, is_merge=name == "merge")
        _add_mismatch_options(parser, is_merge=name == "merge")
    return top, commands


def _adder(parser: argparse._ActionsContainer) -> Callable[..., None]:
    """Return an `add_argument` whose options are absent from the namespace unless typed.

    An option that is absent has the default of `Options`.
    """

    def add(option: str, **settings) -> None:
        parser.add_argument(option, default=argparse.SUPPRESS, **settings)

    return add


def _add_average_options(parser: Parser) -> None:
    group = parser.add_argument_group("weights (default: equal)")
    group.add_argument(
        "--weights", type=numbers, dest="of_average", metavar="W,W",
        help="one per checkpoint, divided by their sum",
    )  # fmt: skip
    group.add_argument(
        "--ema", type=number, metavar="DECAY", help="exponential moving average: 0.9"
    )
    group.add_argument(
        "--schedule", metavar="NAME[:STEPS]",
        help="as a learning rate that decays over the last STEPS steps: linear, cosine, 1-sqrt",
    )  # fmt: skip


def _add_output_options(parser: Parser, *, is_merge: bool) -> None:
    parser.add_argument("--out", metavar="DIR", help="directory to write")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it exists")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and exit")
    if is_merge:
        parser.add_argument(
            "--recipe", metavar="FILE", help="mergekit YAML instead of BASE FT1 FT2"
        )
        parser.add_argument("--no-base", action="store_true", help="no model is a base: M1 M2 ...")
    add = _adder(parser)
    if is_merge:
        add(
            "--as-adapter",
            action="store_true",
            help="merge LoRA adapters into one, in their own dtype",
        )
        add("--rank", type=integer, metavar="R",
            help="with --as-adapter: maximum rank (default: sum)")  # fmt: skip
    add("--dtype", type=dtype_name, choices=DTYPES, metavar="NAME",
        help="dtype: float32, bfloat16, ... "
        f"(default: as in {'BASE' if is_merge else 'CKPT1'})")  # fmt: skip
    add("--max-shard-size", type=size, dest="max_shard_bytes", metavar="SIZE",
        help="maximum size of a file: 500MB, ... (default: 5GB)")  # fmt: skip
    add("--checksum", choices=CHECKSUMS, metavar="KIND",
        help="kind in the report: crc32, sha256 (default: crc32)")  # fmt: skip


def _add_method_options(parser: Parser) -> None:
    add = _adder(parser.add_argument_group("merge method", _METHODS))
    add("--method", type=_method, choices=COMMANDS, metavar="NAME",
        help="one of these (default: model-stock)")  # fmt: skip
    add("--weights", type=numbers, metavar="W,W", help="weights of the fine-tunes (default: 1,1)")
    add("--normalize", action=argparse.BooleanOptionalAction,
        help="divide weights by their sum (default: by method)")  # fmt: skip
    add("--alpha", type=number, metavar="A", help="for wise-ft: 0 is BASE, 1 the fine-tunes' mean")
    add("--scale", type=number, metavar="S", help="factor of the merged update (default: 1)")
    add("--density", type=numbers, metavar="D,D",
        help="fraction of each update that remains (default: 1)")  # fmt: skip
    add("--t", type=number, metavar="T", help="for slerp: position on the arc, 0 to 1")
    add("--seed", type=integer, metavar="N", help="seed of dare and della (default: 0)")
    add("--parameter", type=parameter, action="append", dest="parameters", metavar="KEY=X",
        help="another parameter of the method: gamma=0.02")  # fmt: skip


def _add_tensor_options(parser: Parser, *, is_merge: bool) -> None:
    add = _adder(parser.add_argument_group("tensors and merge units"))
    verb = "merge" if is_merge else "compare"
    add("--include", action="append", metavar="PATTERN",
        help=f"{verb} only matching tensors: 'model.layers.*'")  # fmt: skip
    add("--exclude", action="append", metavar="PATTERN", help=f"do not {verb} matching tensors")
    if is_merge:
        add("--unmerged-from", metavar="WHICH",
            help="other tensors: from base (default), mean, model:1")  # fmt: skip
    add("--unit", choices=UNITS, metavar="NAME",
        help=f"{UNITS[0]} (default), {', '.join(UNITS[1:])}")  # fmt: skip
    add("--num-heads", metavar="N",
        help="attention heads: 12, or vision_model=12,text_model=8")  # fmt: skip
    add("--anchor-rounding", choices=ANCHOR_ROUNDING, metavar="HOW",
        help="correct: without BASE's rounding (default: keep)")  # fmt: skip


def _add_mismatch_options(parser: Parser, *, is_merge: bool) -> None:
    """Add the options for models that do not match; `compare` has defaults that raise no error."""
    add = _adder(parser.add_argument_group("models that do not match"))
    add("--vocab-mismatch", choices=VOCAB_MISMATCH, metavar="HOW",
        help="rows only some have: base, longest "
        f"(default: {'error' if is_merge else 'base'})")  # fmt: skip
    add("--missing-tensors", choices=MISSING_TENSORS, metavar="HOW",
        help="tensors that some lack: base "
        f"(default: {'error' if is_merge else 'base'})")  # fmt: skip
    add("--tied-head", choices=TIED_HEAD, metavar="HOW",
        help="untie: merge a head that BASE ties "
        f"(default: {'keep' if is_merge else 'untie'})")  # fmt: skip
    add("--head", choices=HEAD, metavar="HOW",
        help="new classifier: finetuned, the mean (default: error)")  # fmt: skip
    if is_merge:
        add("--config-from", metavar="WHICH",
            help="config.json if models disagree: base, model:1")  # fmt: skip
        add("--tokenizer-from", metavar="WHICH",
            help="tokenizer and its settings: base, model:1")  # fmt: skip
    add("--dequantize", action="store_true",
        help="read quantized weights as codes x scale")  # fmt: skip


def advice_on(option: str, known: Iterable[str]) -> str | None:
    """Return what to do about an option of another tool or an earlier version, or None.

    Args:
      option: as typed, with its dashes
      known: options of this command

    Example:
      >>> advice_on("--device", []), advice_on("--output", ["--out"])
      ('no accelerator is used; remove this option', 'use --out')
      >>> advice_on("--digest", ["--checksum"])
      'renamed to --checksum'
    """
    known = set(known)
    if option in known:
        return None
    if RENAMED.get(option) in known:
        return f"renamed to {RENAMED[option]}"
    word = option.strip("-").replace("_", "-").lower().removeprefix("no-")
    for advice, words in _UNNECESSARY.items():
        if word in words:
            return advice
    return next(
        (f"use {name}" for name, words in _ALTERNATIVES.items() if word in words and name in known),
        None,
    )


def _method(text: str) -> str:
    try:
        return method_name(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def integer(text: str) -> int:
    """Parse an integer."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid; give an integer") from None


def number(text: str) -> float:
    """Parse a number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid; give a number") from None


def numbers(text: str) -> tuple[float, ...]:
    """Parse numbers separated by commas.

    Example:
      >>> numbers("0.5,1")
      (0.5, 1.0)
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not valid; give numbers such as 0.5,1"
        ) from None


def parameter(text: str) -> tuple[str, float | bool | tuple[float, ...]]:
    """Parse a parameter of a method and its value: a number, one per model, or true or false.

    Example:
      >>> parameter("gamma=0.02"), parameter("rescale=false"), parameter("gamma=0.01,0.02")
      (('gamma', 0.02), ('rescale', False), ('gamma', (0.01, 0.02)))
    """
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not valid; give a name and a value: gamma=0.02"
        )
    if value.lower() in ("true", "false"):
        return name.replace("-", "_"), value.lower() == "true"
    values = numbers(value)
    return name.replace("-", "_"), values[0] if len(values) == 1 else values


def size(text: str) -> int:
    """Parse a size in bytes: `5GB`, `500MB`, `2GiB` or a plain number.

    Example:
      >>> size("5GB"), size("2GiB"), size("1000")
      (5000000000, 2147483648, 1000)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _SIZES or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid; give a size such as 5GB or 500MB")
    return int(float(match[1]) * _SIZES[match[2].upper()])


if __name__ == "__main__":
    sys.exit(main())
