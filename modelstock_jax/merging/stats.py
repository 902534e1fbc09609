"""Measures of a merge: `Stats`, its reports and its checks.

A merge returns its measures as a few rows, with one entry per merge unit, and not as one array per
tensor: a compiled merge of 1,000 tensors has eight outputs instead of 10,000.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from modelstock_jax.errors import UserError
from modelstock_jax.merging import geometry
from modelstock_jax.merging.placement import on_this_host
from modelstock_jax.merging.rules import NonFiniteError, UnitOutcome, unit_row
from modelstock_jax.merging.summaries import has_values
from modelstock_jax.merging.trees import PyTree, shortened

# Maximum number of replicas in a summary.
_MAX_REPLICAS = 8


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class TensorUnits:
    """The merge units of one tensor, and where the rows of `Stats` have them.

    Attributes:
      name: name of the tensor
      key: name of its merge unit
      shape: shape of the unit
      row: index of the rows; None for a tensor that a merge copies
      start: first entry in the rows of units; tensors of one unit have the same
      tensor_start: first entry in `Rows.finite`, where every tensor has its own
    """

    name: str
    key: str
    shape: tuple[int, ...] = ()
    row: int | None = None
    start: int = 0
    tensor_start: int = 0

    @property
    def size(self) -> int:
        """Number of units of the tensor."""
        return math.prod(self.shape)

    def take(self, row: Any, *, by_tensor: bool = False) -> Any:
        """Return the tensor's entries of a row: [..., U] -> [..., *unit shape]."""
        start = self.tensor_start if by_tensor else self.start
        return row[..., start : start + self.size].reshape((*row.shape[:-1], *self.shape))


class UnitTable(NamedTuple):
    """Names of the tensors and of their merge units, in the order of the tree's leaves.

    Attributes:
      unit: one of `units.UNITS`, or the name of a function
      names: name of each tensor
      keys: name of the merge unit of each tensor
      num_joined: number of units of several tensors; 0 if `unit` found nothing to join
    """

    unit: str
    names: tuple[str, ...]
    keys: tuple[str, ...]
    num_joined: int


