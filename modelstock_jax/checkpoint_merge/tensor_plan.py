"""Decide for each tensor of the output whether it is merged or copied, from where, and why."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from modelstock_jax.checkpoint_merge import quantization
from modelstock_jax.checkpoint_merge.kernels import FLOATS, escaped
from modelstock_jax.checkpoint_merge.matching import Names, PlanIssues, bitwise_equal
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

_INTEGERS = ("I8", "U8", "I32")  # dtypes that quantized weights are packed in
_HEAD = re.compile(r"(?:.*[./])?lm_head(?:\.weight)?")
_BLOCK = re.compile(r"\.\d+\.")
_STATISTIC = re.compile(r"(?:.*[._])?running_(?:var|mean)")
_AVERAGED = "a statistic of activations: the fine-tunes' mean"
_ESTIMATE = "estimate these statistics again on training images before you use the merged model"
_CHECK_BASE = "check that these models are fine-tunes of this base"
# A mask has few different values: 0 and 1, or 0 and -inf.
_MAX_MASK_VALUES, _MAX_MASK_SIZE = 3, 2**24


@dataclasses.dataclass(frozen=True)
class TensorPlan:
    """The plan for one tensor of the output.

    Attributes:
      name: name of the tensor
      shape: shape in the output
      code: dtype in the output, as in a safetensors header
      action: `merge`, `mean`, `base` or `model:1` (a copy from the first fine-tune)
      reason: why the merge rule does not apply; empty if it does
      unit_view: the merge unit of the merged rows; None if the tensor is not merged
      rows: number of rows (along `axis`) that are merged if the models differ in it; else None
      rest: the model that supplies the other rows: 0 is the base, 1 the first fine-tune
      names: name of the tensor in the base and in each fine-tune; None if a model lacks it
      axis: the vocabulary axis if the models differ in its length; the axes before it have length 1
      checked: whether a copied tensor is checked for NaN and infinity
    """

    name: str
    shape: tuple[int, ...]
    code: str
    action: str
    reason: str = ""
    unit_view: UnitView | None = None
    rows: int | None = None
    rest: int = 0
    names: Names = ()
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
        """Size in the output, in bytes."""
        return num_bytes(self.code, self.shape)

    def name_in(self, model: int) -> str:
        """Return the name of the tensor in a model, 0 for the base.

        Raises:
          KeyError: the model lacks the tensor
        """
        if (name := self.names[model]) is None:
            raise KeyError(f"{self.name} is not in model {model}")
        return name

    def models(self, number: int) -> list[int]:
        """Return the models, of a base and `number` fine-tunes, that supply unmerged elements."""
        if self.unit_view is not None:
            return [self.rest]
        if self.action == "mean":
            return list(range(1, 1 + number))
        return [int(self.action.partition(":")[2] or 0)]


@dataclasses.dataclass(frozen=True)
class _MatchedTensor:
    """A tensor of the output with everything that its plan depends on.

    Attributes:
      name: name in the output
      names: name in each model; None if a model lacks it
      sources: the base and the fine-tunes
      infos: shape and dtype in each model that has the tensor
      options: the options of the merge
      issues: collects problems and notes
      vocabularies: as `_vocabularies` returns them
    """

    name: str
    names: Names
    sources: Sequence[Source]
    infos: Sequence[TensorInfo]
    options: Options
    issues: PlanIssues
    vocabularies: Collection[tuple[int, ...]]

    @property
    def base(self) -> TensorInfo:
        """Shape and dtype in the base; in the first fine-tune if the base lacks the tensor."""
        return self.infos[0]

    @property
    def is_float(self) -> bool:
        """Whether the base stores floating-point values."""
        return self.base.code in FLOATS

    @property
    def code(self) -> str:
        """Dtype code of the output if the tensor is merged or averaged."""
        if self.is_float and self.options.dtype:
            return DTYPES[self.options.dtype]
        return self.base.output_code or self.base.code

    def plan(self, action: str, reason: str = "", **fields: Any) -> TensorPlan:
        """Return the plan, by default with the shape of the base and the dtype `code`."""
        defaults: dict[str, Any] = {"shape": self.base.shape, "code": self.code}
        fields = defaults | fields
        return TensorPlan(self.name, action=action, reason=reason, names=self.names, **fields)


def plan_tensors(
    sources: Sequence[Source],
    matched: Mapping[str, Names],
    options: Options,
    issues: PlanIssues,
) -> dict[str, TensorPlan]:
    """Plan every tensor of the output, by name; add problems and notes to `issues`."""
    vocabularies = _vocabularies(sources, matched)
    tensors = {}
    for name, names in matched.items():
        infos = [
            source.tensors[model_name]
            for source, model_name in zip(sources, names, strict=True)
            if model_name is not None
        ]
        tensor = _MatchedTensor(name, names, sources, infos, options, issues, vocabularies)
        if (plan := _plan(tensor)) is not None:
            tensors[name] = plan
    issues.notes += _notes_on_statistics(tensors)
    merged = [t for t in tensors.values() if t.action == "merge"]
    shapes = [(t.name, t.merged_shape) for t in merged]
    if not merged:
        if not issues.problems:
            issues.problems.append("no tensor is left to merge; check --include and --exclude")
        return tensors
    try:
        views = units.assign(
            shapes,
            options.unit,
            num_heads=options.num_heads,
            filter_axis=0,
            on_note=issues.notes.append,
        )
    except UserError as error:
        issues.problems.append(str(error).rstrip("."))
        return tensors
    for tensor, view in zip(merged, views, strict=True):
        tensors[tensor.name] = dataclasses.replace(tensor, unit_view=view)
    return tensors


def _notes_on_statistics(tensors: Mapping[str, TensorPlan]) -> list[str]:
    """Return notes that statistics of activations are not those of the merged weights."""
    averaged = [n for n, t in tensors.items() if t.reason == _AVERAGED]
    merged = [n for n, t in tensors.items() if t.action == "merge" and _STATISTIC.fullmatch(n)]
    texts = {
        "differ between the models; the fine-tunes' mean is written, because an angle between "
        "statistics has no meaning and extrapolation can make a variance negative": averaged,
        "differ between the models, and are interpolated like the weights": merged,
    }
    return [f"{listed(names, 3)} {text}: {_ESTIMATE}" for text, names in texts.items() if names]


def _plan(tensor: _MatchedTensor) -> TensorPlan | None:
    """Return the plan of one tensor, or None if it has a problem."""
    name, names, base = tensor.name, tensor.names, tensor.base
    if names[0] is None:  # `match_tensors` passes on only tensors that all fine-tunes have.
        return tensor.plan("mean" if tensor.is_float else "model:1", "only the fine-tunes have it")
    if is_index(name, base.shape) or (
        is_mask(name) and _has_mask_values(tensor.sources[0], names[0], base)
    ):
        reason = "a buffer of indices, frequencies or a mask"
        return tensor.plan("base", reason, code=base.code, checked=False)
    if None in names:
        lacking = [
            s.label
            for s, model_name in zip(tensor.sources, names, strict=True)
            if model_name is None
        ]
        return tensor.plan("base", f"{listed(lacking)} lacks it")
    if is_excluded(name, tensor.options):
        return _plan_excluded(tensor)
    if is_counter(name, base.shape, not tensor.is_float and base.code != "BOOL"):
        if (counter := _plan_counter(tensor)) is not None:
            return counter
    if any((info.code in FLOATS) != tensor.is_float for info in tensor.infos):
        tensor.issues.add_problem(_mixed_kinds(tensor))
        if not tensor.issues.lenient:
            return None
        return tensor.plan("base", "floating point in some models only", code=base.code)
    if not math.prod(base.shape) or not tensor.is_float:
        return _plan_equal(tensor)
    if _STATISTIC.fullmatch(name) and (statistic := _plan_statistic(tensor)) is not None:
        return statistic
    if all(
        info.shape == base.shape or math.prod(info.shape) == math.prod(base.shape) == 1
        for info in tensor.infos
    ):
        return tensor.plan("merge")
    axis = _vocabulary_axis([info.shape for info in tensor.infos], tensor.vocabularies)
    return _plan_other_shape(tensor) if axis is None else _plan_vocabulary(tensor, axis)


def _plan_statistic(tensor: _MatchedTensor) -> TensorPlan | None:
    """Plan a statistic of activations: a copy if all models have the same one, else the mean.

    None if the method interpolates with a coefficient that it does not compute from the tensor, or
    if the shapes differ.
    """
    models = [
        (source, model_name)
        for source, model_name in zip(tensor.sources, tensor.names, strict=True)
        if model_name
    ]
    if len(set(tensor.infos)) == 1 and bitwise_equal(*models):
        return tensor.plan("base", "a statistic of activations, equal in all models")
    method = COMMANDS[tensor.options.method]
    interpolated = method.convex and not method.rule
    if interpolated or len({info.shape for info in tensor.infos}) > 1:
        return None
    return tensor.plan("mean", _AVERAGED)


def _has_mask_values(source: Source, name: str, info: TensorInfo) -> bool:
    """Return whether a tensor has as few different values as a mask."""
    count = math.prod(info.shape)
    if count > _MAX_MASK_SIZE:
        return False
    return len(np.unique(source.read(name, 0, count).astype(np.float64))) <= _MAX_MASK_VALUES


def _plan_counter(tensor: _MatchedTensor) -> TensorPlan | None:
    """Plan the maximum of a counter; None if it is no counter or the base's dtype is too small."""
    name, base = tensor.name, tensor.base
    if any(math.prod(info.shape) != 1 for info in tensor.infos):
        return None
    models = list(zip(tensor.sources, tensor.names, strict=True))
    # Integers and floats, which Python compares exactly.
    counts = [
        value if isinstance(value := source.read(model_name, 0, 1)[0].item(), int) else float(value)
        for source, model_name in models
        if model_name is not None
    ]
    pairs = zip(tensor.sources, counts, strict=True)
    if non_finite := [source.label for source, count in pairs if not math.isfinite(count)]:
        tensor.issues.add_problem(
            f"{name} is NaN or infinite in {listed(non_finite)}; pass --exclude "
            f"{escaped(name)!r} to copy the base's"
        )
        return None
    if any(count < 0 or count != int(count) for count in counts):
        return None  # a trained parameter with the name of a counter
    model = counts.index(max(counts))
    if tensor.infos[model].code != base.code and not _is_exact(base.code, counts[model]):
        return None
    action = f"model:{model}" if model else "base"
    reason = "a counter: the maximum of all models"
    return tensor.plan(action, reason, code=base.code, checked=False)


