"""Carries a plan out: reads, computes and writes at once, and goes on where it was killed."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
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
    narrow,
    piece_length,
    products,
    recode,
    refuse_non_finite,
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
    """What a merge measured and wrote; plain Python values throughout.

    Attributes:
        rows: One a tensor that was merged, by name: ``name, unit, shape, num_units, cosine`` (None
            where undefined), ``angle`` (degrees or None), ``ratio`` (None for TIES and slerp),
            ``norms`` (one a fine-tune),
            ``cosines`` (of each two fine-tunes), ``predicted_distance`` (``replica, mean,
            merged``; None where unknown), ``policy, policies`` (name -> number of units). Under
            filter and head, means over units and root-sum-squares of norms and distances.
        policies: Name of a policy -> units that met it, in the whole model.
        distance: Predicted distances from the center of the whole model, root-sum-squares; None
            where no unit has one.
        digests: File name -> digest (`crc32:...`) of each output file of tensors.
        resumed: Output files that an earlier, killed merge had written.
        bytes_read: Bytes that were read.
        bytes_written: Bytes of tensors that were written.
        seconds: Wall time.
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
    """Writes the merged checkpoint to `out`: whole, or not at all.

    Tensors go to a directory beside `out`, whose name follows from the plan: the same command,
    killed and given again, keeps the files that are complete. Config and tokenizer files of
    ``plan.companions`` are copied next to them.

    Args:
        plan: From `make_plan`.
        out: The directory to make.
        overwrite: Replace an existing one.
        progress: Called with bytes done and bytes in all, read and written together.
        measured: Called with the directory and the report's rows as soon as these are known, while
            the last files are still flushed to the disk.
        finish: Called with the finished directory, before it takes its name, and the report: the
            place to write report, card and pictures.

    Raises:
        UserError: `out` is, holds or lies in an input, or exists; no room on the disk;
            NaN or infinity in a model (nothing is left behind).
    """
    begin = time.monotonic()
    staging = StagingDir(plan, out, overwrite=overwrite)
    counter = ByteCounter(plan.bytes_read + plan.bytes_written, progress)
    try:
        output = Output(plan, staging, counter)
        try:
            _work(plan, counter, staging.rows, output)
            if measured is not None:
                measured(staging.path, _ordered(staging.rows))
            output.close()
        except BaseException:
            output.abandon()
            raise
        copy_auxiliary_files(plan.sources, plan.auxiliary_files, staging.path)
        report = _report(staging.rows, counter, begin, staging.checksums, staging.resumed)
        if finish is not None:
            finish(staging.path, report)
        staging.commit()
    except BaseException as error:
        spoilt = isinstance(error, NonFiniteError)
        staging.leave(keep=not spoilt)
        again = isinstance(error, UserError) and not isinstance(error, OccupiedError)
        if again and staging.checksums and not spoilt:
            kept = "What is complete is kept; give the same command again."
            raise UserError(f"{error} {kept}") from None
        raise
    return report


def measure(plan: Plan, *, progress: Progress | None = None) -> MergeResult:
    """The first pass alone: the rows of a report, nothing written.

    Args:
        plan: From `make_plan`.
        progress: As `run`'s.
    """
    begin = time.monotonic()
    counter = ByteCounter(plan.bytes_read, progress)
    rows: dict[str, Row] = {}
    _work(plan, counter, rows, None)
    return _report(rows, counter, begin, {}, ())


def _work(plan: Plan, counter: ByteCounter, rows: dict[str, Row], output: Output | None) -> None:
    """Every tensor in turn: units that fit the window side by side, larger ones by all workers."""
    threads, scratch = plan.options.num_threads, Scratch()
    jobs: list[Future] = []
    with ThreadPoolExecutor(threads, "merge") as pool:
        try:
            for members in _tasks(plan):
                if output is not None and not _left(plan, members, counter, output):
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
    """Measures one unit, then writes its tensors; or copies a tensor that no rule merges."""
    if (part := members[0].unit_view) is None:
        if output is not None:
            copy_tensor(plan, members[0], counter, output)
        return
    unit = Unit(plan, members, counter, scratch, pool)
    solved = solver(plan.options, len(plan.finetuned))(unit)
    rows.update(tensor_rows(part.key, members, solved, anchored=plan.anchored))
    if output is None:
        return
    for k, member in enumerate(members):
        if output.missing(member.name):
            for _ in unit.each(
                lambda piece, member=member: output.write(
                    member.name, piece.start, unit.merge(solved, piece)
                ),
                unit.pieces([k]),
            ):
                pass
            copy_tensor(plan, member, counter, output, start=unit.layouts[k].count)


