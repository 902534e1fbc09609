"""Merge methods on one merge unit: measurements of the first pass, weights of the second, rows."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
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
    """A merge unit whose tensors can be read as often as a method needs.

    Attributes:
      name: name of its first tensor
      is_scalar: [K] bool, whether it has fewer than two elements
      count: number of elements
    """

    name: str
    is_scalar: np.ndarray
    count: int

    def gram(self, *, with_base: bool = False) -> np.ndarray:
        """Return the Gram matrix of the task vectors, [N, N, K].

        Args:
          with_base: add the base's weights as the first row and column
        """

    def energy(self) -> np.ndarray:
        """Return the expected squared rounding error of the base, [K]."""

    def reduce(self, function: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
        """Return the sum of function(w0 [n], deltas [N, n]) over the pieces."""


@dataclasses.dataclass(frozen=True)
class Solved:
    """Solution of a unit: anchor * w0 + sum_i a_i d_i, or the trimmed task vectors of TIES.

    Attributes:
      solution: coefficients and measurements
      gram: [N, N, K], Gram matrix of the task vectors
      anchor: [K], coefficient of w0; None for 1
      trim: thresholds of TIES; None for other methods
    """

    solution: UnitSolution
    gram: np.ndarray
    anchor: np.ndarray | None = None
    trim: Trim | None = None

    @property
    def has_ratio(self) -> bool:
        """Whether it is w0 + a sum of task vectors, such as w0 + t mean(d); not TIES or slerp."""
        return self.anchor is None and self.trim is None


Solver = Callable[[UnitReader], Solved]

_COLLINEAR = 0.9995  # As in mergekit: weights with a larger cosine are interpolated linearly.


def solver(options: Options, number: int) -> Solver:
    """Return the method of the options.

    | method | merged weights |
    |---|---|
    | with a `rule` in `registry` | w0 + sum_i a_i d_i, a_i from that rule |
    | uniform_mean | w0 + mean_i(d_i) |
    | wise_ft | w0 + alpha mean_i(d_i) |
    | linear | w0 + sum_i c_i d_i, c_i = weight_i / sum of weights |
    | task_arithmetic | w0 + lambda sum_i c_i d_i, c_i = weight_i |
    | ties | w0 + lambda times the disjoint mean of the trimmed d_i (`Trim`) |
    | slerp | on the arc from the base to the fine-tune, or from the first to the second of two |

    Args:
      options: options of the merge
      number: number of fine-tunes
    """
    method, rule = options.method, COMMANDS[options.method].rule
    if rule:
        return _from_gram(getattr(rules, rule), options.anchor_rounding == "correct")
    if options.t is not None:  # Only slerp has t, and it requires it.
        return _slerp(options.t)
    if method == "ties":
        return _ties(options, number)
    if method in ("uniform_mean", "wise_ft"):
        ratio = 1.0 if options.alpha is None else options.alpha
        return _with_coefficients(np.full(number, ratio / number))
    return _with_coefficients(scale(options) * model_weights(options, number))


def model_weights(options: Options, number: int) -> np.ndarray:
    """Return the weights of the fine-tunes [N], divided by their sum if the method does so.

    Args:
      options: options of the merge
      number: number of fine-tunes

    Example:
      >>> model_weights(Options(method="linear", weights=(1, 3)), 2).tolist()
      [0.25, 0.75]
    """
    weights = np.array(options.weights or (1.0,) * number, np.float64)
    normalize = options.method == "linear" if options.normalize is None else options.normalize
    return weights / weights.sum() if normalize and options.method != "ties" else weights


def scale(options: Options) -> float:
    """Return lambda; 1 by default."""
    return 1.0 if options.scale is None else options.scale


def _from_gram(rule: Callable[..., UnitSolution], correct_rounding: bool = False) -> Solver:
    def solve(unit: UnitReader) -> Solved:
        gram = unit.gram()
        if correct_rounding:
            gram = correct_gram(gram, unit.energy())
        return Solved(rule(gram, unit.is_scalar), gram)

    return solve


def _with_coefficients(values: np.ndarray) -> Solver:
    return _from_gram(lambda gram, is_scalar: rules.fixed_coefficients(gram, is_scalar, values))


def _ties(options: Options, number: int) -> Solver:
    weights, normalize = model_weights(options, number), options.normalize is not False
    density = np.broadcast_to(1.0 if options.density is None else options.density, number)
    round_down = options.density_rounding == "down"

    def solve(unit: UnitReader) -> Solved:
        solution = rules.ties_statistics(
            gram := unit.gram(), unit.is_scalar, np.float64(scale(options))
        )
        ranks = None
        if min(density) < 1:
            ranks = rules.ties_ranks(density, unit.count, number, round_down=round_down)
        trim = measure_trim(unit.reduce, ranks, weights, scale(options), normalize)
        return Solved(solution, gram, trim=trim)

    return solve


def _slerp(t: float | Mapping[str, float]) -> Solver:
    """Return spherical interpolation by the angle between the weights (not the task vectors)."""

    def solve(unit: UnitReader) -> Solved:
        full = unit.gram(with_base=True)
        gram = full[1:, 1:]
        # Squared lengths and product of the two ends, w0 + d each; the base is the end d = 0.
        square, along = full[0, 0], full[0, 1:]
        ends = [
            square + 2 * a + g for a, g in zip(along, geometry.squared_norms(gram), strict=True)
        ]
        if len(gram) == 1:
            ends, product = [square, *ends], square + along[0]
        else:
            product = square + along[0] + along[1] + gram[0, 1]
        position = t[unit.name] if isinstance(t, Mapping) else t
        first, second = rules.slerp_coefficients(ends[0], ends[1], product, position, _COLLINEAR)
        values = [second] if len(gram) == 1 else [first, second]
        solution = rules.fixed_coefficients(gram, unit.is_scalar, np.zeros(len(gram)))
        return Solved(
            solution._replace(coefficient=np.array(values), ratio=sum(values)),
            gram,
            anchor=first + second,
        )

    return solve


def coefficients(solved: Solved, *, of_weights: bool) -> np.ndarray:
    """Return the factors of the base's weights and of each vector, [1 + N, K].

    Args:
      solved: solution of the unit
      of_weights: the vectors are the fine-tunes' weights, not their task vectors
    """
    factors = solved.solution.coefficient
    base = np.ones_like(factors[:1]) if solved.anchor is None else solved.anchor[None]
    return np.concatenate([base - factors.sum(axis=0) if of_weights else base, factors])


def combine(vectors: np.ndarray, factors: np.ndarray, layout: UnitLayout, start: int) -> np.ndarray:
    """Return the sum of factors times vectors for one piece, in the precision of the vectors.

    Args:
      vectors: [1 + N, n]; they are overwritten
      factors: [1 + N, K], from `coefficients`
      layout: layout of the tensor
      start: first element of the piece

    Returns:
      [n].
    """
    stop = start + vectors.shape[1]
    for factor, vector in zip(factors, vectors, strict=True):
        if not (factor == 1).all():
            vector *= layout.spread(factor, start, stop).astype(vector.dtype)
    # The updates are summed first, because they are small compared with the weights.
    total = vectors[1]
    for vector in vectors[2:]:
        total += vector
    total += vectors[0]
    return total


_DIGIT = 16  # Bits of a magnitude that one pass determines.


@dataclasses.dataclass(frozen=True)
class Trim:
    """Trimming of TIES-Merging (arXiv 2306.01708) for one unit, in bounded memory.

    Attributes:
      threshold: bits of the minimum magnitude that remains in each task vector, [N] int64
      weights: [N]
      scale: lambda
      normalize: divide by the sum of the weights of the task vectors that agree in sign
    """

    threshold: np.ndarray
    weights: np.ndarray
    scale: float
    normalize: bool

    def merge(self, deltas: np.ndarray) -> np.ndarray:
        """Return lambda sum_i c_i d_i / sum_i c_i over the trimmed d_i with the sign of their sum.

        Args:
          deltas: [N, n] float64, task vectors
        """
        trimmed = np.zeros(deltas.shape)
        for row, delta, min_bits, weight in zip(
            trimmed, deltas, self.threshold, self.weights, strict=True
        ):
            np.multiply(delta, weight, out=row, where=magnitude(delta) >= min_bits)
        agree = np.where(trimmed.sum(axis=0) >= 0, trimmed > 0, trimmed < 0)
        merged = np.where(agree, trimmed, 0).sum(axis=0)
        if self.normalize:
            divisor = np.where(agree, self.weights[:, None], 0).sum(axis=0)
            merged /= np.where(np.abs(divisor) < 1e-8, 1, divisor)
        return merged * self.scale


def magnitude(deltas: np.ndarray) -> np.ndarray:
    """Return the bits of |d| in float64: int64 in the order of the magnitudes.

    Example:
      >>> magnitude(np.array([-2.0, 1.0, 0.0])).argsort().tolist()
      [2, 1, 0]
    """
    return np.abs(deltas).view(np.int64)


def measure_trim(
    reduce: Reduce,
    ranks: Sequence[int] | None,
    weights: np.ndarray,
    scale: float,
    normalize: bool,
) -> Trim:
    """Find the k-th largest magnitude of each task vector.

    The result is exact: each pass determines 16 bits of the k-th, from a histogram of these bits
    over the magnitudes that agree with the bits before. All elements equal to the k-th remain.

    Args:
      reduce: sums a function of (w0 [n], deltas [N, n]) over the pieces of the unit
      ranks: k of each task vector, counted from 1; None to keep all elements
      weights: [N]
      scale: lambda
      normalize: see `Trim`
    """
    threshold = np.zeros(len(weights), np.int64)
    if ranks is not None:
        remaining = np.array(ranks)
        for shift in (48, 32, 16, 0):
            counts = reduce(partial(_histogram, threshold, shift))
            digit, remaining = _select(counts, remaining)
            threshold |= digit << shift
    return Trim(threshold, weights, scale, normalize)


def _histogram(threshold: np.ndarray, shift: int, _: np.ndarray, deltas: np.ndarray) -> np.ndarray:
    """Return the counts of a digit over the magnitudes whose higher digits are the threshold's."""
    counts = np.empty((len(deltas), 2**_DIGIT), np.int64)
    for row, delta, found in zip(counts, deltas, threshold, strict=True):
        digits = magnitude(delta) >> shift
        # `digits` has no sign bit, so the first digit has no higher ones.
        row[:] = np.bincount(
            digits[digits >> _DIGIT == found >> shift >> _DIGIT] & (2**_DIGIT - 1),
            minlength=2**_DIGIT,
        )
    return counts