class Rows(NamedTuple):
    """Measures of the merge units of one dtype, one entry per unit on the last axis.

    Attributes:
      cosine: [U]
      ratio: [U]
      norm: [N, U]
      distance: `Distances`, each [U]
      outcome: [U] int8
      finite: [N, T] bool, one entry per tensor and unit
    """

    cosine: Any
    ratio: Any
    norm: Any
    distance: geometry.Distances
    outcome: Any
    finite: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Stats:
    """Measures of a merge.

    The properties are pytrees with the structure of `pretrained`. A leaf has the shape of the
    tensor's units: `()`; `[F]`, the output channels, under `filter`; `[H]`, the heads, under
    `head`. Tensors that share a unit have the same values. The dtype is float32 (float64 for
    float64 weights) unless noted. Under `vmap` with `out_axes=0`, all leaves have its leading axis.

    | property | leaves |
    |---|---|
    | `cosine` | mean pairwise cosine, or COSINE_UNDEFINED (2.0) |
    | `ratio` | t, from 0 (the anchor) to 1 (the mean); the sum of the a_i |
    | `norm` | norm of d_i of each replica, [N, ...] |
    | `predicted_distance` | from the center, or DISTANCE_UNDEFINED (-1.0): `Distances` of trees |
    | `outcome` | int8 codes of `UnitOutcome` |
    | `finite` | whether the tensor itself, not its unit, is finite, [N, ...] bool |

    Attributes:
      rows: the arrays, as compiled functions return them
      tensors: names and units, a tree of `TensorUnits`; static, no arrays
      unit: one of `units.UNITS`, or the name of a function
      num_replicas: N
    """

    rows: tuple[Rows, ...]
    tensors: PyTree
    unit: str = dataclasses.field(metadata={"static": True})
    num_replicas: int = dataclasses.field(metadata={"static": True})

    @property
    def cosine(self) -> PyTree:
        """Mean pairwise cosine; COSINE_UNDEFINED if fewer than two replicas changed."""
        return self._tree("cosine")

    @property
    def ratio(self) -> PyTree:
        """Ratio t, the sum of the a_i."""
        return self._tree("ratio")

    @property
    def norm(self) -> PyTree:
        """Norm of each task vector, [N, ...]."""
        return self._tree("norm")

    @property
    def predicted_distance(self) -> geometry.Distances:
        """Predicted distances from the center; DISTANCE_UNDEFINED if unknown."""
        return geometry.Distances(
            self._tree("distance.replica"),
            self._tree("distance.mean"),
            self._tree("distance.merged"),
        )

    @property
    def outcome(self) -> PyTree:
        """Codes of `UnitOutcome`, int8."""
        return self._tree("outcome")

    @property
    def finite(self) -> PyTree:
        """Whether each replica's tensor is finite, [N, ...] bool."""
        return self._tree("finite")

    @property
    def units(self) -> UnitTable:
        """Names of the tensors and of their merge units."""
        tensors = self.tensor_units()
        keys = tuple(t.key for t in tensors)
        num_joined = sum(number > 1 for number in collections.Counter(keys).values())
        return UnitTable(self.unit, tuple(t.name for t in tensors), keys, num_joined)

    def tensor_units(self) -> list[TensorUnits]:
        """Return the units of each tensor, in the order of the tree's leaves."""
        return jax.tree.leaves(self.tensors, is_leaf=_is_tensor_units)

    def _tree(self, name: str) -> PyTree:
        """Return a tree of the entries of each tensor in one column of the rows.

        Concrete leaves are kept: a loop over the names of a model reads a property once per name.
        """
        kept = self.__dict__.setdefault("_kept", {})
        if name not in kept:
            treedef = jax.tree.structure(self.tensors, is_leaf=_is_tensor_units)
            if _has_shapes_only(self):  # from `jax.eval_shape`
                leaves = jax.eval_shape(lambda stats: stats._column_leaves(name), self)
            else:
                leaves = self._column_leaves(name)
            if not on_this_host(leaves):
                return treedef.unflatten(leaves)
            kept[name] = treedef, leaves
        treedef, leaves = kept[name]
        return treedef.unflatten(leaves)

    def _column_leaves(self, name: str) -> list:
        column, by_tensor = operator.attrgetter(name), name == "finite"
        leading = self.leading_axes()
        columns = [column(rows) for rows in self.rows]
        concrete = on_this_host(columns)
        if concrete:
            columns = jax.device_get(columns)  # slicing on the host compiles nothing
        copied = column(_copied_rows(self.num_replicas))
        copied = np.broadcast_to(copied, leading + copied.shape)
        leaves = [
            t.take(copied if t.row is None else columns[t.row], by_tensor=by_tensor)
            for t in self.tensor_units()
        ]
        return jax.device_put(leaves) if concrete else [jnp.asarray(x) for x in leaves]

    def __repr__(self) -> str:
        names = self.units.names
        replicas, tensors = self.num_replicas, len(names)
        head = f"Stats of {replicas} replica{'s' * (replicas != 1)}, "
        head += f"{tensors} tensor{'s' * (tensors != 1)}, unit {self.unit!r}"
        if not has_values(self.rows):
            return f"{head} (no values)"
        try:
            return "\n  ".join([head, *_summary(self)])
        except UserError as error:  # several merges, or arrays of other shapes
            return f"{head} ({error})"

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_kept"}

    def leading_axes(self) -> tuple[int, ...]:
        """Return the axes before those of a single merge, for example of `vmap`; usually ().

        Raises:
          UserError: arrays that are not those of merges along leading axes
        """
        leading = self.rows[0].cosine.shape[:-1] if self.rows else ()
        last = collections.defaultdict(lambda: (0, 0))
        for t in self.tensor_units():
            if t.row is not None:
                ends = t.start + t.size, t.tensor_start + t.size
                last[t.row] = tuple(map(max, last[t.row], ends))
        for k, row in enumerate(self.rows):
            num_units, num_tensor_units = last[k]
            one, every = (num_units,), (self.num_replicas, num_units)
            finite = (self.num_replicas, num_tensor_units)
            expected = Rows(one, one, every, geometry.Distances(one, one, one), one, finite)
            expected = jax.tree.map(lambda s: leading + s, expected, is_leaf=_is_shape)
            if jax.tree.map(lambda x: tuple(x.shape), row) != expected:
                raise UserError(
                    "the arrays of these statistics do not have the shapes of a merge; after vmap, "
                    "out_axes must be 0, and jax.tree.map(lambda x: x[i], stats) takes one merge"
                )
        return leading


