"""Check on a sample of elements whether the base is the anchor of the fine-tunes."""

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

# Number of sampled tensors, of sampled elements per tensor, and of pieces to read them in.
_MAX_TENSORS, _MAX_ELEMENTS, _NUM_PIECES = 32, 2**14, 2
# Kernels of models with a common base have far higher cosines, other kernels a cosine of about 0.
_MIN_RELATED_COSINE = 0.3
# Relative standard deviation of a model's distances to all other models: maximum of a base (more
# for small tensors, whose norms vary by 1 / sqrt(2 count)), and minimum of a model that is none.
_MAX_BASE_SPREAD, _MIN_OTHER_SPREAD = 0.012, 0.05
# Fraction of the tensors in which that must be true: two learning rates can make the distances of
# one pair equal by chance, but not in every tensor. Models whose task vectors agree more than
# _MAX_AGREEMENT are a base and models close to it.
_MIN_TENSOR_FRACTION, _MAX_AGREEMENT = 0.8, 0.85
# A head did not start from the base if its update is this many times as large as those of other
# kernels, this large relative to the head, and has this cosine between fine-tunes.
_FAR_FACTOR, _MIN_FAR_UPDATE, _MIN_FAR_COSINE = 10.0, 0.5, 0.8
_MIN_NOTED_ENERGY = 0.01
# A note is printed if the fine-tunes' own rounding error is at least this fraction of the squared
# norm of the task vectors, or if less than this fraction of the update survives the rounding of the
# output.
_MAX_TUNED_ENERGY, _MIN_SURVIVING = 0.05, 0.75


@dataclasses.dataclass(frozen=True)
class Sample:
    """Sums over sampled elements of one tensor.

    Attributes:
      name: name of the tensor
      count: number of sampled elements
      gram: dot products of the base's weights (row 0) and the task vectors, [1 + N, 1 + N]
      base_energy: expected squared rounding error of the base if it is stored at lower precision
        than the fine-tunes, else 0
      tuned_energy: mean expected squared rounding error of the fine-tunes if all are stored at
        lower precision than the base, else 0
      surviving: fraction of the mean task vector that remains after the output is rounded
      is_kernel: whether the tensor has two axes or more
    """

    name: str
    count: int
    gram: np.ndarray
    base_energy: float
    tuned_energy: float
    surviving: float
    is_kernel: bool


@dataclasses.dataclass(frozen=True)
class AnchorCheck:
    """Result of `check_anchor`.

    Attributes:
      notes: notes for the user
      problems: why the given options are an error
      rounding: rounding error of the base, for the report; None if the base is not stored at
        lower precision than the fine-tunes. `energy` is the expected squared rounding error as
        a fraction of the squared norm of the task vectors, `exact` is whether training started
        from the rounded base, `ratio` and `corrected_ratio` are medians of t
    """

    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    rounding: Mapping[str, float | bool] | None = None


def check_anchor(
    sources: Sequence[Source], tensors: Mapping[str, TensorPlan], options: Options
) -> AnchorCheck:
    """Search a sample of all models for signs that the base is not their anchor.

    Args:
      sources: the base and the fine-tunes
      tensors: tensors of the plan, by name
      options: options of the merge
    """
    samples = [
        sample
        for tensor in _sampled_tensors(tensors)
        if (sample := _sample(sources, tensor)) is not None
    ]
    kernels = [
        sample
        for sample in samples
        if sample.is_kernel and sample.gram[0, 0] > 0 and (np.diag(sample.gram)[1:] > 0).all()
    ]
    notes = _unrelated_models(sources, kernels) or _misplaced_base(sources, kernels)
    notes += _replaced_layers(sources, kernels) + _equal_models(sources, samples)
    notes += _far_heads(sources, kernels) + _rounded_away(samples)
    notes += _coarse_fine_tunes(sources, samples)
    rounding, problems, rounding_notes = _base_rounding(sources, samples, options)
    return AnchorCheck((*notes, *rounding_notes), tuple(problems), rounding)