def _select(counts: np.ndarray, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the bin of the k-th largest element, [N], and its rank within the bin."""
    cumulative = counts[:, ::-1].cumsum(axis=1)
    index = (cumulative >= ranks[:, None]).argmax(axis=1)
    before = np.where(index > 0, cumulative[np.arange(len(index)), index - 1], 0)
    return counts.shape[1] - 1 - index, ranks - before


Row = dict[str, Any]
_DISTANCES = ("replica", "mean", "merged")


def tensor_rows(
    key: str, members: Iterable[TensorPlan], solved: Solved, *, anchored: bool = True
) -> dict[str, Row]:
    """Return the report rows of a unit's tensors, by name; only name and shape differ among them.

    A value that a method does not define is None: the ratio and the distance of the merged weights
    for TIES and slerp; the ratio for negative weights, whose sum does not show how far the merged
    weights are from the base; every angle, norm and distance if there is no base.

    Args:
      key: key of the unit
      members: its tensors
      solved: its solution
      anchored: whether there is a base
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
    """Return the number of units per outcome, and the predicted distances of the entire model.

    A unit counts once, however many tensors share it. A distance is None if it is unknown in every
    unit that changed.
    """
    units = {row["unit"]: row for row in rows}.values()
    outcomes: collections.Counter[str] = collections.Counter()
    for row in units:
        outcomes.update(row["outcomes"])
    distance: dict[str, float | None] = {}
    for name in _DISTANCES:
        known = [x for row in units if (x := row["predicted_distance"][name]) is not None]
        is_known = _is_known(known, len(units))
        distance[name] = math.sqrt(sum(x**2 for x in known)) if is_known else None
    return dict(outcomes), distance


def _pairwise(gram: np.ndarray) -> list[list[float | None]]:
    """Return the cosine of each pair of task vectors, averaged over the units.

    Only units count in which both models changed; without such a unit the cosine is None.

    Example:
      >>> _pairwise(np.array([[1.0, 1.0], [1.0, 4.0]])[..., None])
      [[1.0, 0.5], [0.5, 1.0]]
    """
    norms = np.sqrt(np.einsum("iik->ik", gram))
    changed = norms > 0
    both = changed[:, None] & changed[None]
    safe = np.where(changed, norms, 1.0)
    cosines = np.where(both, gram / safe[:, None] / safe[None], 0.0).sum(axis=-1)
    number = both.sum(axis=-1)
    rows = [
        [float(np.clip(c / n, -1.0, 1.0)) if n else None for c, n in zip(*row, strict=True)]
        for row in zip(cosines, number, strict=True)
    ]
    for i, row in enumerate(rows):
        row[i] = row[i] and 1.0
    return rows


def _root_sum_square(distances: np.ndarray) -> float | None:
    known = distances[distances >= 0]
    return float(np.sqrt(np.sum(known**2))) if _is_known(known, distances.size) else None


def _is_known(known: Sequence[float] | np.ndarray, count: int) -> bool:
    """Return whether the distance of `count` units is known from the known ones of them.

    Units that no fine-tune changed have a distance of 0, which is no prediction for the others.

    Example:
      >>> _is_known([0.0, 0.0], 2), _is_known([0.0], 2), _is_known([0.0, 1.0], 3), _is_known([], 0)
      (True, False, True, False)
    """
    return len(known) > 0 and (len(known) == count or bool(np.any(known)))
