"""What becomes of each tensor: merged by the rule, or taken from somewhere, and why."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from modelstock_jax.checkpoint_merge.casts import FLOATS
from modelstock_jax.checkpoint_merge.match import Findings, same_numbers
from modelstock_jax.checkpoint_merge.options import DTYPES, Options
from modelstock_jax.checkpoint_merge.sources import Source
from modelstock_jax.errors import UserError, listed
from modelstock_jax.merging import units
from modelstock_jax.merging.units import Part
from modelstock_jax.tensor_files.header import num_bytes

# What quantised checkpoints keep beside their packed weights.
_QUANTISED = re.compile(
    r".*(?:\.(?:SCB|weight_scale(?:_inv)?|qweight|qzeros|absmax|weight_format)|"
    r"weight_packed|\.(?:absmax|quant_map|nested_absmax|nested_quant_map)|quant_state\..*)"
)
_INTEGERS = ("I8", "U8", "I32")  # that quantised weights are packed in
_PACKED = ("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0")
_WAY_OUT = "dequantise first: load it with transformers, model.dequantize(), save_pretrained"
_VOCABULARY = re.compile(
    r"(?:.*\.)?(?:embed_tokens|wte|embed_in|word_embeddings|shared|token_embedding|lm_head|"
    r"embed_out)\.(?:weight|bias)"
)


@dataclasses.dataclass(frozen=True)
class Planned:
    """One tensor of the output.

    Attributes:
        name: Its name.
        shape: Of the output.
        code: Dtype that is written, as in a safetensors header.
        action: ``merge``, ``mean``, ``base`` or ``model:1`` (taken whole from the first fine-tune).
        reason: Why it is not merged by the rule; empty where it is.
        part: Its part in a merge unit, of the rows that are merged; None where it is not merged.
        rows: Rows (of axis 0) that are merged, where models differ in them; else None.
        rest: The model that gives the other rows: 0 the base, 1 the first fine-tune.
        names: The tensor's name in the base and in each fine-tune; None where it has none.
    """

    name: str
    shape: tuple[int, ...]
    code: str
    action: str
    reason: str = ""
    part: Part | None = None
    rows: int | None = None
    rest: int = 0
    names: tuple[str | None, ...] = ()

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
        if self.part is not None:
            return [self.rest]
        if self.action == "mean":
            return list(range(1, 1 + number))
        return [int(self.action.partition(":")[2] or 0)]


def decide(
    sources: Sequence[Source],
    matched: Mapping[str, tuple[str | None, ...]],
    options: Options,
    findings: Findings,
) -> dict[str, Planned]:
    """Every tensor of the output, by name; problems and notes go to `findings`."""
    _refuse_quantised(sources, findings)
    tensors = {}
    for name, names in matched.items():
        if (found := _decide(name, names, sources, options, findings)) is not None:
            tensors[name] = found
    merged = [t for t in tensors.values() if t.action == "merge"]
    shapes = [(t.name, t.shape if t.rows is None else (t.rows, *t.shape[1:])) for t in merged]
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
        tensors[tensor.name] = dataclasses.replace(tensor, part=part)
    return tensors


def _refuse_quantised(sources: Sequence[Source], findings: Findings) -> None:
    for source in sources:
        packed = [name for name, info in source.tensors.items()
                  if _QUANTISED.fullmatch(name) or info.code in _PACKED]
        if packed:
            findings.problems.append(
                f"{source.label} is quantised ({listed(sorted(packed), 3)}): {_WAY_OUT}"
            )


def _decide(
    name: str,
    names: tuple[str | None, ...],
    sources: Sequence[Source],
    options: Options,
    findings: Findings,
) -> Planned | None:
    infos = [source.tensors[own] for source, own in zip(sources, names, strict=True)
             if own is not None]
    base = infos[0]  # `match` gives what the base has, and no more.
    floats = base.code in FLOATS
    code = DTYPES[options.dtype] if floats and options.dtype else base.code
    if None in names:
        lacking = listed(s.label for s, own in zip(sources, names, strict=True) if own is None)
        return Planned(name, base.shape, code, "base", f"{lacking} lacks it", names=names)
    if any((info.code in FLOATS) != floats for info in infos):
        findings.problems.append(_mixed(name, sources, infos))
        return None
    if not math.prod(base.shape) or not floats:
        return _kept(name, names, sources, infos, findings)
    if _excluded(name, options):
        return _taken(name, names, infos, code, options, findings)
    if all(info.shape == base.shape for info in infos):
        return Planned(name, base.shape, code, "merge", names=names)
    return _of_rows(name, names, sources, infos, code, options, findings)


def _mixed(name: str, sources: Sequence[Source], infos) -> str:
    """Numbers that are floating point in some models and not in others: which, and the way out."""
    whole = [(s.label, i.code) for s, i in zip(sources, infos, strict=True)
             if i.code not in FLOATS]
    codes = listed(sorted({code for _, code in whole}))
    way_out = (f"quantised? {_WAY_OUT}" if {code for _, code in whole} & set(_INTEGERS)
               else "store it as floating point there too")
    return (f"{name} is {codes} in {listed(label for label, _ in whole)} and floating point in the "
            f"others: {way_out}")


def _kept(name, names, sources, infos, findings: Findings) -> Planned | None:
    """Integers, booleans and empty tensors: the base's, where all agree."""
    base = infos[0]
    if any((i.shape, i.code) != (base.shape, base.code) for i in infos) or not same_numbers(
        *zip(sources, names, strict=True)
    ):
        packed = base.code in _INTEGERS and len(base.shape) > 1
        way_out = f"quantised? {_WAY_OUT}" if packed else f"leave it out with --exclude {name!r}"
        if not packed:
            way_out = "such numbers have no mean; make them equal in every model"
        findings.problems.append(f"{name} is {base.code} and differs between models: {way_out}")
        return None
    what = "no numbers in it" if not math.prod(base.shape) else f"{base.code}, equal in all models"
    return Planned(name, base.shape, base.code, "base", what, names=names)