def _is_exact(code: str, value: int | float) -> bool:
    """Return whether a dtype stores a value exactly."""
    try:
        return bool(STORED[code].type(value) == value)
    except OverflowError:
        return False


def _mixed_kinds(tensor: _MatchedTensor) -> str:
    """Return the error message for a tensor that is floating point in some models only."""
    integers = [
        (source.label, info.code)
        for source, info in zip(tensor.sources, tensor.infos, strict=True)
        if info.code not in FLOATS
    ]
    codes = {code for _, code in integers}
    if codes & set(_INTEGERS) and math.prod(tensor.base.shape) > 1:
        fix = f"quantized? {quantization.HOW_TO_FIX}"
    else:
        fix = f"store it as floating point there too, or pass --exclude {escaped(tensor.name)!r}"
    return (
        f"{tensor.name} is {listed(sorted(codes))} in {listed(label for label, _ in integers)} and "
        f"floating point in the others: {fix}"
    )


def _plan_equal(tensor: _MatchedTensor) -> TensorPlan | None:
    """Plan a copy of integers, booleans or an empty tensor, which must be equal in all models."""
    name, base = tensor.name, tensor.base
    reason = f"{base.code}, equal in all models" if math.prod(base.shape) else "no elements"
    models = [
        (s, model_name)
        for s, model_name in zip(tensor.sources, tensor.names, strict=True)
        if model_name
    ]
    if any((i.shape, i.code) != (base.shape, base.code) for i in tensor.infos) or not bitwise_equal(
        *models
    ):
        if base.code in _INTEGERS and len(base.shape) > 1:
            fix = f"quantized? {quantization.HOW_TO_FIX}"
        else:
            fix = f"these values have no mean; pass --exclude {escaped(name)!r} to copy the base's"
        tensor.issues.add_problem(f"{name} is {base.code} and differs between models: {fix}")
        if not tensor.issues.lenient:
            return None
        reason = f"{base.code}, differs between models"
    return tensor.plan("base", reason, code=base.code)


