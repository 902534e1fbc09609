"""Match the tensors of the models: names, aliases, tied weights and missing tensors."""

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
_COMPARED = 2**20  # elements per comparison
_PROBED = 1024  # elements that are compared first
# Using the base's weights for more than this fraction of a model would discard its training.
_MAX_FRACTION = 0.5

Names = tuple[str | None, ...]


@dataclasses.dataclass
class PlanIssues:
    """Problems and notes that planning collects; all problems are raised at once.

    Attributes:
      problems: reasons why the models cannot be merged
      notes: notes for the user
      untied: heads that become separate tensors, which the config must reflect
      vocabulary: tensor with a vocabulary axis -> length of the axis in each model
      new_head: tensors that only the fine-tunes have
      companion: the model with the rows of a longer vocabulary, whose tokenizer is written
      lenient: whether nothing will be written, so that copied tensors may differ between models
    """

    problems: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    untied: list[str] = dataclasses.field(default_factory=list)
    vocabulary: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    new_head: list[str] = dataclasses.field(default_factory=list)
    vocabulary_model: int = 0
    lenient: bool = False

    def add_problem(self, problem: str) -> None:
        """Add a problem, or a note if nothing will be written."""
        (self.notes if self.lenient else self.problems).append(problem)

    def raise_problems(self) -> None:
        """Raise all problems as one error.

        Raises:
          UserError: there are problems
        """
        if self.problems:
            raise UserError("; ".join(self.problems))


def match_tensors(
    sources: Sequence[Source], options: Options, issues: PlanIssues
) -> dict[str, Names]:
    """Return the tensors of the output, each with its name in every model (None if it has none).

    Names of a model that differ from those of the base by a prefix are mapped. A tensor that a
    model stores under another name, or once for two names, is read under the stored name.

    Args:
      sources: the base and the fine-tunes
      options: the options of the merge
      issues: collects problems and notes
    """
    views = [_view(source, sources[0], issues) for source in sources]
    matched: dict[str, Names] = {}
    partly: dict[str, Names] = {}
    for name in sorted(set().union(*views)):
        names: Names = tuple(view.get(name) for view in views)
        if _HEAD.fullmatch(name):
            names = _match_head(name, names, sources, options, issues)
        elif None in names and any(names):
            names = _match_copy(name, names, views, sources, issues)
        if names[0] is not None:
            matched[name] = names
        if None in names and any(names):
            partly[name] = names
    _new_head(matched, partly, sources, options, issues)
    _missing(partly, sources, options, issues)
    return matched


def _view(source: Source, base: Source, issues: PlanIssues) -> dict[str, str]:
    """Map names of the base to the names in this model."""
    view = {name: name for name in source.tensors}
    if source is base:
        return view
    aliased = {name: stored for name, stored in source.aliases.items() if name in base.tensors}
    # If a tensor has two names, this model may store it under the one that the base leaves out.
    aliased |= {
        stored: name
        for name, stored in base.aliases.items()
        if name in view and stored not in view and stored not in aliased
    }
    view |= aliased
    mapped = renames(base.tensors, {n: source.tensors[stored] for n, stored in view.items()})
    if mapped.names:
        issues.notes.append(note(source.label, mapped))
    if mapped.ambiguous:
        issues.problems.append(
            f"{source.label}: {listed(mapped.ambiguous, 3)} match more than one tensor of the "
            "base; rename them to the names of the base"
        )
    renamed = set(mapped.names.values())
    return {name: stored for name, stored in view.items() if name not in renamed} | mapped.names


def _match_copy(
    name: str,
    names: Names,
    views: Sequence[Mapping[str, str]],
    sources: Sequence[Source],
    issues: PlanIssues,
) -> Names:
    """Match a tensor of the vocabulary that some models store only under another name.

    In the models that store the tensor, it must be bitwise identical to another tensor that all
    models have. The other models then read that tensor. A copy that only a fine-tune stores is left
    out. Tensors outside the vocabulary may be equal by chance (norms of ones, a decoder that
    started from the encoder), so they are not matched.
    """
    has = [model for model, model_name in enumerate(names) if model_name is not None]
    if not all(_of_vocabulary(sources[m], views[m][name]) for m in has):
        return names
    for other in sorted(views[has[0]], key=lambda other: not _nested(name, other)):
        if other == name or any(other not in view for view in views):
            continue
        pairs = [(sources[m], views[m][name], views[m][other]) for m in has]
        if not all(itertools.starmap(_equal, pairs)):
            continue
        if not _nested(name, other) and _constant(*pairs[0][:2]):
            continue  # All tensors of zeros are equal.
        if names[0] is None:
            issues.notes.append(
                f"{name}: a copy of {other} in "
                f"{listed(sources[m].label for m in has)}; left out, as in the "
                "base"
            )
            return (None,) * len(names)
        lacking = [
            s.label for s, model_name in zip(sources, names, strict=True) if model_name is None
        ]
        issues.notes.append(
            f"{name}: read from {other} in {listed(lacking)}; the two tensors are equal in the base"
        )
        return tuple(model_name or views[m][other] for m, model_name in enumerate(names))
    return names


