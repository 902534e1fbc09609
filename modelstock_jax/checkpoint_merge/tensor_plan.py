"""What becomes of each tensor: merged by the rule, or taken from somewhere, and why."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np

from modelstock_jax.checkpoint_merge import quantization
from modelstock_jax.checkpoint_merge.kernels import FLOATS, escaped
from modelstock_jax.checkpoint_merge.matching import PlanIssues, same_numbers
from modelstock_jax.checkpoint_merge.options import DTYPES, Options
from modelstock_jax.checkpoint_merge.sources import Source
from modelstock_jax.checkpoint_merge.tensor_names import (
    TensorInfo,
    is_classifier,
    is_counter,
    is_embedding,
    is_index,
    is_mask,
)
from modelstock_jax.errors import UserError, listed
from modelstock_jax.merging import units
from modelstock_jax.merging.units import UnitView
from modelstock_jax.registry import COMMANDS
from modelstock_jax.tensor_files.reader import DTYPES as STORED
from modelstock_jax.tensor_files.reader import num_bytes

_INTEGERS = ("I8", "U8", "I32")  # that quantized weights are packed in
_HEAD = re.compile(r"(?:.*[./])?lm_head(?:\.weight)?")
_BLOCK = re.compile(r"\.\d+\.")
_STATISTIC = re.compile(r"(?:.*[._])?running_(?:var|mean)")
_AVERAGED = "a statistic of activations: the fine-tunes' mean"
# A mask holds few different numbers: 0 and 1, or 0 and -inf.
_MASK_NUMBERS, _MASK_SIZE = 3, 2**24


@dataclasses.dataclass(frozen=True)
class TensorPlan:
    """One tensor of the output.

    Attributes:
      name: Its name.
      shape: Of the output.
      code: Dtype that is written, as in a safetensors header.
      action: `merge`, `mean`, `base` or `model:1` (taken whole from the first fine-tune).
      reason: Why it is not merged by the rule; empty where it is.
      part: Its part in a merge unit, of the rows that are merged; None where it is not merged.
      rows: Rows (of `axis`) that are merged, where models differ in them; else None.
      rest: The model that gives the other rows: 0 the base, 1 the first fine-tune.
      names: The tensor's name in the base and in each fine-tune; None where it has none.
      axis: The vocabulary's, where models differ in its rows; the axes before it have length 1.
      checked: Whether a copy of it is searched for NaN and infinity.
    """

    name: str
    shape: tuple[int, ...]
    code: str
    action: str
    reason: str = ""
    unit_view: UnitView | None = None
    rows: int | None = None
    rest: int = 0
    names: tuple[str | None, ...] = ()
    axis: int = 0
    checked: bool = True

    @property
    def merged_shape(self) -> tuple[int, ...]:
        """Shape of the rows that are merged."""
        if self.rows is None:
            return self.shape
        return (*self.shape[: self.axis], self.rows, *self.shape[self.axis + 1 :])

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes in the output."""
        return num_bytes(self.code, self.shape)

    def name_in(self, model: int) -> str:
        """Its name in a model, 0 the base; a KeyError where it has none there."""
        if (name := self.names[model]) is None:
            raise KeyError(f"{self.name} is not in model {model}")
        return name

    def models(self, number: int) -> list[int]:
        """Models that its unmerged numbers come from, of 1 + number: 0 is the base."""
        if self.unit_view is not None:
            return [self.rest]
        if self.action == "mean":
            return list(range(1, 1 + number))
        return [int(self.action.partition(":")[2] or 0)]


def plan_tensors(
    sources: Sequence[Source],
    matched: Mapping[str, tuple[str | None, ...]],
    options: Options,
    findings: PlanIssues,
) -> dict[str, TensorPlan]:
    """Every tensor of the output, by name; problems and notes go to `findings`."""
    vocabularies = _vocabularies(sources, matched)
    tensors = {}
    for name, names in matched.items():
        found = _decide(name, names, sources, options, findings, vocabularies)
        if found is not None:
            tensors[name] = found
    if statistics := [n for n, t in tensors.items() if t.reason == _AVERAGED]:
        findings.notes.append(
            f"{listed(statistics, 3)}: the fine-tunes' mean, for a variance has no extrapolation"
        )
    merged = [t for t in tensors.values() if t.action == "merge"]
    shapes = [(t.name, t.merged_shape) for t in merged]
    if not merged:
        if not findings.problems:
            findings.problems.append("no tensor is left to merge: look at --include and --exclude")
        return tensors
    try:
        parts = units.assign(shapes, options.unit, num_heads=options.num_heads, filter_axis=0)
    except UserError as error:
        findings.problems.append(str(error).rstrip("."))
        return tensors
    for tensor, part in zip(merged, parts, strict=True):
        tensors[tensor.name] = dataclasses.replace(tensor, unit_view=part)
    return tensors


