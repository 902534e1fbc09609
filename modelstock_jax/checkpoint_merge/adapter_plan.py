"""Plan of a merge of LoRA adapters into one adapter, made from headers and configs."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from modelstock_jax.checkpoint_merge.adapter_config import (
    check_bases,
    config_source,
    merged_config,
)
from modelstock_jax.checkpoint_merge.adapter_sources import AdapterSource
from modelstock_jax.checkpoint_merge.auxiliary_files import AuxiliaryFiles
from modelstock_jax.checkpoint_merge.kernels import FLOATS, PIECE, escaped
from modelstock_jax.checkpoint_merge.lora import PREFIX, WEIGHTS, Factors, module_of
from modelstock_jax.checkpoint_merge.matching import PlanIssues
from modelstock_jax.checkpoint_merge.methods import model_weights
from modelstock_jax.checkpoint_merge.options import DTYPES, Options, model_index
from modelstock_jax.checkpoint_merge.plan import Plan, check_number_of_models
from modelstock_jax.checkpoint_merge.sources import TOKENIZERS, Source
from modelstock_jax.checkpoint_merge.tensor_plan import TensorPlan, is_excluded
from modelstock_jax.errors import UserError, listed
from modelstock_jax.merging import units
from modelstock_jax.merging.attention_names import qkv_siblings
from modelstock_jax.merging.units import UnitView
from modelstock_jax.tensor_files.reader import BITS, num_bytes

# Methods whose result is a mean of weights, so that they need no base.
MEANS = ("uniform_mean", "linear")
_SAVED = re.compile(r"\.modules_to_save(?:\.default)?(?=\.)")
_STATISTIC = re.compile(r"(?:.*[._])?(?:running_(?:var|mean)|num_batches_tracked)")
_COMPLETE_MODEL = "remove --as-adapter to write a complete model"


@dataclasses.dataclass(frozen=True)
class Update:
    """The merged update of one tensor, from the factors of the adapters.

    Attributes:
      name: name of the tensor
      shape: shape of the tensor as the model stores it
      view: its merge unit
      factors: factors in each adapter; None if the adapter does not change the tensor
      a: name of A [rank, in] in the merged adapter
      b: name of B [out, rank]
      size: out and in
      rank: rank in the merged adapter
      total_rank: sum of the ranks of the adapters
      transposed: whether the model stores the tensor as [in, out]
      code: dtype of the merged factors
    """

    name: str
    shape: tuple[int, ...]
    view: UnitView
    factors: tuple[Factors | None, ...]
    a: str
    b: str
    size: tuple[int, int]
    rank: int
    total_rank: int
    transposed: bool
    code: str

    @property
    def written(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The tensors of the merged adapter: name -> dtype and shape."""
        rows, columns = self.size
        return {
            self.a: (self.code, (self.rank, columns)),
            self.b: (self.code, (rows, self.rank)),
        }


