"""Plan of a merge, made from file headers: tensors, output files, bytes and memory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence

from modelstock_jax.checkpoint_merge import quantization, singular_directions
from modelstock_jax.checkpoint_merge.anchor import AnchorCheck, check_anchor
from modelstock_jax.checkpoint_merge.auxiliary_files import AuxiliaryFiles, plan_auxiliary_files
from modelstock_jax.checkpoint_merge.kernels import PIECE, WORKING_SET, piece_length
from modelstock_jax.checkpoint_merge.matching import PlanIssues, match_tensors
from modelstock_jax.checkpoint_merge.methods import normalizes, num_passes
from modelstock_jax.checkpoint_merge.options import METHOD_OPTIONS, Options
from modelstock_jax.checkpoint_merge.sources import Source, prefix_of
from modelstock_jax.checkpoint_merge.tensor_plan import TensorPlan, plan_tensors
from modelstock_jax.merging.update_scaling import LayerPosition, layer_positions, layers_note
from modelstock_jax.registry import COMMANDS, MergeMethod
from modelstock_jax.tensor_files.reader import BITS

# Index file of a variant in transformers and diffusers: model.safetensors.index.fp16.json.
_VARIANT = re.compile(r"(?<![^/])(model|diffusion_pytorch_model)(\.\w+)\.safetensors\.index\.json$")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A merge that has not started.

    Attributes:
      base: the anchor
      finetuned: models that are merged toward it
      options: options of the merge
      tensors: tensors of the output by name, sorted
      shards: names of the tensors in each output file
      files: name of each output file
      bytes_read: bytes of tensors that will be read, including second passes
      bytes_written: bytes of tensors that will be written
      memory: upper estimate of the peak memory of the process, in bytes
      auxiliary_files: source of the config and tokenizer files, and the changes to them
      notes: notes for the user: tied weights, vocabulary, dropped tensors
      checksum: checksum of inputs, options and tensors; an interrupted merge resumes only if it is
        equal
      anchored: whether there is a base; a mean of models needs none
      rounding: rounding error of the base compared with the updates (`anchor.AnchorCheck`)
      layers: position of each tensor in the layers, for LiNeS
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
    layers: Mapping[str, LayerPosition] = dataclasses.field(default_factory=dict)

    @property
    def sources(self) -> tuple[Source, ...]:
        """The base and the fine-tunes."""
        return (self.base, *self.finetuned)

    @property
    def components(self) -> dict[str, str]:
        """Prefix of a tensor's name -> stem of its output file, also for heads that BASE lacks."""
        return _components(self.sources)

    @property
    def indexes(self) -> dict[str, dict[str, str]]:
        """Index file -> tensor -> file, for each component that has several files."""
        files_by_stem: dict[str, dict[str, str]] = {}
        for file, names in zip(self.files, self.shards, strict=True):
            stem = self.components[prefix_of(names[0], self.components)]
            files_by_stem.setdefault(stem, {}).update(dict.fromkeys(names, file))
        return {
            _VARIANT.sub(r"\1.safetensors.index\2.json", f"{stem}.safetensors.index.json"): files
            for stem, files in files_by_stem.items()
            if len(set(files.values())) > 1
        }

    def passes(self, tensor: TensorPlan) -> int:
        """Return the number of times that a merged tensor is read."""
        return num_passes(self.options, tensor.name, tensor.merged_shape)

    def bytes_in(self, tensor: TensorPlan) -> int:
        """Return the bytes of all models that are merged into a tensor; 0 if it is not merged."""
        if tensor.unit_view is None:
            return 0
        count = math.prod(tensor.unit_view.view)
        return sum(
            count * BITS[source.tensors[tensor.name_in(i)].code] // 8
            for i, source in enumerate(self.sources)
        )

    def bytes_copied(self, tensor: TensorPlan) -> int:
        """Return the bytes that are read to copy a tensor, or to compute its plain mean."""
        merged = 0 if tensor.unit_view is None else math.prod(tensor.unit_view.view)
        count = math.prod(tensor.shape) - merged
        return sum(
            count * BITS[self.sources[i].tensors[tensor.name_in(i)].code] // 8
            for i in tensor.models(len(self.finetuned))
        )