def _left(plan: Plan, members: list[TensorPlan], counter: ByteCounter, output: Output) -> bool:
    """Whether any of a unit is still to be written; tells what an earlier start has done of it."""
    done = [m for m in members if not output.missing(m.name)]
    # The last pass alone is by member.
    passes = plan.passes if len(done) == len(members) else 1
    counter.skip(sum(passes * plan.bytes_in(m) + plan.bytes_copied(m) + m.num_bytes for m in done))
    return len(done) < len(members)


def _tasks(plan: Plan) -> Iterator[list[TensorPlan]]:
    """Tensors unit by unit, in the order of the files."""
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
    """Raises what a worker raised, but not that it was told to stop."""
    for job in jobs:
        if job.done() and not job.cancelled() and (error := job.exception()) is not None:
            if not isinstance(error, MergeStopped):
                raise error


def _ordered(rows: dict[str, Row]) -> list[Row]:
    return [rows[name] for name in sorted(rows)]


def _report(rows, counter: ByteCounter, begin: float, digests, resumed) -> MergeResult:
    ordered = _ordered(rows)
    policies, distance = totals(ordered)
    return MergeResult(
        rows=ordered,
        outcomes=policies,
        distance=distance,
        checksums=dict(sorted(digests.items())),
        resumed=resumed,
        bytes_read=counter.read,
        bytes_written=counter.written,
        seconds=time.monotonic() - begin,
    )


# One merge unit: its tensors read piece by piece, measured, then merged.

_SPAN = 8  # pieces that a worker takes at once
# Mean squares whose float32 products neither vanish nor overflow.
_SAFE = (1e-24, 1e30)
_LARGEST = float(np.finfo(np.float32).max)


class Piece(NamedTuple):
    """Elements [start, stop) of the unit's k-th tensor."""

    member: int
    start: int
    stop: int