def _summary(stats: Stats) -> list[str]:
    """Return lines with the measures over all units."""
    tensors, counts = _leaf_stats(stats), outcome_counts(stats)
    units = {leaf.key: leaf for leaf in tensors}.values()
    lines = [f"units: {sum(counts.values())} ({', '.join(f'{n} {k}' for k, n in counts.items())})"]
    cosine, ratio, outcome = (
        np.concatenate([np.ravel(getattr(leaf, name)) for leaf in units])
        for name in ("cosine", "ratio", "outcome")
    )
    measured = ~np.isin(outcome, (UnitOutcome.COPIED, UnitOutcome.UNCHANGED))
    for name, values in (
        ("cosine", cosine[cosine != geometry.COSINE_UNDEFINED]),
        ("ratio", ratio[measured]),  # others have the ratio 0, although nothing was merged
    ):
        if values.size:
            text = f"mean {values.mean():.3f}, from {values.min():.3f} to {values.max():.3f}"
            lines.append(f"{name}: {text}")
    lengths = np.sqrt(sum(np.sum(np.square(leaf.norm, dtype=np.float64).reshape(
        len(leaf.norm), -1), axis=1) for leaf in units))  # fmt: skip
    shown = [f"{length:.4g}" for length in lengths[:_MAX_REPLICAS]]
    more = f" and {len(lengths) - _MAX_REPLICAS} more" * (len(lengths) > _MAX_REPLICAS)
    lines.append(f"L2 norm of the task vectors: {', '.join(shown)}{more}")
    if not all(leaf.finite.all() for leaf in tensors):
        lines.append("not finite: call check_finite(stats)")
    lines.append("report(stats) has one row per tensor")
    return lines


def _is_tensor_units(node: Any) -> bool:
    return isinstance(node, TensorUnits)


def _has_shapes_only(stats: Stats) -> bool:
    return any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(stats))


def _is_shape(node: Any) -> bool:
    return type(node) is tuple


def report(stats: Stats) -> list[dict[str, Any]]:
    """Return one row per tensor for tables and JSON: plain Python values, None if undefined.

    Under `filter` and `head` a row has the means over its units of cosine, angle (degrees) and
    ratio, and root-sum-squares of norms; `outcomes` counts the units. Means of cosine and angle
    leave out the units whose cosine is undefined.

    Raises:
      UserError: statistics of several merges, from `vmap`, or a call under `jit`

    Example:
      >>> from modelstock_jax.merging import model_stock
      >>> w0, w = np.zeros(2, np.float32), np.array([[1, 0], [1, 1]], np.float32)
      >>> row, = report(model_stock({"w": w0}, {"w": w})[1])
      >>> row["name"], row["outcome"], round(row["angle"], 3), round(row["ratio"], 3)
      ('w', 'interpolated', 45.0, 0.828)
    """
    return [
        unit_row(leaf.name, leaf.key, leaf.cosine, leaf.ratio, leaf.norm, leaf.outcome)
        for leaf in _leaf_stats(stats)
    ]


def total_distance(stats: Stats) -> geometry.Distances:
    """Return the predicted distances of the complete model from the center.

    These are root-sum-squares over units. Each unit counts once, even if several tensors share it.
    Units whose distance is unknown (one replica changed, copied tensors) are left out.

    Returns:
      `Distances` of Python floats, in the units of the weights; None if it is unknown in every
      unit that changed.

    Raises:
      UserError: statistics of several merges, from `vmap`, or a call under `jit`

    Example:
      >>> from modelstock_jax.merging import model_stock
      >>> w0, w = np.zeros(2, np.float32), np.array([[1, 0], [1, 1]], np.float32)
      >>> round(total_distance(model_stock({"w": w0}, {"w": w})[1]).mean, 3)
      0.469
    """
    unit_stats = {leaf.key: leaf for leaf in _leaf_stats(stats)}.values()

    def total(distances):
        arrays = [np.asarray(d, np.float64).ravel() for d in distances]
        known = [d[d != geometry.DISTANCE_UNDEFINED] for d in arrays]
        num_units, num_known = (sum(d.size for d in group) for group in (arrays, known))
        # Units that no replica changed have a distance of 0, which is no prediction for the others.
        if not num_known or (num_known < num_units and not any(d.any() for d in known)):
            return None
        # Summed unit by unit: the last bits of results depend on this order.
        return float(np.sqrt(sum(np.sum(d[d > 0] ** 2) for d in known)))

    return geometry.Distances(*(total(leaf.distance[k] for leaf in unit_stats) for k in range(3)))


def outcome_counts(stats: Stats) -> dict[str, int]:
    """Return the number of units per outcome, {name in lower case: count}, without zeros.

    Raises:
      UserError: statistics of several merges, from `vmap`, or a call under `jit`

    Example:
      >>> from modelstock_jax.merging import model_stock
      >>> outcome_counts(model_stock({"w": np.zeros(2)}, {"w": np.zeros((2, 2))})[1])
      {'unchanged': 1}
    """
    counts = collections.Counter()
    for leaf in {leaf.key: leaf for leaf in _leaf_stats(stats)}.values():
        counts.update(UnitOutcome(int(code)).name.lower() for code in leaf.outcome.flat)
    return dict(counts)