def is_excluded(name: str, options: Options) -> bool:
    """Return whether the patterns exclude a tensor from the merge."""
    included = not options.include or any(fnmatchcase(name, p) for p in options.include)
    return not included or any(fnmatchcase(name, p) for p in options.exclude)


def _plan_excluded(tensor: _MatchedTensor) -> TensorPlan | None:
    """Plan a tensor that the patterns exclude; integers have no mean and come from the base."""
    base, action = tensor.base, tensor.options.unmerged_from
    if not tensor.is_float and action == "mean":
        action = "base"
    plan = tensor.plan(action, "excluded by pattern", checked=False)
    for model in plan.models(len(tensor.infos) - 1):
        other = tensor.infos[model]
        if other.shape != base.shape or (
            other.code != base.code and not {other.code, base.code} <= {*FLOATS}
        ):
            tensor.issues.problems.append(
                f"{tensor.name}: the shape or dtype in {tensor.options.unmerged_from} does not "
                "match the base; pass another --unmerged-from"
            )
            return None
    return plan


def _vocabularies(sources: Sequence[Source], matched: Mapping[str, Names]) -> set[tuple[int, ...]]:
    """Return the numbers of embedding rows, one per model, of embeddings whose rows differ."""
    vocabularies = set()
    # A head without an embedding is a classifier, such as that of CTC: its rows do not correspond.
    embedded = any(is_embedding(name) and not _HEAD.fullmatch(name) for name in matched)
    for name, names in matched.items():
        if not is_embedding(name) or (_HEAD.fullmatch(name) and not embedded):
            continue
        shapes = [
            source.tensors[model_name].shape
            for source, model_name in zip(sources, names, strict=True)
            if model_name is not None
        ]
        if None not in names and len(shapes[0]) == 2 and len({shape[1:] for shape in shapes}) == 1:
            vocabularies.add(tuple(shape[0] for shape in shapes))
    return {rows for rows in vocabularies if len(set(rows)) > 1}


