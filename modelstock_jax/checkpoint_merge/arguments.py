"""What may be typed after `modelstock`. Imports nothing that is slow."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import NoReturn

from modelstock_jax import __version__
from modelstock_jax.checkpoint_merge.options import (
    ANCHOR_ROUNDING,
    DIGESTS,
    DTYPES,
    HEAD,
    METHODS,
    MISSING,
    TIED,
    VOCABULARY,
    dtype_name,
    method_name,
)
from modelstock_jax.checkpoint_merge.spelling import elsewhere, near
from modelstock_jax.errors import listed
from modelstock_jax.merging.units import UNITS

_SIZES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20,
          "GIB": 2**30}
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
    add("--unit", choices=UNITS, metavar="NAME",
        help=f"elements that share one angle: {', '.join(UNITS)} (tensor)")
    add("--num-heads", metavar="N", help="for --unit head: 12, or vision_model=12,text_model=8")
    add("--include", action="append", metavar="PATTERN",
        help="merge only matching tensors: 'model.layers.*'")
    add("--exclude", action="append", metavar="PATTERN", help="do not merge matching tensors")
    add("--vocabulary", choices=VOCABULARY, metavar="WHICH",
        help="embeddings of different sizes: merge common rows, take the rest from base or longest "
        "(refuse)")
    add("--tied", choices=TIED, metavar="HOW",
        help="head tied to the embedding in some models: untie (keep)")
    add("--missing", choices=MISSING, metavar="HOW",
        help="tensors that some models lack: base (refuse)")
    add("--head", choices=HEAD, metavar="HOW",
        help="classifier that is new in the fine-tunes: take theirs, finetuned (refuse)")
    add("--dequantize", action="store_true", help="read quantized weights as codes x scale")
    add("--anchor-rounding", choices=ANCHOR_ROUNDING, metavar="HOW",
        help="correct the angles of a base that was rounded after training: correct (keep)")
    add("--threads", type=int, metavar="N", help="worker threads (one per core)")
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else")


def _add_merge(parser: Parser) -> None:
    add = _adder(parser)
    parser.add_argument("--out", metavar="DIR", help="directory to write")
    parser.add_argument("--recipe", metavar="FILE", help="mergekit YAML instead of BASE FT1 FT2")
    add("--method", type=method_name, choices=METHODS, metavar="NAME",
        help=", ".join(METHODS) + " (stock)")
    add("--dtype", type=dtype_name, choices=DTYPES, metavar="NAME",
        help="of the output: bfloat16, float16, ... (as in BASE)")
    add("--config-from", metavar="WHICH",
        help="config to write if models disagree: base or model:1")
    add("--tokenizer-from", metavar="WHICH",
        help="tokenizer, chat template and generation settings to write: base or model:1 (base)")
    add("--excluded", metavar="WHICH",
        help="values of tensors that are not merged: base, mean or model:1 (base)")
    add("--weights", type=numbers, metavar="W,W",
        help="for linear, task-arithmetic, ties: one per fine-tune (1)")
    add("--normalize", action=argparse.BooleanOptionalAction,
        help="divide weights by their sum (yes for linear, ties)")
    add("--alpha", type=float, metavar="A", help="for wise-ft: 0 is BASE, 1 the fine-tunes' mean")
    add("--scale", type=float, metavar="S", help="lambda of task-arithmetic and ties (1)")
    add("--density", type=numbers, metavar="D,D",
        help="for ties: fraction of each task vector to keep (1)")
    add("--t", type=float, metavar="T", help="for slerp, in [0, 1]: how far along the arc")
    add("--digest", choices=DIGESTS, metavar="KIND",
        help="checksums in the report: crc32 or sha256 (crc32)")
    add("--max-shard-size", type=size, dest="max_shard_bytes", metavar="SIZE",
        help="of a file: 5GB, 500MB (5GB)")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it exists")
    parser.add_argument("--dry-run", action="store_true", help="show the plan and stop")


def _adder(parser: Parser):
    def add(option: str, **how) -> None:
        parser.add_argument(option, default=argparse.SUPPRESS, **how)

    return add


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