def _of_vocabulary(source: Source, name: str) -> bool:
    """Return whether a tensor has a row, or an element, for each row of its model's embedding."""
    rows = {
        source.tensors[n].shape[0]
        for n in source.tensors
        if is_embedding(n) and len(source.tensors[n].shape) == 2
    }
    shape = source.tensors[name].shape
    return bool(shape) and shape[0] in rows and math.prod(shape) > 1


def _nested(a: str, b: str) -> bool:
    """Return whether two names differ by one part, as `decoder.bias` and `bias` of a module do."""
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
    """Apply `--head finetuned`.

    Add the tensors that all fine-tunes have and the base lacks. Remove those that only the base
    has.
    """
    if options.head != "finetuned":
        return
    left_out = []
    for name, names in list(partly.items()):
        shapes = {
            source.tensors[model_name].shape
            for source, model_name in zip(sources, names, strict=True)
            if model_name is not None
        }
        if names[0] is None and None not in names[1:] and len(shapes) == 1:
            matched[name] = names
            issues.new_head.append(name)
            del partly[name]
        elif names[0] is not None and not any(names[1:]):
            matched.pop(name)
            del partly[name]
            left_out.append(name)
    if left_out:
        issues.notes.append(
            f"{listed(left_out, 4)}: left out, because no fine-tune has it "
            f"({_percent(_fraction(sources[0], left_out))} of the base's parameters)"
        )


def _missing(
    partly: Mapping[str, Names], sources: Sequence[Source], options: Options, issues: PlanIssues
) -> None:
    """Add problems or notes for tensors that some models have and others lack."""
    for model, source in enumerate(sources[1:], 1):
        lacking = [
            name
            for name, names in partly.items()
            if names[0] is not None
            and names[model] is None
            and not is_index(name, sources[0].tensors[names[0]].shape)
        ]
        extra = [
            name
            for name, names in partly.items()
            if names[0] is None
            and (model_name := names[model])
            and not is_index(name, source.tensors[model_name].shape)
        ]
        fraction = _fraction(sources[0], lacking)
        if options.missing_tensors == "base":
            if lacking:
                issues.notes.append(
                    f"{source.label} lacks {listed(lacking, 3)}: {_percent(fraction)} of the "
                    "base's parameters are copied from the base"
                )
            if extra:
                issues.notes.append(
                    f"{listed(extra, 3)} of {source.label}: left out, because the base lacks it"
                )
            continue
        why = _why(sources[0], source, lacking, extra)
        if lacking:
            hint = why or _lacking_hint(len(lacking), fraction)
            issues.problems.append(
                f"{listed(lacking)} {_is(lacking)} missing in {source.label} ({hint})"
            )
        if extra:
            extra_fraction = _fraction(
                source, [model_name for n in extra if (model_name := partly[n][model])]
            )
            if why:
                hint = "" if lacking else f" ({why})"
            else:
                hint = _extra_hint(extra, partly, max(fraction, extra_fraction))
            issues.problems.append(
                f"{listed(extra)} {_is(extra)} in {source.label} but not in "
                f"{sources[0].label}{hint}"
            )


def _is(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _them(number: int) -> str:
    return "it" if number == 1 else "them"


def _lacking_hint(number: int, fraction: float) -> str:
    if fraction < _MAX_FRACTION:
        return (
            f"--missing-tensors base copies {_them(number)} from the base: {_percent(fraction)} of "
            "the parameters"
        )
    return (
        f"{_percent(fraction)} of the base's parameters: is this a fine-tune of it, saved by the "
        "same library?"
    )


def _extra_hint(extra: Sequence[str], partly: Mapping[str, Names], fraction: float) -> str:
    in_all = all(None not in partly[name][1:] for name in extra)
    if fraction >= _MAX_FRACTION:  # Probably another model, unless all tensors belong to a head.
        heads = in_all and all(map(is_classifier, extra))
        return " (--head finetuned writes the fine-tunes' mean)" if heads else ""
    return f" (--missing-tensors base leaves {_them(len(extra))} out" + (
        "; --head finetuned writes the fine-tunes' mean)" if in_all else ")"
    )


def _why(base: Source, source: Source, lacking: Sequence[str], extra: Sequence[str]) -> str:
    """Return why the names differ, or '' if the reason is not recognized."""
    if is_pipeline(base.directory) != is_pipeline(source.directory):
        pipeline, single = (base, source) if is_pipeline(base.directory) else (source, base)
        names = set(single.tensors)
        component = max(
            pipeline.components,
            key=lambda prefix: len(
                names & {n.removeprefix(prefix) for n in pipeline.tensors if n.startswith(prefix)}
            ),
        )
        components = listed((prefix.rstrip("/") for prefix in pipeline.components), 4)
        return (
            f"{pipeline.label} is a pipeline of {components}, and {single.label} is one model: "
            f"pass {pipeline.directory}/{component.rstrip('/')} instead of {pipeline.label}"
        )
    return explanation(base.tensors, lacking, extra)


def _fraction(source: Source, names: Sequence[str]) -> float:
    """Return the fraction of a model's parameters that are in the tensors `names`."""

    def size(name: str) -> int:
        return math.prod(source.tensors[source.aliases.get(name, name)].shape)

    return sum(map(size, names)) / max(1, sum(map(size, source.tensors)))


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.0f} %" if fraction >= 0.01 else f"{100 * fraction:.2g} %"