def _excluded(name: str, options: Options) -> bool:
    included = not options.include or any(fnmatchcase(name, p) for p in options.include)
    return not included or any(fnmatchcase(name, p) for p in options.exclude)


def _taken(name, names, infos, code, options: Options, findings: Findings) -> Planned | None:
    """A tensor that the patterns leave out."""
    base = infos[0]
    tensor = Planned(name, base.shape, code, options.excluded, "excluded by pattern", names=names)
    if any(infos[m].shape != base.shape for m in tensor.models(len(infos) - 1)):
        findings.problems.append(f"{name}: {options.excluded} has another shape than the base")
        return None
    return tensor


def _of_rows(
    name, names, sources, infos, code, options: Options, findings: Findings
) -> Planned | None:
    """A tensor whose shapes differ: in the rows of a vocabulary, or by mistake."""
    base = infos[0]
    shapes = "; ".join(f"{s.label} {list(i.shape)}" for s, i in zip(sources, infos, strict=True))
    if not _VOCABULARY.fullmatch(name) or any(i.shape[1:] != base.shape[1:] for i in infos):
        findings.problems.append(f"{name} differs in shape: {shapes}")
        return None
    if options.vocabulary == "refuse":
        findings.problems.append(
            f"{name} differs in its number of rows, as vocabularies do: {shapes} (--vocabulary "
            "base merges the rows in common and takes the rest from the base, longest from the "
            "model with most)"
        )
        return None
    lengths = [info.shape[0] for info in infos]
    rest = lengths.index(max(lengths)) if options.vocabulary == "longest" else 0
    rest = 0 if lengths[rest] == lengths[0] else rest
    if rest:
        findings.companion = rest
    rows = min(lengths)
    note = (f"{name}: {rows} rows in common merged, {lengths[rest] - rows} more from "
            f"{sources[rest].label}")
    findings.notes.append(note)
    return Planned(name, infos[rest].shape, code, "merge", note.partition(": ")[2],
                   rows=rows, rest=rest, names=names)
