"""A merge unit of files: its tensors in pieces, its Gram matrix, and its merged weights."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from typing import Any, NamedTuple

import numpy as np

from modelstock_jax.checkpoint_merge.anchor import is_coarser
from modelstock_jax.checkpoint_merge.elementwise import OfPiece, Place
from modelstock_jax.checkpoint_merge.kernels import (
    PIECE,
    Scratch,
    UnitLayout,
    check_finite,
    narrow,
    piece_length,
    products,
    recode,
    widen,
)
from modelstock_jax.checkpoint_merge.methods import Solved, coefficients, combine
from modelstock_jax.checkpoint_merge.output import ByteCounter
from modelstock_jax.checkpoint_merge.plan import Plan
from modelstock_jax.checkpoint_merge.singular_directions import len_rows
from modelstock_jax.checkpoint_merge.tensor_plan import TensorPlan
from modelstock_jax.merging import geometry
from modelstock_jax.merging.rules import NonFiniteError
from modelstock_jax.registry import COMMANDS
from modelstock_jax.tensor_files.reader import BITS

_PIECES_PER_JOB = 8
# Mean squares whose float32 products neither underflow nor overflow.
_SAFE = (1e-24, 1e30)
_MAX_FLOAT32 = float(np.finfo(np.float32).max)


class Piece(NamedTuple):
    """Elements [start, stop) of a unit's tensor.

    Attributes:
      member: index of the tensor in the unit
      start: first element
      stop: end
    """

    member: int
    start: int
    stop: int


class Unit:
    """Tensors that share one angle: a `methods.UnitReader` whose pieces can be merged.

    Args:
      plan: plan of the merge
      members: tensors of the unit
      counter: counts the bytes that are read
      scratch: arrays of this thread
      pool: workers for the pieces; None to use this thread and to cache computed values
    """

    def __init__(
        self,
        plan: Plan,
        members: Sequence[TensorPlan],
        counter: ByteCounter,
        scratch: Scratch,
        pool: Executor | None = None,
    ):
        self.plan, self.members, self.pool = plan, members, pool
        self._counter, self._scratch = counter, scratch
        self._sources, self._method = plan.sources, COMMANDS[plan.options.method]
        self._cache: dict[tuple[int, Piece], np.ndarray] = {}
        views = [member.unit_view for member in members if member.unit_view is not None]
        self.layouts = [UnitLayout.of(view) for view in views]
        self.dtypes = [self._dtype(*pair) for pair in zip(members, self.layouts, strict=True)]
        self.name, self.anchored = members[0].name, plan.anchored
        self.shape, self.layer = members[0].merged_shape, plan.layers.get(members[0].name)
        self.count = sum(layout.count for layout in self.layouts)
        self.per_unit = sum(view.count for view in views)
        self.is_scalar = np.full(self.layouts[0].units, self.per_unit < 2)

    def gram(self, *, with_base: bool = False) -> np.ndarray:
        """Return the Gram matrix of the task vectors, [N, N, K] float64.

        Args:
          with_base: add the base's weights as the first row and column, [N + 1, N + 1, K]

        Raises:
          NonFiniteError: a model contains NaN or infinity; names the model and the tensor
        """
        first = 0 if with_base else 1
        total = self._sum_products(first, self.dtypes)
        if any(dtype == np.float32 for dtype in self.dtypes):
            mean = geometry.squared_norms(total) / self.per_unit
            if not ((mean > _SAFE[0]) & (mean < _SAFE[1])).all():
                total = self._sum_products(first, [np.float64] * len(self.members))
        squares = geometry.squared_norms(total)
        wide = any(self._code(m, i) == "F64" for m in self.members for i in range(len(m.names)))
        if not (np.isfinite(squares) & (wide | (squares < _MAX_FLOAT32))).all():
            self._raise_non_finite()
        return total

    def energy(self) -> np.ndarray:
        """Return the expected squared rounding error of the base, [K].

        It is 0 if the base is not stored at lower precision than the fine-tunes.
        """
        total = np.zeros(self.layouts[0].units)

        def piece_energy(piece: Piece) -> np.ndarray:
            name, layout = self.members[piece.member].name_in(0), self.layouts[piece.member]
            squares = self._sources[0].half_ulp_squares(name, piece.start, piece.stop)
            return products(np.sqrt(squares / 3.0)[None], layout, piece.start, piece.stop)[0, 0]

        coarse = [
            k for k, member in enumerate(self.members) if is_coarser(self._sources, member.names)
        ]
        pieces = self.pieces(coarse)
        for piece, values in zip(pieces, self.map_pieces(piece_energy, pieces), strict=True):
            total[self.layouts[piece.member].touched(piece.start, piece.stop)[0]] += values
        return total

    def reduce(self, function: OfPiece) -> np.ndarray:
        """Return the sum of function(w0 [n], task vectors [N, n], place) over the pieces."""
        apply = functools.partial(self._apply, function)
        return functools.reduce(np.add, self.map_pieces(apply, self.pieces()))

    def each_piece(self, function: OfPiece) -> Iterator[Any]:
        """Yield function(w0 [n], task vectors [N, n], place) of one piece after the other."""
        return map(functools.partial(self._apply, function), self.pieces())

    def _apply(self, function: OfPiece, piece: Piece) -> Any:
        vectors = self._vectors(self._raw(piece), np.float64)
        return function(vectors[0], vectors[1:], self._place(piece))

    def merge(self, solved: Solved, piece: Piece) -> np.ndarray:
        """Return the merged weights of a piece as stored values.

        They are valid until the next call in this thread.

        Args:
          solved: solution of the unit
          piece: the piece
        """
        member, layout = self.members[piece.member], self.layouts[piece.member]
        solution, code, raw = solved.solution, member.code, self._raw(piece)
        if layout.units == 1 and solution.keep_anchor[0]:
            return recode(raw[0], code)
        if layout.units == 1 and solution.copy_replica.any():
            return recode(raw[1 + int(solution.copy_replica[:, 0].argmax())], code)
        if solved.combination is not None:
            vectors = self._vectors(raw, np.float64)
            merged = solved.combination(vectors[0], vectors[1:], self._place(piece))
        else:
            merged = self._combine(raw, solved, piece)
        saturate = self._may_overflow(member)
        merged = narrow(merged, code, saturate=saturate, allocate=self._scratch.take)
        if layout.units > 1:
            for values, mask in zip(
                raw, (solution.keep_anchor, *solution.copy_replica), strict=True
            ):
                if mask.any():
                    is_copied = layout.spread(mask, piece.start, piece.stop)
                    merged = np.where(is_copied, recode(values, code), merged)
        return merged

    def pieces(self, members: Sequence[int] | None = None) -> list[Piece]:
        """Return the pieces of some members, or of all, in order."""
        indices = range(len(self.members)) if members is None else members
        return [
            Piece(k, *cut)
            for k in indices
            for cut in self.layouts[k].cut(self._length(k), self._row(k))
        ]

    def map_pieces(
        self, function: Callable[[Piece], Any], pieces: Sequence[Piece]
    ) -> Iterator[Any]:
        """Call a function with every piece; yield the results in the order of the pieces."""
        if self.pool is None:
            yield from map(function, pieces)
            return
        groups = (pieces[a : a + _PIECES_PER_JOB] for a in range(0, len(pieces), _PIECES_PER_JOB))
        jobs: deque = deque()
        for group in groups:
            jobs.append(self.pool.submit(lambda group=group: [function(p) for p in group]))
            if len(jobs) > 4 * self.plan.options.num_threads:
                yield from jobs.popleft().result()
        while jobs:
            yield from jobs.popleft().result()

    def _combine(self, raw: Sequence[np.ndarray], solved: Solved, piece: Piece) -> np.ndarray:
        dtype = self._output_dtype(piece.member)
        # In float32, sums of 16-bit weights are far more precise than the weights themselves, so
        # their differences are not needed.
        of_weights = dtype == np.float32
        vectors = self._vectors(raw, dtype, deltas=not of_weights)
        factors = coefficients(solved, of_weights=of_weights)
        return combine(vectors, factors, self.layouts[piece.member], piece.start)

    def _output_dtype(self, member: int) -> type:
        """Return float32 for 16-bit weights, whose rounding is far coarser; otherwise float64."""
        bits = max(self._bits(self.members[member]), BITS[self.members[member].code])
        return np.float32 if bits <= 16 and self.dtypes[member] == np.float32 else np.float64

    def _sum_products(self, first: int, dtypes: Sequence[type]) -> np.ndarray:
        number = len(self._sources) - first
        total = np.zeros((number, number, self.layouts[0].units))

        def piece_products(piece: Piece) -> np.ndarray:
            vectors = self._vectors(self._raw(piece), dtypes[piece.member])[first:]
            # A non-finite weight makes its products non-finite; its position is found afterwards.
            with np.errstate(over="ignore", invalid="ignore"):
                return products(vectors, self.layouts[piece.member], piece.start, piece.stop)

        pieces = self.pieces()
        with np.errstate(over="ignore", invalid="ignore"):
            for piece, values in zip(pieces, self.map_pieces(piece_products, pieces), strict=True):
                touched = self.layouts[piece.member].touched(piece.start, piece.stop)[0]
                total[:, :, touched] += values
        return total

    def _vectors(
        self, raw: Sequence[np.ndarray], dtype: type, *, deltas: bool = True
    ) -> np.ndarray:
        """Return the base's weights, and task vectors or weights, [1 + N, n], in scratch memory."""
        size = len(raw) * len(raw[0])
        vectors = self._scratch.take("vectors", size, dtype).reshape(len(raw), -1)
        with np.errstate(over="ignore", invalid="ignore"):
            for values, vector in zip(raw, vectors, strict=True):
                widen(values, vector)
            if deltas:
                vectors[1:] -= vectors[0]
        return vectors

    def _raw(self, piece: Piece) -> list[np.ndarray]:
        """Return the stored values of each model, in scratch memory.

        A second pass reads them again. Reading from the system's cache into memory that is in the
        processor's cache is as fast as keeping them, and needs no additional memory.
        """
        member = self.members[piece.member]
        raw = [
            self._read(model, member.name_in(model), piece) for model in range(len(self._sources))
        ]
        self._counter.add(read=sum(values.nbytes for values in raw))
        return raw

    def _read(self, model: int, name: str, piece: Piece) -> np.ndarray:
        if (cached := self._cache.get((model, piece))) is not None:
            return cached
        source = self._sources[model]
        size = (piece.stop - piece.start) * BITS[source.tensors[name].code] // 8
        buffer = self._scratch.take(f"read {model}", size, np.uint8)
        values = source.read(name, piece.start, piece.stop, buffer)
        source.note(name, piece.start, values)
        if self.pool is None and name in source.formed:
            self._cache[model, piece] = values
        return values

    def _length(self, k: int) -> int:
        # Elementwise methods compute in float64 for weights of any dtype.
        bits = 64 if self._method.elementwise else self._bits(self.members[k])
        return piece_length(len(self._sources), bits)

    def _row(self, k: int) -> int:
        """Return the number of elements that a piece of a tensor must have complete rows of."""
        shape = self.members[k].merged_shape
        if self._method.of_matrices:
            return max(len_rows(shape)[1], 1)
        return shape[-1] if self._method.by_row and shape else 1

    def _place(self, piece: Piece) -> Place:
        return Place(self.members[piece.member].name, piece.start, self._row(piece.member))

    def _code(self, member: TensorPlan, model: int) -> str:
        return self._sources[model].tensors[member.name_in(model)].code

    def _bits(self, member: TensorPlan) -> int:
        return max(BITS[self._code(member, i)] for i in range(len(member.names)))

    def _dtype(self, member: TensorPlan, layout: UnitLayout) -> type:
        """Return the dtype of the products: float32 if it is precise enough, otherwise float64.

        Float32 represents 16-bit weights exactly, and rounds their differences once. It rounds
        differences of float32 weights by 2^-24 of the difference, which over many elements is
        precise enough for an angle. The angle between weights is small.
        """
        max_bits = 16 if layout.count < PIECE else 32
        is_precise = self._bits(member) <= max_bits and not self._method.of_weights
        return np.float32 if is_precise else np.float64

    def _may_overflow(self, member: TensorPlan) -> bool:
        codes = {self._code(member, i) for i in range(len(member.names))}
        return not self._method.convex or codes != {member.code}

    def _raise_non_finite(self) -> None:
        for piece in self.pieces():
            raw = self._raw(piece)
            for model, values in enumerate(raw):
                label, member = self._sources[model].label, self.members[piece.member]
                check_finite(label, model, member, values, piece.start)
        name = self.members[0].name
        raise NonFiniteError(
            f"{name}: an update is too large for float32; exclude the tensor with --exclude",
            "finetuned",
            name,
        )