def make_plan(
    base: Source,
    finetuned: Sequence[Source],
    options: Options,
    *,
    lenient: bool = False,
    anchored: bool = True,
) -> Plan:
    """Plan a merge, or raise one error with all problems.

    File headers are sufficient, with these exceptions: integers (which must be equal in all models
    to be copied), weights that may be tied, and a sample of weights that shows whether the base is
    the base of the fine-tunes.

    Args:
      base: the anchor
      finetuned: models that are merged toward it
      options: options of the merge
      lenient: nothing will be written, so a mismatch in something that is only copied is a note
      anchored: False for a mean of models without a base; `base` is then the first of them

    Raises:
      UserError: the models or the options do not fit; the message lists all problems
    """
    sources = (base, *finetuned)
    issues = PlanIssues(lenient=lenient)
    check_number_of_models(len(finetuned), options, issues, anchored=anchored)
    if not anchored and COMMANDS[options.method].needs_base:
        known = ", ".join(m.command for m in COMMANDS.values() if not m.needs_base)
        issues.problems.append(
            f"--method {COMMANDS[options.method].command} requires a base; remove --no-base "
            f"(it applies to {known})"
        )
    issues.problems += filter(None, map(quantization.quantization_error, sources))
    if not issues.problems and (problem := quantization.codes_that_differ(sources)):
        issues.problems.append(problem)
    issues.raise_problems()  # Names of codes and scales do not match names of weights.
    matched = match_tensors(sources, options, issues)
    tensors = plan_tensors(sources, matched, options, issues)
    auxiliary_files = plan_auxiliary_files(sources, tensors, options, issues)
    issues.raise_problems()
    examination = check_anchor(sources, tensors, options) if anchored else AnchorCheck()
    issues.problems += examination.problems
    issues.raise_problems()
    layers = _layers(tensors) if options.method == "lines" else {}
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
        auxiliary_files=auxiliary_files,
        notes=(*issues.notes, *examination.notes, *([layers_note(layers)] if layers else [])),
        checksum=_checksum(sources, options, tensors),
        anchored=anchored,
        rounding=examination.rounding,
        layers=layers,
    )
    return dataclasses.replace(plan, bytes_read=_bytes_read(plan), memory=_memory(plan))


def check_number_of_models(
    number: int, options: Options, issues: PlanIssues, *, anchored: bool
) -> None:
    """Add a problem for each option or method that does not fit the number of models.

    Args:
      number: number of fine-tuned models
      options: options of the merge
      issues: receives the problems
      anchored: whether there is a base
    """
    method = COMMANDS[options.method]
    if problem := _wrong_number(number, method, lenient=issues.lenient, anchored=anchored):
        issues.problems.append(problem)
    given = {"weights": options.weights, "density": options.density, **options.parameters}
    for name, value in given.items():
        flag = f"--{name}" if name in METHOD_OPTIONS else f"--parameter {name}"
        if isinstance(value, tuple) and len(value) != number:
            issues.problems.append(
                f"{flag} has {len(value)} values, but there are {number} fine-tuned models; give "
                "one per model"
            )
    if problem := _without_sum(options):
        issues.problems.append(problem)
    source = options.unmerged_from
    if source.startswith("model:") and int(source.removeprefix("model:")) > number:
        issues.problems.append(
            f"--unmerged-from {source}: no such model; the last fine-tuned model is model:{number}"
        )
    if method.elementwise and options.unit in ("filter", "head"):
        issues.problems.append(
            f"--unit {options.unit} does not apply to {method.command}, which treats complete "
            "tensors; choose tensor, layer, block or global"
        )


def _without_sum(options: Options) -> str | None:
    """Return the error for weights that cannot be divided by their sum; None if they can."""
    weights = options.weights
    if not normalizes(options) or weights is None:
        return None
    if isinstance(weights, Mapping) and COMMANDS[options.method].elementwise:
        return None  # They divide by the weights of the elements that remain, if these are not 0.
    by_tensor = weights if isinstance(weights, Mapping) else {"": weights}
    for name, values in by_tensor.items():
        if sum(values) == 0:
            where = f" for {name}" if name else ""
            return f"the sum of --weights is 0{where}, so they cannot be normalized"
    return None


