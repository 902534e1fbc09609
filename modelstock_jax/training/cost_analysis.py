"""Memory per device and traffic between devices, computed from compiled functions."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import numpy as np

from modelstock_jax.merging.trees import PyTree
from modelstock_jax.training.step_fns import StepFunctions


@dataclass(frozen=True)
class Memory:
    """Memory of one device, in bytes.

    Attributes:
      anchor: the pretrained parameters
      params: this device's part of the replicas' parameters
      opt_state: the optimizer state of these parameters
      merged: the last merged model, kept as the result of the run; 0 if the run never merges
      batch: images and labels of one step
      gradients: gradients of the replicas that run in parallel; included in `step_temporary`
      step_temporary: memory of a step in addition to its arguments: gradients, activations
      merge_temporary: memory of a merge in addition to its arguments and the merged model
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
        """Memory that is in use between steps."""
        return self.anchor + self.params + self.opt_state + self.merged

    @property
    def step(self) -> int:
        """Peak memory of a step. The next batch is transferred while it runs."""
        return self.total + 2 * self.batch + self.step_temporary

    @property
    def merge(self) -> int:
        """Peak memory of a merge, before the previous merged model is freed; 0 without merging."""
        return self.total + self.merged + self.merge_temporary if self.merged else 0

    @property
    def peak(self) -> int:
        """Peak memory of the run."""
        return max(self.step, self.merge)


def memory(
    step_functions: StepFunctions, compiled: dict[str, jax.stages.Compiled], batch: PyTree
) -> Memory:
    """Compute the memory of a run from the compiler's memory analysis of its functions.

    Temporary memory depends on the device that was compiled for: an analysis on a CPU is not valid
    for a GPU, for which the compiler selects other kernels.

    Args:
      step_functions: the functions of the run
      compiled: the result of `StepFunctions.lower`, compiled
      batch: shapes [R, B, ...] and dtypes
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
        step_temporary=temporary_bytes(compiled["step"]),
        merge_temporary=temporary_bytes(compiled["merge"]) - anchor if merges else 0,
    )


def device_bytes(tree: PyTree) -> int:
    """Return the bytes of arrays, or of shapes with shardings, on one device.

    Example:
      >>> device_bytes([jax.numpy.zeros((3, 5))])
      60
    """

    def leaf_bytes(x) -> int:
        shape = x.sharding.shard_shape(x.shape)
        return math.prod(shape) * x.dtype.itemsize

    return sum(map(leaf_bytes, jax.tree.leaves(tree)))


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """Return the bytes that a program needs besides its arguments: temporaries and new outputs."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise ValueError("this backend provides no memory analysis of a compiled function")
    new_outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return analysis.temp_size_in_bytes + max(new_outputs, 0)


# Collectives, parsed from the HLO of a compiled program.

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
    """One collective operation of a compiled program.

    Attributes:
      kind: one of `KINDS`
      shapes: (dtype, sizes) of each result on one device
      groups: int [groups, devices per group], the devices that communicate with each other
      times: number of executions, including loops
    """

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    groups: np.ndarray
    times: int

    @property
    def sent(self) -> int:
        """Bytes that one device sends in all executions, with ring algorithms.

        For a result of b bytes and a group of g devices, a device sends

            all-gather, all-to-all    (g - 1) / g b
            all-reduce                2 (g - 1) / g b
            reduce-scatter            (g - 1) b
            permute, broadcast        b

        It receives the same number of bytes.
        """
        size = sum(math.prod(sizes) * _itemsize(dtype) for dtype, sizes in self.shapes)
        devices = self.groups.shape[-1]
        factor = {
            "all-reduce": 2 * (devices - 1) / devices,
            "reduce-scatter": devices - 1,
            "collective-permute": 1,
            "collective-broadcast": 1,
        }
        return round(self.times * size * factor.get(self.kind, (devices - 1) / devices))

    def within(self, devices: int) -> bool:
        """Return whether every group is within one row of a mesh with `devices` devices per row."""
        rows = self.groups // devices
        return bool((rows == rows[:, :1]).all())


def sent_bytes(compiled: jax.stages.Compiled) -> Counter[str]:
    """Return the bytes that one device sends per execution, by kind of collective."""
    sent: Counter[str] = Counter()
    for collective in collectives(_text(compiled)):
        sent[collective.kind] += collective.sent
    return +sent


