"""Factors of the update of one model: MonoSoup by singular direction, LiNeS by layer.

This module does not need JAX: `modelstock merge` uses it too.
"""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from modelstock_jax.errors import UserError, listed
from modelstock_jax.merging.attention_names import network_blocks, projections
from modelstock_jax.merging.geometry import namespace
from modelstock_jax.merging.tensor_roles import BlockPosition, block_position

# MonoSoup leaves an update as it is if it is shorter than this fraction of the pretrained matrix.
UNMOVED = 1e-6


class MonoSoupFactors(NamedTuple):
    """How MonoSoup scales the singular directions of an update.

    Attributes:
      is_high: whether a direction is one of the k first ones, [..., n] bool
      high: factor of these directions, [...]
      low: factor of the others, [...]
    """

    is_high: Any
    high: Any
    low: Any


def singular_values(eigenvalues):
    """Return the singular values of D from the eigenvalues of D^T D, NumPy or JAX.

    Eigenvalues below the rounding error of the largest, n 2^-52 of it, count as 0, so singular
    values below sqrt(n) 2^-26 of the largest. An update of low
    rank, such as that of LoRA, would otherwise have a higher effective rank.

    Args:
      eigenvalues: [..., n], ascending

    Example:
      >>> import numpy as np
      >>> singular_values(np.array([-1e-17, 4.0, 9.0])).tolist()
      [0.0, 2.0, 3.0]
    """
    xp = namespace(eigenvalues)
    floor = eigenvalues.shape[-1] * 2.0**-52 * eigenvalues[..., -1:]
    return xp.sqrt(xp.where(eigenvalues > floor, eigenvalues, 0.0))


def monosoup_factors(values) -> MonoSoupFactors:
    """Return the factors of MonoSoup (arXiv 2602.09689) of the singular values s of an update.

        p_i  = s_i / sum_j s_j,  r = exp(-sum_i p_i ln p_i),  k = ceil(r)
        P    = sum_(i <= k) s_i^2 / sum_i s_i^2,  rho = (s_(k+1) / s_1)^2
        low  = rho + (1 - rho) sqrt(1 - P),  high = 1 - low

    r is the effective rank. If it is full (k = n; above n - 1 is sufficient), nothing is left for
    `low`, and `high` is 1: the update does not change. The same holds for an update of rank 1.

    Args:
      values: singular values in ascending order, [..., n], NumPy or JAX

    Example:
      >>> import numpy as np
      >>> factors = monosoup_factors(np.array([0.5, 0.8, 1.0]))  # r = 2.9, so k = 3
      >>> factors.is_high.tolist(), float(factors.high)
      ([True, True, True], 1.0)
      >>> factors = monosoup_factors(np.array([0.01, 0.1, 1.0]))  # r = 1.4, so k = 2
      >>> factors.is_high.tolist(), round(float(factors.low), 6)
      ([False, True, True], 0.010049)
    """
    xp = namespace(values)
    n = values.shape[-1]
    total, largest = values.sum(axis=-1, keepdims=True), values[..., -1:]
    p = values / xp.where(total > 0, total, 1.0)
    entropy = -(p * xp.log(xp.where(p > 0, p, 1.0))).sum(axis=-1, keepdims=True)
    k = xp.clip(xp.ceil(xp.exp(entropy)), 1, n)
    rank = xp.arange(n, 0, -1, dtype=values.dtype)
    is_high = rank.reshape(*[1] * (values.ndim - 1), n) <= k
    rest = xp.where(is_high, 0.0, values)
    squares = (values**2).sum(axis=-1)
    rest_energy = (rest**2).sum(axis=-1) / xp.where(squares > 0, squares, 1.0)  # 1 - P
    rho = (rest.max(axis=-1) / xp.where(largest > 0, largest, 1.0)[..., 0]) ** 2
    low = rho + (1.0 - rho) * xp.sqrt(rest_energy)
    return MonoSoupFactors(is_high, 1.0 - low, low)


