"""Which tensor of one model is which of another: names, aliases, tied weights, what is missing."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from modelstock_jax.checkpoint_merge.hf_config import read_config
from modelstock_jax.checkpoint_merge.options import Options
from modelstock_jax.checkpoint_merge.sources import Source, is_pipeline
from modelstock_jax.checkpoint_merge.tensor_names import (
    explanation,
    is_classifier,
    is_embedding,
    is_index,
    note,
    renames,
)
from modelstock_jax.errors import UserError, listed

_HEAD = re.compile(r"(?:.*\.)?(?:lm_head|embed_out)\.weight")
_EMBEDDING = re.compile(r"(?:.*\.)?(?:embed_tokens|wte|embed_in|word_embeddings|shared)\.weight")
_COMPARED = 2**20
_PROBED = 1024
# Above this share of a model's numbers, taking the base's instead would throw its training away.
_MOST = 0.5

Names = tuple[str | None, ...]


@dataclasses.dataclass
class PlanIssues:
    """What planning comes upon; problems are raised all at once.

    Attributes:
      problems: What stands in the way.
      notes: What a user should know.
      untied: Heads that become tensors of their own; the config has to say so.
      vocabulary: Tensor with an axis of the vocabulary -> its length in each model.
      new_head: Tensors that are the fine-tunes' own.
      companion: The model with the rows of a longer vocabulary: its tokenizer is written.
      lenient: Nothing will be written: models that disagree in what is only copied will do.
    """

    problems: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    untied: list[str] = dataclasses.field(default_factory=list)
    vocabulary: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    new_head: list[str] = dataclasses.field(default_factory=list)
    companion: int = 0
    lenient: bool = False

    def add_problem(self, problem: str) -> None:
        """A problem; a note where nothing will be written."""
        (self.notes if self.lenient else self.problems).append(problem)

    def raise_problems(self) -> None:
        """Raises where there are problems."""
        if self.problems:
            raise UserError("; ".join(self.problems) + ".")


def match_tensors(
    sources: Sequence[Source], options: Options, issues: PlanIssues
) -> dict[str, Names]:
    """The output's tensors, each with its name in every model; None where it has none there.

    A model's names that differ from the base's by a prefix are mapped; a tensor that a model stores
    under another name, or once for two names, is read from there.
    """
    views = [_view(source, sources[0], issues) for source in sources]
    matched: dict[str, Names] = {}
    partly: dict[str, Names] = {}
    for name in sorted(set().union(*views)):
        own: Names = tuple(view.get(name) for view in views)
        if _HEAD.fullmatch(name):
            own = _tied(name, own, sources, options, issues)
        elif None in own and any(own):
            own = _copied(name, own, views, sources, issues)
        if own[0] is not None:
            matched[name] = own
        if None in own and any(own):
            partly[name] = own
    _new_head(matched, partly, sources, options, issues)
    _missing(partly, sources, options, issues)
    return matched


def _view(source: Source, base: Source, findings: PlanIssues) -> dict[str, str]:
    """Names as the base has them -> where this model has them."""
    view = {name: name for name in source.tensors}
    if source is base:
        return view
    aliased = {name: kept for name, kept in source.aliases.items() if name in base.tensors}
    # Two names of one tensor: this model may store it under the one that the base leaves out.
    aliased |= {
        kept: name
        for name, kept in base.aliases.items()
        if name in view and kept not in view and kept not in aliased
    }
    view |= aliased
    found = renames(base.tensors, {n: source.tensors[own] for n, own in view.items()})
    if found.names:
        findings.notes.append(note(source.label, found))
    if found.ambiguous:
        findings.problems.append(
            f"{source.label}: {listed(found.ambiguous, 3)} fit more than one tensor of the base; "
            "rename them as the base does"
        )
    renamed = set(found.names.values())
    return {name: own for name, own in view.items() if name not in renamed} | found.names


def _copied(
    name: str,
    own: Names,
    views: Sequence[Mapping[str, str]],
    sources: Sequence[Source],
    issues: PlanIssues,
) -> Names:
    """Fills in a tensor of the vocabulary that some models store once, under another's name.

    Models that store it must hold it equal, bit for bit, to a tensor that all models have; the
    others then have it by that name. What only a fine-tune stores so is a copy, and left out.
    Other tensors may be equal by chance (norms of ones, a decoder that started from the encoder).
    """
    has = [model for model, found in enumerate(own) if found is not None]
    if not all(_of_vocabulary(sources[m], views[m][name]) for m in has):
        return own
    for other in sorted(views[has[0]], key=lambda other: not _nested(name, other)):
        if other == name or any(other not in view for view in views):
            continue
        pairs = [(sources[m], views[m][name], views[m][other]) for m in has]
        if not all(itertools.starmap(_equal, pairs)):
            continue
        if not _nested(name, other) and _constant(*pairs[0][:2]):
            continue  # Zeros are equal everywhere.
        if own[0] is None:
            issues.notes.append(
                f"{name}: a copy of {other} in "
                f"{listed(sources[m].label for m in has)}; left out, as in the "
                "base"
            )
            return (None,) * len(own)
        lacking = [s.label for s, found in zip(sources, own, strict=True) if found is None]
        issues.notes.append(
            f"{name}: read from {other} in {listed(lacking)}; the base's two are equal"
        )
        return tuple(found or views[m][other] for m, found in enumerate(own))
    return own


def _of_vocabulary(source: Source, name: str) -> bool:
    """Whether a tensor has a row, or a number, for each row of its model's embedding."""
    rows = {
        source.tensors[n].shape[0]
        for n in source.tensors
        if is_embedding(n) and len(source.tensors[n].shape) == 2
    }
    shape = source.tensors[name].shape
    return bool(shape) and shape[0] in rows and math.prod(shape) > 1