def sent_across(compiled: jax.stages.Compiled, devices: int) -> int:
    """Return the bytes that one device sends in collectives across mesh rows, i.e. replicas.

    Args:
      compiled: a compiled function
      devices: number of devices per row, those of one replica
    """
    return sum(c.sent for c in collectives(_text(compiled)) if not c.within(devices))


def collectives(hlo: str) -> list[Collective]:
    r"""Return all collectives in the HLO text of a compiled program, including loops and calls.

    Raises:
      ValueError: if the trip count of a loop with collectives is unknown

    Example:
      >>> line = "  ROOT %r = f32[2,12]{1,0} all-gather(%x), replica_groups=[2,4]<=[8]"
      >>> (gather,) = collectives("ENTRY %main (x: f32[2,3]) -> f32[2,12] {\n" + line)
      >>> gather.kind, gather.shapes, gather.groups.tolist(), gather.sent
      ('all-gather', (('f32', (2, 12)),), [[0, 1, 2, 3], [4, 5, 6, 7]], 72)
    """
    computations, entry = _computations(hlo)
    result = list(_walk(computations, entry, 1))
    if any(collective.times == 0 for collective in result):
        raise ValueError("a collective is in a loop of unknown length")
    return result


def _text(compiled: jax.stages.Compiled) -> str:
    text = compiled.as_text()
    if text is None:
        raise ValueError("this backend does not provide the HLO text of a compiled function")
    return text


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Return ({name of a computation: its lines}, name of the entry computation)."""
    computations, entry, lines = {}, "", []
    for line in hlo.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            lines = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        else:
            lines.append(line)
    return computations, entry


def _walk(computations: dict[str, list[str]], name: str, times: int) -> Iterator[Collective]:
    for line in computations.get(name, ()):
        kind = _KIND.search(line)
        if kind:
            yield Collective(kind[2], _results(kind), _groups(line, kind[2]), times)
            continue
        trips = _TRIPS.search(line)
        for role, names in _CALLED.findall(line):
            repeats = (int(trips[1]) if trips else 0) if role == "body" else 1
            for called in re.findall(r"[\w.\-]+", names):
                yield from _walk(computations, called, times * repeats)


def _results(kind: re.Match) -> tuple[tuple[str, tuple[int, ...]], ...]:
    shapes = [(dtype, tuple(_numbers(sizes))) for dtype, sizes in _SHAPE.findall(kind[1])]
    if kind[3] and kind[2] == "all-gather":  # -start returns (operands, results).
        shapes = shapes[len(shapes) // 2 :]
    elif kind[3] and kind[2] == "collective-permute":  # -start returns (operand, result, ...).
        shapes = shapes[1:2]
    return tuple(shapes)


def _groups(line: str, kind: str) -> np.ndarray:
    """Parse the device groups, in any of the formats of XLA."""
    if kind == "collective-permute":
        return _parse_list(line.partition("source_target_pairs=")[2])
    text = line.partition("replica_groups=")[2]
    mesh = re.match(r"mesh\[(.*?)\](?:, device_ids=\((.*?\)?)\))? \{(.*?)\}", text)
    if mesh:  # Mesh axes; the axes named in braces form a group.
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        names = list(sizes)
        inner = [names.index(name) for name in re.findall(r"'(\w+)'", mesh[3])]
        outer = [axis for axis in range(len(names)) if axis not in inner]
        count = math.prod(sizes.values())
        devices = (_iota(mesh[2]) if mesh[2] else np.arange(count)).reshape(list(sizes.values()))
        width = math.prod(devices.shape[axis] for axis in inner)
        return devices.transpose(outer + inner).reshape(-1, width)
    iota = re.match(r"\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text)
    return _iota(iota[2]).reshape(_numbers(iota[1])) if iota else _parse_list(text)


def _iota(text: str) -> np.ndarray:
    """Parse `[2,4]T(1,0)`: the numbers 0, 1, ... in this shape, transposed."""
    dims, _, order = text.partition("T")
    devices = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    return devices.transpose(_numbers(order)) if order else devices


def _parse_list(text: str) -> np.ndarray:
    """Parse `{{0,4},{1,5}}`."""
    return np.array([_numbers(group) for group in re.findall(r"[\d,]+", text.partition("}}")[0])
                     if group != ","])  # fmt: skip


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _itemsize(dtype: str) -> int:
    bits = re.search(r"\d+", dtype)
    return max(int(bits[0]) // 8, 1) if bits else 1  # pred uses one byte