def is_coarser(sources: Sequence[Source], names: Sequence[str | None]) -> bool:
    """Return whether the base stores a tensor at lower precision than every fine-tune.

    False if a fine-tune is an adapter of this base: its task vector contains no rounding error of
    the base.

    Args:
      sources: the base and the fine-tunes
      names: name of the tensor in each of them; None where the model lacks it
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
    if dtypes[0].kind == "i":  # Integer codes x scale have no mantissa: coarser than any float.
        return all(dtype.kind not in "iu" for dtype in dtypes[1:])
    return anchor_rounding.is_coarser(dtypes[0], dtypes[1:])


def _sampled_tensors(tensors: Mapping[str, TensorPlan]) -> list[TensorPlan]:
    """Return the largest merged tensors, and all heads."""
    merged = [tensor for tensor in tensors.values() if tensor.unit_view is not None]
    merged.sort(key=lambda tensor: (-math.prod(tensor.shape), tensor.name))
    return [
        tensor for k, tensor in enumerate(merged) if k < _MAX_TENSORS or is_classifier(tensor.name)
    ]


def _sample(sources: Sequence[Source], tensor: TensorPlan) -> Sample | None:
    """Sum over pieces spread through a tensor; None if a value is not finite."""
    total = math.prod(tensor.merged_shape)
    length = min(total, _MAX_ELEMENTS // _NUM_PIECES) if total > _MAX_ELEMENTS else total
    starts = (
        {round(k * (total - length) / max(1, _NUM_PIECES - 1)) for k in range(_NUM_PIECES)}
        if total > _MAX_ELEMENTS
        else {0}
    )
    base_is_coarser = is_coarser(sources, tensor.names)
    tuned_are_coarser = _fine_tunes_are_coarser(sources, tensor.names)
    number = len(sources)
    gram, base_energy, tuned_energy = np.zeros((number, number)), 0.0, 0.0
    surviving = np.zeros(2)
    for start in sorted(starts):
        stop = start + length
        vectors = np.empty((number, length))
        for model, vector in enumerate(vectors):
            name = tensor.name_in(model)
            if sources[model].tensors[name].code not in FLOATS:
                return None
            widen(sources[model].read(name, start, stop), vector)
        if not np.isfinite(vectors).all():
            return None  # The merge raises an error that names the tensor and the element.
        vectors[1:] -= vectors[0]
        gram += np.array([[a @ b for b in vectors] for a in vectors])
        surviving += _after_rounding(vectors, tensor.code)
        if base_is_coarser:
            squares = sources[0].half_ulp_squares(tensor.name_in(0), start, stop)
            base_energy += float(squares.sum()) / 3.0
        if tuned_are_coarser:
            squares = [
                source.half_ulp_squares(tensor.name_in(model), start, stop).sum()
                for model, source in enumerate(sources[1:], 1)
            ]
            tuned_energy += float(np.mean(squares)) / 3.0
    return Sample(
        tensor.name,
        length * len(starts),
        gram,
        base_energy,
        tuned_energy,
        float(surviving[0] / surviving[1]) if surviving[1] > 0 else 1.0,
        len([size for size in tensor.shape if size > 1]) > 1,
    )


def _fine_tunes_are_coarser(sources: Sequence[Source], names: Sequence[str | None]) -> bool:
    """Return whether all fine-tunes store a tensor at lower precision than the base."""
    pairs = list(zip(sources, names, strict=True))
    if any(name is None for _, name in pairs):
        return False
    first, *rest = (source.stored_dtype(str(name)) for source, name in pairs)
    return all(anchor_rounding.is_coarser(dtype, [first]) for dtype in rest)


def _after_rounding(vectors: np.ndarray, code: str) -> np.ndarray:
    """Return the dot product of the mean task vector with its rounded form, and with itself."""
    update = vectors[1:].mean(axis=0)
    if code in ("F32", "F64"):
        return np.array([1.0, 1.0]) * (update @ update)
    written = np.empty(len(update))
    widen(narrow(vectors[0] + update, code), written)
    return np.array([(written - vectors[0]) @ update, update @ update])


def _unrelated_models(sources: Sequence[Source], kernels: Sequence[Sample]) -> list[str]:
    """Return a note for each model whose kernels are nearly orthogonal to the base's."""
    notes = []
    for model, source in enumerate(sources[1:], 1):
        cosines = [_weight_cosine(sample.gram, model) for sample in kernels]
        updates = [math.sqrt(sample.gram[model, model] / sample.gram[0, 0]) for sample in kernels]
        if cosines and statistics.median(cosines) < _MIN_RELATED_COSINE:
            notes.append(
                f"{source.label} has no common base with {sources[0].label}: the cosine of their "
                f"weights is {statistics.median(cosines):.2f} and the norm of the task vector is "
                f"{statistics.median(updates):.2g} times that of the weights; Model Stock requires "
                "fine-tunes of one base"
            )
    return notes


def _weight_cosine(gram: np.ndarray, model: int) -> float:
    """Return the cosine between a model's weights and the base's; 1 if the weights are 0."""
    base, along, update = gram[0, 0], gram[0, model], gram[model, model]
    square = base + 2 * along + update
    return (base + along) / math.sqrt(base * square) if square > 0 else 1.0


