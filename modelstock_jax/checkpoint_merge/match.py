"""Which tensor of one model is which of another: names, tied weights, what is missing."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from modelstock_jax.checkpoint_merge.config import read_config
from modelstock_jax.checkpoint_merge.options import Options
from modelstock_jax.checkpoint_merge.sources import Source
from modelstock_jax.errors import UserError, listed

_HEAD = re.compile(r"(?:.*\.)?(?:lm_head|embed_out)\.weight")
_EMBEDDING = re.compile(r"(?:.*\.)?(?:embed_tokens|wte|embed_in|word_embeddings|shared)\.weight")
# Buffers that older checkpoints hold and newer ones compute.
_BUFFER = re.compile(r"(?:.*\.)?(?:rotary_emb\.inv_freq|position_ids|masked_bias)")
_COMPARED = 2**20


@dataclasses.dataclass
class Findings:
    """What planning comes upon; problems are raised all at once."""

    problems: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    companion: int = 0

    def refuse(self) -> None:
        """Raises where there are problems."""
        if self.problems:
            raise UserError("; ".join(self.problems) + ".")


def match(
    sources: Sequence[Source], options: Options, findings: Findings
) -> dict[str, tuple[str | None, ...]]:
    """The output's tensors, each with its name in every model; None where it has none there.

    A head that one model ties to its embedding, and another stores, is read from the embedding.
    """
    matched: dict[str, tuple[str | None, ...]] = {}
    lacking: dict[int, list[str]] = {}
    extra: dict[int, list[str]] = {}
    for name in sorted(set().union(*(source.tensors for source in sources))):
        own = tuple(name if name in source.tensors else None for source in sources)
        if _HEAD.fullmatch(name):
            own = _tied(name, own, sources, options, findings)
        if own[0] is not None:
            matched[name] = own
        if None not in own or not any(own):
            continue
        if options.missing == "base" or _BUFFER.fullmatch(name):
            if own[0] is None:
                findings.notes.append(f"{name}: left out, for the base does not have it")
            continue
        if own[0] is None:
            for model, found in enumerate(own):
                if found:
                    extra.setdefault(model, []).append(name)
        for model, found in enumerate(own):
            if own[0] is not None and found is None:
                lacking.setdefault(model, []).append(name)
    for model, names in lacking.items():
        findings.problems.append(
            f"{sources[model].label} lacks {listed(names)} (--missing base takes the base's)"
        )
    for model, names in extra.items():
        findings.problems.append(f"{sources[0].label} lacks, and {sources[model].label} has, "
                                 f"{listed(names)} (--missing base leaves them out)")
    return matched


def _tied(
    name: str,
    own: tuple[str | None, ...],
    sources: Sequence[Source],
    options: Options,
    findings: Findings,
) -> tuple[str | None, ...]:
    """Where each model holds its head: under its own name, or as its embedding."""
    said = [_config(source).get("tie_word_embeddings") for source in sources]
    # A model without a head ties it, unless its config denies that.
    alias = tuple(
        _embedding(source) if found is None and tie is not False else found
        for found, tie, source in zip(own, said, sources, strict=True)
    )
    if said[0] is not True and own[0] is not None:  # The base has a head of its own.
        _note_aliases(name, own, alias, sources, findings)
        return alias
    if alias[0] is None:
        return own
    trained = [
        source.label for source, found, embedding in
        zip(sources, own, map(_embedding, sources), strict=True)
        if found and embedding and not _equal(source, found, embedding)
    ]
    if not trained:
        if own[0] is None:
            stored = [s.label for s, found in zip(sources, own, strict=True) if found]
            findings.notes.append(f"{name}: kept tied to {alias[0]}, as in the base; it is stored "
                                  f"in {listed(stored)} and equal to the embedding there")
            return (None,) * len(own)
        return alias
    if options.tied == "untie":
        findings.config["tie_word_embeddings"] = False
        findings.notes.append(f"{name}: untied, for {listed(trained)} trained a head of its own")
        _note_aliases(name, own, alias, sources, findings)
        return alias
    findings.problems.append(
        f"{name} is tied to {alias[0]} in {sources[0].label}, but {listed(trained)} trained a head "
        "of its own (--tied untie merges it, and the config says so)"
    )
    return (None,) * len(own)


def _note_aliases(name, own, alias, sources, findings: Findings) -> None:
    for source, found, read in zip(sources, own, alias, strict=True):
        if found is None and read is not None:
            findings.notes.append(f"{name}: read from {read} in {source.label}, which ties them")


def _embedding(source: Source) -> str | None:
    return min((n for n in source.tensors if _EMBEDDING.fullmatch(n)), key=len, default=None)


def _config(source: Source) -> dict[str, Any]:
    config = read_config(source.directory) or {}
    # Models of several towers keep the language model's settings one level down.
    text = config.get("text_config")
    return {**(text if isinstance(text, dict) else {}), **config}


def _equal(source: Source, a: str, b: str) -> bool:
    return source.tensors[a] == source.tensors[b] and same_numbers((source, a), (source, b))


def same_numbers(*tensors: tuple[Source, str]) -> bool:
    """Whether stored tensors of one shape and dtype are equal, bit for bit."""
    count = math.prod(tensors[0][0].tensors[tensors[0][1]].shape)
    for start in range(0, count, _COMPARED):
        stop = min(start + _COMPARED, count)
        first, *rest = (source.read(name, start, stop).view(np.uint8) for source, name in tensors)
        if not all(np.array_equal(first, other) for other in rest):
            return False
    return True
