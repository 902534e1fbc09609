"""Recipes of mergekit (YAML): strict parsing into models and options.

No key is ignored: an unknown key is an error that suggests a similar one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml

from modelstock_jax.checkpoint_merge.recipe_settings import (
    RECIPE,
    Part,
    Setting,
    check_parameters,
    mapping,
    of_model_keys,
    place,
    read_parameters,
)
from modelstock_jax.checkpoint_merge.vocabulary import Tokenizer, TokenRule
from modelstock_jax.errors import UserError, suggest
from modelstock_jax.registry import COMMANDS, RECIPES

MAX_BYTES, MAX_VALUES = 2**20, 10**6
# Methods for which the base is one of the models.
_WITH_BASE = ("linear", "karcher")
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
_UNSUPPORTED = {"modules": "a recipe must have one list of models for one checkpoint"}


class LayerRange(NamedTuple):
    """Layers of a model.

    Attributes:
      model: its label
      start: first layer
      stop: end
    """

    model: str
    start: int
    stop: int


class Recipe(NamedTuple):
    """Models and options of a merge.

    Attributes:
      base: label of the base model for `open_source`; None for a mean of models without a base
      models: labels of the fine-tunes
      options: arguments of `Options`
      settings: parameters that differ by layer or filter, by the names of the options
      slices: layers that each slice takes, of the base (if there is one) and of each fine-tune;
        None for complete models
      tokenizer: the tokenizer that is written, with the rows of all embeddings in its order; None
        to compare the tokenizers only
      notes: settings of the recipe that have no effect
    """

    base: str | None
    models: tuple[str, ...]
    options: dict[str, Any]
    settings: Mapping[str, Setting] = MappingProxyType({})
    slices: tuple[tuple[LayerRange, ...], ...] | None = None
    tokenizer: Tokenizer | None = None
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
    raw = mapping(raw, RECIPE)
    for key, reason in _UNSUPPORTED.items():
        if key in raw:
            raise UserError(f"{key} is not supported: {reason}")
    raw = mapping(raw, RECIPE, _TOP_LEVEL_KEYS)
    method = raw.get("merge_method")
    if method is None:
        raise UserError(f"merge_method is missing; choose one of {', '.join(RECIPES)}")
    if not isinstance(method, str) or method not in RECIPES:
        raise UserError(
            f"merge_method {method!r} is not supported; choose one of {', '.join(RECIPES)}"
            f"{suggest(method, RECIPES)}"
        )
    base = None if raw.get("base_model") is None else _model(raw["base_model"], "base_model")
    if base is None and RECIPES[method].needs_base | (method == "slerp"):
        raise UserError(f"base_model is missing; merge_method {method} requires it")
    pieces = [_read_part(piece, method, base) for piece in _pieces(raw)]
    parts = [part for part, _ in pieces]
    names = parts[0].names
    if any(len(part.names) != len(names) for part in parts):
        raise UserError("slices: all slices must have the same number of models")
    options, settings, notes = read_parameters(method, parts)
    options = {"method": RECIPES[method].name, **options}
    tokenizer = _tokenizer(raw, base, names)
    if method == "karcher" or (method == "linear" and _is_sum(options, settings)):
        base = None  # The weights are merged, not their differences to the base.
    if tokenizer is not None and tokenizer.source in names:
        # Without a base the first model is also opened as the base; index 1 is still that model.
        options["tokenizer_from"] = f"model:{names.index(tokenizer.source) + 1}"
    chat_template, template_notes = _chat_template(raw)
    options |= chat_template
    if (dtype := raw.get("out_dtype") or raw.get("dtype")) is not None:
        options["dtype"] = dtype
    slices = _slices(base, pieces) if "slices" in raw else None
    notes = (*template_notes, *notes)
    return Recipe(base, tuple(names), options, settings, slices, tokenizer, notes)


def _check_number(method: str, names: Sequence[str], base: str | None) -> None:
    """Check the number of models, which is without the base."""
    smallest, largest = 1, RECIPES[method].max_models
    if method == "slerp":
        largest = 1
    if method == "nuslerp":
        smallest = 2
    if smallest <= len(names) <= (largest or len(names)):
        return
    number = f"exactly {largest}" if largest else f"at least {smallest}"
    plural = "s" if (largest or smallest) > 1 else ""
    also = " in addition to base_model" if base is not None else ""
    raise UserError(
        f"merge_method {method} requires {number} model{plural}{also}, not {len(names)}"
    )


def _is_sum(options: Mapping[str, Any], settings: Mapping[str, Setting]) -> bool:
    """Return whether the weights of a linear merge are not a mean of the models."""
    if options.get("normalize") is not False:
        return False
    return "weights" in settings or abs(sum(options["weights"]) - 1.0) > 1e-6


_Ranges = dict[str, LayerRange]


def _pieces(raw: Mapping) -> list[tuple[list[dict], list[tuple[dict, str]]]]:
    """Return the entries of each slice, or of the recipe, and the parameters that they share.

    The parameters have their names in messages, and the most specific are first.
    """
    shared = [(mapping(raw.get("parameters") or {}, "parameters"), "parameters")]
    if ("models" in raw) == ("slices" in raw):
        raise UserError("give either models or slices")
    if "models" in raw:
        models = [_entry(x, ("model", "parameters")) for x in _list(raw["models"], "models")]
        return [(models, shared)]
    pieces = []
    for x in _list(raw["slices"], "slices"):
        piece = mapping(x, "a slice", ("sources", "parameters", "base_model", "residual_weight"))
        for key in ("base_model", "residual_weight"):
            if key in piece:
                raise UserError(f"{key} of a slice is not supported; remove it")
        place = "parameters of a slice"
        own = (mapping(piece.get("parameters") or {}, place), place)
        keys = ("model", "layer_range", "parameters")
        sources = [_entry(y, keys) for y in _list(piece.get("sources"), "sources")]
        pieces.append((sources, [own, *shared]))
    return pieces


def _read_part(
    piece: tuple[list[dict], list[tuple[dict, str]]], method: str, base: str | None
) -> tuple[Part, _Ranges]:
    """Return the models of a slice without the base, with their parameters, and all layer ranges.

    Args:
      piece: from `_pieces`
      method: name in the recipe
      base: label of the base
    """
    entries, shared = piece
    for values, where in shared:
        check_parameters(values, where, RECIPES[method].mergekit_keys, method)
    names = [_model(entry["model"], "model") for entry in entries]
    ranges = {
        name: _layer_range(name, entry)
        for name, entry in zip(names, entries, strict=True)
        if "layer_range" in entry
    }
    if ranges and len(ranges) < len(entries):
        raise UserError("layer_range is missing, or a slice has a model twice")
    sizes = {x.stop - x.start for x in ranges.values()}
    if len(sizes) > 1:
        raise UserError("layer_range: all models of a slice must have the same number of layers")
    keys = [key for key in RECIPES[method].mergekit_keys if key in of_model_keys(method)]
    of_models = [entry.get("parameters") or {} for entry in entries]
    for name, values in zip(names, of_models, strict=True):
        check_parameters(values, f"parameters of {name}", keys, method)
    if method not in _WITH_BASE:  # A linear mean may include the base, with a weight.
        indices = [i for i, name in enumerate(names) if name != base]
        names, of_models = [names[i] for i in indices], [of_models[i] for i in indices]
    elif base is not None and (
        method == "karcher" or any(values.get("normalize") is False for values, _ in shared)
    ):
        # Without a base, the first model has the config and the tokenizer.
        models = {base: {}, **dict(zip(names, of_models, strict=True))}
        names, of_models = list(models), list(models.values())
    _check_number(method, names, base)
    values = [parameters for parameters, _ in shared]
    return Part(names, of_models, values, sizes.pop() if sizes else None), ranges


def _layer_range(name: str, entry: Mapping) -> LayerRange:
    value = entry["layer_range"]
    is_pair = isinstance(value, list) and len(value) == 2
    if not is_pair or not all(isinstance(x, int) and not isinstance(x, bool) for x in value):
        raise UserError(f"layer_range of {name}: give two integers, such as [0, 16]")
    start, stop = value
    if not 0 <= start < stop:
        raise UserError(f"layer_range of {name}: {value} contains no layers")
    return LayerRange(name, start, stop)


def _slices(
    base: str | None, pieces: Sequence[tuple[Part, _Ranges]]
) -> tuple[tuple[LayerRange, ...], ...]:
    """Return the layers that each slice takes, of the base and of each fine-tune."""
    slices = []
    for part, ranges in pieces:
        names = [*([] if base is None else [base]), *part.names]
        if lacking := [name for name in names if name not in ranges]:
            raise UserError(f"layer_range of {lacking[0]} is missing in a slice")
        slices.append(tuple(ranges[name] for name in names))
    return tuple(slices)


def options_of(recipe: Recipe, tensors: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of `Options`, with the parameters that differ by tensor.

    Args:
      recipe: the recipe
      tensors: names of the base's tensors
    """
    options = dict(recipe.options)
    for option, setting in recipe.settings.items():
        method = COMMANDS[options["method"]].mergekit
        place(options, method, option, setting.by_tensor(tensors))
    return options


