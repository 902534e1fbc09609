"""Merge LoRA adapters into one adapter: Gram matrices, stacked factors and truncation by an SVD.

The update of a tensor in adapter i is d_i = s_i B_i A_i, and the merged update is

    sum_i a_i d_i = [a_1 s_1 B_1, a_2 s_2 B_2, ...] [A_1; A_2; ...]

The complete matrices are never computed: products of d_i are products of the factors.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from modelstock_jax.checkpoint_merge.adapter_plan import MEANS, AdapterPlan, Replacement, Update
from modelstock_jax.checkpoint_merge.auxiliary_files import copy_tokenizer
from modelstock_jax.checkpoint_merge.elementwise import OfPiece
from modelstock_jax.checkpoint_merge.executor import MergeResult, Progress
from modelstock_jax.checkpoint_merge.kernels import (
    PIECE,
    UnitLayout,
    escaped,
    first_non_finite,
    narrow,
    products,
)
from modelstock_jax.checkpoint_merge.lora import CONFIG, WEIGHTS
from modelstock_jax.checkpoint_merge.methods import (
    Row,
    Solved,
    model_weights,
    solver,
    tensor_rows,
    totals,
)
from modelstock_jax.checkpoint_merge.output import ByteCounter, check_out
from modelstock_jax.errors import UserError
from modelstock_jax.fileio import new_directory
from modelstock_jax.merging.rules import NonFiniteError
from modelstock_jax.tensor_files.reader import DTYPES, TensorFiles
from modelstock_jax.tensor_files.writer import ShardWriter, write_indented_json

Part = Update | Replacement


class Factored(NamedTuple):
    """A product B A, float64.

    Attributes:
      b: [out, r]
      a: [r, in]
    """

    b: np.ndarray
    a: np.ndarray


def run_adapter(
    plan: AdapterPlan,
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    measured: Callable[[Path, list[Row]], None] | None = None,
    finish: Callable[[Path, MergeResult], None] | None = None,
) -> MergeResult:
    """Write the merged adapter to `out`: the complete directory, or nothing.

    Args:
      plan: plan from `plan_adapter`
      out: directory to create
      overwrite: replace an existing directory
      progress: called with bytes done and total bytes, reads and writes together
      measured: called with the temporary directory and the report rows when they are known
      finish: called with the complete temporary directory and the result, before the directory is
        renamed to `out`

    Raises:
      UserError: `out` is an input, contains one, is inside one, or exists; the disk is too full; an
        adapter contains NaN or infinity; a value exceeds the range of its dtype
    """
    begin = time.monotonic()
    check_out(plan, out, overwrite=overwrite)
    counter = ByteCounter(plan.bytes_read + plan.bytes_written, progress)
    with new_directory(out, overwrite=overwrite) as directory:
        rows, checksum = _write(plan, directory / WEIGHTS, counter)
        ordered = [rows[name] for name in sorted(rows)]
        write_indented_json(directory / CONFIG, plan.config)
        if plan.tokenizer is not None:
            copy_tokenizer(plan.adapters[plan.tokenizer].adapter.directory, directory)
        if measured is not None:
            measured(directory, ordered)
        outcomes, distance = totals(ordered)
        result = MergeResult(
            rows=ordered, outcomes=outcomes, distance=distance,
            checksums={WEIGHTS: f"{plan.options.checksum}:{checksum}"}, resumed=(),
            bytes_read=counter.read, bytes_written=counter.written,
            seconds=time.monotonic() - begin,
        )  # fmt: skip
        if finish is not None:
            finish(directory, result)
    return result


def _write(plan: AdapterPlan, path: Path, counter: ByteCounter) -> tuple[dict[str, Row], str]:
    """Write the tensors; return the report rows by tensor and the checksum of the file."""
    units: dict[str, list[Part]] = {}
    for part in (*plan.updates, *plan.replacements):
        if part.view is not None:
            units.setdefault(part.view.key, []).append(part)
    means = [part for part in plan.replacements if part.view is None]
    rows: dict[str, Row] = {}
    writer = ShardWriter(path, plan.written, checksum=plan.options.checksum)
    try:
        for key, members in units.items():
            unit = AdapterUnit(plan, members, counter)
            solved = solver(plan.options, len(plan.adapters))(unit)
            planned = [plan.tensors[part.name] for part in members]
            rows |= tensor_rows(key, planned, solved)
            for part, layout in zip(members, unit.layouts, strict=True):
                if isinstance(part, Update):
                    factors = read_factors(plan, part, counter)
                    rows[part.name] |= _write_update(
                        writer, plan, part, combine(factors, part, layout, solved), counter
                    )
                else:
                    _write_replacement(writer, plan, part, layout, solved, counter)
        for part in means:
            _write_replacement(writer, plan, part, UnitLayout(1, 0, 0), None, counter)
    except BaseException:
        writer.abandon()
        raise
    return rows, writer.finish()


class AdapterUnit:
    """Updates of adapters that share one angle: a `methods.UnitReader`.

    Args:
      plan: plan of the merge
      members: tensors of the unit
      counter: counts the bytes that are read
    """

    anchored = True  # The updates are known without the base.
    layer = None  # Without the base, the number of layers is unknown.

    def __init__(self, plan: AdapterPlan, members: Sequence[Part], counter: ByteCounter):
        self._plan, self._members, self._counter = plan, members, counter
        views = [part.view for part in members if part.view is not None]
        self.layouts = [UnitLayout.of(view) for view in views]
        self.name, self.shape = members[0].name, members[0].shape
        self.count = sum(layout.count for layout in self.layouts)
        per_unit = sum(view.count for view in views)
        self.is_scalar = np.full(self.layouts[0].units, per_unit < 2)

    def gram(self, *, with_base: bool = False) -> np.ndarray:
        """Return the Gram matrix of the updates, [N, N, K] float64; `with_base` must be False.

        Raises:
          NonFiniteError: an adapter contains NaN or infinity; names the adapter and the tensor
        """
        assert not with_base, "a merge of adapters reads no base"
        number = len(self._plan.adapters)
        total = np.zeros((number, number, self.layouts[0].units))
        for part, layout in zip(self._members, self.layouts, strict=True):
            if isinstance(part, Update):
                total += factor_gram(read_factors(self._plan, part, self._counter), part, layout)
            else:
                _add_products(self._plan, part, layout, self._counter, total)
        if not np.isfinite(total).all():
            raise NonFiniteError(
                f"{self.name}: an update is too large for float64; check lora_alpha",
                "finetuned",
                self.name,
            )
        return total

    def energy(self) -> np.ndarray:
        """Return the rounding error of the base in the updates of adapters: 0, [K]."""
        return np.zeros(self.layouts[0].units)

    def reduce(self, function: OfPiece) -> np.ndarray:
        """Raise an error: the elements of an update are never computed."""
        raise NotImplementedError("elements of updates are not computed")

    def each_piece(self, function: OfPiece) -> Iterator[Any]:
        """Raise an error: the elements of an update are never computed."""
        raise NotImplementedError("elements of updates are not computed")


def read_factors(plan: AdapterPlan, update: Update, counter: ByteCounter) -> list[Factored | None]:
    """Return s B and A of a tensor in each adapter; None if the adapter does not change it.

    Args:
      plan: plan of the merge
      update: the tensor
      counter: counts the bytes that are read

    Raises:
      NonFiniteError: a factor contains NaN or infinity
    """
    read: list[Factored | None] = []
    for index, (source, factors) in enumerate(zip(plan.adapters, update.factors, strict=True)):
        if factors is None:
            read.append(None)
            continue
        files: TensorFiles = source.adapter.files
        b, a = (files[name] for name in (factors.b, factors.a))
        for name, values in ((factors.b, b), (factors.a, a)):
            _check_finite(source, index, update.name, name, values)
        counter.add(read=a.nbytes + b.nbytes)
        read.append(Factored(b.astype(np.float64) * factors.scale, a.astype(np.float64)))
    return read


def factor_gram(
    factors: Sequence[Factored | None], update: Update, layout: UnitLayout
) -> np.ndarray:
    """Return the Gram matrix of updates from their factors, [N, N, K].

    The product of two updates is trace((B_i^T B_j) (A_j A_i^T)); for units of rows or columns it is
    the sum over the rows of B or the columns of A.

    Args:
      factors: s B and A of each adapter; None for no update
      update: the tensor
      layout: layout of its merge units
    """
    gram = np.zeros((len(factors), len(factors), layout.units))
    axis, unit_of = units_of_axis(update, layout)
    for i, x in enumerate(factors):
        for j, y in enumerate(factors[: i + 1]):
            if x is None or y is None:
                continue
            # A float64 overflow becomes infinite or NaN, which `gram` reports.
            with np.errstate(over="ignore", invalid="ignore"):
                if axis == "out":
                    sums = ((x.b @ (x.a @ y.a.T)) * y.b).sum(axis=1)
                elif axis == "in":
                    sums = ((y.b.T @ x.b @ x.a) * y.a).sum(axis=0)
                else:
                    sums = ((x.b.T @ y.b) * (x.a @ y.a.T)).sum(keepdims=True).ravel()
                sums = np.bincount(unit_of, sums, layout.units)
            gram[i, j] = gram[j, i] = sums
    return gram


def units_of_axis(update: Update, layout: UnitLayout) -> tuple[str, np.ndarray]:
    """Return the axis of the matrix that its units divide, and the unit of each index of the axis.

    Args:
      update: the tensor
      layout: layout of its merge units

    Returns:
      `out` (rows of B), `in` (columns of A), or an empty text for one unit.
    """
    if layout.units == 1:
        return "", np.zeros(1, np.intp)
    rows, columns = update.shape
    # Element e is in unit (e // run) % units: rows if a run contains complete rows.
    by_row = layout.run % columns == 0
    element = np.arange(rows) * columns if by_row else np.arange(columns)
    assert by_row or columns % (layout.run * layout.units) == 0, f"{update.name}: {layout}"
    return "out" if by_row != update.transposed else "in", element // layout.run % layout.units


def combine(
    factors: Sequence[Factored | None], update: Update, layout: UnitLayout, solved: Solved
) -> Factored:
    """Return the merged update as [a_1 s_1 B_1, ...] [A_1; ...]; units of columns scale A instead.

    Args:
      factors: s B and A of each adapter; None for no update
      update: the tensor
      layout: layout of its merge units
      solved: solution of the unit
    """
    axis, unit_of = units_of_axis(update, layout)
    b, a = [], []
    for x, coefficient in zip(factors, solved.solution.coefficient, strict=True):
        if x is not None:
            scale = coefficient[unit_of]
            b.append(x.b if axis == "in" else x.b * scale[:, None])
            a.append(x.a * scale if axis == "in" else x.a)
    return Factored(np.concatenate(b, axis=1), np.concatenate(a, axis=0))


def truncate(product: Factored, rank: int) -> tuple[Factored, float]:
    """Return the best approximation of B A of a rank, and its relative Frobenius error.

    The singular values of B A are those of the small matrix R_B R_A^T of the QR decompositions of B
    and of A^T. Both factors of the result contain the square roots of the singular values.

    Args:
      product: B [out, r] and A [r, in]
      rank: rank of the result, at most min(r, out, in)

    Example:
      >>> diagonal = np.diag([4.0, 3.0])
      >>> cut, error = truncate(Factored(diagonal, np.eye(2)), 1)
      >>> (cut.b @ cut.a).round(6).tolist(), round(error, 6)
      ([[4.0, 0.0], [0.0, 0.0]], 0.6)
    """
    (q_b, r_b), (q_a, r_a) = np.linalg.qr(product.b), np.linalg.qr(product.a.T)
    u, s, v = np.linalg.svd(r_b @ r_a.T, full_matrices=False)
    norm = np.linalg.norm(s)
    error = float(np.linalg.norm(s[rank:]) / norm) if norm > 0 else 0.0
    root = np.sqrt(s[:rank])
    return Factored(q_b @ (u[:, :rank] * root), (root[:, None] * v[:rank]) @ q_a.T), error


def rounding_error(product: Factored, rounded: Factored) -> float:
    """Return the relative Frobenius error of a product whose factors were rounded.

    Example:
      >>> one = np.ones((1, 1))
      >>> rounding_error(Factored(one, one), Factored(one * 1.5, one))
      0.5
    """
    norm = _norm(product)
    if norm == 0:
        return 0.0
    # (b + x) (a + y) - b a = x (a + y) + b y, without the difference of nearly equal products.
    b, a = rounded.b - product.b, rounded.a
    if (a != product.a).any():
        b = np.concatenate([b, product.b], axis=1)
        a = np.concatenate([a, a - product.a], axis=0)
    return _norm(Factored(b, a)) / norm


def _norm(product: Factored) -> float:
    """Return the Frobenius norm of B A, the root of tr((B^T B) (A A^T))."""
    square = ((product.b.T @ product.b) * (product.a @ product.a.T)).sum()
    return math.sqrt(max(square, 0.0))


def _write_update(
    writer: ShardWriter, plan: AdapterPlan, update: Update, product: Factored, counter: ByteCounter
) -> Row:
    """Write the factors of a merged update; return the entries of its report row."""
    error = 0.0
    if update.rank < update.total_rank:
        product, error = truncate(product, update.rank)
    stored = []
    for name, values in ((update.b, product.b), (update.a, product.a)):
        array = to_stored(name, values.ravel(), update.code)
        writer.write(name, 0, array)
        counter.add(written=array.nbytes)
        stored.append(array.astype(np.float64).reshape(values.shape))
    return {
        "rank": update.rank,
        "dtype": str(DTYPES[update.code]),
        "total_rank": update.total_rank,
        "truncation_error": error,
        "rounding_error": rounding_error(product, Factored(*stored)),
    }


def to_stored(name: str, values: np.ndarray, code: str) -> np.ndarray:
    """Return values [n] in a stored dtype.

    Args:
      name: name of the tensor, for the error
      values: [n], float64
      code: dtype

    Raises:
      UserError: a value exceeds the range of the dtype

    Example:
      >>> to_stored("w", np.array([0.1]), "F32").dtype
      dtype('float32')
    """
    with np.errstate(over="ignore"):
        rounded = narrow(values, code, saturate=False)
    if first_non_finite(rounded) is not None:
        raise UserError(
            f"{name}: a merged value exceeds the range of {DTYPES[code]}; pass --dtype float32"
        )
    return rounded


# Below: tensors that the adapters store in full.


def _read_weights(
    plan: AdapterPlan, part: Replacement, start: int, stop: int, counter: ByteCounter
) -> np.ndarray:
    """Return elements of the base, if it is read, and of each adapter, [1 + N, n] float64."""
    weights = np.zeros((1 + len(plan.adapters), stop - start))
    if part.view is not None:
        base = plan.base.read(part.name, start, stop)
        plan.base.note(part.name, start, base)
        _check_finite(plan.base, -1, part.name, part.name, base)
        counter.add(read=base.nbytes)
        weights[:] = base
    for index, (source, stored) in enumerate(zip(plan.adapters, part.stored, strict=True)):
        if stored is not None:
            values = source.adapter.files.read(stored, start, stop)
            _check_finite(source, index, part.name, stored, values)
            counter.add(read=values.nbytes)
            weights[1 + index] = values
    return weights


def _add_products(
    plan: AdapterPlan,
    part: Replacement,
    layout: UnitLayout,
    counter: ByteCounter,
    total: np.ndarray,
) -> None:
    """Add the Gram matrix of the updates of a tensor that is stored in full to a sum."""
    for start, stop in layout.cut(PIECE):
        weights = _read_weights(plan, part, start, stop, counter)
        units = layout.touched(start, stop)[0]
        total[:, :, units] += products(weights[1:] - weights[0], layout, start, stop)


def _write_replacement(
    writer: ShardWriter,
    plan: AdapterPlan,
    part: Replacement,
    layout: UnitLayout,
    solved: Solved | None,
    counter: ByteCounter,
) -> None:
    """Write (1 - sum_i a_i) w0 + sum_i a_i w_i for a tensor that is stored in full."""
    count, number = math.prod(part.shape), len(plan.adapters)
    if solved is not None:
        factors, pieces = solved.solution.coefficient, layout.cut(PIECE)
    else:
        factors = mean_weights(plan)[:, None]
        layout = UnitLayout(1, count, count)
        pieces = layout.cut(PIECE)
    # A mean has no term of the base, not even one of the size of rounding errors.
    is_mean = plan.options.method in MEANS or solved is None
    rest = np.zeros(factors.shape[1]) if is_mean else 1.0 - factors.sum(axis=0)
    for start, stop in pieces:
        weights = _read_weights(plan, part, start, stop, counter)
        merged = weights[0] * layout.spread(rest, start, stop)
        for i in range(number):
            merged += weights[1 + i] * layout.spread(factors[i], start, stop)
        array = to_stored(part.target, merged, part.code)
        writer.write(part.target, start, array)
        counter.add(written=array.nbytes)


def mean_weights(plan: AdapterPlan) -> np.ndarray:
    """Return the weights of the adapters [N] in a mean without a base, with sum 1."""
    number = len(plan.adapters)
    if plan.options.method == "linear":
        return model_weights(plan.options, number)
    return np.full(number, 1 / number)


def _check_finite(source: Any, index: int, name: str, stored: str, values: np.ndarray) -> None:
    """Raise an error if values contain NaN or infinity."""
    if (offset := first_non_finite(values.reshape(-1))) is not None:
        raise NonFiniteError(
            f"{source.label}: tensor {stored!r} contains NaN or infinity, first at element "
            f"{offset}; correct the adapter, or pass --exclude {escaped(name)!r}",
            "pretrained" if index < 0 else index,
            name,
        )