def _wrong_number(number: int, method: MergeMethod, *, lenient: bool, anchored: bool) -> str | None:
    """Return the error for too few or too many fine-tuned models; None if the number is right."""
    min_models, max_models = method.min_models, method.max_models
    if number >= min_models and (max_models is None or number <= max_models):
        return None
    required = f"{min_models} or more" if max_models is None else f"{min_models} to {max_models}"
    subject = "an angle" if lenient else f"--method {method.command}"
    kind, which = (
        ("fine-tuned models", " (the first model is the base)") if anchored else ("models", "")
    )
    problem = f"{subject} requires {required} {kind}, not {number}{which}"
    if number == 1 and min_models > 1 and anchored and not lenient:
        problem += "; to merge one fine-tune, pass --method wise-ft --alpha 0.5"
    return problem


def _layers(tensors: Mapping[str, TensorPlan]) -> dict[str, LayerPosition]:
    shapes = [(name, tensor.shape) for name, tensor in tensors.items()]
    return dict(zip(tensors, layer_positions(shapes), strict=True))


def _components(sources: Sequence[Source]) -> dict[str, str]:
    components: dict[str, str] = {}
    for source in sources:
        components = source.components | components
    return components


def _files(
    tensors: dict[str, TensorPlan], components: Mapping[str, str], max_bytes: int
) -> dict[str, tuple[str, ...]]:
    """Return the output files, each with its tensors in the order in which they are stored."""

    def in_order(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted(names, key=lambda name: (-BITS[tensors[name].code], name)))

    groups: dict[str, dict[str, TensorPlan]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(prefix_of(name, components), {})[name] = tensor
    files: dict[str, tuple[str, ...]] = {}
    for prefix in sorted(groups):
        stem, shards = components.get(prefix, "model"), _shards(groups[prefix], max_bytes)
        files |= (
            {f"{stem}.safetensors": in_order(shards[0])}
            if len(shards) == 1
            else {
                f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors": in_order(names)
                for i, names in enumerate(shards)
            }
        )
    return files


def _shards(tensors: dict[str, TensorPlan], max_bytes: int) -> list[list[str]]:
    """Return the names of the tensors in each file."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.num_bytes
    return shards


def _bytes_read(plan: Plan) -> int:
    return sum(
        plan.passes(tensor) * plan.bytes_in(tensor) + plan.bytes_copied(tensor)
        for tensor in plan.tensors.values()
    )


def _memory(plan: Plan) -> int:
    number, threads = len(plan.sources), plan.options.num_threads
    units = max(
        (math.prod(t.unit_view.unit_shape) for t in plan.tensors.values() if t.unit_view), default=1
    )
    is_cached = any(source.formed for source in plan.sources)
    window = plan.options.window_bytes if is_cached else 0
    pieces = max(WORKING_SET, 16 * number * piece_length(number, 64))
    if COMMANDS[plan.options.method].of_matrices:
        window += max(singular_directions.memory(t.merged_shape) for t in plan.tensors.values())
    return (
        100 * 2**20 + window + threads * (pieces + 4 * 8 * PIECE) + 8 * units * (4 * number**2 + 64)
    )


def _checksum(sources: Sequence[Source], options: Options, tensors: dict[str, TensorPlan]) -> str:
    without_effect = ("threads", "window_bytes")  # They change the speed, not the result.
    values = {
        name: x for name, x in dataclasses.asdict(options).items() if name not in without_effect
    }
    files = [
        [
            (os.path.realpath(path), path.stat().st_size, path.stat().st_mtime_ns)
            for path in source.files
        ]
        for source in sources
    ]
    rows = [dataclasses.astuple(tensor) for tensor in tensors.values()]
    derived = [source.derivation for source in sources]
    return hashlib.sha256(json.dumps([3, values, files, rows, derived]).encode()).hexdigest()
