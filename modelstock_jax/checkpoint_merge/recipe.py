"""Recipes of mergekit (YAML): strict parsing into models and options.

No key is ignored: an unknown key is an error that suggests a similar one.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from modelstock_jax.errors import UserError, suggest
from modelstock_jax.merging.tensor_roles import block_position
from modelstock_jax.registry import RECIPES

MAX_BYTES, MAX_VALUES = 2**20, 10**6
_MODEL_PARAMETERS = ("weight", "density")
_TOP_LEVEL_KEYS = (
    "merge_method",
    "base_model",
    "models",
    "slices",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
)
_RECIPE = "the recipe"  # Name of the top level in messages.
_UNSUPPORTED = {"modules": "a recipe must have one list of models for one checkpoint"}


class Recipe(NamedTuple):
    """Models and options of a merge.

    Attributes:
      base: label of the base model for `open_source`; None for a mean of models without a base
      models: labels of the fine-tunes
      options: arguments of `Options`, except t
      t: t of slerp as written: a number, a list over the layers, or a list of filters
      layers: number of layers that the slices cover; None without slices
      notes: settings of the recipe that have no effect
    """

    base: str | None
    models: tuple[str, ...]
    options: dict[str, Any]
    t: Any = None
    layers: int | None = None
    notes: tuple[str, ...] = ()


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe of one of the methods in `registry.RECIPES`.

    Args:
      path: the YAML file

    Raises:
      UserError: the file does not exist, is not YAML, or contains something that is not supported
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"too large for a recipe; the limit is {MAX_BYTES} bytes")
        raw = _load(path.read_text(encoding="utf-8"))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read the recipe ({error.strerror})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        position = "" if line is None else f" at line {line + 1}"
        problem = getattr(error, "problem", None) or type(error).__name__
        raise UserError(f"{path}: not valid YAML{position} ({problem})") from None
    try:
        return parse(raw)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _load(text: str) -> Any:
    """Return the parsed YAML; check its size first, since anchors can expand without limit."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if _expanded_size(node, {}) > MAX_VALUES:
            raise UserError(
                f"its anchors contain themselves or expand to more than {MAX_VALUES} values"
            )
        return None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _expanded_size(node: Any, sizes: dict[int, float]) -> float:
    """Return the number of values after expanding anchors; infinite if one contains itself."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in sizes:
        sizes[id(node)] = math.inf  # A node that is met again before its size is set is a cycle.
        is_mapping = isinstance(node, yaml.MappingNode)
        children = [child for pair in node.value for child in pair] if is_mapping else node.value
        sizes[id(node)] = 1 + sum(_expanded_size(child, sizes) for child in children)
    return sizes[id(node)]


def parse(raw: Any) -> Recipe:
    """Convert parsed YAML to a `Recipe`.

    Args:
      raw: value of the YAML document

    Raises:
      UserError: the recipe contains something that is not supported

    Example:
      >>> recipe = parse({"merge_method": "model_stock", "base_model": "b",
      ...                 "models": [{"model": "x"}, {"model": "y+lora"}], "dtype": "bfloat16"})
      >>> recipe.base, recipe.models, recipe.options
      ('b', ('x', 'y+lora'), {'method': 'model_stock', 'dtype': 'bfloat16'})
    """
    raw = mapping(raw, _RECIPE)
    for key, reason in _UNSUPPORTED.items():
        if key in raw:
            raise UserError(f"{key} is not supported: {reason}")
    raw = mapping(raw, _RECIPE, _TOP_LEVEL_KEYS)
    method = raw.get("merge_method")
    if method is None:
        raise UserError(f"merge_method is missing; choose one of {', '.join(RECIPES)}")
    if not isinstance(method, str) or method not in RECIPES:
        raise UserError(
            f"merge_method {method!r} is not supported; choose one of {', '.join(RECIPES)}"
            f"{suggest(method, RECIPES)}"
        )
    keys = RECIPES[method].mergekit_keys
    entries, common, layers = _entries(raw)
    common = _parameters(common, "parameters", keys, method)
    base = None if raw.get("base_model") is None else _model(raw["base_model"], "base_model")
    names = [_model(entry["model"], "model") for entry in entries]
    model_keys = [key for key in keys if key in _MODEL_PARAMETERS]
    parameters = [
        _parameters(entry.get("parameters") or {}, f"parameters of {name}", model_keys, method)
        for name, entry in zip(names, entries, strict=True)
    ]
    if base is None and method != "linear":
        raise UserError(f"base_model is missing; merge_method {method} requires it")
    if method != "linear":  # A linear mean may include the base, with a weight.
        indices = [i for i, name in enumerate(names) if name != base]
        names, parameters = [names[i] for i in indices], [parameters[i] for i in indices]
    if not names or (method == "slerp" and len(names) != 1):
        required = "exactly 1 model" if method == "slerp" else "at least 1 model"
        raise UserError(
            f"merge_method {method} requires {required} in addition to base_model, not {len(names)}"
        )
    options = {
        "method": RECIPES[method].name,
        **_method_options(method, names, parameters, common),
    }
    tokenizer, notes = _tokenizer(raw, base, names)
    options |= {} if tokenizer is None else {"tokenizer_from": tokenizer}
    if (dtype := raw.get("out_dtype") or raw.get("dtype")) is not None:
        options["dtype"] = dtype
    if "int8_mask" in common:
        notes.append("int8_mask has no effect here: in mergekit it only saves memory")
    if method == "slerp" and "t" not in common:
        raise UserError("parameters.t is missing; merge_method slerp requires it")
    return Recipe(base, tuple(names), options, common.get("t"), layers, tuple(notes))


def _entries(raw: Mapping) -> tuple[list[dict], dict, int | None]:
    """Return the models with their parameters, the common parameters, and the number of layers.

    The number of layers is None for a recipe without slices.
    """
    common = dict(mapping(raw.get("parameters") or {}, "parameters"))
    if ("models" in raw) == ("slices" in raw):
        raise UserError("give either models or slices")
    if "models" in raw:
        models = [_entry(x, ("model", "parameters")) for x in _list(raw["models"], "models")]
        return models, common, None
    slices = [
        mapping(x, "a slice", ("sources", "parameters", "base_model", "residual_weight"))
        for x in _list(raw["slices"], "slices")
    ]
    end, models = 0, []
    for number, piece in enumerate(slices):
        sources, end = _slice_sources(piece, end)
        merged = [
            {key: source[key] for key in ("model", "parameters") if key in source}
            for source in sources
        ]
        models = models if number else merged
        if merged != models or (len(slices) > 1 and piece.get("parameters")):
            raise UserError("slices that differ in their models or parameters are not supported")
        common |= mapping(piece.get("parameters") or {}, "parameters of a slice")
    return models, common, end


def _slice_sources(piece: Mapping, start: int) -> tuple[list[dict], int]:
    """Return the sources of a slice, which must start at layer `start`, and its end."""
    for key in ("base_model", "residual_weight"):
        if key in piece:
            raise UserError(
                f"{key} of a slice is not supported: only complete models can be merged"
            )
    sources = [
        _entry(x, ("model", "layer_range", "parameters"))
        for x in _list(piece.get("sources"), "sources")
    ]
    ranges = [_list(source.get("layer_range"), "layer_range") for source in sources]
    first = ranges[0]
    is_next = len(first) == 2 and first[0] == start and isinstance(first[1], int)
    if not is_next or any(other != first for other in ranges):
        raise UserError(
            f"layer_range {ranges} is not supported: slices must cover the complete model in order "
            f"(this one must start at layer {start} in every model); give models instead of slices"
        )
    return sources, first[1]


def _parameters(value: Any, name: str, keys: Collection[str], method: str) -> dict:
    """Return parameters that the method reads.

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
    return mapping(value, name, keys)