def _replaced_layers(sources: Sequence[Source], kernels: Sequence[Sample]) -> list[str]:
    """Return a note for kernels that are unrelated to the base's while most others are related."""
    notes: list[str] = []
    for model, source in enumerate(sources[1:], 1):
        names = [
            sample.name
            for sample in kernels
            if _weight_cosine(sample.gram, model) < _MIN_RELATED_COSINE
            and not is_classifier(sample.name)
        ]
        if names and 2 * len(names) < len(kernels):
            notes.append(
                f"{listed(names, 3)} of {source.label}: nothing in common with the base's tensors; "
                "check whether layers were replaced or renumbered"
            )
    return notes


def _equal_models(sources: Sequence[Source], samples: Sequence[Sample]) -> list[str]:
    """Return a note for each pair of equal models: their angle is no measure of noise."""
    if len(sources) < 3 or not samples:
        return []
    distances = np.sum([_distances(sample.gram) ** 2 for sample in samples], axis=0)
    pairs = itertools.combinations(range(len(sources)), 2)
    return [
        f"{sources[b].label} is equal to {sources[a].label} in every sampled element: it counts as "
        "a fine-tune, but adds no information"
        for a, b in pairs
        if distances[a, b] == 0
    ]


def _rounded_away(samples: Sequence[Sample]) -> list[str]:
    """Return a note if the dtype of the output is too coarse for the update."""
    fractions = [sample.surviving for sample in samples if np.trace(sample.gram[1:, 1:]) > 0]
    surviving = statistics.median(fractions) if fractions else 1.0
    if surviving >= _MIN_SURVIVING:
        return []
    return [
        f"the update is smaller than the rounding of the output: {100 * surviving:.0f} % of it "
        "remains in a typical tensor; pass --dtype float32 to preserve it"
    ]


def _coarse_fine_tunes(sources: Sequence[Source], samples: Sequence[Sample]) -> list[str]:
    """Return a note if the fine-tunes' own rounding error is a large part of their task vectors."""
    coarse = [sample for sample in samples if sample.tuned_energy > 0]
    square = sum(np.diag(sample.gram)[1:].mean() for sample in coarse)
    energy = sum(sample.tuned_energy for sample in coarse) / square if square > 0 else 0.0
    if energy < _MAX_TUNED_ENERGY or len(sources) < 3:
        return []
    return [
        f"the fine-tunes are stored at lower precision than {sources[0].label}: their rounding "
        f"error is {100 * energy:.0f} % of the squared norm of the task vectors, is partly common "
        "to all of them, and makes the ratios too high; merge the fine-tunes as they were before "
        "rounding"
    ]


def _misplaced_base(sources: Sequence[Source], kernels: Sequence[Sample]) -> list[str]:
    """Return a note if a model other than the first is equally far from all others.

    The base is equally far from all others; fine-tunes are not, except if their task vectors have a
    cosine of 0.5. Then all models are equally far from each other, and the base cannot be found.
    """
    if len(sources) < 3 or not kernels:
        return []
    distances = [_distances(sample.gram) for sample in kernels]
    spreads = np.array(
        [[_spread(matrix, model) for model in range(len(sources))] for matrix in distances]
    )
    noise = np.array([max(_MAX_BASE_SPREAD, 1.5 / math.sqrt(2 * s.count)) for s in kernels])
    typical = np.median(spreads, axis=0)
    best = int(typical.argmin())
    if (
        best == 0
        or typical[0] < _MIN_OTHER_SPREAD
        or typical[best] > float(np.median(noise))
        or (spreads[:, best] < 1.5 * noise).mean() < _MIN_TENSOR_FRACTION
        or statistics.median(_agreement(matrix, best) for matrix in distances) > _MAX_AGREEMENT
    ):
        return []
    return [
        f"{sources[best].label} is equally far from all other models and {sources[0].label}, the "
        f"first model, is not; check whether {sources[best].label} is the base"
    ]


def _distances(gram: np.ndarray) -> np.ndarray:
    """Return the distances between all models, [1 + N, 1 + N], from `Sample.gram`."""
    gram = gram.copy()
    gram[0], gram[:, 0] = 0.0, 0.0  # The base's own task vector is 0.
    squares = np.diag(gram)
    return np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * gram, 0.0))


def _spread(distances: np.ndarray, model: int) -> float:
    """Return how unequal the distances are if a model is taken as the base.

    The maximum relative standard deviation of two sets: its distances to the other models, and the
    distances between those.
    """
    to_others, between_others = _as_base(distances, model)
    sets = [to_others] if len(between_others) < 2 else [to_others, between_others]
    return max(
        float(values.std() / values.mean()) if values.mean() > 0 else math.inf for values in sets
    )


