"""What devices send one another in a compiled program, read from its HLO."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import numpy as np

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
