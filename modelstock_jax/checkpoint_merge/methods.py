"""Merge methods on one merge unit: measurements of the first pass, weights of the second, rows."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from modelstock_jax.checkpoint_merge import elementwise, singular_directions
from modelstock_jax.checkpoint_merge.elementwise import Combination, OfPiece
from modelstock_jax.checkpoint_merge.kernels import UnitLayout
from modelstock_jax.checkpoint_merge.options import Options
from modelstock_jax.checkpoint_merge.tensor_plan import TensorPlan
from modelstock_jax.merging import rules, spherical
from modelstock_jax.merging.anchor_rounding import correct_gram
from modelstock_jax.merging.rules import UnitSolution, unit_row
from modelstock_jax.merging.update_scaling import LayerPosition
from modelstock_jax.registry import COMMANDS


class UnitReader(Protocol):
    """A merge unit whose tensors can be read as often as a method needs.

    Attributes:
      name: name of its first tensor
      shape: shape of this tensor
      layer: its position in the layers, for LiNeS
      is_scalar: [K] bool, whether it has fewer than two elements
      count: number of elements
      anchored: whether there is a base; without one, the base is the first fine-tune
    """

    name: str
    shape: tuple[int, ...]
    layer: LayerPosition | None
    anchored: bool
    is_scalar: np.ndarray
    count: int

    def gram(self, *, with_base: bool = False) -> np.ndarray:
        """Return the Gram matrix of the task vectors, [N, N, K].

        Args:
          with_base: add the base's weights as the first row and column
        """

    def energy(self) -> np.ndarray:
        """Return the expected squared rounding error of the base, [K]."""

    def reduce(self, function: OfPiece) -> np.ndarray:
        """Return the sum of function(w0 [n], task vectors [N, n], place) over the pieces."""

    def each_piece(self, function: OfPiece) -> Iterator[Any]:
        """Yield function(w0 [n], task vectors [N, n], place) of one piece after the other."""


@dataclasses.dataclass(frozen=True)
class Solved:
    """Solution of a unit: anchor * w0 + sum_i a_i d_i, or a combination of single elements.

    Attributes:
      solution: coefficients and measurements
      gram: [N, N, K], Gram matrix of the task vectors
      anchor: [K], coefficient of w0; None for 1
      combination: of an elementwise method; None for other methods
    """

    solution: UnitSolution
    gram: np.ndarray
    anchor: np.ndarray | None = None
    combination: Combination | None = None

    @property
    def has_ratio(self) -> bool:
        """Whether it is w0 + a sum of complete task vectors, such as w0 + t mean(d)."""
        return self.anchor is None and self.combination is None


Solver = Callable[[UnitReader], Solved]

_COLLINEAR = 0.9995  # As in mergekit: weights with a larger cosine are interpolated linearly.


def solver(options: Options, number: int) -> Solver:
    """Return the method of the options.

    | method | merged weights |
    |---|---|
    | with a `rule` in `registry` | w0 + sum_i a_i d_i, a_i from that rule |
    | uniform_mean | w0 + mean_i(d_i) |
    | wise_ft | w0 + alpha mean_i(d_i) |
    | lines | w0 + (alpha + beta (l - 1) / (L - 1)) mean_i(d_i) in layer l of L |
    | linear | sum_i c_i w_i, c_i = weight_i / sum of weights |
    | task_arithmetic | w0 + lambda sum_i c_i d_i, c_i = weight_i |
    | elementwise | a `Combination` of `elementwise` |
    | slerp | on the arc from the base to the fine-tune, or from the first to the second of two |
    | nuslerp, multislerp, karcher | of the task vectors or weights, see `merging.spherical` |
    | passthrough | lambda w_1 |

    Args:
      options: options of the merge
      number: number of fine-tunes
    """
    method = COMMANDS[options.method]
    if method.rule:
        rule = getattr(rules, method.rule)
        return lambda unit: _by_rule(rule, unit, options.anchor_rounding == "correct")
    if method.elementwise:
        return lambda unit: _elementwise(unit, options, number)
    if method.of_weights:
        return lambda unit: _spherical(unit, options, number)
    if options.method == "passthrough":
        return lambda unit: _passthrough(unit, scale(options, unit.name))
    return lambda unit: _with_coefficients(unit, *_fixed_coefficients(unit, options, number))


def _passthrough(unit: UnitReader, factor: float) -> Solved:
    solved = _with_coefficients(unit, np.array([factor]), factor)
    copied = np.full_like(solved.solution.copy_replica, factor == 1)
    return dataclasses.replace(solved, solution=solved.solution._replace(copy_replica=copied))


def _fixed_coefficients(
    unit: UnitReader, options: Options, number: int
) -> tuple[np.ndarray, float | None]:
    """Return the coefficients of the task vectors [N], and of the base; None for 1."""
    if options.method == "uniform_mean":
        return np.full(number, 1 / number), None
    if options.method in ("wise_ft", "lines"):
        ratio = options.value("alpha", unit.name)
        if options.method == "lines" and unit.layer is not None:
            beta = options.value("beta", unit.name)
            ratio += (1 - ratio if beta is None else beta) * unit.layer.index / unit.layer.last
        return np.full(number, ratio / number), None
    weights = scale(options, unit.name) * model_weights(options, number, unit.name)
    is_sum_of_weights = not unit.anchored and abs(weights.sum() - 1) > 1e-12
    return weights, float(weights.sum()) if is_sum_of_weights else None


def model_weights(options: Options, number: int, tensor: str = "") -> np.ndarray:
    """Return the weights of the fine-tunes [N], divided by their sum if the method does so.

    Args:
      options: options of the merge
      number: number of fine-tunes
      tensor: name of the tensor, for weights that differ by tensor

    Example:
      >>> model_weights(Options(method="linear", weights=(1, 3)), 2).tolist()
      [0.25, 0.75]
    """
    weights = np.array(options.value("weights", tensor) or (1.0,) * number, np.float64)
    # An elementwise method divides by the weights of the elements that remain.
    is_divided = normalizes(options) and not COMMANDS[options.method].elementwise
    return weights / weights.sum() if is_divided else weights


def normalizes(options: Options) -> bool:
    """Return whether the weights are divided by their sum."""
    default = COMMANDS[options.method].normalize
    return default if options.normalize is None else options.normalize


def scale(options: Options, tensor: str = "") -> float:
    """Return lambda of a tensor; 1 by default."""
    value = options.value("scale", tensor)
    return 1.0 if value is None else value


def _by_rule(rule: Callable[..., UnitSolution], unit: UnitReader, correct_rounding: bool) -> Solved:
    gram = unit.gram()
    if correct_rounding:
        gram = correct_gram(gram, unit.energy())
    return Solved(rule(gram, unit.is_scalar), gram)


def _with_coefficients(unit: UnitReader, values: np.ndarray, anchor: float | None = None) -> Solved:
    gram = unit.gram()
    solved = Solved(rules.fixed_coefficients(gram, unit.is_scalar, values), gram)
    if anchor is None:
        return solved
    # Weights that are no mean of the models: unchanged weights are scaled too.
    solution = solved.solution._replace(keep_anchor=np.zeros_like(solved.solution.keep_anchor))
    return dataclasses.replace(
        solved, solution=solution, anchor=np.full(unit.is_scalar.shape, anchor)
    )


def _elementwise(unit: UnitReader, options: Options, number: int) -> Solved:
    gram = unit.gram()
    factor = scale(options, unit.name) if "scale" in COMMANDS[options.method].options else 1.0
    solution = rules.ties_statistics(gram, unit.is_scalar, np.float64(factor))
    return Solved(solution, gram, combination=_combination(unit, options, number))


def _combination(unit: UnitReader, options: Options, number: int) -> Combination:
    """Return the combination of an elementwise method, measured on a unit."""

    def value(name: str) -> Any:
        return options.value(name, unit.name)

    match options.method:
        case "monosoup":
            return singular_directions.measure(unit.each_piece, unit.shape)
        case "sce":
            return elementwise.SelectCalculateErase.measure(unit.reduce, value("select_topk"))
        case "ram":
            return elementwise.Overlap(value("epsilon"), np.ones(number))
        case "ramplus_tl":
            limit = 0.2 if value("alpha") is None else value("alpha")
            return elementwise.Overlap.measure(unit.reduce, value("epsilon"), value("r"), limit)
        case "nearswap":
            return elementwise.NearSwap(value("t"))
        case "arcee_fusion":
            return elementwise.Fusion.measure(unit.reduce, unit.count)
    return elementwise.SparseSum(
        _sparsifier(unit, options, number),
        model_weights(options, number, unit.name),
        scale(options, unit.name),
        elect=options.method in _ELECTS,
        normalize=normalizes(options),
    )


_ELECTS = ("ties", "dare_ties", "breadcrumbs_ties", "della")


def _sparsifier(unit: UnitReader, options: Options, number: int) -> elementwise.Sparsifier:
    """Return which elements of the task vectors remain, measured on a unit."""

    def of_models(name: str, default: float = 1.0) -> np.ndarray:
        value = options.value(name, unit.name)
        return np.broadcast_to(np.float64(default if value is None else value), number)

    density, rescale = of_models("density"), options.value("rescale", unit.name)
    if "seed" in COMMANDS[options.method].options:
        epsilon = of_models("epsilon") if options.method.startswith("della") else None
        return elementwise.RandomElements(options.seed or 0, density, rescale, epsilon)
    if min(density) >= 1:
        return elementwise.everything(number)
    if options.method.startswith("breadcrumbs"):
        smallest, largest = rules.breadcrumbs_ranks(density, of_models("gamma"), unit.count)
    else:
        round_down = options.density_rounding == "down"
        smallest = rules.ties_ranks(density, unit.count, number, round_down=round_down)
        largest = [1] * number
    return elementwise.magnitude_range(unit.reduce, smallest, largest, rescale=rescale)


def num_passes(options: Options, tensor: str, shape: Sequence[int]) -> int:
    """Return the number of times that a merged tensor is read.

    Two: to measure, then to combine. The order statistics of an elementwise method need more.

    Args:
      options: options of the merge
      tensor: name of the tensor
      shape: its shape
    """
    method, ranks = COMMANDS[options.method], elementwise.PASSES_OF_RANKS
    if method.of_matrices:
        return 2 + singular_directions.num_passes(shape)
    if options.method in ("ram", "nearswap"):
        return 2
    if options.method == "sce":
        return 3 + (1 + ranks) * (options.value("select_topk", tensor) < 1)
    if options.method in ("ramplus_tl", "arcee_fusion"):
        return 2 + (1 if options.method == "ramplus_tl" else ranks)
    density = options.value("density", tensor)
    is_complete = density is None or np.min(density) >= 1
    if not method.elementwise or "seed" in method.options or is_complete:
        return 2
    return 2 + ranks + int(options.value("rescale", tensor))


def _spherical(unit: UnitReader, options: Options, number: int) -> Solved:
    """Return the mean on a sphere, of task vectors or of weights.

    Slerp and the Karcher mean are of weights. NuSLERP and Multi-SLERP are of task vectors if there
    is a base.
    """
    of_deltas = unit.anchored and options.method in ("nuslerp", "multislerp")
    full = unit.gram(with_base=True)
    gram = full[1:, 1:]
    # Vectors as combinations of w0 and the task vectors.
    rows = np.eye(number + 1)[1:]
    rows[:, 0] = 0 if of_deltas else 1
    if options.method == "slerp" and number == 1:
        rows = np.vstack([np.eye(2)[0], rows])  # From the base to the fine-tune.
    vectors = np.einsum("ai,bj,ijk->abk", rows, rows, full)
    values = rows.T @ _mean_on_sphere(unit, options, vectors)
    solution = rules.fixed_coefficients(gram, unit.is_scalar, np.zeros(number))
    is_mean = of_deltas | (np.abs(values.sum(axis=0) - 1) < 1e-6)
    solution = solution._replace(
        coefficient=values[1:],
        ratio=values[1:].sum(axis=0),
        keep_anchor=solution.keep_anchor & is_mean,
    )
    return Solved(solution, gram, anchor=values[0] + of_deltas)


def _mean_on_sphere(unit: UnitReader, options: Options, gram: np.ndarray) -> np.ndarray:
    """Return the coefficients of the vectors with a Gram matrix [M, M, K], [M, K]."""
    if options.method == "slerp":
        ends = gram[0, 0], gram[1, 1], gram[0, 1]
        t = options.value("t", unit.name)
        return np.stack(rules.slerp_coefficients(*ends, t, _COLLINEAR))
    if options.method == "karcher":
        names = ("max_iter", "tol")
        max_iter, tol = (options.value(name, unit.name) for name in names)
        return spherical.karcher_mean(gram, int(max_iter), tol)
    weights = model_weights(options, len(gram), unit.name)
    if options.method == "nuslerp":
        return spherical.nuslerp(gram, weights)
    return spherical.multislerp(gram, weights)


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