def _match_head(
    name: str,
    names: Names,
    sources: Sequence[Source],
    options: Options,
    issues: PlanIssues,
) -> Names:
    """Return the tensor of each model that contains its head: a separate one, or its embedding."""
    ties = [_config(source).get("tie_word_embeddings") for source in sources]
    embeddings = [_embedding(source) for source in sources]
    base_head, base_embedding = names[0], embeddings[0]
    equal = (
        base_head is not None
        and base_embedding is not None
        and _equal(sources[0], base_head, base_embedding)
    )
    # A model without a head ties it if its config says so, or if head and embedding are equal in
    # the base. A base without a head ties it, because transformers stores every untied head.
    alias = tuple(
        embedding
        if model_name is None and tie is not False and (tie or equal or base_head is None)
        else model_name
        for model_name, tie, embedding in zip(names, ties, embeddings, strict=True)
    )
    if ties[0] is not True and base_head is not None:  # The base has a separate head.
        _note_aliases(name, names, alias, sources, issues)
        return alias
    if alias[0] is None:
        return names
    trained = [
        source.label
        for source, model_name, embedding in zip(sources, names, embeddings, strict=True)
        if model_name and embedding and not _equal(source, model_name, embedding)
    ]
    if not trained:
        if names[0] is None:
            stored = [s.label for s, model_name in zip(sources, names, strict=True) if model_name]
            issues.notes.append(
                f"{name}: remains tied to {alias[0]}, as in the base; {listed(stored)} stores "
                "it, equal to the embedding"
            )
            return (None,) * len(names)
        return alias
    if options.tied_head == "untie":
        issues.untied.append(name)
        issues.notes.append(f"{name}: untied, because {listed(trained)} trained a separate head")
        _note_aliases(name, names, alias, sources, issues)
        return alias
    issues.problems.append(
        f"{name} is tied to {alias[0]} in {sources[0].label}, but {listed(trained)} trained a "
        "separate head (--tied-head untie merges it and unties it in the config)"
    )
    return (None,) * len(names)


def _note_aliases(name, names, alias, sources, issues: PlanIssues) -> None:
    for source, model_name, read in zip(sources, names, alias, strict=True):
        if model_name is None and read is not None:
            issues.notes.append(f"{name}: read from {read} in {source.label}, which ties them")


def _embedding(source: Source) -> str | None:
    return min((n for n in source.tensors if _EMBEDDING.fullmatch(n)), key=len, default=None)


def _config(source: Source) -> dict[str, Any]:
    config = read_config(source.directory) or {}
    # Models with several towers store the settings of the language model in `text_config`.
    text = config.get("text_config")
    return {**(text if isinstance(text, dict) else {}), **config}


def _equal(source: Source, a: str | None, b: str | None) -> bool:
    """Return whether two tensors of a model are bitwise identical; compare few elements first."""
    if a is None or b is None:
        return False
    if a == b:
        return True
    if source.tensors[a] != source.tensors[b]:
        return False
    count = min(_PROBED, math.prod(source.tensors[a].shape))
    first, second = (source.read(name, 0, count).view(np.uint8) for name in (a, b))
    return np.array_equal(first, second) and bitwise_equal((source, a), (source, b))


def bitwise_equal(*tensors: tuple[Source, str]) -> bool:
    """Return whether stored tensors of one shape and dtype are bitwise identical."""
    count = math.prod(tensors[0][0].tensors[tensors[0][1]].shape)
    for start in range(0, count, _COMPARED):
        stop = min(start + _COMPARED, count)
        first, *rest = (source.read(name, start, stop).view(np.uint8) for source, name in tensors)
        if not all(np.array_equal(first, other) for other in rest):
            return False
    return True
