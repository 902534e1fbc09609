"""What a merge will do, known from headers alone: tensors, files, bytes, and why."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from modelstock_jax.checkpoint_merge import quantization
from modelstock_jax.checkpoint_merge.anchor import Examination, examine
from modelstock_jax.checkpoint_merge.auxiliary_files import AuxiliaryFiles, plan_auxiliary_files
from modelstock_jax.checkpoint_merge.kernels import PIECE, WORKING_SET, piece_length
from modelstock_jax.checkpoint_merge.matching import PlanIssues, match_tensors
from modelstock_jax.checkpoint_merge.options import Options
from modelstock_jax.checkpoint_merge.sources import Source, prefix_of
from modelstock_jax.checkpoint_merge.tensor_plan import TensorPlan, plan_tensors
from modelstock_jax.registry import COMMANDS
from modelstock_jax.tensor_files.reader import BITS

# The index of a variant, as transformers and diffusers name it: model.safetensors.index.fp16.json.
_VARIANT = re.compile(r"(?<![^/])(model|diffusion_pytorch_model)(\.\w+)\.safetensors\.index\.json$")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A merge, before anything of it is done.

    Attributes:
        base: The anchor.
        finetuned: The models that are merged toward it.
        options: As asked.
        tensors: By name, sorted.
        shards: Names of the tensors of each output file.
        files: Name of each output file.
        bytes_read: Bytes of tensors that will be read, second passes included.
        bytes_written: Bytes of tensors that will be written.
        memory: Upper estimate of the process's peak, bytes.
        companions: Whose config and tokenizer files are copied, and what changes in them.
        notes: What a user should know: tied weights, vocabulary, what is left out.
        fingerprint: Of inputs, options and tensors; a killed merge resumes only where it is equal.
        anchored: Whether there is a base: a linear mean of models alone has none.
        rounding: The base's rounding error beside the movements (`anchor.Examination`).
    """

    base: Source
    finetuned: tuple[Source, ...]
    options: Options
    tensors: dict[str, TensorPlan]
    shards: tuple[tuple[str, ...], ...]
    files: tuple[str, ...]
    bytes_read: int
    bytes_written: int
    memory: int
    auxiliary_files: AuxiliaryFiles
    notes: tuple[str, ...]
    checksum: str
    anchored: bool = True
    rounding: Mapping[str, float | bool] | None = None

    @property
    def sources(self) -> tuple[Source, ...]:
        """The base and the fine-tunes."""
        return (self.base, *self.finetuned)

    @property
    def components(self) -> dict[str, str]:
        """Prefix of a tensor's name -> stem of its output file; also of heads that BASE lacks."""
        return _components(self.sources)

    @property
    def indexes(self) -> dict[str, dict[str, str]]:
        """Index file -> tensor -> file, of each component that takes several files."""
        found: dict[str, dict[str, str]] = {}
        for file, names in zip(self.files, self.shards, strict=True):
            stem = self.components[prefix_of(names[0], self.components)]
            found.setdefault(stem, {}).update(dict.fromkeys(names, file))
        return {
            _VARIANT.sub(r"\1.safetensors.index\2.json", f"{stem}.safetensors.index.json"): places
            for stem, places in found.items()
            if len(set(places.values())) > 1
        }

    @property
    def passes(self) -> int:
        """How often what is merged is read: measured, then combined; TIES counts in between."""
        density = self.options.density
        trimmed = self.options.method == "ties" and density is not None and np.min(density) < 1
        return 4 if trimmed else 2

    def bytes_in(self, tensor: TensorPlan) -> int:
        """Bytes of all models' numbers that are merged into a tensor; 0 where none are."""
        if tensor.unit_view is None:
            return 0
        count = math.prod(tensor.unit_view.view)
        return sum(
            count * BITS[source.tensors[tensor.name_in(m)].code] // 8
            for m, source in enumerate((self.base, *self.finetuned))
        )

    def bytes_copied(self, tensor: TensorPlan) -> int:
        """Bytes that are read to be copied, or for a plain mean."""
        sources = (self.base, *self.finetuned)
        merged = 0 if tensor.unit_view is None else math.prod(tensor.unit_view.view)
        count = math.prod(tensor.shape) - merged
        return sum(
            count * BITS[sources[m].tensors[tensor.name_in(m)].code] // 8
            for m in tensor.models(len(self.finetuned))
        )


