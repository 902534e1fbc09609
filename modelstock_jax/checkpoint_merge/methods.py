"""Merge methods on one unit: what the first pass measures, what the second computes; their rows."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from modelstock_jax.checkpoint_merge.kernels import UnitLayout
from modelstock_jax.checkpoint_merge.options import Options
from modelstock_jax.checkpoint_merge.tensor_plan import TensorPlan
from modelstock_jax.merging import geometry, rules
from modelstock_jax.merging.anchor_rounding import correct_gram
from modelstock_jax.merging.rules import UnitSolution, unit_row
from modelstock_jax.registry import COMMANDS

Reduce = Callable[[Callable[[np.ndarray, np.ndarray], np.ndarray]], np.ndarray]


class UnitReader(Protocol):
    """A merge unit whose tensors can be gone through as often as a method needs."""

    name: str  # of its first tensor
    is_scalar: np.ndarray  # [K] bool: fewer than two numbers
    count: int  # numbers in all

    def gram(self, *, with_base: bool = False) -> np.ndarray:
        """[N, N, K] of the task vectors; with the base's own weights as a first row if asked."""

    def energy(self) -> np.ndarray:
        """[K], the expected squared rounding error of the base."""

    def reduce(self, function: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
        """Sum over the pieces of function(w0 [n], deltas [N, n])."""


@dataclasses.dataclass(frozen=True)
class Solved:
    """A unit's answer: anchor * w0 + sum_i a_i d_i, or what TIES keeps of it."""

    solution: UnitSolution
    gram: np.ndarray  # [N, N, K]
    anchor: np.ndarray | None = None  # [K]; None for 1
    trim: Trim | None = None

    @property
    def has_ratio(self) -> bool:
        """Whether it is w0 + t mean(d), or any sum of task vectors: TIES and slerp are none."""
        return self.anchor is None and self.trim is None


Solver = Callable[[UnitReader], Solved]

_STRAIGHT = 0.9995  # mergekit's: weights of a larger cosine lie on one line


def solver(options: Options, number: int) -> Solver:
    """The method asked for, of `number` fine-tunes.

    | method | merged weights |
    |---|---|
    | with a `rule` in `registry` | w0 + sum_i a_i d_i, a_i by that rule |
    | uniform | w0 + mean_i(d_i) |
    | wise-ft | w0 + alpha mean_i(d_i) |
    | linear | w0 + sum_i c_i d_i, c_i = weight_i / sum of weights |
    | task-arithmetic | w0 + lambda sum_i c_i d_i, c_i = weight_i |
    | ties | w0 + lambda times the disjoint mean of the trimmed d_i (`ties`) |
    | slerp | along the arc from the base to the fine-tune, or from the first to the second of two |
    """
    method, rule = options.method, COMMANDS[options.method].rule
    if rule:
        return _by_angles(getattr(rules, rule), options.anchor_rounding == "correct")
    if options.t is not None:  # Slerp's alone, and never missing there.
        return _slerp(options.t)
    if method == "ties":
        return _ties(options, number)
    if method in ("uniform_mean", "wise_ft"):
        ratio = 1.0 if options.alpha is None else options.alpha
        return _by_shares(np.full(number, ratio / number))
    return _by_shares(scale(options) * shares(options, number))


def shares(options: Options, number: int) -> np.ndarray:
    """Weights of the fine-tunes [N], divided by their sum where the method does so.

    Example:
        >>> shares(Options(method="linear", weights=(1, 3)), 2).tolist()
        [0.25, 0.75]
    """
    weights = np.array(options.weights or (1.0,) * number, np.float64)
    by_sum = options.method == "linear" if options.normalize is None else options.normalize
    return weights / weights.sum() if by_sum and options.method != "ties" else weights


def scale(options: Options) -> float:
    """Lambda, 1 unless given."""
    return 1.0 if options.scale is None else options.scale


def _by_angles(rule: Callable[..., UnitSolution], corrected: bool = False) -> Solver:
    def solve(unit: UnitReader) -> Solved:
        gram = unit.gram()
        if corrected:
            gram = correct_gram(gram, unit.energy())
        return Solved(rule(gram, unit.is_scalar), gram)

    return solve


def _by_shares(coefficients: np.ndarray) -> Solver:
    return _by_angles(lambda gram, single: rules.fixed_coefficients(gram, single, coefficients))


def _ties(options: Options, number: int) -> Solver:
    weights, normalize = shares(options, number), options.normalize is not False
    density = np.broadcast_to(1.0 if options.density is None else options.density, number)

    def solve(unit: UnitReader) -> Solved:
        gram = unit.gram()
        coefficients = scale(options) * weights / (weights.sum() if normalize else 1.0)
        trim = measure_trim(unit.reduce, unit.count, density, weights, scale(options), normalize)
        return Solved(rules.fixed_coefficients(gram, unit.is_scalar, coefficients), gram, trim=trim)

    return solve


def _slerp(t: float | Mapping[str, float]) -> Solver:
    """Spherical interpolation as it is commonly done: by the angle of the weights themselves."""

    def solve(unit: UnitReader) -> Solved:
        whole = unit.gram(with_base=True)
        gram = whole[1:, 1:]
        # Lengths and product of the two ends, w0 + d each; the base itself is the end d = 0.
        square, along = whole[0, 0], whole[0, 1:]
        ends = [
            square + 2 * a + g for a, g in zip(along, geometry.squared_norms(gram), strict=True)
        ]
        if len(gram) == 1:
            ends, product = [square, *ends], square + along[0]
        else:
            product = square + along[0] + along[1] + gram[0, 1]
        share = t[unit.name] if isinstance(t, Mapping) else t
        from_end, to_end = rules.slerp_coefficients(ends[0], ends[1], product, share, _STRAIGHT)
        each = [to_end] if len(gram) == 1 else [from_end, to_end]
        solution = rules.fixed_coefficients(gram, unit.is_scalar, np.zeros(len(gram)))
        return Solved(
            solution._replace(coefficient=np.array(each), ratio=sum(each)),
            gram,
            anchor=from_end + to_end,
        )

    return solve


def coefficients(solved: Solved, *, of_weights: bool) -> np.ndarray:
    """What the base's weights and each vector are multiplied by, [1 + N, K].

    Args:
        solved: Of the unit.
        of_weights: The vectors are the fine-tunes' weights, and not their task vectors.
    """
    each = solved.solution.coefficient
    base = np.ones_like(each[:1]) if solved.anchor is None else solved.anchor[None]
    return np.concatenate([base - each.sum(axis=0) if of_weights else base, each])


def combine(vectors: np.ndarray, factors: np.ndarray, layout: UnitLayout, start: int) -> np.ndarray:
    """Sum of factors times vectors for one piece, in the precision of the vectors.

    Args:
        vectors: [1 + N, n]; they are overwritten.
        factors: [1 + N, K], from `coefficients`.
        layout: Of the tensor.
        start: Of the piece.

    Returns:
        [n].
    """
    stop = start + vectors.shape[1]
    for factor, vector in zip(factors, vectors, strict=True):
        if not (factor == 1).all():
            vector *= layout.spread(factor, start, stop).astype(vector.dtype)
    # The movements first: they are small beside the weights.
    total = vectors[1]
    for vector in vectors[2:]:
        total += vector
    total += vectors[0]
    return total


# TIES-Merging (2306.01708): trim, elect signs, mean of those that agree; in bounded memory.

_HALF = 2**16


@dataclasses.dataclass(frozen=True)
class Trim:
    """What TIES keeps of a unit, and how it weighs it.

    Attributes:
        least: Bits of the least magnitude that is kept of each task vector, [N] uint32.
        weights: [N].
        scale: Lambda.
        normalize: Whether to divide by the weights of those that agree.
    """

    threshold: np.ndarray
    weights: np.ndarray
    scale: float
    normalize: bool

    def merge(self, deltas: np.ndarray) -> np.ndarray:
        """Lambda sum_i c_i d_i / sum_i c_i, over the kept d_i whose sign is the sum's; [N, n]."""
        kept = np.zeros(deltas.shape, deltas.dtype)
        for row, delta, least, weight in zip(
            kept, deltas, self.threshold, self.weights, strict=True
        ):
            np.multiply(delta, deltas.dtype.type(weight), out=row, where=magnitude(delta) >= least)
        agree = np.where(kept.sum(axis=0) >= 0, kept > 0, kept < 0)
        merged = np.where(agree, kept, 0).sum(axis=0)
        if self.normalize:
            weights = self.weights.astype(deltas.dtype)[:, None]
            divisor = np.where(agree, weights, 0).sum(axis=0)
            merged /= np.where(np.abs(divisor) < 1e-8, 1, divisor)
        merged *= deltas.dtype.type(self.scale)
        return merged


def magnitude(delta: np.ndarray) -> np.ndarray:
    """Bits of |d| as float32: whole numbers in the order of the magnitudes.

    Example:
        >>> magnitude(np.array([-2.0, 1.0, 0.0])).argsort().tolist()
        [2, 1, 0]
    """
    return delta.astype(np.float32).view(np.uint32) & np.uint32(0x7FFFFFFF)


def measure_trim(
    reduce: Reduce,
    count: int,
    density: Sequence[float] | np.ndarray,
    weights: np.ndarray,
    scale: float,
    normalize: bool,
) -> Trim:
    """Finds the magnitude of the k-th largest number of each task vector, k = density * count.

    Exact, by two histograms of the magnitudes' bits (upper half, then lower half within the bin
    that holds the k-th). Numbers as large as the k-th are all kept.

    Args:
        reduce: Sums a function of (w0 [n], deltas [N, n]) over the unit's pieces.
        count: Numbers in the unit.
        density: In (0, 1], one a task vector.
        weights: [N].
        scale: Lambda.
        normalize: See `Trim`.
    """
    least = np.zeros(len(weights), np.uint32)
    if min(density) < 1:
        ranks = np.maximum(1, (np.asarray(density) * count).astype(np.int64))
        upper, left = _select(reduce(lambda _, d: _histogram(magnitude(d) >> 16)), ranks)

        def within(_, deltas):
            bits = magnitude(deltas)
            return np.stack(
                [_counts(b[b >> 16 == u] & 0xFFFF) for b, u in zip(bits, upper, strict=True)]
            )

        lower, _ = _select(reduce(within), left)
        least = (upper << 16 | lower).astype(np.uint32)
        least[np.asarray(density) >= 1] = 0
    return Trim(least, weights, scale, normalize)


def _histogram(halves: np.ndarray) -> np.ndarray:
    return np.stack([_counts(row) for row in halves])


def _counts(halves: np.ndarray) -> np.ndarray:
    return np.bincount(halves, minlength=_HALF)


def _select(counts: np.ndarray, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bin of the k-th largest, [N], and its rank among the numbers of that bin."""
    above = counts[:, ::-1].cumsum(axis=1)
    place = (above >= ranks[:, None]).argmax(axis=1)
    before = np.where(place > 0, above[np.arange(len(place)), place - 1], 0)
    return (counts.shape[1] - 1 - place).astype(np.uint32), ranks - before


# What a merge measured, as rows of plain Python values.

Row = dict[str, Any]
_DISTANCES = ("replica", "mean", "merged")


def tensor_rows(
    key: str, members: Iterable[TensorPlan], solved: Solved, *, anchored: bool = True
) -> dict[str, Row]:
    """The rows of a unit's tensors, by name; tensors of one unit differ in name and shape alone.

    What a method does not define is None: the ratio and the merged weights' distance of TIES and
    slerp; the ratio of negative weights, whose sum says nothing about how far the merged weights
    are from the base; every angle, norm and distance where there is no base.

    Args:
        key: Of the unit.
        members: Its tensors.
        solved: What was found of it.
        anchored: Whether there is a base.
    """
    solution = solved.solution
    distance = {
        name: _root_sum_square(values) if anchored else None
        for name, values in zip(_DISTANCES, solution.distance, strict=True)
    }
    shared: Row = {"cosines": _pairwise(solved.gram), "predicted_distance": distance}
    if not solved.has_ratio:
        shared["ratio"] = distance["merged"] = None
    elif (solution.coefficient < 0).any():
        shared["ratio"] = None
    if not anchored:
        shared |= {"cosine": None, "angle": None, "ratio": None, "norms": [], "cosines": []}
    rows = {}
    for member in members:
        row = unit_row(
            member.name, key, solution.cosine, solution.ratio, solution.norm, solution.outcome
        )
        rows[member.name] = {**row, "shape": list(member.shape), **shared}
    return rows


def totals(rows: Iterable[Row]) -> tuple[dict[str, int], dict[str, float | None]]:
    """Units that met each policy, and predicted distances of the whole model, None where unknown.

    A unit counts once, however many tensors share it.
    """
    units = {row["unit"]: row for row in rows}.values()
    policies: collections.Counter[str] = collections.Counter()
    for row in units:
        policies.update(row["outcomes"])
    distance: dict[str, float | None] = {}
    for name in _DISTANCES:
        known = [far for row in units if (far := row["predicted_distance"][name]) is not None]
        distance[name] = math.sqrt(sum(far**2 for far in known)) if known else None
    return dict(policies), distance


def _pairwise(gram: np.ndarray) -> list[list[float | None]]:
    """Cosine of each two task vectors, the mean over units where both moved; None where none did.

    Example:
        >>> _pairwise(np.array([[1.0, 1.0], [1.0, 4.0]])[..., None])
        [[1.0, 0.5], [0.5, 1.0]]
    """
    norms = np.sqrt(np.einsum("iik->ik", gram))
    moved = norms > 0
    both = moved[:, None] & moved[None]
    safe = np.where(moved, norms, 1.0)
    cosines = np.where(both, gram / safe[:, None] / safe[None], 0.0).sum(axis=-1)
    number = both.sum(axis=-1)
    found = [
        [float(np.clip(c / n, -1.0, 1.0)) if n else None for c, n in zip(*row, strict=True)]
        for row in zip(cosines, number, strict=True)
    ]
    for i, row in enumerate(found):
        row[i] = row[i] and 1.0
    return found


def _root_sum_square(distances: np.ndarray) -> float | None:
    known = distances[distances >= 0]
    return float(np.sqrt(np.sum(known**2))) if known.size else None