def _method_options(
    method: str, names: list[str], parameters: list[dict], common: dict
) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if common.get("filter_wise"):
        options["unit"] = "filter"
    if "weight" in RECIPES[method].mergekit_keys:
        weights = [values.get("weight", common.get("weight")) for values in parameters]
        if missing := [name for name, x in zip(names, weights, strict=True) if x is None]:
            raise UserError(
                f"weight is missing for {', '.join(missing)}; add weight to the parameters of each "
                "model, or one weight for all models to the parameters of the recipe"
            )
        options["weights"] = tuple(constant(x, "weight") for x in weights)
    if "density" in RECIPES[method].mergekit_keys:
        default = common.get("density", 1.0)
        options["density"] = tuple(
            constant(values.get("density", default), "density") for values in parameters
        )
        options["density_rounding"] = "down"
    if "lambda" in common:
        options["scale"] = constant(common["lambda"], "lambda")
    if "normalize" in common:
        options["normalize"] = bool(common["normalize"])
        total = sum(options["weights"])
        if method == "linear" and not common["normalize"] and abs(total - 1.0) > 1e-6:
            raise UserError(
                f"normalize: false requires weights with a sum of 1 for merge_method linear; the "
                f"sum of these weights is {total:g}"
            )
    return options


def _tokenizer(
    raw: Mapping, base: str | None, names: Sequence[str]
) -> tuple[str | None, list[str]]:
    """Return `tokenizer_from` for the `tokenizer_source` of a recipe, and notes."""
    tokenizer = mapping(raw.get("tokenizer") or {}, "tokenizer", ("source",))
    source = raw.get("tokenizer_source") or tokenizer.get("source") or "base"
    choice = None
    if source != "base" and (model := _model(source, "tokenizer_source")) != base:
        if model not in names:
            raise UserError(
                f"tokenizer_source {source!r} is not supported; give base or one of the models "
                "(for vocabularies that differ, pass --vocab-mismatch)"
            )
        # Without a base the first model is also opened as the base; index 1 is still that model.
        choice = f"model:{names.index(model) + 1}"
    if raw.get("chat_template") not in (None, "auto"):
        raise UserError(
            "chat_template is not supported; remove it (tokenizer_source selects the model whose "
            "chat template is copied)"
        )
    notes = (
        ["chat_template: auto copies the chat template of the tokenizer"]
        if raw.get("chat_template")
        else []
    )
    return choice, notes


