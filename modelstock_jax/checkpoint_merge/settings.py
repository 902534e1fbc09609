"""Values in a recipe: checked mappings, numbers, and numbers that change over the layers."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from modelstock_jax.checkpoint_merge.depth import place
from modelstock_jax.checkpoint_merge.spelling import near
from modelstock_jax.errors import UserError

_LARGEST = sys.float_info.max


def schedule(setting: Any, names: Sequence[str]) -> float | dict[str, float]:
    """Slerp's t for each tensor.

    A list of numbers is spread evenly over the depth and interpolated; a list by filter takes
    the first entry whose filter is part of the tensor's name, `*` or absent.

    Args:
      setting: as a recipe writes it.
      names: of the model's tensors.

    Returns:
      One number where it is the same for all, else name -> t.

    Example:
      >>> names = ["embed.w", "layers.0.mlp.w", "layers.1.mlp.w", "layers.1.attn.w", "norm.w"]
      >>> schedule([{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}], names)["layers.1.mlp.w"]
      1.0
    """
    places = place(names)
    last = max((p.depth for p in places if math.isfinite(p.depth)), default=0.0)
    values = {
        name: _at(setting, name, min(max(p.depth, 0.0) / max(last, 1.0), 1.0))
        for name, p in zip(names, places, strict=True)
    }
    return values if len(set(values.values())) > 1 else next(iter(values.values()))


def _at(setting: Any, name: str, depth: float) -> float:
    if is_number(setting):
        return float(setting)
    if isinstance(setting, list) and setting and all(is_number(value) for value in setting):
        at = depth * (len(setting) - 1)
        low = min(int(at), len(setting) - 1)
        high = min(low + 1, len(setting) - 1)
        return (1 - (at - low)) * setting[low] + (at - low) * setting[high]
    for entry in [setting] if isinstance(setting, Mapping) else setting or ():
        entry = mapping(entry, "an entry of t", ("filter", "value"))
        if "value" not in entry:
            raise UserError("an entry of t has no value")
        if entry.get("filter") in (None, "*") or str(entry["filter"]) in name:
            return _at(entry["value"], name, depth)
    raise UserError(f"t says nothing about {name}; end its list with an entry of a value alone")


def constant(setting: Any, key: str) -> float:
    """A number; mergekit's gradients and filters are read for slerp's t alone."""
    while isinstance(setting, list) and len(setting) == 1:
        setting = setting[0]
    if isinstance(setting, Mapping) and set(setting) == {"value"}:
        setting = setting["value"]
    if not is_number(setting):
        raise UserError(f"{key} {setting!r}: lists over layers and filters are read for slerp's "
                        "t alone; give one number")
    return float(setting)


def mapping(value: Any, where: str, known: Collection[str] | None = None) -> dict:
    """The value, if it is a mapping of known keys."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected keys and values, not {value!r}")
    for key in value:
        if known is not None and key not in known:
            raise UserError(f"{where}: unknown key {key!r}{near(key, known)}")
    return value


def is_number(value: Any) -> bool:
    """Whether a value is a number that a float can hold, and not a truth value."""
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST
    return whole or isinstance(value, float)