def _tokenizer(raw: Mapping, base: str | None, names: Sequence[str]) -> Tokenizer | None:
    """Return the tokenizer of a recipe; None if it has none of these keys."""
    if raw.get("tokenizer_source") is not None and raw.get("tokenizer") is not None:
        raise UserError("give either tokenizer_source or tokenizer")
    if (source := raw.get("tokenizer_source")) is not None:
        return Tokenizer(_tokenizer_source(source, "tokenizer_source", base, names))
    if raw.get("tokenizer") is None:
        return None
    keys = ("source", "tokens", "pad_to_multiple_of")
    tokenizer = mapping(raw["tokenizer"], "tokenizer", keys)
    multiple = tokenizer.get("pad_to_multiple_of") or 1
    if not isinstance(multiple, int) or isinstance(multiple, bool) or multiple < 1:
        raise UserError(f"pad_to_multiple_of: must be a positive integer, not {multiple!r}")
    tokens = mapping(tokenizer.get("tokens") or {}, "tokens")
    # As in mergekit, the default is the union.
    source = _tokenizer_source(tokenizer.get("source") or "union", "source", base, names)
    return Tokenizer(source, {str(t): _token_rule(str(t), x) for t, x in tokens.items()}, multiple)


def _tokenizer_source(source: Any, key: str, base: str | None, names: Sequence[str]) -> str:
    if source in ("base", "union"):
        return source
    model = _model(source, key)
    if model == base:
        return "base"
    if model not in names:
        raise UserError(f"{key} {model!r} is not valid; give base, union or one of the models")
    return model