def _decide(
    name: str,
    names: tuple[str | None, ...],
    sources: Sequence[Source],
    options: Options,
    findings: PlanIssues,
    vocabularies: Collection[tuple[int, ...]],
) -> TensorPlan | None:
    infos = [
        source.tensors[own] for source, own in zip(sources, names, strict=True) if own is not None
    ]
    base = infos[0]
    floats = base.code in FLOATS
    code = DTYPES[options.dtype] if floats and options.dtype else base.written or base.code
    if names[0] is None:  # `match` lets through what all fine-tunes have alike.
        return TensorPlan(
            name,
            base.shape,
            code,
            "mean" if floats else "model:1",
            "the fine-tunes' own, which the base lacks",
            names=names,
        )
    if is_index(name, base.shape) or (is_mask(name) and _few_numbers(sources[0], names[0], base)):
        return TensorPlan(
            name,
            base.shape,
            base.code,
            "base",
            "a buffer of indices, frequencies or a mask",
            names=names,
            checked=False,
        )
    if None in names:
        lacking = listed(s.label for s, own in zip(sources, names, strict=True) if own is None)
        return TensorPlan(name, base.shape, code, "base", f"{lacking} lacks it", names=names)
    if _excluded(name, options):
        return _taken(name, names, infos, code, options, findings)
    if is_counter(name, base.shape, not floats and base.code != "BOOL"):
        if (counter := _counter(name, names, sources, infos, findings)) is not None:
            return counter
    if any((info.code in FLOATS) != floats for info in infos):
        findings.add_problem(_mixed(name, sources, infos))
        return (
            TensorPlan(
                name, base.shape, base.code, "base", "of several kinds of number", names=names
            )
            if findings.lenient
            else None
        )
    if not math.prod(base.shape) or not floats:
        return _kept(name, names, sources, infos, findings)
    if _STATISTIC.fullmatch(name) and not COMMANDS[options.method].convex:
        return TensorPlan(name, base.shape, code, "mean", _AVERAGED, names=names)
    if all(
        info.shape == base.shape or math.prod(info.shape) == math.prod(base.shape) == 1
        for info in infos
    ):
        return TensorPlan(name, base.shape, code, "merge", names=names)
    return _of_rows(name, names, sources, infos, code, options, findings, vocabularies)


def _few_numbers(source: Source, name: str | None, info: TensorInfo) -> bool:
    """Whether a tensor holds as few different numbers as a mask does."""
    count = math.prod(info.shape)
    if name is None or count > _MASK_SIZE:
        return False
    return len(np.unique(source.read(name, 0, count).astype(np.float64))) <= _MASK_NUMBERS


def _counter(name, names, sources, infos, findings: PlanIssues) -> TensorPlan | None:
    """A counter: the largest of all models'; None where the base's dtype cannot hold it."""
    base = infos[0]
    if any(math.prod(info.shape) != 1 for info in infos):
        return None
    # Integers and floats as Python compares them: exactly.
    counts = [
        value if isinstance(value := source.read(own, 0, 1)[0].item(), int) else float(value)
        for source, own in zip(sources, names, strict=True)
    ]
    if lost := [s.label for s, x in zip(sources, counts, strict=True) if not math.isfinite(x)]:
        findings.add_problem(
            f"{name} is NaN or infinite in {listed(lost)}; pass --exclude "
            f"{escaped(name)!r} to keep the base's"
        )
        return None
    if any(count < 0 or count != int(count) for count in counts):
        return None  # A number that was trained, with a counter's name.
    model = counts.index(max(counts))
    if infos[model].code != base.code and not _holds(base.code, counts[model]):
        return None
    return TensorPlan(
        name,
        base.shape,
        base.code,
        f"model:{model}" if model else "base",
        "a counter: the largest of all models",
        names=names,
        checked=False,
    )


def _holds(code: str, value: int | float) -> bool:
    """Whether a dtype stores a number exactly."""
    try:
        return bool(STORED[code].type(value) == value)
    except OverflowError:
        return False


def _mixed(name: str, sources: Sequence[Source], infos) -> str:
    """Numbers that are floating point in some models and not in others: which, and how to fix."""
    whole = [(s.label, i.code) for s, i in zip(sources, infos, strict=True) if i.code not in FLOATS]
    codes = listed(sorted({code for _, code in whole}))
    packed = {code for _, code in whole} & set(_INTEGERS) and math.prod(infos[0].shape) > 1
    fix = (
        f"quantized? {quantization.HOW_TO_FIX}"
        if packed
        else f"store it as floating point there too, or pass --exclude {escaped(name)!r}"
    )
    return (
        f"{name} is {codes} in {listed(label for label, _ in whole)} and floating point in the "
        f"others: {fix}"
    )


def _kept(name, names, sources, infos, findings: PlanIssues) -> TensorPlan | None:
    """Integers, booleans and empty tensors: the base's, where all agree."""
    base = infos[0]
    what = "no numbers in it" if not math.prod(base.shape) else f"{base.code}, equal in all models"
    if any((i.shape, i.code) != (base.shape, base.code) for i in infos) or not same_numbers(
        *zip(sources, names, strict=True)
    ):
        packed = base.code in _INTEGERS and len(base.shape) > 1
        fix = (
            f"quantized? {quantization.HOW_TO_FIX}"
            if packed
            else f"such numbers have no mean; pass --exclude {escaped(name)!r} to keep the base's"
        )
        findings.add_problem(f"{name} is {base.code} and differs between models: {fix}")
        if not findings.lenient:
            return None
        what = f"{base.code}, and differs between models"
    return TensorPlan(name, base.shape, base.code, "base", what, names=names)


