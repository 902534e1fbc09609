"""Execution of a plan: concurrent reading, computing and writing; an interrupted merge resumes."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from modelstock_jax.checkpoint_merge.auxiliary_files import copy_auxiliary_files
from modelstock_jax.checkpoint_merge.kernels import (
    FLOATS,
    PIECE,
    Scratch,
    check_finite,
    narrow,
    recode,
    widen,
)
from modelstock_jax.checkpoint_merge.methods import (
    Row,
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
from modelstock_jax.checkpoint_merge.unit import Unit
from modelstock_jax.errors import UserError
from modelstock_jax.merging.rules import NonFiniteError
from modelstock_jax.registry import COMMANDS
from modelstock_jax.tensor_files.reader import DTYPES

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class MergeResult:
    """Measurements and output files of a merge, as plain Python values.

    Attributes:
      rows: one row per merged tensor, sorted by name: `name, unit, shape, num_units, cosine` (None
        if undefined), `angle` (degrees or None), `ratio` (None if it has none), `norms` (one per
        fine-tune), `cosines` (of each pair of fine-tunes), `predicted_distance` (`replica,
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
    # The directions of a matrix need much memory: one unit at a time.
    window = 0 if COMMANDS[plan.options.method].of_matrices else plan.options.window_bytes
    jobs: list[Future] = []
    with ThreadPoolExecutor(threads, "merge") as pool:
        try:
            for members in _tasks(plan):
                if output is not None and not _is_missing(plan, members, counter, output):
                    continue
                task = (plan, members, counter, scratch, rows, output)
                if _bytes(plan, members) <= window // threads:
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
    is_done = len(done) == len(members)
    counter.skip(
        sum(
            (plan.passes(m) if is_done else 1) * plan.bytes_in(m)
            + plan.bytes_copied(m)
            + m.num_bytes
            for m in done
        )
    )
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
