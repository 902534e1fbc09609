"""Whether the base is the fine-tunes' anchor: what a sample of their numbers says."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from modelstock_jax.checkpoint_merge.kernels import FLOATS, escaped, narrow, widen
from modelstock_jax.checkpoint_merge.options import Options
from modelstock_jax.checkpoint_merge.sources import AdaptedSource, Source
from modelstock_jax.checkpoint_merge.tensor_plan import TensorPlan, is_classifier
from modelstock_jax.errors import listed
from modelstock_jax.merging import anchor_rounding, geometry

# Tensors that are looked at, numbers of each, and the pieces that these are read in.
TENSORS, NUMBERS, PIECES = 32, 2**14, 2
# Kernels of models with a base in common have cosines far above this, others about 0.
_RELATED = 0.3
# Relative standard deviation of a model's distances from all others: of the base at most (more for
# small tensors, whose lengths vary by 1 / sqrt(2 count)), of another at least.
_EQUAL, _UNEQUAL = 0.012, 0.05
# Part of the tensors in which that holds: two learning rates make one pair equal by chance, but
# not in every tensor. Fine-tunes that agree more than this are a base and what is near it.
_MOST_TENSORS, _AGREE = 0.8, 0.85
# A head that moved this many times as far as other kernels, relative to its own size.
_FAR, _OF_ITS_SIZE, _TOGETHER = 10.0, 0.5, 0.8
_WORTH_A_NOTE = 0.01
# Part of the squared movement that the fine-tunes' own rounding may be, and part of the movement
# that must survive the rounding of the output, before a note says so.
_FINE_TUNES_ROUNDING, _SURVIVES = 0.05, 0.75


@dataclasses.dataclass(frozen=True)
class Sample:
    """Sums over some numbers of one tensor.

    Attributes:
        name: Of the tensor.
        count: Numbers.
        gram: Products of the base's weights (row 0) and the task vectors, [1 + N, 1 + N].
        energy: Expected squared rounding error of the base, where it is stored coarser; else 0.
        own_energy: That of the fine-tunes, a mean, where all are stored coarser than the base.
        kept: Part of the mean movement that is left when the mean is rounded for the output.
        kernel: Whether it has two axes or more.
    """

    name: str
    count: int
    gram: np.ndarray
    energy: float
    own_energy: float
    kept: float
    kernel: bool


@dataclasses.dataclass(frozen=True)
class Examination:
    """What the sample says: notes and problems for the user, and the base's rounding for a report.

    Attributes:
        notes: What a user should know.
        problems: Why the options asked for are refused.
        rounding: None where the base is not stored coarser than the fine-tunes; else ``energy``
            (expected squared rounding error as a part of the squared movement), ``exact`` (training
            started from the rounded base), ``ratio`` and ``corrected_ratio`` (medians of t).
    """

    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    rounding: Mapping[str, float | bool] | None = None


def examine(
    sources: Sequence[Source], tensors: Mapping[str, TensorPlan], options: Options
) -> Examination:
    """Looks at a sample of all models for signs that the base is not their anchor.

    Args:
        sources: The base and the fine-tunes.
        tensors: Of the plan.
        options: As asked.
    """
    samples = [
        found for tensor in _chosen(tensors) if (found := _sample(sources, tensor)) is not None
    ]
    kernels = [
        sample
        for sample in samples
        if sample.kernel and sample.gram[0, 0] > 0 and (np.diag(sample.gram)[1:] > 0).all()
    ]
    notes = _unrelated(sources, kernels) or _misplaced(sources, kernels)
    notes += _replaced_layers(sources, kernels) + _equal_models(sources, samples)
    notes += _far_heads(sources, kernels) + _lost_movement(samples) + _coarse(sources, samples)
    rounding, problems, more = _rounding(sources, samples, options)
    return Examination(tuple(notes + more), tuple(problems), rounding)


def is_coarser(sources: Sequence[Source], names: Sequence[str | None]) -> bool:
    """Whether the base stores a tensor coarser than every fine-tune.

    Not where a fine-tune is an adapter of this base: its movement holds no rounding of the base.
    """
    dtypes = [
        source.stored_dtype(name)
        for source, name in zip(sources, names, strict=True)
        if name is not None
    ]
    adapted = any(
        isinstance(source, AdaptedSource) and source.base is sources[0] for source in sources
    )
    if adapted or len(dtypes) < len(sources):
        return False
    if dtypes[0].kind == "i":  # Integer codes x scale: no mantissa, and coarser than any float.
        return all(dtype.kind not in "iu" for dtype in dtypes[1:])
    return anchor_rounding.is_coarser(dtypes[0], dtypes[1:])


def _chosen(tensors: Mapping[str, TensorPlan]) -> list[TensorPlan]:
    """The largest tensors, and all heads."""
    merged = [tensor for tensor in tensors.values() if tensor.unit_view is not None]
    merged.sort(key=lambda tensor: (-math.prod(tensor.shape), tensor.name))
    return [tensor for k, tensor in enumerate(merged) if k < TENSORS or is_classifier(tensor.name)]


def _sample(sources: Sequence[Source], tensor: TensorPlan) -> Sample | None:
    """Sums over pieces spread through a tensor; None where numbers are not finite."""
    total = math.prod(tensor.merged_shape)
    length = min(total, NUMBERS // PIECES) if total > NUMBERS else total
    starts = (
        {round(k * (total - length) / max(1, PIECES - 1)) for k in range(PIECES)}
        if total > NUMBERS
        else {0}
    )
    coarser = is_coarser(sources, tensor.names)
    coarse = _are_coarser(sources, tensor.names)
    number = len(sources)
    gram, energy, own_energy, kept = np.zeros((number, number)), 0.0, 0.0, np.zeros(2)
    for start in sorted(starts):
        stop = start + length
        vectors = np.empty((number, length))
        for model, vector in enumerate(vectors):
            name = tensor.name_in(model)
            if sources[model].tensors[name].code not in FLOATS:
                return None
            widen(sources[model].read(name, start, stop), vector)
        if not np.isfinite(vectors).all():
            return None  # The merge itself names the tensor and the number.
        vectors[1:] -= vectors[0]
        gram += np.array([[a @ b for b in vectors] for a in vectors])
        kept += _after_rounding(vectors, tensor.code)
        if coarser:
            squares = sources[0].half_ulp_squares(tensor.name_in(0), start, stop)
            energy += float(squares.sum()) / 3.0
        if coarse:
            squares = [
                source.half_ulp_squares(tensor.name_in(model), start, stop).sum()
                for model, source in enumerate(sources[1:], 1)
            ]
            own_energy += float(np.mean(squares)) / 3.0
    kernel = len([length for length in tensor.shape if length > 1]) > 1
    return Sample(
        tensor.name,
        length * len(starts),
        gram,
        energy,
        own_energy,
        float(kept[0] / kept[1]) if kept[1] > 0 else 1.0,
        kernel,
    )


def _are_coarser(sources: Sequence[Source], names: Sequence[str | None]) -> bool:
    """Whether all fine-tunes store a tensor coarser than the base."""
    pairs = list(zip(sources, names, strict=True))
    if any(name is None for _, name in pairs):
        return False
    first, *rest = (source.stored_dtype(str(name)) for source, name in pairs)
    return all(anchor_rounding.is_coarser(dtype, [first]) for dtype in rest)


def _after_rounding(vectors: np.ndarray, code: str) -> np.ndarray:
    """Product of the mean movement with what rounding leaves of it, and its square."""
    movement = vectors[1:].mean(axis=0)
    if code in ("F32", "F64"):
        return np.array([1.0, 1.0]) * (movement @ movement)
    written = np.empty(len(movement))
    widen(narrow(vectors[0] + movement, code), written)
    return np.array([(written - vectors[0]) @ movement, movement @ movement])


def _unrelated(sources: Sequence[Source], kernels: Sequence[Sample]) -> list[str]:
    """A note where a model's kernels are nearly orthogonal to the base's."""
    found = []
    for model, source in enumerate(sources[1:], 1):
        cosines, movements = [], []
        for sample in kernels:
            base, along, own = (sample.gram[0, 0], sample.gram[0, model], sample.gram[model, model])
            length = base + 2 * along + own
            cosines.append((base + along) / math.sqrt(base * length) if length > 0 else 1.0)
            movements.append(math.sqrt(own / base))
        if cosines and statistics.median(cosines) < _RELATED:
            found.append(
                f"{source.label} has no base in common with {sources[0].label}: the cosine of "
                f"their weights is {statistics.median(cosines):.2f} and the movement "
                f"{statistics.median(movements):.2g} times the weights; Model Stock needs "
                "fine-tunes of one base"
            )
    return found


def _replaced_layers(sources: Sequence[Source], kernels: Sequence[Sample]) -> list[str]:
    """A note where single kernels have nothing in common with the base's, and most others do."""
    found: list[str] = []
    for model, source in enumerate(sources[1:], 1):
        names = []
        for sample in kernels:
            base, along, own = (sample.gram[0, 0], sample.gram[0, model], sample.gram[model, model])
            length = base + 2 * along + own
            if (
                length > 0
                and (base + along) / math.sqrt(base * length) < _RELATED
                and not (is_classifier(sample.name))
            ):
                names.append(sample.name)
        if names and 2 * len(names) < len(kernels):
            found.append(
                f"{listed(names, 3)} of {source.label}: nothing in common with the base's "
                "(replaced or renumbered layers?)"
            )
    return found