@dataclasses.dataclass(frozen=True)
class Replacement:
    """A tensor that adapters store in full: a bias, or a tensor of `modules_to_save`.

    Attributes:
      name: name of the tensor
      shape: its shape
      view: its merge unit; None for a mean without a base
      stored: its name in the file of each adapter; None if the adapter does not store it
      target: its name in the merged adapter
      code: its dtype in the merged adapter
    """

    name: str
    shape: tuple[int, ...]
    view: UnitView | None
    stored: tuple[str | None, ...]
    target: str
    code: str

    @property
    def written(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The tensor of the merged adapter: name -> dtype and shape."""
        return {self.target: (self.code, self.shape)}


@dataclasses.dataclass(frozen=True)
class AdapterPlan(Plan):
    """A merge of adapters that has not started; `tensors` are those of the model.

    Attributes:
      adapters: the adapters
      updates: tensors with factors
      replacements: tensors that are stored in full
      config: content of adapter_config.json
      tokenizer: index of the adapter whose tokenizer files are copied; None if there are none
    """

    adapters: tuple[AdapterSource, ...] = ()
    updates: tuple[Update, ...] = ()
    replacements: tuple[Replacement, ...] = ()
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tokenizer: int | None = None

    @property
    def reads_base(self) -> bool:
        """Whether weights of the base are read, not only its names and shapes."""
        return self.anchored and any(r.view is not None for r in self.replacements)

    @property
    def written(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The tensors of the merged adapter: name -> dtype and shape."""
        return {
            name: x
            for part in (*self.updates, *self.replacements)
            for name, x in part.written.items()
        }


def plan_adapter(
    base: Source | None, adapters: Sequence[AdapterSource], options: Options
) -> AdapterPlan:
    """Plan a merge of adapters into an adapter, or raise one error with all problems.

    Args:
      base: the base, for names, shapes and the values of tensors that adapters store in full; None
        to merge without it
      adapters: the adapters, with equal names of tensors
      options: options of the merge

    Raises:
      UserError: the adapters or the options do not fit; the message lists all problems
    """
    issues = PlanIssues()
    check_number_of_models(len(adapters), options, issues, anchored=base is not None)
    issues.raise_problems()
    _check_options(base, adapters, options, issues)
    chosen = config_source(adapters, options, issues)
    if base is None:
        check_bases(adapters, options, issues)
    issues.raise_problems()
    tensors = _Tensors(base, adapters, options, issues)
    views = tensors.views()
    updates = [tensors.update(name, views[name]) for name in tensors.with_factors]
    replacements = [tensors.replacement(name, views) for name in tensors.replaced]
    issues.raise_problems()
    ready = tuple(x for x in replacements if x is not None)
    config = merged_config(
        adapters, chosen, tensors.modules(),
        {module_of(update.b): update.rank for update in updates}, [r.target for r in ready],
    )  # fmt: skip
    tokenizer = _tokenizer(adapters, options, issues)
    issues.raise_problems()
    return _assemble(base, adapters, options, tensors, tuple(updates), ready, config, tokenizer)


def _check_options(
    base: Source | None, adapters: Sequence[AdapterSource], options: Options, issues: PlanIssues
) -> None:
    total = model_weights(options, len(adapters)).sum() if options.method == "linear" else 1.0
    if abs(total - 1) > 1e-9:
        issues.problems.append(
            f"--weights of linear have the sum {total:g}, which also scales the base, and an "
            "adapter cannot; pass --normalize, or --method task-arithmetic to add the updates"
        )
    if base is None:
        for name in ("head", "dequantize"):
            if getattr(options, name) not in ("error", False):
                issues.problems.append(
                    f"--{name} applies to the base, but there is none; pass BASE"
                )
        if options.unit == "head":
            issues.problems.append("--unit head requires the shapes of all attentions; pass BASE")


class _Tensors:
    """The tensors of the adapters, by the names of the base or of the first adapter."""

    def __init__(
        self,
        base: Source | None,
        adapters: Sequence[AdapterSource],
        options: Options,
        issues: PlanIssues,
    ):
        self.base, self.adapters = base, adapters
        self.options, self.issues = options, issues
        self._shapes = [source.adapter.shapes() for source in adapters]
        names = sorted({name for shapes in self._shapes for name in shapes})
        self.excluded = [name for name in names if is_excluded(name, options)]
        merged = [name for name in names if name not in self.excluded]
        self.with_factors = [n for n in merged if any(n in s.adapter.factors for s in adapters)]
        self.replaced = [n for n in merged if any(n in s.adapter.replacements for s in adapters)]
        if not merged:
            issues.problems.append("no tensor is left to merge; check --include and --exclude")
        elif not self.with_factors:
            issues.problems.append(
                "no tensor with factors is left, so the result is no LoRA adapter; check --include "
                f"and --exclude, or {_COMPLETE_MODEL}"
            )
        self._check_shapes(merged)
        self._check_layouts()
        self._check_names()
        self._check_embeddings()
        issues.raise_problems()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, which is equal in all adapters."""
        return next(shapes[name] for shapes in self._shapes if name in shapes)

    def modules(self) -> list[set[str]]:
        """Return the modules with factors of each adapter, as the merged adapter names them."""
        return [{module_of(self._first(n).b) for n in s.adapter.factors} for s in self.adapters]

    def views(self) -> dict[str, UnitView]:
        """Return the merge unit of each tensor."""
        merged = {name: self.shape(name) for name in (*self.with_factors, *self.replaced)}
        shapes = dict(merged)
        if self.base is not None:
            shapes |= {
                name: info.shape
                for name, info in self.base.tensors.items()
                if name not in merged and info.code in FLOATS
                and not is_excluded(name, self.options)
            }  # fmt: skip
        elif self.options.unit in ("layer", "block"):
            # Adapters often lack the keys of an attention, by which its other names are recognized.
            for name, shape in merged.items():
                for sibling in qkv_siblings(name):
                    if not is_excluded(sibling, self.options):
                        shapes.setdefault(sibling, shape)
        try:
            views = units.assign(
                list(shapes.items()), self.options.unit, num_heads=self.options.num_heads,
                filter_axis=0, on_note=self.issues.notes.append,
            )  # fmt: skip
        except UserError as error:
            hint = "" if self.base is not None else "; or pass BASE, whose names show the blocks"
            raise UserError(f"{str(error).rstrip('.')}{hint}") from None
        found = dict(zip(shapes, views, strict=True))
        if self.base is None and self.options.unit == "block":
            self._check_blocks({name: found[name] for name in merged})
        return found

    def update(self, name: str, view: UnitView) -> Update:
        """Return the plan of a tensor with factors."""
        factors = tuple(source.adapter.factors.get(name) for source in self.adapters)
        first = self._first(name)
        start = PREFIX + module_of(first.a)
        embedding = "lora_embedding_" in first.a
        a, b = (f"{start}.lora_embedding_{x}" if embedding else f"{start}.lora_{x}.weight"
                for x in "AB")  # fmt: skip
        shape = self.shape(name)
        size = shape[::-1] if first.transposed else shape
        present = [(s.adapter.files, f) for s, f in zip(self.adapters, factors, strict=True) if f]
        total = sum(files.shape(f.a)[0] for files, f in present)
        limit = self.options.rank
        rank = total if limit is None or limit >= total else min(limit, *size)
        codes = [files.code(x) for files, f in present for x in (f.a, f.b)]
        return Update(
            name, shape, view, factors, a, b, (size[0], size[1]), rank, total, first.transposed,
            self._code(name, codes),
        )  # fmt: skip

    def replacement(self, name: str, views: Mapping[str, UnitView]) -> Replacement | None:
        """Return the plan of a tensor that is stored in full; None if there is nothing to write."""
        if name in self.with_factors:  # A copy of the base's, which `_check_embeddings` compared.
            self.issues.notes.append(
                f"{name}: the copy of the base's tensor, next to its factors, is left out"
            )
            return None
        stored = tuple(source.adapter.replacements.get(name) for source in self.adapters)
        files = [s.adapter.files for s in self.adapters]
        codes = [f.code(x) for f, x in zip(files, stored, strict=True) if x is not None]
        first = next(x for x in stored if x is not None)
        problem, is_mean = self._anchor(name, None in stored)
        if not {*codes} <= {*FLOATS} or _STATISTIC.fullmatch(name):
            problem = f"is no weight, so it is not merged; pass --exclude {escaped(name)!r}"
        if problem is not None:
            self.issues.problems.append(f"{name} is stored in full by an adapter and {problem}")
            return None
        view = None if is_mean else views[name]
        target = PREFIX + _SAVED.sub("", first.removeprefix(PREFIX))
        return Replacement(name, self.shape(name), view, stored, target, self._code(name, codes))

    def _anchor(self, name: str, is_partial: bool) -> tuple[str | None, bool]:
        """Return why a tensor that is stored in full has no update, and whether a mean is due."""
        if self.base is None:
            if self.options.method in MEANS and not is_partial:
                return None, True
            lacking = "not by all of them" if is_partial else "its update is unknown without it"
            return f"needs the base ({lacking}); pass BASE", False
        info = self.base.tensors.get(name)
        if info is not None and info.shape == self.shape(name) and info.code in FLOATS:
            return None, False
        if self.options.head == "finetuned" and not is_partial:
            return None, True
        return (
            f"has no equal in {self.base.label}; pass --head finetuned for the mean of a new "
            f"classifier that all adapters have, or {_COMPLETE_MODEL}"
        ), False

    def _first(self, name: str) -> Factors:
        return next(f for s in self.adapters if (f := s.adapter.factors.get(name)) is not None)

    def _code(self, name: str, codes: Sequence[str]) -> str:
        """Return the dtype of the option, or that of the inputs; the wider one if they differ."""
        if self.options.dtype is not None:
            return DTYPES[self.options.dtype]
        if wrong := sorted({*codes} - {*FLOATS}):
            self.issues.problems.append(f"{name} is {wrong[0]} in an adapter, not floating point")
        if len({*codes}) == 1:
            return codes[0]
        return "F64" if "F64" in codes else "F32"

    def _check_shapes(self, names: Sequence[str]) -> None:
        for name in names:
            shapes = {
                source.label: of_adapter[name]
                for source, of_adapter in zip(self.adapters, self._shapes, strict=True)
                if name in of_adapter
            }
            if len({*shapes.values()}) > 1:
                each = "; ".join(f"{label} {list(shape)}" for label, shape in shapes.items())
                self.issues.problems.append(
                    f"{name} differs in shape: {each}; check that the adapters have one base, or "
                    f"pass --exclude {escaped(name)!r}"
                )

    def _check_layouts(self) -> None:
        """Check that a tensor is stored as [in, out] by all adapters or by none."""
        for name in self.with_factors:
            kinds = {s.adapter.factors[name].transposed for s in self.adapters
                     if name in s.adapter.factors}  # fmt: skip
            if len(kinds) > 1:
                self.issues.problems.append(
                    f"{name}: fan_in_fan_out differs between the adapters; correct their configs"
                )

    def _check_names(self) -> None:
        """Check that the merged adapter can name all modules as one of the adapters does."""
        for source in self.adapters:
            factors = source.adapter.factors
            modules = {name: module_of(factors[name].a) for name in factors}
            other = {name for name, module in modules.items()
                     if module != module_of(self._first(name).a)}  # fmt: skip
            alone = [
                n
                for n in modules
                if self._first(n) is factors[n] and source is not self.adapters[0]
            ]
            if other and alone:
                name = min(other)
                self.issues.problems.append(
                    f"{source.label} names modules differently ({modules[name]}, not "
                    f"{module_of(self._first(name).a)}); save the adapters with one release of PEFT"
                )

    def _check_embeddings(self) -> None:
        """Check that tensors that are stored next to their factors are copies of the base's."""
        problems = self.issues.problems
        for name in sorted({*self.with_factors} & {*self.replaced}):
            stored = [s for s in self.adapters if name in s.adapter.replacements]
            if trained := [s for s in stored if name not in s.adapter.factors]:
                problems.append(
                    f"{name} has factors in one adapter and is trained in full in "
                    f"{trained[0].label}; {_COMPLETE_MODEL}"
                )
            elif self.base is None:
                problems.append(
                    f"{name} is stored in full next to its factors; pass BASE to compare them, or "
                    "save the adapters with save_embedding_layers=False"
                )
            else:
                problems += [
                    f"{name} in {s.label} has factors and is not that of the base; "
                    f"{_COMPLETE_MODEL}"
                    for s in stored
                    if not _is_copy(self.base, name, s, s.adapter.replacements[name])
                ]

    def _check_blocks(self, views: Mapping[str, UnitView]) -> None:
        """Check that every tensor with a number of a layer is in a block."""
        alone = [n for n, view in views.items() if view.key == n and re.search(r"\.\d+\.", n)]
        if alone:
            self.issues.problems.append(
                f"--unit block: the block of {listed(alone, 3)} is unknown without the names of "
                "its attention; pass BASE"
            )


def _is_copy(base: Source, name: str, source: AdapterSource, stored: str) -> bool:
    """Return whether a stored tensor has the values of the base's tensor."""
    files, count = source.adapter.files, math.prod(base.tensors[name].shape)
    return files.shape(stored) == base.tensors[name].shape and all(
        np.array_equal(
            base.read(name, start, min(start + PIECE, count)).astype(np.float64),
            files.read(stored, start, min(start + PIECE, count)).astype(np.float64),
        )
        for start in range(0, count, PIECE)
    )


def _tokenizer(
    adapters: Sequence[AdapterSource], options: Options, issues: PlanIssues
) -> int | None:
    """Return the adapter whose tokenizer files are copied: the given one, or the first with any."""
    having = [i for i, source in enumerate(adapters) if source.tokenizer_directory is not None]
    if options.tokenizer_from is not None:
        index = model_index(options.tokenizer_from) - 1
        if index not in having:
            issues.problems.append(
                f"--tokenizer-from {options.tokenizer_from}: no adapter with tokenizer files"
            )
        return index
    if not having:
        return None
    first = adapters[having[0]]
    for source in (adapters[i] for i in having[1:]):
        differing = [n for n in TOKENIZERS if _content(first, n) != _content(source, n)]
        if differing:
            issues.notes.append(
                f"{listed(differing)} of {source.label} differs from {first.label}, whose "
                "tokenizer is copied; --tokenizer-from chooses another adapter"
            )
    return having[0]


def _content(source: AdapterSource, name: str) -> bytes | None:
    path = source.adapter.directory / name
    return path.read_bytes() if path.is_file() else None


def _assemble(
    base: Source | None,
    adapters: Sequence[AdapterSource],
    options: Options,
    tensors: _Tensors,
    updates: tuple[Update, ...],
    replacements: tuple[Replacement, ...],
    config: Mapping[str, Any],
    tokenizer: int | None,
) -> AdapterPlan:
    planned = {}
    for part in (*updates, *replacements):
        reason = "" if part.view is not None else "the mean of the adapters' tensors"
        action = "merge" if part.view is not None else "mean"
        planned[part.name] = TensorPlan(
            part.name, part.shape, part.code, action, reason, unit_view=part.view
        )
    for name in tensors.excluded:
        planned[name] = TensorPlan(name, tensors.shape(name), "F32", "base", "excluded by pattern")
    written = {name: x for part in (*updates, *replacements) for name, x in part.written.items()}
    read = sum(
        num_bytes(s.adapter.files.code(x), s.adapter.files.shape(x))
        for s in adapters for x in s.adapter.files
    )  # fmt: skip
    if base is not None:
        read += sum(
            math.prod(r.shape) * BITS[base.tensors[r.name].code] // 8
            for r in replacements if r.view is not None
        )  # fmt: skip
    elements = max((sum(u.size) * u.total_rank for u in updates), default=0)
    return AdapterPlan(
        base if base is not None else adapters[0], tuple(adapters), options,
        dict(sorted(planned.items())), (tuple(written),), (WEIGHTS,),
        bytes_read=2 * read, bytes_written=sum(num_bytes(*x) for x in written.values()),
        memory=100 * 2**20 + 8 * (6 * elements + 3 * len(adapters) * PIECE),
        auxiliary_files=AuxiliaryFiles(), notes=tuple(tensors.issues.notes), checksum="adapter",
        anchored=base is not None, adapters=tuple(adapters), updates=updates,
        replacements=replacements, config=config, tokenizer=tokenizer,
    )  # fmt: skip