def _entry(entry: Any, keys: Collection[str]) -> dict:
    entry = mapping(entry, "an entry of models", keys)
    if "model" not in entry:
        raise UserError("an entry of models lacks the key 'model'")
    return entry


def _model(value: Any, name: str) -> str:
    """Return a model as one label: 'path', 'path@revision' or 'path+lora'."""
    if isinstance(value, str):
        return value
    value = mapping(value, name, ("model", "lora", "path", "revision"))
    if "path" in value:
        return str(value["path"]) + (f"@{value['revision']}" if value.get("revision") else "")
    labels = [_model(value[key], name) for key in ("model", "lora") if value.get(key)]
    if "model" not in value or not labels:
        raise UserError(f"{name}: {value!r} names no model")
    return "+".join(labels)


def _list(value: Any, name: str) -> list:
    if not isinstance(value, list) or not value:
        raise UserError(f"{name}: expected a list, not {value!r}")
    return value


def schedule(setting: Any, names: Sequence[str]) -> float | dict[str, float]:
    """Return t of slerp for each tensor.

    A list of numbers is spread evenly over the depth and interpolated. In a list of filters, the
    first entry applies whose filter is part of the tensor's name, is `*`, or is absent.

    Args:
      setting: value of t in the recipe
      names: names of the model's tensors

    Returns:
      One number if t is equal for all tensors, otherwise name -> t.

    Raises:
      UserError: no entry applies to a tensor, or an entry is not valid

    Example:
      >>> names = ["embed.w", "layers.0.mlp.w", "layers.1.mlp.w", "layers.1.attn.w", "norm.w"]
      >>> schedule([{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}], names)["layers.1.mlp.w"]
      1.0
    """
    positions = block_position(names)
    max_depth = max((p.depth for p in positions if math.isfinite(p.depth)), default=0.0)
    values = {
        name: _value_at(setting, name, min(max(p.depth, 0.0) / max(max_depth, 1.0), 1.0))
        for name, p in zip(names, positions, strict=True)
    }
    return values if len(set(values.values())) > 1 else next(iter(values.values()))


def _value_at(setting: Any, name: str, depth: float) -> float:
    """Return t of the tensor `name` at a relative depth in [0, 1]."""
    if is_number(setting):
        return float(setting)
    if isinstance(setting, list) and setting and all(is_number(value) for value in setting):
        index = depth * (len(setting) - 1)
        low = min(int(index), len(setting) - 1)
        high = min(low + 1, len(setting) - 1)
        return (1 - (index - low)) * setting[low] + (index - low) * setting[high]
    for entry in [setting] if isinstance(setting, Mapping) else setting or ():
        entry = mapping(entry, "an entry of t", ("filter", "value"))
        if "value" not in entry:
            raise UserError("an entry of t lacks the key 'value'")
        if entry.get("filter") in (None, "*") or str(entry["filter"]) in name:
            return _value_at(entry["value"], name, depth)
    raise UserError(
        f"no entry of t applies to {name}; end the list with an entry that has only a value"
    )


def constant(setting: Any, key: str) -> float:
    """Return a setting that must be one number: only t of slerp may vary by layer or filter."""
    while isinstance(setting, list) and len(setting) == 1:
        setting = setting[0]
    if isinstance(setting, Mapping) and set(setting) == {"value"}:
        setting = setting["value"]
    if not is_number(setting):
        raise UserError(
            f"{key} {setting!r} is not supported; give one number (lists over layers and filters "
            "are supported only for t of slerp)"
        )
    return float(setting)


def mapping(value: Any, name: str, keys: Collection[str] | None = None) -> dict:
    """Return the value if it is a mapping with known keys.

    Raises:
      UserError: it is not a mapping, or has an unknown key
    """
    if not isinstance(value, dict):
        raise UserError(f"{name}: expected keys and values, not {value!r}")
    for key in value:
        if keys is not None and key not in keys:
            prefix = "" if name == _RECIPE else f"{name}: "
            raise UserError(
                f"{prefix}unknown key {key!r}{suggest(key, keys)}; known keys: {', '.join(keys)}"
            )
    return value


def is_number(value: Any) -> bool:
    """Return whether a value is a number that a float can represent; booleans are not numbers."""
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) <= sys.float_info.max
    return isinstance(value, float)