def _equal_models(sources: Sequence[Source], samples: Sequence[Sample]) -> list[str]:
    """A note where models are equal: their angle says nothing of noise."""
    if len(sources) < 3 or not samples:
        return []
    distances = np.sum([_distances(sample.gram) ** 2 for sample in samples], axis=0)
    pairs = itertools.combinations(range(len(sources)), 2)
    return [
        f"{sources[b].label} is equal to {sources[a].label} in all that was sampled: it is "
        "counted as a fine-tune, and adds no information"
        for a, b in pairs
        if distances[a, b] == 0
    ]


def _lost_movement(samples: Sequence[Sample]) -> list[str]:
    """A note where the output's dtype is too coarse for the movement."""
    moved = [sample for sample in samples if np.trace(sample.gram[1:, 1:]) > 0]
    kept = statistics.median(sample.kept for sample in moved) if moved else 1.0
    if kept >= _SURVIVES:
        return []
    return [
        f"the movement is smaller than the rounding of the output: {100 * kept:.0f} % of it is "
        "left in a typical tensor; pass --dtype float32 to keep it"
    ]


def _coarse(sources: Sequence[Source], samples: Sequence[Sample]) -> list[str]:
    """A note where the fine-tunes' own rounding is much of their movement."""
    coarse = [sample for sample in samples if sample.own_energy > 0]
    square = sum(np.diag(sample.gram)[1:].mean() for sample in coarse)
    part = sum(sample.own_energy for sample in coarse) / square if square > 0 else 0.0
    if part < _FINE_TUNES_ROUNDING or len(sources) < 3:
        return []
    return [
        f"the fine-tunes are stored coarser than {sources[0].label}: their rounding is "
        f"{100 * part:.0f} % of the squared movement, in part common to all, and makes the "
        "ratios too high; merge them as they were before they were rounded"
    ]