def _excluded(name: str, options: Options) -> bool:
    included = not options.include or any(fnmatchcase(name, p) for p in options.include)
    return not included or any(fnmatchcase(name, p) for p in options.exclude)


def _taken(name, names, infos, code, options: Options, findings: PlanIssues) -> TensorPlan | None:
    """A tensor that the patterns leave out; whole numbers have no mean and are the base's."""
    base, excluded = infos[0], options.unmerged_from
    if base.code not in FLOATS and excluded == "mean":
        excluded = "base"
    tensor = TensorPlan(
        name, base.shape, code, excluded, "excluded by pattern", names=names, checked=False
    )
    for model in tensor.models(len(infos) - 1):
        other = infos[model]
        if other.shape != base.shape or (
            other.code != base.code and not {other.code, base.code} <= {*FLOATS}
        ):
            findings.problems.append(
                f"{name}: {options.unmerged_from} has another shape or kind of number than the base"
            )
            return None
    return tensor


def _vocabularies(
    sources: Sequence[Source], matched: Mapping[str, tuple[str | None, ...]]
) -> set[tuple[int, ...]]:
    """Numbers of rows of the models' embeddings, one a model, where they differ."""
    found = set()
    # A head alone is a classifier, such as that of CTC: its rows have nothing in common.
    embedded = any(is_embedding(name) and not _HEAD.fullmatch(name) for name in matched)
    for name, names in matched.items():
        if not is_embedding(name) or (_HEAD.fullmatch(name) and not embedded):
            continue
        shapes = [
            source.tensors[own].shape
            for source, own in zip(sources, names, strict=True)
            if own is not None
        ]
        if None not in names and len(shapes[0]) == 2 and len({shape[1:] for shape in shapes}) == 1:
            found.add(tuple(shape[0] for shape in shapes))
    return {rows for rows in found if len(set(rows)) > 1}


def _of_rows(
    name, names, sources, infos, code, options: Options, findings: PlanIssues, vocabularies
) -> TensorPlan | None:
    """A tensor whose shapes differ: in the rows of a vocabulary, as another head, or by mistake."""
    base = infos[0]
    shapes = "; ".join(f"{s.label} {list(i.shape)}" for s, i in zip(sources, infos, strict=True))
    axis = _vocabulary_axis([info.shape for info in infos], vocabularies)
    if axis is None:
        # Between the blocks of a network no tensor is a head.
        alike = len({info.shape for info in infos[1:]}) == 1 and (
            is_classifier(name) or _BLOCK.search(name) is None
        )
        if alike and options.head == "finetuned":
            findings.new_head.append(name)
            return TensorPlan(
                name,
                infos[1].shape,
                code,
                "mean",
                f"the fine-tunes' own: {list(base.shape)} in the base",
                names=names,
            )
        hint = (
            " (--head finetuned takes the fine-tunes')"
            if alike and (is_classifier(name) or is_embedding(name))
            else ""
        )
        findings.add_problem(f"{name} differs in shape: {shapes}{hint}")
        return (
            TensorPlan(name, base.shape, code, "base", "shapes differ", names=names)
            if findings.lenient
            else None
        )
    if options.vocab_mismatch == "error":
        findings.problems.append(
            f"{name} differs in its number of rows, as vocabularies do: {shapes} (--vocabulary "
            "base merges the rows in common and takes the rest from the base, longest from the "
            "model with most)"
        )
        return None
    lengths = [info.shape[axis] for info in infos]
    rest = lengths.index(max(lengths)) if options.vocab_mismatch == "longest" else 0
    rest = 0 if lengths[rest] == lengths[0] else rest
    if rest:
        findings.companion = rest
    findings.vocabulary[name] = tuple(lengths)
    note = (
        f"{name}: {min(lengths)} rows in common merged, {lengths[rest] - min(lengths)} more "
        f"from {sources[rest].label}"
    )
    findings.notes.append(note)
    return TensorPlan(
        name,
        infos[rest].shape,
        code,
        "merge",
        note.partition(": ")[2],
        rows=min(lengths),
        rest=rest,
        names=names,
        axis=axis,
    )


def _vocabulary_axis(
    shapes: Sequence[tuple[int, ...]], vocabularies: Collection[tuple[int, ...]]
) -> int | None:
    """The axis that changed exactly as an embedding's rows did; None where no axis did.

    Example:
      >>> _vocabulary_axis([(1, 65), (1, 67)], {(65, 67)}), _vocabulary_axis([(5,), (7,)], set())
      (1, None)
    """
    if len({len(shape) for shape in shapes}) > 1:
        return None
    differ = [
        axis for axis, lengths in enumerate(zip(*shapes, strict=True)) if len(set(lengths)) > 1
    ]
    if len(differ) != 1 or math.prod(shapes[0][: differ[0]]) != 1:
        return None
    lengths = tuple(shape[differ[0]] for shape in shapes)
    return differ[0] if lengths in vocabularies else None