def _nested(a: str, b: str) -> bool:
    """Whether two names differ by one part alone, as `decoder.bias` and `bias` of a module do."""
    short, long = sorted((a.split("."), b.split(".")), key=len)
    return len(long) == len(short) + 1 and any(
        long[:i] + long[i + 1 :] == short for i in range(len(long))
    )


def _constant(source: Source, name: str) -> bool:
    values = source.read(name, 0, min(_PROBED, math.prod(source.tensors[name].shape)))
    return bool((values == values[0]).all())


def _new_head(
    matched: dict[str, Names],
    partly: dict[str, Names],
    sources: Sequence[Source],
    options: Options,
    issues: PlanIssues,
) -> None:
    """With `head` finetuned: what all fine-tunes have and the base lacks; what only it has goes."""
    if options.head != "finetuned":
        return
    left_out = []
    for name, own in list(partly.items()):
        shapes = {
            source.tensors[n].shape for source, n in zip(sources, own, strict=True) if n is not None
        }
        if own[0] is None and None not in own[1:] and len(shapes) == 1:
            matched[name] = own
            issues.new_head.append(name)
            del partly[name]
        elif own[0] is not None and not any(own[1:]):
            matched.pop(name)
            del partly[name]
            left_out.append(name)
    if left_out:
        issues.notes.append(
            f"{listed(left_out, 4)}: left out, for no fine-tune has it "
            f"({_percent(_share(sources[0], left_out))} of the base's numbers)"
        )


def _missing(
    partly: Mapping[str, Names], sources: Sequence[Source], options: Options, issues: PlanIssues
) -> None:
    """Problems or notes for tensors that some models have and others lack."""
    for model, source in enumerate(sources[1:], 1):
        lacking = [
            n
            for n, own in partly.items()
            if own[0] is not None
            and own[model] is None
            and not is_index(n, sources[0].tensors[own[0]].shape)
        ]
        extra = [
            n
            for n, own in partly.items()
            if own[0] is None
            and (found := own[model])
            and not is_index(n, source.tensors[found].shape)
        ]
        share = _share(sources[0], lacking)
        if options.missing_tensors == "base":
            if lacking:
                issues.notes.append(
                    f"{source.label} lacks {listed(lacking, 3)}: {_percent(share)} of the base's "
                    "numbers stay the base's"
                )
            if extra:
                issues.notes.append(
                    f"{listed(extra, 3)} of {source.label}: left out, for the base does not have it"
                )
            continue
        why = _why(sources[0], source, lacking, extra)
        if lacking:
            hint = (
                f" ({why})"
                if why
                else f" (--missing base takes the base's: {_percent(share)} of its numbers)"
                if share < _MOST
                else f" ({_percent(share)} of the base's numbers: is this a fine-tune of it, saved "
                "by the same library?)"
            )
            issues.problems.append(f"{source.label} lacks {listed(lacking)}{hint}")
        if extra:
            most = max(share, _share(source, [own for n in extra if (own := partly[n][model])]))
            hint = ("" if lacking else f" ({why})") if why else (_extra_hint(extra, partly, most))
            issues.problems.append(
                f"{sources[0].label} lacks, and {source.label} has, {listed(extra)}{hint}"
            )


def _extra_hint(extra: Sequence[str], partly: Mapping[str, Names], share: float) -> str:
    theirs = all(None not in partly[name][1:] for name in extra)
    if share >= _MOST:  # Of another model, unless all are a head's.
        heads = theirs and all(map(is_classifier, extra))
        return " (--head finetuned takes the fine-tunes' mean)" if heads else ""
    return " (--missing base leaves them out" + (
        "; --head finetuned takes the fine-tunes' mean)" if theirs else ")"
    )