def _misplaced(sources: Sequence[Source], kernels: Sequence[Sample]) -> list[str]:
    """A note where another model than the first is equally far from all others.

    The base is, and fine-tunes are not, but where their task vectors have a cosine of 0.5: then all
    models are equally far from each other, and nothing can be said.
    """
    if len(sources) < 3 or not kernels:
        return []
    distances = [_distances(sample.gram) for sample in kernels]
    spreads = np.array(
        [[_spread(far, model) for model in range(len(sources))] for far in distances]
    )
    noise = np.array([max(_EQUAL, 1.5 / math.sqrt(2 * sample.count)) for sample in kernels])
    typical = np.median(spreads, axis=0)
    best = int(typical.argmin())
    if best == 0 or typical[0] < _UNEQUAL or typical[best] > float(np.median(noise)):
        return []
    if (spreads[:, best] < 1.5 * noise).mean() < _MOST_TENSORS:
        return []
    if statistics.median(_agreement(far, best) for far in distances) > _AGREE:
        return []
    return [
        f"{sources[best].label} is equally far from all other models and {sources[0].label}, "
        f"given first, is not: is {sources[best].label} the base?"
    ]


def _distances(gram: np.ndarray) -> np.ndarray:
    """Distances between all models, [1 + N, 1 + N], from products with the task vectors."""
    whole = gram.copy()
    whole[0], whole[:, 0] = 0.0, 0.0  # Seen from the base, its own task vector is 0.
    squares = np.diag(whole)
    return np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * whole, 0.0))