def _shapes(tensor: _MatchedTensor) -> str:
    pairs = zip(tensor.sources, tensor.infos, strict=True)
    return "; ".join(f"{source.label} {list(info.shape)}" for source, info in pairs)


def _plan_other_shape(tensor: _MatchedTensor) -> TensorPlan | None:
    """Plan a tensor whose shapes differ, but not in a vocabulary: a new head, or a mismatch."""
    name, base, infos = tensor.name, tensor.base, tensor.infos
    # A tensor in a block of the network is not a head.
    same_in_finetuned = len({info.shape for info in infos[1:]}) == 1 and (
        is_classifier(name) or _BLOCK.search(name) is None
    )
    if same_in_finetuned and tensor.options.head == "finetuned":
        tensor.issues.new_head.append(name)
        reason = f"the fine-tunes' head: {list(base.shape)} in the base"
        return tensor.plan("mean", reason, shape=infos[1].shape)
    message = f"{name} differs in shape: {_shapes(tensor)}"
    if tensor.issues.lenient:
        tensor.issues.add_problem(f"{message}; it is left out")
        return tensor.plan("base", "shapes differ")
    is_head = same_in_finetuned and (is_classifier(name) or is_embedding(name))
    if is_head:
        hint = " (--head finetuned writes the fine-tunes' mean)"
    elif not any(_CHECK_BASE in problem for problem in tensor.issues.problems):  # Say it once.
        hint = f" ({_CHECK_BASE}, or pass --exclude {escaped(name)!r} to copy the base's)"
    else:
        hint = ""
    tensor.issues.add_problem(f"{message}{hint}")
    return None


def _plan_vocabulary(tensor: _MatchedTensor, axis: int) -> TensorPlan | None:
    """Plan a tensor whose shapes differ in the length of a vocabulary axis."""
    name, options, issues = tensor.name, tensor.options, tensor.issues
    if options.vocab_mismatch == "error":
        issues.problems.append(
            f"{name} differs in its number of rows, as vocabularies do: {_shapes(tensor)} "
            "(--vocab-mismatch base merges the rows in common and copies the rest from the base, "
            "longest copies the rest from the model with the most rows)"
        )
        return None
    lengths = [info.shape[axis] for info in tensor.infos]
    rest = lengths.index(max(lengths)) if options.vocab_mismatch == "longest" else 0
    rest = 0 if lengths[rest] == lengths[0] else rest
    if rest:
        issues.vocabulary_model = rest
    issues.vocabulary[name] = tuple(lengths)
    common = min(lengths)
    reason = (
        f"{common} rows in common merged, {lengths[rest] - common} more copied "
        f"from {tensor.sources[rest].label}"
    )
    issues.notes.append(f"{name}: {reason}")
    shape = tensor.infos[rest].shape
    return tensor.plan("merge", reason, shape=shape, rows=common, rest=rest, axis=axis)


def _vocabulary_axis(
    shapes: Sequence[tuple[int, ...]], vocabularies: Collection[tuple[int, ...]]
) -> int | None:
    """Return the axis that changed exactly like the rows of an embedding, or None.

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
