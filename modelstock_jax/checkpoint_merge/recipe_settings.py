"""Parameters of mergekit recipes: one value, values over the layers, or values by tensor name."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from modelstock_jax.errors import UserError, suggest
from modelstock_jax.merging.tensor_roles import block_position
from modelstock_jax.registry import RECIPES

RECIPE = "the recipe"  # Name of the top level in messages.
# Parameters that a recipe can give for each model.
_OF_MODEL = ("weight", "density", "gamma", "epsilon", "scale")
# Parameters whose option has another name; the other parameters have their own.
_OPTIONS = {"weight": "weights", "lambda": "scale", "normalize_weights": "normalize"}
_REQUIRED = ("weight", "t")
# Switches that must be equal for all tensors.
_FIXED = ("filter_wise", "normalize", "normalize_weights", "nuslerp_flatten", "nuslerp_row_wise")
_WITHOUT_EFFECT = {
    "int8_mask": "in mergekit it only saves memory",
    "eps": "sums are in float64",
}


class Part(NamedTuple):
    """The models of a recipe, or of one of its slices.

    Attributes:
      names: the models, without the base
      of_models: their parameters
      shared: parameters of the slice and of the recipe, the most specific first
      size: number of layers; None for complete models
    """

    names: Sequence[str]
    of_models: Sequence[Mapping]
    shared: Sequence[Mapping]
    size: int | None = None


class Setting(NamedTuple):
    """A parameter as written.

    Attributes:
      key: its name in the recipe
      scopes: its values in each part, the most specific first; for a parameter of models one list
        per model
      sizes: number of layers of each part; None for a part with all layers
      of_model: whether it is a parameter of models
      default: value where the recipe gives none; None if it must
    """

    key: str
    scopes: Sequence[Any]
    sizes: Sequence[int | None]
    of_model: bool
    default: float | bool | None

    def by_tensor(self, names: Sequence[str]) -> Any:
        """Return the value, as `Options` has it, for the tensors of a model."""
        if not self.of_model:
            return by_tensor(self.key, self.scopes, names, self.sizes, self.default)
        models = [
            by_tensor(self.key, scopes, names, self.sizes, self.default)
            for scopes in zip(*self.scopes, strict=True)
        ]
        if not any(isinstance(values, Mapping) for values in models):
            return tuple(models)
        return {
            name: tuple(v[name] if isinstance(v, Mapping) else v for v in models) for name in names
        }

    def constant(self) -> Any:
        """Return the value if it is equal for all tensors; None if it differs."""
        if self.of_model:
            models = [self._constant(scopes) for scopes in zip(*self.scopes, strict=True)]
            return None if None in models else tuple(models)
        return self._constant(self.scopes)

    def _constant(self, scopes: Sequence[Sequence[Any]]) -> float | bool | None:
        values = {constant(part[0]) if part else self.default for part in scopes}
        return values.pop() if len(values) == 1 else None


def of_model_keys(method: str) -> tuple[str, ...]:
    """Return the parameters that can differ by model."""
    shared = ("epsilon",) if method in ("ram", "ramplus_tl") else ()
    return tuple(key for key in _OF_MODEL if key not in shared)


def check_parameters(value: Any, name: str, keys: Collection[str], method: str) -> None:
    """Check that the method reads all parameters.

    Args:
      value: parameters as written
      name: their name in messages
      keys: parameters that can be given there
      method: name in the recipe

    Raises:
      UserError: it does not read one of them, or not at this place
    """
    value = mapping(value, name)
    for key in value:
        if key not in keys and key in RECIPES[method].mergekit_keys:
            raise UserError(
                f"{name}: {key!r} is not a parameter of one model; move it to the parameters of "
                "the recipe"
            )
        if key not in keys and (not keys or any(key in m.mergekit_keys for m in RECIPES.values())):
            raise UserError(f"{name}: merge_method {method} has no parameter {key!r}; remove it")
    mapping(value, name, keys)


def read_parameters(
    method: str, parts: Sequence[Part]
) -> tuple[dict[str, Any], dict[str, Setting], list[str]]:
    """Return arguments of `Options`, parameters that differ by tensor, and notes.

    Args:
      method: name in the recipe
      parts: the slices of the recipe; one part without slices
    """
    options: dict[str, Any] = {}
    settings: dict[str, Setting] = {}
    given = {key for part in parts for scope in (*part.shared, *part.of_models) for key in scope}
    for key in RECIPES[method].mergekit_keys:
        if key in _WITHOUT_EFFECT or not (key in given or key in _REQUIRED):
            continue
        if key in _FIXED:
            options |= _fixed_switch(key, parts)
            continue
        setting = _setting(method, key, parts)
        option = _OPTIONS.get(key, key)
        if (value := setting.constant()) is None:
            settings[option] = setting
        else:
            place(options, method, option, value)
    if method == "ties" and "density" in given:
        options["density_rounding"] = "down"
    notes = [f"{k} has no effect here: {why}" for k, why in _WITHOUT_EFFECT.items() if k in given]
    return options, settings, notes


def place(options: dict[str, Any], method: str, option: str, value: Any) -> None:
    """Add a value to arguments of `Options`: as a field, or as a further parameter."""
    if option in RECIPES[method].parameters:
        options["parameters"] = options.get("parameters", {}) | {option: value}
    else:
        options[option] = value


def _fixed_switch(key: str, parts: Sequence[Part]) -> dict[str, Any]:
    """Return the options of a switch that must be equal for all tensors."""
    values = {
        next((constant(scope[key]) for scope in part.shared if key in scope), None)
        for part in parts
    }
    if len(values) > 1 or None in values:
        raise UserError(f"{key}: must be true or false for all tensors")
    (value,) = values
    if key.startswith("nuslerp_"):
        if bool(value) != (key == "nuslerp_flatten"):
            raise UserError(
                f"{key}: {str(bool(value)).lower()} is not supported; remove it (tensors are "
                "interpolated as a whole)"
            )
        return {}
    if key == "filter_wise":
        return {"unit": "filter"} if value else {}
    return {_OPTIONS.get(key, key): bool(value)}


def _setting(method: str, key: str, parts: Sequence[Part]) -> Setting:
    """Return a parameter as written.

    Raises:
      UserError: it has no default, and is missing for a model
    """
    found, option = RECIPES[method], _OPTIONS.get(key, key)
    default = None if key in _REQUIRED else found.parameters.get(option, 1.0)
    of_model = key in of_model_keys(method) and key != "scale"
    scopes = []
    for part in parts:
        common = [scope[key] for scope in part.shared if key in scope]
        models = [[x[key], *common] if x.get(key) is not None else common for x in part.of_models]
        if key in _REQUIRED:
            _check_given(key, method, [n for n, s in zip(part.names, models, strict=True) if not s])
        for setting in (x for of_one_model in models for x in of_one_model):
            check(key, setting)
        scopes.append(models if of_model else models[0])
    return Setting(key, scopes, [part.size for part in parts], of_model, default)


def _check_given(key: str, method: str, lacking: Sequence[str]) -> None:
    """Check that no model lacks a parameter."""
    if lacking and key != "weight":
        raise UserError(f"parameters.{key} is missing; merge_method {method} requires it")
    if lacking:
        raise UserError(
            f"weight is missing for {', '.join(lacking)}; add weight to the parameters of each "
            "model, or one weight for all models to the parameters of the recipe"
        )


def by_tensor(
    key: str,
    scopes: Sequence[Sequence[Any]],
    names: Sequence[str],
    sizes: Sequence[int | None] = (None,),
    default: Any = None,
) -> Any:
    """Return a setting for each tensor.

    A list of numbers is spread evenly over the layers of a part and interpolated; a list of
    switches is not interpolated. Tensors outside the layers (embeddings, final norm, head) have the
    first value, as in mergekit. In a list of filters, the first entry applies whose filter is part
    of the tensor's name, is `*`, or is absent. If none applies, the next scope does.

    Args:
      key: name of the setting in the recipe
      scopes: the setting as written for each part in each place, the most specific first
      names: names of the model's tensors
      sizes: number of layers of each part; None for a part with all layers
      default: value if no scope applies; None for an error

    Returns:
      One value if it is equal for all tensors, otherwise name -> value.

    Raises:
      UserError: no entry applies to a tensor, or an entry is not valid

    Example:
      >>> names = ["embed.w", "layers.0.mlp.w", "layers.1.mlp.w", "layers.1.attn.w", "norm.w"]
      >>> by_tensor("t", [[[{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}]]], names)["norm.w"]
      0.5
      >>> by_tensor("weight", [[[{"filter": "mlp", "value": 0}], 1.0]], names)["embed.w"]
      1.0
    """
    values = {
        name: _of_tensor(key, scopes[part], name, depth, default)
        for name, (part, depth) in zip(names, _positions(names, sizes), strict=True)
    }
    return values if len(set(values.values())) > 1 else next(iter(values.values()))


def _positions(names: Sequence[str], sizes: Sequence[int | None]) -> list[tuple[int, float]]:
    """Return the part of each tensor, and its relative depth in the part, in [0, 1].

    As in mergekit, the only layer of a part has depth 1. Tensors before the layers are in the first
    part and those after them in the last, with depth 0.
    """
    depths = [position.depth for position in block_position(names)]
    last = max((depth for depth in depths if math.isfinite(depth)), default=-1.0)
    lengths = [int(last) + 1 if size is None else size for size in sizes]
    layers = [
        (part, i / (length - 1) if length > 1 else 1.0)
        for part, length in enumerate(lengths)
        for i in range(length)
    ]
    return [
        (0, 0.0)
        if depth < 0
        else (len(sizes) - 1, 0.0)
        if depth == math.inf
        else layers[min(int(depth), len(layers) - 1)]
        for depth in depths
    ]


def _of_tensor(key: str, scopes: Sequence[Any], name: str, depth: float, default: Any) -> Any:
    for scope in scopes:
        if (value := _in_scope(key, scope, name, depth)) is not None:
            return value
    if default is None:
        raise UserError(
            f"no entry of {key} applies to {name}; end the list with an entry that has only a value"
        )
    return default


def _in_scope(key: str, setting: Any, name: str, depth: float) -> Any:
    """Return the value of a tensor at a relative depth in [0, 1]; None if no entry applies."""
    if (value := _value(setting)) is not None:
        return value
    if (values := _values(setting)) is not None:
        index = depth * (len(values) - 1)
        low, high = int(index), min(int(index) + 1, len(values) - 1)
        if any(isinstance(value, bool) for value in values):
            return values[low]
        return (1 - (index - low)) * values[low] + (index - low) * values[high]
    for entry in _filters(key, setting):
        if entry.get("filter") in (None, "*") or str(entry["filter"]) in name:
            return _in_scope(key, entry["value"], name, depth)
    return None


def check(key: str, setting: Any) -> None:
    """Check that a setting can be read.

    Args:
      key: name of the setting in the recipe
      setting: the setting as written

    Raises:
      UserError: it is neither a value, nor a list of values, nor a list of filters with values
    """
    if _value(setting) is None and _values(setting) is None:
        for entry in _filters(key, setting):
            check(key, entry["value"])


def _filters(key: str, setting: Any) -> list[dict]:
    """Return the entries of a list of filters."""
    setting = [setting] if isinstance(setting, Mapping) else setting
    if not isinstance(setting, list) or not setting:
        raise UserError(f"{key}: {setting!r} is not valid; give a number, or a list")
    entries = [mapping(x, f"an entry of {key}", ("filter", "value")) for x in setting]
    if any("value" not in entry for entry in entries):
        raise UserError(f"an entry of {key} lacks the key 'value'")
    return entries


def constant(setting: Any) -> float | bool | None:
    """Return a setting that is one value for all tensors; None if it is a list or has filters.

    Example:
      >>> constant([{"value": 0.5}]), constant([0, 1]), constant(True)
      (0.5, None, True)
    """
    while isinstance(setting, list) and len(setting) == 1:
        setting = setting[0]
    if isinstance(setting, Mapping) and set(setting) == {"value"}:
        return constant(setting["value"])
    return _value(setting)


def mapping(value: Any, name: str, keys: Collection[str] | None = None) -> dict:
    """Return the value if it is a mapping with known keys.

    Raises:
      UserError: it is not a mapping, or has an unknown key
    """
    if not isinstance(value, dict):
        raise UserError(f"{name}: expected keys and values, not {value!r}")
    for key in value:
        if keys is not None and key not in keys:
            prefix = "" if name == RECIPE else f"{name}: "
            raise UserError(
                f"{prefix}unknown key {key!r}{suggest(key, keys)}; known keys: {', '.join(keys)}"
            )
    return value


def _values(setting: Any) -> list[float | bool] | None:
    """Return a list of values; None for anything else."""
    if not isinstance(setting, list) or not setting:
        return None
    values = [value for x in setting if (value := _value(x)) is not None]
    return values if len(values) == len(setting) else None


def _value(setting: Any) -> float | bool | None:
    """Return a switch, or a number that a float can represent; None for anything else.

    YAML reads 1e-5 as text.
    """
    if isinstance(setting, bool):
        return setting
    try:
        return float(setting) if isinstance(setting, int | float | str) else None
    except (ValueError, OverflowError):
        return None
