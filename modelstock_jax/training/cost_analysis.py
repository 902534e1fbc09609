"""What a run takes on one device and what devices send, from the compiled programs alone."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import numpy as np

from modelstock_jax.merging.gram import PyTree
from modelstock_jax.training.step_fns import StepFunctions


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      anchor: the pretrained weights.
      params: the weights of the replicas that this device holds.
      opt_state: the optimizer's moments of them.
      merged: the last merged model, kept for the run's result; 0 where replicas never merge.
      batch: a step's images and labels.
      gradients: of the replicas that run side by side; a part of `step_temporary`.
      step_temporary: what a step needs beside its arguments: gradients, activations.
      merge_temporary: what a merge needs beside its arguments and the merged model.
    """

    anchor: int
    params: int
    opt_state: int
    merged: int
    batch: int
    gradients: int
    step_temporary: int
    merge_temporary: int

    @property
    def total(self) -> int:
        """What stays from step to step."""
        return self.anchor + self.params + self.opt_state + self.merged

    @property
    def step(self) -> int:
        """The most during a step: the next batch arrives while it runs."""
        return self.total + 2 * self.batch + self.step_temporary

    @property
    def merge(self) -> int:
        """The most during a merge, before the merged model of the last one is let go."""
        return self.total + self.merged + self.merge_temporary if self.merged else 0

    @property
    def peak(self) -> int:
        """The larger of the two."""
        return max(self.step, self.merge)


def memory(
    step_functions: StepFunctions, compiled: dict[str, jax.stages.Compiled], batch: PyTree
) -> Memory:
    """Reads the compiler's own account of the step and the merge.

    Temporary memory is the compiler's for the device it compiled for: an analysis made on a CPU
    is the CPU's, where other kernels are chosen than on a GPU.

    Args:
      programs: of the run.
      compiled: what `Programs.lower` gives, compiled.
      batch: shapes [R, B, ...] and dtypes.
    """
    state = step_functions.abstract_state
    anchor, params = device_bytes(step_functions.abstract_anchor), device_bytes(state.params)
    merges = "merge" in compiled
    return Memory(
        anchor=anchor,
        params=params,
        opt_state=device_bytes(state.opt_state),
        merged=anchor if merges else 0,
        batch=device_bytes(batch),
        gradients=anchor if step_functions.replica_mode == "map" else params,
        step_temporary=extra_bytes(compiled["step"]),
        merge_temporary=extra_bytes(compiled["merge"]) - anchor if merges else 0,
    )


def device_bytes(tree: PyTree) -> int:
    """Bytes of a tree of placed shapes, or of arrays, on one device.

    >>> device_bytes([jax.numpy.zeros((3, 5))])
    60
    """

    def one(x) -> int:
        shape = x.sharding.shard_shape(x.shape)
        return math.prod(shape) * x.dtype.itemsize

    return sum(map(one, jax.tree.leaves(tree)))


def extra_bytes(compiled: jax.stages.Compiled) -> int:
    """What a program needs beside its arguments: temporaries, and outputs apart from them."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise ValueError("this backend gives no account of a program's memory")
    fresh = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return analysis.temp_size_in_bytes + max(fresh, 0)


# What devices send one another in a compiled program, read from its HLO.


KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
)
_KIND = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_SHAPE = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\]")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_CALLED = re.compile(r"\b(body|calls|to_apply|[a-z_]*computations?)=(\{[^}]*\}|%?[\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    Attributes:
      kind: of `KINDS`.
      shapes: (dtype, sizes) of each of its results, on one device.
      groups: int [groups, devices a group], the devices that take part in it together.
      times: how often it runs, loops counted.
    """

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    groups: np.ndarray
    times: int

    @property
    def sent(self) -> int:
        """Bytes that one device sends, all runs together, where each goes around a ring.

        Of a result of b bytes and a group of g devices: (g - 1) / g b by an all-gather or an
        all-to-all, twice that by an all-reduce, (g - 1) b by a reduce-scatter, b by a permutation
        or a broadcast. A device receives as many.
        """
        size = sum(math.prod(sizes) * _itemsize(dtype) for dtype, sizes in self.shapes)
        devices = self.groups.shape[-1]
        share = {
            "all-reduce": 2 * (devices - 1) / devices,
            "reduce-scatter": devices - 1,
            "collective-permute": 1,
            "collective-broadcast": 1,
        }
        return round(self.times * size * share.get(self.kind, (devices - 1) / devices))

    def within(self, devices: int) -> bool:
        """Whether each group stays in one row of a mesh with rows of `devices` devices."""
        rows = self.groups // devices
        return bool((rows == rows[:, :1]).all())