def _token_rule(token: str, value: Any) -> TokenRule:
    """Return the rule of a token: from a model, another token or row of a model, or zeros."""
    name = f"tokens: {token!r}"
    value = mapping(value, name, ("source", "force"))
    force, source = value.get("force", False), value.get("source")
    if not isinstance(force, bool):
        raise UserError(f"{name}: force must be true or false, not {force!r}")
    if source is None:
        raise UserError(f"{name}: source is missing; give a model, or a mapping with kind")
    if not isinstance(source, Mapping) or "kind" not in source:
        return TokenRule(_model(source, f"{name}: source"), force=force)
    source = mapping(source, f"{name}: source", ("kind", "model", "token", "token_id"))
    kind, other, row = (source.get(key) for key in ("kind", "token", "token_id"))
    if kind == "zero":
        return TokenRule(None, force=force)
    if kind != "model_token":
        raise UserError(f"{name}: kind must be zero or model_token, not {kind!r}")
    if "model" not in source or (other is None) == (row is None):
        raise UserError(f"{name}: kind model_token requires model, and either token or token_id")
    if row is not None and (isinstance(row, bool) or not isinstance(row, int)):
        raise UserError(f"{name}: token_id must be an integer, not {row!r}")
    other = None if other is None else str(other)
    return TokenRule(_model(source["model"], f"{name}: model"), other, row, force)


def _chat_template(raw: Mapping) -> tuple[dict[str, Any], list[str]]:
    """Return the option of the chat template, and notes."""
    template = raw.get("chat_template")
    if template is None:
        return {}, []
    if template == "auto":
        return {}, ["chat_template: auto copies the chat template of the tokenizer"]
    if not isinstance(template, str) or "{" not in template:
        raise UserError(
            f"chat_template {template!r} is not supported; give auto or the template itself (Jinja)"
        )
    return {"chat_template": template}, []


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