class Unit:
    """The tensors that share angles; `methods` measures it, `pieces` of it are merged in turn.

    Args:
        plan: Of the merge.
        members: The unit's tensors.
        counter: Counts what is read.
        scratch: Arrays of this thread.
        pool: Workers for the pieces; None to do them here and keep what is formed.
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
        self._tally, self._scratch = counter, scratch
        self._sources = (plan.base, *plan.finetuned)
        self._formed: dict[tuple[int, Piece], np.ndarray] = {}
        parts = [member.unit_view for member in members if member.unit_view is not None]
        self.layouts = [UnitLayout.of(part) for part in parts]
        self.dtypes = [self._dtype(*pair) for pair in zip(members, self.layouts, strict=True)]
        self.name = members[0].name
        self.count = sum(layout.count for layout in self.layouts)
        self.per_unit = sum(part.count for part in parts)
        self.is_scalar = np.full(self.layouts[0].units, self.per_unit < 2)

    def gram(self, *, with_base: bool = False) -> np.ndarray:
        """Gram matrix of the task vectors, [N, N, K] float64.

        Args:
            with_base: The base's own weights are a first row, [N + 1, N + 1, K].

        Raises:
            NonFiniteError: NaN or infinity in a model; it names both model and tensor.
        """
        first = 0 if with_base else 1
        total = self._sum_products(first, self.dtypes)
        if any(dtype == np.float32 for dtype in self.dtypes):
            mean = geometry.squared_norms(total) / self.per_unit
            if not ((mean > _SAFE[0]) & (mean < _SAFE[1])).all():
                total = self._sum_products(first, [np.float64] * len(self.members))
        squares = geometry.squared_norms(total)
        wide = any(self._code(m, i) == "F64" for m in self.members for i in range(len(m.names)))
        if not (np.isfinite(squares) & (wide | (squares < _LARGEST))).all():
            self._refuse_non_finite()
        return total

    def energy(self) -> np.ndarray:
        """Expected squared rounding error of the base, [K]; 0 where it is not stored coarser."""
        total = np.zeros(self.layouts[0].units)

        def one(piece: Piece) -> np.ndarray:
            name, layout = self.members[piece.member].name_in(0), self.layouts[piece.member]
            squares = self._sources[0].half_ulp_squares(name, piece.start, piece.stop)
            return products(np.sqrt(squares / 3.0)[None], layout, piece.start, piece.stop)[0, 0]

        coarse = [
            k for k, member in enumerate(self.members) if is_coarser(self._sources, member.names)
        ]
        pieces = self.pieces(coarse)
        for piece, part in zip(pieces, self.each(one, pieces), strict=True):
            total[self.layouts[piece.member].touched(piece.start, piece.stop)[0]] += part
        return total

    def reduce(self, function: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
        """Sum over the pieces of function(w0 [n], deltas [N, n])."""

        def one(piece: Piece) -> np.ndarray:
            vectors = self._vectors(self._raw(piece), self._output_dtype(piece.member))
            return function(vectors[0], vectors[1:])

        return functools.reduce(np.add, self.each(one, self.pieces()))

    def merge(self, solved: Solved, piece: Piece) -> np.ndarray:
        """Merged weights of a piece, as they are written; valid until this thread's next call."""
        member, layout = self.members[piece.member], self.layouts[piece.member]
        solution, code, raw = solved.solution, member.code, self._raw(piece)
        if layout.units == 1 and solution.keep_anchor[0]:
            return recode(raw[0], code)
        if layout.units == 1 and solution.copy_replica.any():
            return recode(raw[1 + int(solution.copy_replica[:, 0].argmax())], code)
        if solved.trim is not None:
            vectors = self._vectors(raw, self._output_dtype(piece.member))
            merged = vectors[0] + solved.trim.merge(vectors[1:])
        else:
            merged = self._combine(raw, solved, piece)
        merged = narrow(merged, code, saturate=self._may_overflow(member), room=self._scratch.take)
        if layout.units > 1:
            for values, mask in zip(
                raw, (solution.keep_anchor, *solution.copy_replica), strict=True
            ):
                if mask.any():
                    chosen = layout.spread(mask, piece.start, piece.stop)
                    merged = np.where(chosen, recode(values, code), merged)
        return merged

    def pieces(self, members: Sequence[int] | None = None) -> list[Piece]:
        """All pieces, or those of some members, in order."""
        wanted = range(len(self.members)) if members is None else members
        return [Piece(k, *cut) for k in wanted for cut in self.layouts[k].cut(self._length(k))]

    def each(self, function: Callable[[Piece], Any], pieces: Sequence[Piece]) -> Iterator[Any]:
        """Calls a function with every piece and yields its results in the pieces' order."""
        if self.pool is None:
            yield from map(function, pieces)
            return
        spans = (pieces[a : a + _SPAN] for a in range(0, len(pieces), _SPAN))
        waiting: deque = deque()
        for span in spans:
            waiting.append(self.pool.submit(lambda span=span: [function(p) for p in span]))
            if len(waiting) > 4 * self.plan.options.num_threads:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()

    def _combine(self, raw: Sequence[np.ndarray], solved: Solved, piece: Piece) -> np.ndarray:
        dtype = self._output_dtype(piece.member)
        # Of 16-bit numbers float32 holds sums of weights far beyond their own rounding, so their
        # differences need not be formed again.
        of_weights = dtype == np.float32
        vectors = self._vectors(raw, dtype, deltas=not of_weights)
        factors = coefficients(solved, of_weights=of_weights)
        return combine(vectors, factors, self.layouts[piece.member], piece.start)

    def _output_dtype(self, member: int) -> type:
        """Float32 holds 16-bit weights and sums of them far beyond their rounding; else 64."""
        bits = max(self._bits(self.members[member]), BITS[self.members[member].code])
        return np.float32 if bits <= 16 and self.dtypes[member] == np.float32 else np.float64

    def _sum_products(self, first: int, dtypes: Sequence[type]) -> np.ndarray:
        number = len(self._sources) - first
        total = np.zeros((number, number, self.layouts[0].units))

        def one(piece: Piece) -> np.ndarray:
            vectors = self._vectors(self._raw(piece), dtypes[piece.member])[first:]
            # What is not finite is found by its products, and named afterwards.
            with np.errstate(over="ignore", invalid="ignore"):
                return products(vectors, self.layouts[piece.member], piece.start, piece.stop)

        pieces = self.pieces()
        with np.errstate(over="ignore", invalid="ignore"):
            for piece, part in zip(pieces, self.each(one, pieces), strict=True):
                touched = self.layouts[piece.member].touched(piece.start, piece.stop)[0]
                total[:, :, touched] += part
        return total

    def _vectors(
        self, raw: Sequence[np.ndarray], dtype: type, *, deltas: bool = True
    ) -> np.ndarray:
        """The base's weights, and task vectors or weights, [1 + N, n], in this thread's scratch."""
        size = len(raw) * len(raw[0])
        vectors = self._scratch.take("vectors", size, dtype).reshape(len(raw), -1)
        with np.errstate(over="ignore", invalid="ignore"):
            for values, vector in zip(raw, vectors, strict=True):
                widen(values, vector)
            if deltas:
                vectors[1:] -= vectors[0]
        return vectors

    def _raw(self, piece: Piece) -> list[np.ndarray]:
        """The stored numbers of each model, in this thread's scratch.

        A second pass reads them again: from the system's cache into memory that the processor's
        own holds costs no more than to keep them, and takes none.
        """
        member = self.members[piece.member]
        raw = [
            self._read(model, member.name_in(model), piece) for model in range(len(self._sources))
        ]
        self._tally.add(read=sum(values.nbytes for values in raw))
        return raw

    def _read(self, model: int, name: str, piece: Piece) -> np.ndarray:
        if (kept := self._formed.get((model, piece))) is not None:
            return kept
        source = self._sources[model]
        size = (piece.stop - piece.start) * BITS[source.tensors[name].code] // 8
        room = self._scratch.take(f"read {model}", size, np.uint8)
        values = source.read(name, piece.start, piece.stop, room)
        source.note(name, piece.start, values)
        if self.pool is None and name in source.formed:
            self._formed[model, piece] = values
        return values

    def _length(self, k: int) -> int:
        return piece_length(len(self._sources), self._bits(self.members[k]))

    def _code(self, member: TensorPlan, model: int) -> str:
        return self._sources[model].tensors[member.name_in(model)].code

    def _bits(self, member: TensorPlan) -> int:
        return max(BITS[self._code(member, i)] for i in range(len(member.names)))

    def _dtype(self, member: TensorPlan, layout: UnitLayout) -> type:
        """Float32 holds 16-bit weights and the float32 rounding of their differences.

        Differences of float32 weights it rounds by 2^-24 of themselves: over many, enough for an
        angle. Slerp takes the angle of the weights, which is small.
        """
        most = 16 if layout.count < PIECE else 32
        narrow_enough = self._bits(member) <= most and self.plan.options.method != "slerp"
        return np.float32 if narrow_enough else np.float64

    def _may_overflow(self, member: TensorPlan) -> bool:
        codes = {self._code(member, i) for i in range(len(member.names))}
        return not COMMANDS[self.plan.options.method].convex or codes != {member.code}

    def _refuse_non_finite(self) -> None:
        for piece in self.pieces():
            raw = self._raw(piece)
            for model, values in enumerate(raw):
                refuse_non_finite(
                    self._sources[model].label,
                    model,
                    self.members[piece.member],
                    values,
                    piece.start,
                )
        name = self.members[0].name
        raise NonFiniteError(
            f"{name}: a movement too large for float32; leave it out with --exclude",
            "finetuned",
            name,
        )