def check_finite(stats: Stats, pretrained: PyTree = None) -> None:
    """Raise an error if weights were not finite. Call this after a jitted merge.

    A merge outside jit calls it automatically.

    Args:
      stats: statistics of the merge
      pretrained: the anchor, to distinguish a non-finite anchor from non-finite replicas; optional

    Raises:
      NonFiniteError: the message names the replica, counted from 0, and the tensor
      UserError: statistics of several merges, from `vmap`, or a call under `jit`
    """
    anchors = jax.tree.leaves(pretrained)
    for index, leaf in enumerate(_leaf_stats(stats)):
        finite = leaf.finite.reshape(len(leaf.finite), -1).all(axis=1)
        if finite.all():
            continue
        anchor = anchors[index] if anchors else None
        if not finite.any() and (anchor is None or not bool(jnp.isfinite(anchor).all())):
            replica = "pretrained"
            who = "pretrained" if anchor is not None else "pretrained, or every replica"
        else:
            replica = int(np.argmin(finite))
            who = f"replica {replica} (counted from 0)"
        raise NonFiniteError(
            f"{who}: tensor {shortened(leaf.name)!r} contains NaN or infinity, or an update too "
            "large for float32; repair the tensor or leave it out",
            replica,
            leaf.name,
        )


class _LeafStats(NamedTuple):
    name: str
    key: str
    cosine: np.ndarray
    ratio: np.ndarray
    norm: np.ndarray
    distance: tuple[np.ndarray, ...]
    outcome: np.ndarray
    finite: np.ndarray


def _leaf_stats(stats: Stats) -> list[_LeafStats]:
    if _has_shapes_only(stats) or any(
        isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(stats)
    ):
        raise UserError(
            "reports and checks of statistics need their values, which a compiled function has "
            "only after it ran; return the statistics from it, and call this outside"
        )
    leading = stats.leading_axes()
    if leading:
        raise UserError(
            f"these are the statistics of several merges, of leading axes {leading} (from vmap); "
            "pass one of them: jax.tree.map(lambda x: x[i], stats)"
        )
    rows = jax.device_get(stats.rows)
    copied = _copied_rows(stats.num_replicas)
    found = []
    for t in stats.tensor_units():
        row = copied if t.row is None else rows[t.row]
        found.append(
            _LeafStats(
                name=t.name,
                key=t.key,
                cosine=t.take(row.cosine),
                ratio=t.take(row.ratio),
                norm=t.take(row.norm),
                distance=tuple(t.take(d) for d in row.distance),
                outcome=t.take(row.outcome),
                finite=t.take(row.finite, by_tensor=True),
            )
        )
    return found


def _copied_rows(num_replicas: int) -> Rows:
    """Return the measures of a tensor that a merge copies, as rows of one unit."""
    undefined = np.full(1, geometry.DISTANCE_UNDEFINED, np.float32)
    return Rows(
        cosine=np.full(1, geometry.COSINE_UNDEFINED, np.float32),
        ratio=np.zeros(1, np.float32),
        norm=np.zeros((num_replicas, 1), np.float32),
        distance=geometry.Distances(undefined, undefined, undefined),
        outcome=np.full(1, UnitOutcome.COPIED, np.int8),
        finite=np.ones((num_replicas, 1), bool),
    )


def _dump_tensor_units(value: TensorUnits) -> bytes:
    return json.dumps(dataclasses.astuple(value)).encode()


def _load_tensor_units(data: bytes) -> TensorUnits:
    name, key, shape, *rest = json.loads(data)
    return TensorUnits(name, key, tuple(shape), *rest)


# So that `jax.export` can serialize functions that return `Stats`.
export.register_pytree_node_serialization(
    Stats,
    serialized_name="modelstock_jax.Stats",
    serialize_auxdata=lambda data: json.dumps(data).encode(),
    deserialize_auxdata=lambda data: tuple(json.loads(data)),
)
export.register_pytree_node_serialization(
    TensorUnits,
    serialized_name="modelstock_jax.TensorUnits",
    serialize_auxdata=_dump_tensor_units,
    deserialize_auxdata=_load_tensor_units,
)
for _tuple in (Rows, geometry.Distances, geometry.Shell):
    export.register_namedtuple_serialization(
        _tuple, serialized_name=f"modelstock_jax.{_tuple.__name__}"
    )
