"""Convert a checkpoint to another format: `python -m modelstock_jax.models.convert`.

Model Soups' fine-tuned models have no text tower; it is copied from the pretrained model (--base).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from modelstock_jax.errors import UserError
from modelstock_jax.models import checkpoint_io, formats
from modelstock_jax.models.checkpoint import Checkpoint
from modelstock_jax.models.config import DualEncoderConfig
from modelstock_jax.models.param_mapping import flatten


def main(argv: Sequence[str] | None = None) -> None:
    """Convert one checkpoint; user errors are one line on stderr and exit code 1 (2 for usage)."""
    args = _parser().parse_args(argv)
    try:
        checkpoint = _load(args)
        reads_texts = isinstance(checkpoint.config, DualEncoderConfig) and args.to != "openai"
        if reads_texts and not checkpoint_io.has_tokenizer(checkpoint):
            raise UserError(
                f"{args.source}: no tokenizer found, but format {args.to} needs one: pass a "
                "directory or repository with it, e.g. --tokenizer=openai/clip-vit-base-patch32"
            )
        checkpoint_io.save(args.out, checkpoint, format=args.to, overwrite=args.overwrite)
    except UserError as error:
        sys.exit(f"error: {error}")
    size = sum(leaf.size for _, leaf in flatten(checkpoint.params))
    head = f", head with {len(checkpoint.head['bias'])} classes" if checkpoint.head else ""
    print(f"{args.out}: {args.to}, from {checkpoint.format}; {size:,} parameters{head}")


def _load(args: argparse.Namespace) -> Checkpoint:
    base = None if args.base is None else checkpoint_io.load(args.base)
    return checkpoint_io.load(
        args.source, format=args.source_format, base=base, tokenizer=args.tokenizer
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m modelstock_jax.models.convert",
        description="Convert a checkpoint from one format to another. Models other than CLIP have "
        "only the format hugging_face.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SRC", help="directory, .safetensors file or hub id")
    parser.add_argument(
        "--to", required=True, choices=list(formats.WRITABLE), help="format to write"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="directory to create")
    parser.add_argument(
        "--from",
        dest="source_format",
        choices=list(formats.READABLE),
        help="format of SRC, if it contains several (default: the first of these)",
    )
    parser.add_argument(
        "--base", metavar="BASE", help="with model_soups: the model that was fine-tuned"
    )
    parser.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="directory or hub id of the tokenizer, if not in SRC (or BASE)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it exists")
    return parser


if __name__ == "__main__":
    main()