def _why(base: Source, source: Source, lacking: Sequence[str], extra: Sequence[str]) -> str:
    """What the difference in names comes from, where that is known."""
    if is_pipeline(base.directory) != is_pipeline(source.directory):
        pipeline, single = (base, source) if is_pipeline(base.directory) else (source, base)
        own = set(single.tensors)
        part = max(
            pipeline.components,
            key=lambda prefix: len(
                own & {n.removeprefix(prefix) for n in pipeline.tensors if n.startswith(prefix)}
            ),
        )
        parts = listed((prefix.rstrip("/") for prefix in pipeline.components), 4)
        return (
            f"{pipeline.label} is a pipeline of {parts}, and {single.label} is one model: give "
            f"{pipeline.directory}/{part.rstrip('/')} in place of {pipeline.label}"
        )
    return explanation(base.tensors, lacking, extra)


def _share(source: Source, names: Sequence[str]) -> float:
    """Part of a model's numbers that some tensors hold."""

    def size(name: str) -> int:
        return math.prod(source.tensors[source.aliases.get(name, name)].shape)

    return sum(map(size, names)) / max(1, sum(map(size, source.tensors)))


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else f"{100 * share:.2g} %"


def _tied(
    name: str,
    own: Names,
    sources: Sequence[Source],
    options: Options,
    issues: PlanIssues,
) -> Names:
    """Where each model holds its head: under its own name, or as its embedding."""
    said = [_config(source).get("tie_word_embeddings") for source in sources]
    embeddings = [_embedding(source) for source in sources]
    base_head, base_embedding = own[0], embeddings[0]
    equal = (
        base_head is not None
        and base_embedding is not None
        and _equal(sources[0], base_head, base_embedding)
    )
    # A model without a head ties it where its config says so, or where the base's two are equal. A
    # base without one says so by that: transformers stores a head that is not tied.
    alias = tuple(
        embedding
        if found is None and tie is not False and (tie or equal or base_head is None)
        else found
        for found, tie, embedding in zip(own, said, embeddings, strict=True)
    )
    if said[0] is not True and base_head is not None:  # The base has a head of its own.
        _note_aliases(name, own, alias, sources, issues)
        return alias
    if alias[0] is None:
        return own
    trained = [
        source.label
        for source, found, embedding in zip(sources, own, embeddings, strict=True)
        if found and embedding and not _equal(source, found, embedding)
    ]
    if not trained:
        if own[0] is None:
            stored = [s.label for s, found in zip(sources, own, strict=True) if found]
            issues.notes.append(
                f"{name}: kept tied to {alias[0]}, as in the base; it is stored "
                f"in {listed(stored)} and equal to the embedding there"
            )
            return (None,) * len(own)
        return alias
    if options.tied_head == "untie":
        issues.untied.append(name)
        issues.notes.append(f"{name}: untied, for {listed(trained)} trained a head of its own")
        _note_aliases(name, own, alias, sources, issues)
        return alias
    issues.problems.append(
        f"{name} is tied to {alias[0]} in {sources[0].label}, but {listed(trained)} trained a head "
        "of its own (--tied untie merges it, and the config says so)"
    )
    return (None,) * len(own)


def _note_aliases(name, own, alias, sources, issues: PlanIssues) -> None:
    for source, found, read in zip(sources, own, alias, strict=True):
        if found is None and read is not None:
            issues.notes.append(f"{name}: read from {read} in {source.label}, which ties them")


def _embedding(source: Source) -> str | None:
    return min((n for n in source.tensors if _EMBEDDING.fullmatch(n)), key=len, default=None)


def _config(source: Source) -> dict[str, Any]:
    config = read_config(source.directory) or {}
    # Models of several towers keep the language model's settings one level down.
    text = config.get("text_config")
    return {**(text if isinstance(text, dict) else {}), **config}


def _equal(source: Source, a: str | None, b: str | None) -> bool:
    """Whether two tensors of a model are equal, bit for bit; few numbers are read first."""
    if a is None or b is None:
        return False
    if a == b:
        return True
    if source.tensors[a] != source.tensors[b]:
        return False
    count = min(_PROBED, math.prod(source.tensors[a].shape))
    first, second = (source.read(name, 0, count).view(np.uint8) for name in (a, b))
    return np.array_equal(first, second) and same_numbers((source, a), (source, b))


def same_numbers(*tensors: tuple[Source, str]) -> bool:
    """Whether stored tensors of one shape and dtype are equal, bit for bit."""
    count = math.prod(tensors[0][0].tensors[tensors[0][1]].shape)
    for start in range(0, count, _COMPARED):
        stop = min(start + _COMPARED, count)
        first, *rest = (source.read(name, start, stop).view(np.uint8) for source, name in tensors)
        if not all(np.array_equal(first, other) for other in rest):
            return False
    return True