class LayerPosition(NamedTuple):
    """Position of a tensor in the layers of its tower: layer l of L.

    Attributes:
      index: l - 1
      last: L - 1, at least 1
      tower: name prefix of the layers
      is_inside: whether the tensor is in a layer, not before or after all of them
    """

    index: int
    last: int
    tower: str = ""
    is_inside: bool = True


def layer_positions(
    tensors: Sequence[tuple[str, Sequence[int]]],
    layer_of: Callable[[str], int] | None = None,
    *,
    is_stacked: bool = False,
) -> list[LayerPosition]:
    """Return the position of each tensor in the layers, for LiNeS.

    A layer is a block of a tower. Tensors before the blocks (embeddings) belong to the first layer,
    tensors after them (final norm, head) to the last. The only block of a tower is the last layer.
    If some blocks are known, by their attention or their convolutions, other numbers in names are
    no layers.

    Args:
      tensors: names and shapes of all tensors of the model
      layer_of: number of the layer of a tensor by name; None to read it from the name
      is_stacked: whether some tensors stack layers in an axis: names then need no numbers

    Raises:
      UserError: no name contains the number of a block, or `layer_of` returns no integer

    Example:
      >>> names = ["embed.weight", "layers.0.weight", "layers.1.weight", "layers.2.weight", "head"]
      >>> [position.index for position in layer_positions([(name, (4,)) for name in names])]
      [0, 0, 1, 2, 2]
    """
    shapes = {name: tuple(shape) for name, shape in tensors}
    names = list(shapes)
    if layer_of is not None:
        return _positions_of_function(names, layer_of)
    places = block_position(names, network_blocks(names, projections(shapes), {}))
    blocks: dict[str, set[int]] = defaultdict(set)
    for place in places:
        if 0 <= place.depth < math.inf:
            blocks[place.tower].add(int(place.depth))
    if not blocks and not is_stacked:
        raise UserError(
            "LiNeS: no tensor's name contains the number of a block; the first tensor is "
            f"{names[0] if names else '(none)'!r}; in the library, pass layer_of"
        )
    return [_position(place, blocks.get(place.tower, {0})) for place in places]


def _positions_of_function(
    names: Sequence[str], layer_of: Callable[[str], int]
) -> list[LayerPosition]:
    layers = []
    for name in names:
        try:
            layers.append(operator.index(layer_of(name)))
        except TypeError:
            raise UserError(
                f"layer_of({name!r}) returned {layer_of(name)!r}; it must return the number of the "
                "tensor's layer"
            ) from None
    first = min(layers, default=0)
    last = max(max(layers, default=0) - first, 1)
    return [LayerPosition(layer - first, last) for layer in layers]


def _position(place: BlockPosition, blocks: set[int]) -> LayerPosition:
    first, last = min(blocks), max(blocks)
    is_inside = 0 <= place.depth < math.inf
    if first == last:
        return LayerPosition(0 if place.depth < 0 else 1, 1, place.tower, is_inside)
    index = int(min(max(place.depth, first), last)) - first
    return LayerPosition(index, last - first, place.tower, is_inside)


def layers_note(positions: Mapping[str, LayerPosition]) -> str:
    """Return a line about the layers of a model, and about the tensors that are in none.

    Args:
      positions: name of a tensor -> its position

    Example:
      >>> names = ["embed.w", "layers.0.w", "layers.1.w", "norm.w"]
      >>> places = layer_positions([(name, (4,)) for name in names])
      >>> layers_note(dict(zip(names, places)))
      'lines: 2 layers in layers; with the first: embed.w; with the last: norm.w'
    """
    towers = {p.tower: p.last + 1 for p in positions.values() if p.is_inside}
    text = "lines: " + ", ".join(f"{count} layers in {name}" for name, count in towers.items())
    for end in ("first", "last"):
        outside = [
            name
            for name, p in positions.items()
            if not p.is_inside and (p.index == 0) == (end == "first")
        ]
        if outside:
            text += f"; with the {end}: {listed(outside)}"
    return text