def _spread(distances: np.ndarray, model: int) -> float:
    """How unequal a model's distances are, and those between the others if it were the base."""
    own, pairs = _as_base(distances, model)
    return max(
        float(values.std() / values.mean()) if values.mean() > 0 else math.inf
        for values in ([own] if len(pairs) < 2 else [own, pairs])
    )


def _agreement(distances: np.ndarray, model: int) -> float:
    """Cosine of the others' task vectors if a model were the base and all as long."""
    own, pairs = _as_base(distances, model)
    return 1.0 - float((pairs**2).mean() / (2 * (own**2).mean()))


def _as_base(distances: np.ndarray, model: int) -> tuple[np.ndarray, np.ndarray]:
    """Distances of a model from the others, and of each two of these."""
    rest = np.delete(np.delete(distances, model, 0), model, 1)
    return np.delete(distances[model], model), rest[np.triu_indices(len(rest), 1)]


def _far_heads(sources: Sequence[Source], kernels: Sequence[Sample]) -> list[str]:
    """A note where a head moved far beyond the others, and all fine-tunes' alike."""

    def relative(sample: Sample) -> float:
        return math.sqrt(np.diag(sample.gram)[1:].mean() / sample.gram[0, 0])

    others = [relative(sample) for sample in kernels if not is_classifier(sample.name)]
    if not others or len(sources) < 3:
        return []
    usual = statistics.median(others)
    far = [
        sample
        for sample in kernels
        if is_classifier(sample.name)
        and relative(sample) > max(_FAR * usual, _OF_ITS_SIZE)
        and float(geometry.cosine(sample.gram[1:, 1:])) > _TOGETHER
    ]
    return [
        f"{sample.name} moved by {relative(sample):.2g} of its size, other kernels by "
        f"{usual:.2g}, and in all fine-tunes alike: they did not start from this head. Give "
        "the base that they started from, or pass "
        f"--exclude {escaped(sample.name)!r} --excluded mean"
        for sample in far
    ]


def _rounding(sources: Sequence[Source], samples: Sequence[Sample], options: Options):
    """The base's rounding compared with the movements, and whether it may be corrected."""
    coarse = [sample for sample in samples if sample.energy > 0]
    asked = options.anchor_rounding == "correct"
    if not coarse or len(sources) < 3:
        notes = (
            [
                "--anchor-rounding correct changes nothing: the base is not stored coarser than "
                "the fine-tunes"
            ]
            if asked
            else []
        )
        return None, [], notes
    grams = [sample.gram[1:, 1:] for sample in coarse]
    pairs = list(itertools.combinations(range(len(sources) - 1), 2))
    together = np.array([np.mean([gram[i, j] for i, j in pairs]) for gram in grams])
    energy = np.array([sample.energy for sample in coarse])
    counts = np.array([sample.count for sample in coarse])
    exact = bool(anchor_rounding.started_from_rounded(together, energy, counts))
    part = float(energy.sum() / sum(np.diag(gram).mean() for gram in grams))
    ratio = _median_ratio(grams)
    corrected = _median_ratio(
        [
            anchor_rounding.correct_gram(gram[..., None], np.array([e]))[..., 0]
            for gram, e in zip(grams, energy, strict=True)
        ]
    )
    rounding = {"energy": part, "exact": exact, "ratio": ratio, "corrected_ratio": corrected}
    base = sources[0].label
    if exact:
        problems = (
            [
                f"--anchor-rounding correct: the fine-tunes' common movement is smaller than "
                f"the rounding of {base}: their training started from the rounded weights, so "
                "the ratios are right; leave the option out"
            ]
            if asked
            else []
        )
        return rounding, problems, []
    if part < _WORTH_A_NOTE:
        return rounding, [], []
    effect = f"a median ratio of {ratio:.2f}, {corrected:.2f} without it"
    if asked:
        return (
            rounding,
            [],
            [
                f"the rounding of {base} ({100 * part:.0f} % of the squared "
                f"movement) is taken out of the angles: {effect}"
            ],
        )
    return (
        rounding,
        [],
        [
            f"{base} is stored coarser than the fine-tunes: its rounding is {100 * part:.0f} % of "
            f"their squared movement and common to all of them ({effect}). If it was rounded after "
            "the training, give the unrounded base, or pass --anchor-rounding correct"
        ],
    )


def _median_ratio(grams: Sequence[np.ndarray]) -> float:
    return statistics.median(
        float(geometry.ratio(np.clip(geometry.cosine(gram), -1, 1), len(gram))) for gram in grams
    )
