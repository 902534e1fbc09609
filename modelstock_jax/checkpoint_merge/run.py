"""Carries a plan out: reads, computes and writes at once, and goes on where it was killed."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path

from modelstock_jax.checkpoint_merge.chunks import Scratch
from modelstock_jax.checkpoint_merge.companions import copy_companions
from modelstock_jax.checkpoint_merge.copying import copy_tensor
from modelstock_jax.checkpoint_merge.decide import Planned
from modelstock_jax.checkpoint_merge.methods import solver
from modelstock_jax.checkpoint_merge.output import Output
from modelstock_jax.checkpoint_merge.plan import Plan
from modelstock_jax.checkpoint_merge.rows import Row, tensor_rows, totals
from modelstock_jax.checkpoint_merge.tally import Stopped, Tally
from modelstock_jax.checkpoint_merge.unit import Unit
from modelstock_jax.checkpoint_merge.workplace import OccupiedError, Workplace
from modelstock_jax.errors import UserError
from modelstock_jax.merging.rules import NonFiniteError

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Report:
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
    policies: dict[str, int]
    distance: dict[str, float | None]
    digests: dict[str, str]
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
    finish: Callable[[Path, Report], None] | None = None,
) -> Report:
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
    workplace = Workplace(plan, out, overwrite=overwrite)
    tally = Tally(plan.bytes_read + plan.bytes_written, progress)
    try:
        output = Output(plan, workplace, tally)
        try:
            _work(plan, tally, workplace.rows, output)
            if measured is not None:
                measured(workplace.path, _ordered(workplace.rows))
            output.close()
        except BaseException:
            output.abandon()
            raise
        copy_companions(plan.sources, plan.companions, workplace.path)
        report = _report(workplace.rows, tally, begin, workplace.digests, workplace.resumed)
        if finish is not None:
            finish(workplace.path, report)
        workplace.commit()
    except BaseException as error:
        spoilt = isinstance(error, NonFiniteError)
        workplace.leave(keep=not spoilt)
        again = isinstance(error, UserError) and not isinstance(error, OccupiedError)
        if again and workplace.digests and not spoilt:
            kept = "What is complete is kept; give the same command again."
            raise UserError(f"{error} {kept}") from None
        raise
    return report


def measure(plan: Plan, *, progress: Progress | None = None) -> Report:
    """The first pass alone: the rows of a report, nothing written.

    Args:
        plan: From `make_plan`.
        progress: As `run`'s.
    """
    begin = time.monotonic()
    tally = Tally(plan.bytes_read, progress)
    rows: dict[str, Row] = {}
    _work(plan, tally, rows, None)
    return _report(rows, tally, begin, {}, ())


def _work(plan: Plan, tally: Tally, rows: dict[str, Row], output: Output | None) -> None:
    """Every tensor in turn: units that fit the window side by side, larger ones by all workers."""
    threads, scratch = plan.options.num_threads, Scratch()
    jobs: list[Future] = []
    with ThreadPoolExecutor(threads, "merge") as pool:
        try:
            for members in _tasks(plan):
                if output is not None and not _left(plan, members, tally, output):
                    continue
                task = (plan, members, tally, scratch, rows, output)
                if _bytes(plan, members) <= plan.options.window_bytes // threads:
                    jobs.append(pool.submit(_merge, *task, None))
                    jobs[-1].add_done_callback(lambda job: _stop_if_failed(job, tally))
                else:
                    _merge(*task, pool)
                if tally.stopped.is_set():
                    raise Stopped
            for job in jobs:
                job.result()
        except BaseException:
            tally.stopped.set()
            pool.shutdown(cancel_futures=True)
            _raise_first(jobs)
            raise


def _merge(
    plan: Plan,
    members: list[Planned],
    tally: Tally,
    scratch: Scratch,
    rows: dict[str, Row],
    output: Output | None,
    pool: Executor | None,
) -> None:
    """Measures one unit, then writes its tensors; or copies a tensor that no rule merges."""
    if (part := members[0].part) is None:
        if output is not None:
            copy_tensor(plan, members[0], tally, output)
        return
    unit = Unit(plan, members, tally, scratch, pool)
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
            copy_tensor(plan, member, tally, output, start=unit.layouts[k].count)


def _left(plan: Plan, members: list[Planned], tally: Tally, output: Output) -> bool:
    """Whether any of a unit is still to be written; tells what an earlier start has done of it."""
    done = [m for m in members if not output.missing(m.name)]
    # The last pass alone is by member.
    passes = plan.passes if len(done) == len(members) else 1
    tally.skip(sum(passes * plan.bytes_in(m) + plan.bytes_copied(m) + m.num_bytes for m in done))
    return len(done) < len(members)


def _tasks(plan: Plan) -> Iterator[list[Planned]]:
    """Tensors unit by unit, in the order of the files."""
    units: dict[str, list[Planned]] = {}
    ordered = [plan.tensors[name] for names in plan.shards for name in names]
    for tensor in ordered:
        if tensor.part is not None:
            units.setdefault(tensor.part.key, []).append(tensor)
    for tensor in ordered:
        if tensor.part is None:
            yield [tensor]
        elif units[tensor.part.key][0] is tensor:
            yield units[tensor.part.key]


def _bytes(plan: Plan, members: list[Planned]) -> int:
    return sum(plan.bytes_in(member) for member in members)


def _stop_if_failed(job: Future, tally: Tally) -> None:
    if not job.cancelled() and job.exception() is not None:
        tally.stopped.set()


def _raise_first(jobs: list[Future]) -> None:
    """Raises what a worker raised, but not that it was told to stop."""
    for job in jobs:
        if job.done() and not job.cancelled() and (error := job.exception()) is not None:
            if not isinstance(error, Stopped):
                raise error


def _ordered(rows: dict[str, Row]) -> list[Row]:
    return [rows[name] for name in sorted(rows)]


def _report(rows, tally: Tally, begin: float, digests, resumed) -> Report:
    ordered = _ordered(rows)
    policies, distance = totals(ordered)
    return Report(
        rows=ordered, policies=policies, distance=distance, digests=dict(sorted(digests.items())),
        resumed=resumed, bytes_read=tally.read, bytes_written=tally.written,
        seconds=time.monotonic() - begin,
    )