def sent_bytes(compiled: jax.stages.Compiled) -> Counter[str]:
    """Bytes that a device sends in one run of a program, by kind of collective."""
    sent: Counter[str] = Counter()
    for collective in collectives(_text(compiled)):
        sent[collective.kind] += collective.sent
    return +sent


def sent_across(compiled: jax.stages.Compiled, devices: int) -> int:
    """Bytes that a device sends in collectives that join several rows of a mesh: replicas.

    Args:
      compiled: a program.
      devices: in a row, those of one replica.
    """
    found = collectives(_text(compiled))
    return sum(collective.sent for collective in found if not collective.within(devices))


def collectives(hlo: str) -> list[Collective]:
    r"""Every collective of a compiled program's text, those in loops and calls included.

    >>> line = "  ROOT %r = f32[2,12]{1,0} all-gather(%x), replica_groups=[2,4]<=[8]"
    >>> (found,) = collectives("ENTRY %main (x: f32[2,3]) -> f32[2,12] {\n" + line)
    >>> found.kind, found.shapes, found.groups.tolist(), found.sent
    ('all-gather', (('f32', (2, 12)),), [[0, 1, 2, 3], [4, 5, 6, 7]], 72)

    Raises:
      ValueError: where a loop that communicates has no length that the compiler knows.
    """
    bodies, entry = _computations(hlo)
    found = list(_walk(bodies, entry, 1))
    if any(collective.times == 0 for collective in found):
        raise ValueError("a collective lies in a loop of unknown length")
    return found


def _text(compiled: jax.stages.Compiled) -> str:
    text = compiled.as_text()
    if text is None:
        raise ValueError("this backend does not show the text of a compiled program")
    return text


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Lines of each computation by its name, and the entry's name."""
    bodies, entry, lines = {}, "", []
    for line in hlo.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            lines = bodies.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        else:
            lines.append(line)
    return bodies, entry


def _walk(bodies: dict[str, list[str]], name: str, times: int) -> Iterator[Collective]:
    for line in bodies.get(name, ()):
        kind = _KIND.search(line)
        if kind:
            yield Collective(kind[2], _results(kind), _groups(line, kind[2]), times)
            continue
        trips = _TRIPS.search(line)
        for role, names in _CALLED.findall(line):
            again = (int(trips[1]) if trips else 0) if role == "body" else 1
            for called in re.findall(r"[\w.\-]+", names):
                yield from _walk(bodies, called, times * again)


def _results(kind: re.Match) -> tuple[tuple[str, tuple[int, ...]], ...]:
    shapes = [(dtype, tuple(_numbers(sizes))) for dtype, sizes in _SHAPE.findall(kind[1])]
    if kind[3] and kind[2] == "all-gather":  # Started: (operands, results).
        shapes = shapes[len(shapes) // 2 :]
    elif kind[3] and kind[2] == "collective-permute":  # Started: (operand, result, ...).
        shapes = shapes[1:2]
    return tuple(shapes)


def _groups(line: str, kind: str) -> np.ndarray:
    """The groups of devices, in any of the forms in which XLA writes them."""
    if kind == "collective-permute":
        return _listed(line.partition("source_target_pairs=")[2])
    text = line.partition("replica_groups=")[2]
    mesh = re.match(r"mesh\[(.*?)\](?:, device_ids=\((.*?\)?)\))? \{(.*?)\}", text)
    if mesh:  # Axes of a mesh of devices: those named in the end form a group.
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        names = list(sizes)
        inner = [names.index(name) for name in re.findall(r"'(\w+)'", mesh[3])]
        outer = [axis for axis in range(len(names)) if axis not in inner]
        count = math.prod(sizes.values())
        devices = (_iota(mesh[2]) if mesh[2] else np.arange(count)).reshape(list(sizes.values()))
        width = math.prod(devices.shape[axis] for axis in inner)
        return devices.transpose(outer + inner).reshape(-1, width)
    iota = re.match(r"\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text)
    return _iota(iota[2]).reshape(_numbers(iota[1])) if iota else _listed(text)


def _iota(text: str) -> np.ndarray:
    """`[2,4]T(1,0)`: the numbers 0, 1, ... in that shape, transposed."""
    dims, _, order = text.partition("T")
    devices = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    return devices.transpose(_numbers(order)) if order else devices


def _listed(text: str) -> np.ndarray:
    """`{{0,4},{1,5}}`."""
    return np.array([_numbers(group) for group in re.findall(r"[\d,]+", text.partition("}}")[0])
                     if group != ","])  # fmt: skip


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _itemsize(dtype: str) -> int:
    bits = re.search(r"\d+", dtype)
    return max(int(bits[0]) // 8, 1) if bits else 1  # pred is a byte
