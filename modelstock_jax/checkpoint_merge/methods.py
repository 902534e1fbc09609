"""The methods: what a merge unit's first pass must measure, and what the second computes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from modelstock_jax.checkpoint_merge.chunks import Layout
from modelstock_jax.checkpoint_merge.options import Options
from modelstock_jax.checkpoint_merge.ties import Trim, measure_trim
from modelstock_jax.merging import geometry, rules
from modelstock_jax.merging.anchor_rounding import correct_gram
from modelstock_jax.merging.rules import Solution


class Measured(Protocol):
    """A merge unit whose tensors can be gone through as often as a method needs."""

    name: str  # of its first tensor
    single: np.ndarray  # [K] bool: fewer than two numbers
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

    solution: Solution
    gram: np.ndarray  # [N, N, K]
    anchor: np.ndarray | None = None  # [K]; None for 1
    trim: Trim | None = None

    @property
    def has_ratio(self) -> bool:
        """Whether it is w0 + t mean(d), or any sum of task vectors: TIES and slerp are none."""
        return self.anchor is None and self.trim is None


Solver = Callable[[Measured], Solved]

_STRAIGHT = 0.9995  # mergekit's: weights of a larger cosine lie on one line


def solver(options: Options, number: int) -> Solver:
    """The method asked for, of `number` fine-tunes.

    | method | merged weights |
    |---|---|
    | stock | w0 + t mean_i(d_i), t by equation 3 |
    | weighted-stock | w0 + sum_i a_i d_i, a_i by each replica's noise (`weighted_model_stock`) |
    | uniform | w0 + mean_i(d_i) |
    | wise-ft | w0 + alpha mean_i(d_i) |
    | linear | w0 + sum_i c_i d_i, c_i = weight_i / sum of weights |
    | task-arithmetic | w0 + lambda sum_i c_i d_i, c_i = weight_i |
    | ties | w0 + lambda times the disjoint mean of the trimmed d_i (`ties`) |
    | slerp | along the arc from the base to the fine-tune, or from the first to the second of two |
    """
    method = options.method
    if method == "stock":
        return _by_angles(rules.equation_3, options.anchor_rounding == "correct")
    if method == "weighted-stock":
        return _by_angles(rules.unequal_noise, options.anchor_rounding == "correct")
    if options.t is not None:  # Slerp's alone, and never missing there.
        return _slerp(options.t)
    if method == "ties":
        return _ties(options, number)
    if method in ("uniform", "wise-ft"):
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


def _by_angles(rule: Callable[..., Solution], corrected: bool = False) -> Solver:
    def solve(unit: Measured) -> Solved:
        gram = unit.gram()
        if corrected:
            gram = correct_gram(gram, unit.energy())
        return Solved(rule(gram, unit.single), gram)

    return solve


def _by_shares(coefficients: np.ndarray) -> Solver:
    return _by_angles(lambda gram, single: rules.given_shares(gram, single, coefficients))


def _ties(options: Options, number: int) -> Solver:
    weights, normalize = shares(options, number), options.normalize is not False
    density = np.broadcast_to(1.0 if options.density is None else options.density, number)

    def solve(unit: Measured) -> Solved:
        gram = unit.gram()
        coefficients = scale(options) * weights / (weights.sum() if normalize else 1.0)
        trim = measure_trim(unit.reduce, unit.count, density, weights, scale(options), normalize)
        return Solved(rules.given_shares(gram, unit.single, coefficients), gram, trim=trim)

    return solve


def _slerp(t: float | Mapping[str, float]) -> Solver:
    """Spherical interpolation as it is commonly done: by the angle of the weights themselves."""

    def solve(unit: Measured) -> Solved:
        whole = unit.gram(with_base=True)
        gram = whole[1:, 1:]
        # Lengths and product of the two ends, w0 + d each; the base itself is the end d = 0.
        square, along = whole[0, 0], whole[0, 1:]
        ends = [square + 2 * a + g for a, g in zip(along, geometry.squared_norms(gram),
                                                   strict=True)]
        if len(gram) == 1:
            ends, product = [square, *ends], square + along[0]
        else:
            product = square + along[0] + along[1] + gram[0, 1]
        share = t[unit.name] if isinstance(t, Mapping) else t
        from_end, to_end = rules.arc_shares(ends[0], ends[1], product, share, _STRAIGHT)
        each = [to_end] if len(gram) == 1 else [from_end, to_end]
        solution = rules.given_shares(gram, unit.single, np.zeros(len(gram)))
        return Solved(
            solution._replace(coefficient=np.array(each), ratio=sum(each)),
            gram, anchor=from_end + to_end,
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


def combine(
    vectors: np.ndarray, factors: np.ndarray, layout: Layout, start: int
) -> np.ndarray:
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