def make_plan(
    base: Source,
    finetuned: Sequence[Source],
    options: Options,
    *,
    lenient: bool = False,
    anchored: bool = True,
) -> Plan:
    """Plans a merge of models, or says everything that stands in its way at once.

    Headers suffice but for integers (which must be equal everywhere to be copied), weights that
    may be tied, and a sample of numbers that shows whether the base is one.

    Args:
        base: The anchor.
        finetuned: The models that are merged toward it.
        options: How.
        lenient: Nothing will be written: what models disagree on that is only copied is a note.
        anchored: False for a mean of models without a base; `base` is then the first of them.

    Raises:
        UserError: All problems, one a line.
    """
    sources = (base, *finetuned)
    findings = PlanIssues(lenient=lenient)
    _check_number(len(finetuned), options, findings)
    findings.problems += filter(None, map(quantization.refusal, sources))
    if not findings.problems and (problem := quantization.codes_that_differ(sources)):
        findings.problems.append(problem)
    findings.raise_problems()  # Codes and scales have no names in common with weights.
    matched = match_tensors(sources, options, findings)
    tensors = plan_tensors(sources, matched, options, findings)
    companions = plan_auxiliary_files(sources, tensors, options, findings)
    findings.raise_problems()
    examined = examine(sources, tensors, options) if anchored else Examination()
    findings.problems += examined.problems
    findings.raise_problems()
    files = _files(tensors, _components(sources), options.max_shard_bytes)
    plan = Plan(
        base,
        tuple(finetuned),
        options,
        tensors,
        tuple(files.values()),
        tuple(files),
        bytes_read=0,
        bytes_written=sum(t.num_bytes for t in tensors.values()),
        memory=0,
        auxiliary_files=companions,
        notes=(*findings.notes, *examined.notes),
        checksum=_fingerprint(sources, options, tensors),
        anchored=anchored,
        rounding=examined.rounding,
    )
    return dataclasses.replace(plan, bytes_read=_bytes_read(plan), memory=_memory(plan))


def _check_number(number: int, options: Options, findings: PlanIssues) -> None:
    method = COMMANDS[options.method]
    least, most = method.min_models, method.max_models
    if number < least or (most is not None and number > most):
        findings.problems.append(
            f"method {options.method!r} takes {least}{'' if most is None else f' to {most}'}"
            f"{' or more' if most is None else ''} fine-tuned models, not {number}"
            f"{_too_few(number, findings.lenient) if number < least else ''}"
        )
    for name in ("weights", "density"):
        value = getattr(options, name)
        if isinstance(value, tuple) and len(value) != number:
            findings.problems.append(
                f"{len(value)} {name} for {number} fine-tuned models; give one for each"
            )
    by_sum = options.method != "task_arithmetic" if options.normalize is None else options.normalize
    if options.weights is not None and sum(options.weights) == 0 and by_sum:
        findings.problems.append("the weights add up to 0")
    if options.unmerged_from.startswith("model:") and int(options.unmerged_from[6:]) > number:
        findings.problems.append(f"excluded is {options.unmerged_from}, and there are {number}")
    if options.method == "ties" and options.unit in ("filter", "head"):
        findings.problems.append("ties trims whole tensors: unit tensor, layer, block or global")


def _too_few(number: int, lenient: bool) -> str:
    base = "; the model that is given first is the base"
    if number != 1 or lenient:
        return base
    return f"{base}; of one fine-tune pass --method wise-ft --alpha 0.5"


def _components(sources: Sequence[Source]) -> dict[str, str]:
    found: dict[str, str] = {}
    for source in sources:
        found = source.components | found
    return found


def _files(
    tensors: dict[str, TensorPlan], components: Mapping[str, str], most: int
) -> dict[str, tuple[str, ...]]:
    """Output files, each with its tensors in the order in which they are stored there."""

    def ordered(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted(names, key=lambda name: (-BITS[tensors[name].code], name)))

    groups: dict[str, dict[str, TensorPlan]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(prefix_of(name, components), {})[name] = tensor
    files: dict[str, tuple[str, ...]] = {}
    for prefix in sorted(groups):
        stem, shards = components.get(prefix, "model"), _shards(groups[prefix], most)
        files |= (
            {f"{stem}.safetensors": ordered(shards[0])}
            if len(shards) == 1
            else {
                f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors": ordered(names)
                for i, names in enumerate(shards)
            }
        )
    return files


def _shards(tensors: dict[str, TensorPlan], most: int) -> list[list[str]]:
    """Names, cut where a file would grow too large."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.num_bytes > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.num_bytes
    return shards


def _bytes_read(plan: Plan) -> int:
    return sum(
        plan.passes * plan.bytes_in(tensor) + plan.bytes_copied(tensor)
        for tensor in plan.tensors.values()
    )


def _memory(plan: Plan) -> int:
    number, threads = 1 + len(plan.finetuned), plan.options.num_threads
    units = max(
        (math.prod(t.unit_view.unit_shape) for t in plan.tensors.values() if t.unit_view), default=1
    )
    formed = any(source.formed for source in (plan.base, *plan.finetuned))
    window = plan.options.window_bytes if formed else 0
    pieces = max(WORKING_SET, 16 * number * piece_length(number, 64))
    return (
        100 * 2**20 + window + threads * (pieces + 4 * 8 * PIECE) + 8 * units * (4 * number**2 + 64)
    )


def _fingerprint(
    sources: Sequence[Source], options: Options, tensors: dict[str, TensorPlan]
) -> str:
    fast = ("threads", "window_bytes")  # How fast, and not what.
    asked = {name: x for name, x in dataclasses.asdict(options).items() if name not in fast}
    files = [
        [
            (os.path.realpath(path), path.stat().st_size, path.stat().st_mtime_ns)
            for path in source.files
        ]
        for source in sources
    ]
    made = [dataclasses.astuple(tensor) for tensor in tensors.values()]
    return hashlib.sha256(json.dumps([2, asked, files, made]).encode()).hexdigest()
