"""Execution of a plan: concurrent reading, computing and writing; an interrupted merge resumes."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from modelstock_jax.checkpoint_merge.anchor import is_coarser
from modelstock_jax.checkpoint_merge.auxiliary_files import copy_auxiliary_files
from modelstock_jax.checkpoint_merge.kernels import (
    FLOATS,
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
from modelstock_jax.checkpoint_merge.methods import (
    Row,
    Solved,
    coefficients,
    combine,
    solver,
    tensor_rows,
    totals,
)
from modelstock_jax.checkpoint_merge.output import (
    ByteCounter,
    MergeStopped,
    OccupiedError,
    Output,
    StagingDir,
)
from modelstock_jax.checkpoint_merge.plan import Plan
from modelstock_jax.checkpoint_merge.tensor_plan import TensorPlan
from modelstock_jax.errors import UserError
from modelstock_jax.merging import geometry
from modelstock_jax.merging.rules import NonFiniteError
from modelstock_jax.registry import COMMANDS
from modelstock_jax.tensor_files.reader import BITS, DTYPES

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class MergeResult:
    """Measurements and output files of a merge, as plain Python values.

    Attributes:
      rows: one row per merged tensor, sorted by name: `name, unit, shape, num_units, cosine` (None
        if undefined), `angle` (degrees or None), `ratio` (None for TIES and slerp), `norms` (one
        per fine-tune), `cosines` (of each pair of fine-tunes), `predicted_distance` (`replica,
        mean, merged`; None if unknown), `outcome, outcomes` (name -> number of units). With the
        units filter and head they are means over units, and root-sum-squares of norms and distances
      outcomes: outcome -> number of units in the entire model
      distance: predicted distances of the entire model to the center, root-sum-squares; None if no
        unit has one
      checksums: file name -> checksum (`crc32:...`) of each output file of tensors
      resumed: output files that an earlier, interrupted merge had written
      bytes_read: bytes that were read
      bytes_written: bytes of tensors that were written
      seconds: wall time
    """

    rows: list[Row]
    outcomes: dict[str, int]
    distance: dict[str, float | None]
    checksums: dict[str, str]
    resumed: tuple[str, ...]
    bytes_read: int
    bytes_written: int
    seconds: float


def run(
    plan: Plan,
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    measured: Callable[[Path, list[Row]], None] | None = None,
    finish: Callable[[Path, MergeResult], None] | None = None,
) -> MergeResult:
    """Write the merged checkpoint to `out`: the complete directory, or nothing.

    Tensors are written to a staging directory next to `out`. Its name follows from the plan: if the
    merge is interrupted and run again, it reuses the files that are complete. Config and tokenizer
    files (`plan.auxiliary_files`) are copied to the same directory.

    Args:
      plan: plan from `make_plan`
      out: directory to create
      overwrite: replace an existing directory
      progress: called with bytes done and total bytes, reads and writes together
      measured: called with the staging directory and the report rows as soon as they are known,
        while the last files are still being flushed to disk
      finish: called with the complete staging directory and the result, before the directory is
        renamed to `out`; it can write the report, the model card and figures

    Raises:
      UserError: `out` is an input, contains one, is inside one, or exists; the disk is too full;
        a model contains NaN or infinity (then nothing is left on disk)
    """
    begin = time.monotonic()
    staging = StagingDir(plan, out, overwrite=overwrite)
    counter = ByteCounter(plan.bytes_read + plan.bytes_written, progress)
    try:
        output = Output(plan, staging, counter)
        try:
            _merge_all(plan, counter, staging.rows, output)
            if measured is not None:
                measured(staging.path, _ordered(staging.rows))
            output.close()
        except BaseException:
            output.abandon()
            raise
        copy_auxiliary_files(plan.sources, plan.auxiliary_files, staging.path)
        result = _result(staging.rows, counter, begin, staging.checksums, staging.resumed)
        if finish is not None:
            finish(staging.path, result)
        staging.commit()
    except BaseException as error:
        is_non_finite = isinstance(error, NonFiniteError)
        staging.leave(keep=not is_non_finite)
        can_resume = isinstance(error, UserError) and not isinstance(error, OccupiedError)
        if can_resume and staging.checksums and not is_non_finite:
            problem = str(error).rstrip(".")
            raise UserError(
                f"{problem}; complete files are kept, run the same command again to resume"
            ) from None
        raise
    return result


def measure(plan: Plan, *, progress: Progress | None = None) -> MergeResult:
    """Run only the first pass of a merge: return the report rows, write nothing.

    Args:
      plan: plan from `make_plan`
      progress: see `run`
    """
    begin = time.monotonic()
    counter = ByteCounter(plan.bytes_read, progress)
    rows: dict[str, Row] = {}
    _merge_all(plan, counter, rows, None)
    return _result(rows, counter, begin, {}, ())


def _merge_all(
    plan: Plan, counter: ByteCounter, rows: dict[str, Row], output: Output | None
) -> None:
    """Merge all tensors: one worker per unit if units fit the window, else all workers per unit."""
    threads, scratch = plan.options.num_threads, Scratch()
    jobs: list[Future] = []
    with ThreadPoolExecutor(threads, "merge") as pool:
        try:
            for members in _tasks(plan):
                if output is not None and not _is_missing(plan, members, counter, output):
                    continue
                task = (plan, members, counter, scratch, rows, output)
                if _bytes(plan, members) <= plan.options.window_bytes // threads:
                    jobs.append(pool.submit(_merge, *task, None))
                    jobs[-1].add_done_callback(lambda job: _stop_if_failed(job, counter))
                else:
                    _merge(*task, pool)
                if counter.stopped.is_set():
                    raise MergeStopped
            for job in jobs:
                job.result()
        except BaseException:
            counter.stopped.set()
            pool.shutdown(cancel_futures=True)
            _raise_first(jobs)
            raise


def _merge(
    plan: Plan,
    members: list[TensorPlan],
    counter: ByteCounter,
    scratch: Scratch,
    rows: dict[str, Row],
    output: Output | None,
    pool: Executor | None,
) -> None:
    """Measure one unit and write its tensors, or copy a tensor that is not merged."""
    if (view := members[0].unit_view) is None:
        if output is not None:
            copy_tensor(plan, members[0], counter, output)
        return
    unit = Unit(plan, members, counter, scratch, pool)
    solved = solver(plan.options, len(plan.finetuned))(unit)
    rows.update(tensor_rows(view.key, members, solved, anchored=plan.anchored))
    if output is None:
        return
    for k, member in enumerate(members):
        if output.missing(member.name):
            for _ in unit.map_pieces(
                lambda piece, member=member: output.write(
                    member.name, piece.start, unit.merge(solved, piece)
                ),
                unit.pieces([k]),
            ):
                pass
            copy_tensor(plan, member, counter, output, start=unit.layouts[k].count)


def _is_missing(
    plan: Plan, members: list[TensorPlan], counter: ByteCounter, output: Output
) -> bool:
    """Return whether a tensor of a unit must still be written; count the bytes of the others."""
    done = [m for m in members if not output.missing(m.name)]
    # If some members are missing, the unit is measured again: only the last pass is per member.
    passes = plan.passes if len(done) == len(members) else 1
    counter.skip(sum(passes * plan.bytes_in(m) + plan.bytes_copied(m) + m.num_bytes for m in done))
    return len(done) < len(members)


def _tasks(plan: Plan) -> Iterator[list[TensorPlan]]:
    """Yield the tensors of each unit, in the order of the files."""
    units: dict[str, list[TensorPlan]] = {}
    ordered = [plan.tensors[name] for names in plan.shards for name in names]
    for tensor in ordered:
        if tensor.unit_view is not None:
            units.setdefault(tensor.unit_view.key, []).append(tensor)
    for tensor in ordered:
        if tensor.unit_view is None:
            yield [tensor]
        elif units[tensor.unit_view.key][0] is tensor:
            yield units[tensor.unit_view.key]


def _bytes(plan: Plan, members: list[TensorPlan]) -> int:
    return sum(plan.bytes_in(member) for member in members)


def _stop_if_failed(job: Future, counter: ByteCounter) -> None:
    if not job.cancelled() and job.exception() is not None:
        counter.stopped.set()


def _raise_first(jobs: list[Future]) -> None:
    """Raise the first error of a worker, except `MergeStopped`."""
    for job in jobs:
        if job.done() and not job.cancelled() and (error := job.exception()) is not None:
            if not isinstance(error, MergeStopped):
                raise error


def _ordered(rows: dict[str, Row]) -> list[Row]:
    return [rows[name] for name in sorted(rows)]


def _result(
    rows: dict[str, Row],
    counter: ByteCounter,
    begin: float,
    checksums: Mapping[str, str],
    resumed: tuple[str, ...],
) -> MergeResult:
    ordered = _ordered(rows)
    outcomes, distance = totals(ordered)
    return MergeResult(
        rows=ordered,
        outcomes=outcomes,
        distance=distance,
        checksums=dict(sorted(checksums.items())),
        resumed=resumed,
        bytes_read=counter.read,
        bytes_written=counter.written,
        seconds=time.monotonic() - begin,
    )


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
        self._sources = plan.sources
        self._cache: dict[tuple[int, Piece], np.ndarray] = {}
        views = [member.unit_view for member in members if member.unit_view is not None]
        self.layouts = [UnitLayout.of(view) for view in views]
        self.dtypes = [self._dtype(*pair) for pair in zip(members, self.layouts, strict=True)]
        self.name = members[0].name
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

    def reduce(self, function: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
        """Return the sum of function(w0 [n], deltas [N, n]) over the pieces, in float64."""

        def apply(piece: Piece) -> np.ndarray:
            vectors = self._vectors(self._raw(piece), np.float64)
            return function(vectors[0], vectors[1:])

        return functools.reduce(np.add, self.map_pieces(apply, self.pieces()))

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
        if solved.trim is not None:
            vectors = self._vectors(raw, np.float64)
            merged = vectors[0] + solved.trim.merge(vectors[1:])
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
        return [Piece(k, *cut) for k in indices for cut in self.layouts[k].cut(self._length(k))]

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
        # TIES computes in float64 for weights of any dtype.
        bits = 64 if self.plan.options.method == "ties" else self._bits(self.members[k])
        return piece_length(len(self._sources), bits)

    def _code(self, member: TensorPlan, model: int) -> str:
        return self._sources[model].tensors[member.name_in(model)].code

    def _bits(self, member: TensorPlan) -> int:
        return max(BITS[self._code(member, i)] for i in range(len(member.names)))

    def _dtype(self, member: TensorPlan, layout: UnitLayout) -> type:
        """Return the dtype of the products: float32 if it is precise enough, otherwise float64.

        Float32 represents 16-bit weights exactly, and rounds their differences once. It rounds
        differences of float32 weights by 2^-24 of the difference, which over many elements is
        precise enough for an angle. Slerp uses the angle between the weights, which is small.
        """
        max_bits = 16 if layout.count < PIECE else 32
        is_precise = self._bits(member) <= max_bits and self.plan.options.method != "slerp"
        return np.float32 if is_precise else np.float64

    def _may_overflow(self, member: TensorPlan) -> bool:
        codes = {self._code(member, i) for i in range(len(member.names))}
        return not COMMANDS[self.plan.options.method].convex or codes != {member.code}

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


def copy_tensor(
    plan: Plan, tensor: TensorPlan, counter: ByteCounter, output: Output, *, start: int = 0
) -> None:
    """Write the elements of a tensor that are not merged: those of one model, or a plain mean.

    Args:
      plan: plan of the merge
      tensor: the tensor
      counter: counts the bytes that are read
      output: output of the merge; the tensor is marked as complete
      start: first element that is not merged

    Raises:
      NonFiniteError: the model that supplies the elements contains NaN or infinity
    """
    count = math.prod(tensor.shape)
    models = tensor.models(len(plan.finetuned))
    for begin in range(start, count, PIECE):
        stop = min(begin + PIECE, count)
        arrays = [_read(plan, tensor, model, begin, stop, counter) for model in models]
        output.write(tensor.name, begin, _mean(arrays, tensor.code))
    output.complete(tensor.name)


def _read(
    plan: Plan, tensor: TensorPlan, model: int, start: int, stop: int, counter: ByteCounter
) -> np.ndarray:
    source = plan.sources[model]
    name = tensor.name_in(model)
    values = source.read(name, start, stop)
    source.note(name, start, values)
    counter.add(read=values.nbytes)
    if tensor.checked and source.tensors[name].code in FLOATS:
        check_finite(source.label, model, tensor, values, start)
    return values


def _mean(arrays: list[np.ndarray], code: str) -> np.ndarray:
    if len(arrays) == 1:
        # A counter may be an integer in one model and a float in another.
        return recode(arrays[0], code) if code in FLOATS else arrays[0].astype(DTYPES[code])
    total, wide = np.zeros(len(arrays[0])), np.empty(len(arrays[0]))
    for array in arrays:
        widen(array, wide)
        total += wide
    total /= len(arrays)
    return narrow(total, code)