def _agreement(distances: np.ndarray, model: int) -> float:
    """Return the cosine of the others' task vectors, of equal norm, with a model as the base."""
    to_others, between_others = _as_base(distances, model)
    return 1.0 - float((between_others**2).mean() / (2 * (to_others**2).mean()))


def _as_base(distances: np.ndarray, model: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the distances from a model to the others, and those of all pairs of the others."""
    rest = np.delete(np.delete(distances, model, 0), model, 1)
    return np.delete(distances[model], model), rest[np.triu_indices(len(rest), 1)]


def _far_heads(sources: Sequence[Source], kernels: Sequence[Sample]) -> list[str]:
    """Return a note for each head with a far larger update than others, alike in all fine-tunes."""

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
        and relative(sample) > max(_FAR_FACTOR * usual, _MIN_FAR_UPDATE)
        and float(geometry.cosine(sample.gram[1:, 1:])) > _MIN_FAR_COSINE
    ]
    return [
        f"{sample.name} changed by {relative(sample):.2g} of its norm, other kernels by "
        f"{usual:.2g}, and in all fine-tunes alike: they did not start from this head; give the "
        f"base that they started from, or pass --exclude {escaped(sample.name)!r} "
        "--unmerged-from mean"
        for sample in far
    ]


def _base_rounding(
    sources: Sequence[Source], samples: Sequence[Sample], options: Options
) -> tuple[dict[str, float | bool] | None, list[str], list[str]]:
    """Return `Examination.rounding`, and problems and notes about correcting it."""
    coarse = [sample for sample in samples if sample.base_energy > 0]
    correct = options.anchor_rounding == "correct"
    if not coarse or len(sources) < 3:
        note = (
            "--anchor-rounding correct has no effect: the base is not stored at lower precision "
            "than the fine-tunes"
        )
        return None, [], [note] if correct else []
    energy, exact, ratio, corrected_ratio = _rounding_statistics(coarse)
    rounding = {
        "energy": energy,
        "exact": exact,
        "ratio": ratio,
        "corrected_ratio": corrected_ratio,
    }
    base = sources[0].label
    if exact:
        problem = (
            f"--anchor-rounding correct: what the task vectors have in common is smaller than the "
            f"rounding error of {base}: training started from the rounded weights, so the ratios "
            "are right; leave the option out"
        )
        return rounding, [problem] if correct else [], []
    if energy < _MIN_NOTED_ENERGY:
        return rounding, [], []
    effect = f"the median ratio is {ratio:.2f} with it and {corrected_ratio:.2f} without it"
    if correct:
        note = (
            f"the rounding error of {base} ({100 * energy:.0f} % of the squared norm of the task "
            f"vectors) is removed from the angles: {effect}"
        )
    else:
        note = (
            f"{base} is stored at lower precision than the fine-tunes: its rounding error is "
            f"{100 * energy:.0f} % of the squared norm of the task vectors and common to all of "
            f"them ({effect}); if the base was rounded after training, give the unrounded base or "
            "pass --anchor-rounding correct"
        )
    return rounding, [], [note]


def _rounding_statistics(coarse: Sequence[Sample]) -> tuple[float, bool, float, float]:
    """Return the values of `Examination.rounding` for tensors that the base stores coarser."""
    grams = [sample.gram[1:, 1:] for sample in coarse]
    pairs = list(itertools.combinations(range(len(grams[0])), 2))
    off_diagonal = np.array([np.mean([gram[i, j] for i, j in pairs]) for gram in grams])
    energy = np.array([sample.base_energy for sample in coarse])
    counts = np.array([sample.count for sample in coarse])
    square = sum(np.diag(gram).mean() for gram in grams)
    corrected = [
        anchor_rounding.correct_gram(gram[..., None], np.array([e]))[..., 0]
        for gram, e in zip(grams, energy, strict=True)
    ]
    return (
        float(energy.sum() / square) if square > 0 else 0.0,
        bool(anchor_rounding.started_from_rounded(off_diagonal, energy, counts)),
        _median_ratio(grams),
        _median_ratio(corrected),
    )


def _median_ratio(grams: Sequence[np.ndarray]) -> float:
    """Return the median ratio of the tensors that have an angle; 0 if none has."""
    cosines = (geometry.cosine(gram) for gram in grams)
    ratios = [
        float(geometry.ratio(cosine, len(gram)))
        for cosine, gram in zip(cosines, grams, strict=True)
        if cosine != geometry.COSINE_UNDEFINED
    ]
    return statistics.median(ratios) if ratios else 0.0