# Tensors, and rows of them, that no rule merges: taken from one model, or the plain mean.


def copy_tensor(
    plan: Plan, tensor: TensorPlan, counter: ByteCounter, output: Output, *, start: int = 0
) -> None:
    """Writes what is left of a tensor from element `start` on, and says that it is complete.

    Raises:
        NonFiniteError: NaN or infinity in the model that it is taken from.
    """
    count = math.prod(tensor.shape)
    models = tensor.models(len(plan.finetuned))
    for begin in range(start, count, PIECE):
        stop = min(begin + PIECE, count)
        parts = [_read(plan, tensor, model, begin, stop, counter) for model in models]
        output.write(tensor.name, begin, _mean(parts, tensor.code))
    output.complete(tensor.name)


def _read(
    plan: Plan, tensor: TensorPlan, model: int, start: int, stop: int, counter: ByteCounter
) -> np.ndarray:
    source = (plan.base, *plan.finetuned)[model]
    name = tensor.name_in(model)
    values = source.read(name, start, stop)
    source.note(name, start, values)
    counter.add(read=values.nbytes)
    if tensor.checked and source.tensors[name].code in FLOATS:
        refuse_non_finite(source.label, model, tensor, values, start)
    return values


def _mean(parts: list[np.ndarray], code: str) -> np.ndarray:
    if len(parts) == 1:
        # A counter may be an integer in one model and a float in another.
        return recode(parts[0], code) if code in FLOATS else parts[0].astype(DTYPES[code])
    total, wide = np.zeros(len(parts[0])), np.empty(len(parts[0]))
    for part in parts:
        widen(part, wide)
        total += wide
    total /= len(parts)
    return narrow(total, code)
