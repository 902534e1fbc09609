"""mergekit's YAML recipes: read strictly, and turned into models and options."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from modelstock_jax.errors import UserError, near
from modelstock_jax.merging.units import block_position
from modelstock_jax.registry import RECIPES

MAX_BYTES, MAX_VALUES = 2**20, 10**6
_OF_A_MODEL = ("weight", "density")
_TOP = (
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
_REFUSED = {"modules": "one checkpoint with one list of models is merged at a time"}


class Recipe(NamedTuple):
    """A recipe as the command line takes it.

    Attributes:
      base: the base model, as `open_source` reads it; None for a mean of models without one.
      models: the fine-tunes.
      options: arguments of `Options`, but for slerp's t.
      t: slerp's, as written: a number, a list over the layers, or a list by filter.
      layers: where the slices end; None where the recipe has none.
      notes: what the recipe asks that changes nothing here.
    """

    base: str | None
    models: tuple[str, ...]
    options: dict[str, Any]
    t: Any = None
    layers: int | None = None
    notes: tuple[str, ...] = ()


def read_recipe(path: str | Path) -> Recipe:
    """Reads a recipe of one of the methods of `registry.RECIPES`.

    Nothing in it is ignored in silence: a key that is not known is an error that names a near one.

    Raises:
      UserError: no such file, not YAML, or anything in it that is not done here.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError("too large for a recipe")
        raw = _load(path.read_text(encoding="utf-8"))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        where = "" if line is None else f", line {line + 1}"
        problem = getattr(error, "problem", None) or type(error).__name__
        raise UserError(f"{path}: not YAML{where} ({problem})") from None
    try:
        return parse(raw)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _load(text: str) -> Any:
    """What the YAML says; refused before it is built where its anchors would fill the memory."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if _unfolded(node, {}) > MAX_VALUES:
            raise UserError("its anchors hold themselves, or stand for too many values")
        return None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _unfolded(node: Any, known: dict[int, float]) -> float:
    """Values in all, each as often as anchors repeat it; infinite where one holds itself."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = math.inf  # Until it is known: what is met again lies within itself.
        pairs = isinstance(node, yaml.MappingNode)
        parts = [part for pair in node.value for part in pair] if pairs else node.value
        known[id(node)] = 1 + sum(_unfolded(part, known) for part in parts)
    return known[id(node)]


def parse(raw: Any) -> Recipe:
    """Turns the parsed YAML into a `Recipe`.

    Example:
      >>> recipe = parse({"merge_method": "model_stock", "base_model": "b",
      ...                 "models": [{"model": "x"}, {"model": "y+lora"}], "dtype": "bfloat16"})
      >>> recipe.base, recipe.models, recipe.options
      ('b', ('x', 'y+lora'), {'method': 'model_stock', 'dtype': 'bfloat16'})
    """
    raw = mapping(raw, "the recipe", _TOP + tuple(_REFUSED))
    for key, why in _REFUSED.items():
        if key in raw:
            raise UserError(f"{key} is not done here: {why}")
    theirs = raw.get("merge_method")
    if not isinstance(theirs, str) or theirs not in RECIPES:
        raise UserError(
            f"merge_method {theirs!r} is not done here{near(theirs, RECIPES)}; one of "
            f"{', '.join(RECIPES)}"
        )
    known = RECIPES[theirs].mergekit_keys
    entries, common, layers = _entries(raw)
    common = mapping(common, "parameters", known)
    base = None if raw.get("base_model") is None else _model(raw["base_model"], "base_model")
    names = [_model(entry["model"], "model") for entry in entries]
    own = [
        mapping(
            entry.get("parameters") or {},
            f"parameters of {name}",
            [key for key in known if key in _OF_A_MODEL],
        )
        for name, entry in zip(names, entries, strict=True)
    ]
    if base is None and theirs != "linear":
        raise UserError(f"base_model is missing; {theirs} needs it")
    if theirs != "linear":  # There the base's own weight counts.
        kept = [i for i, name in enumerate(names) if name != base]
        names, own = [names[i] for i in kept], [own[i] for i in kept]
    if not names or (theirs == "slerp" and len(names) != 1):
        raise UserError(
            f"{theirs} of {len(names)} models beside base_model; give "
            f"{'one' if theirs == 'slerp' else 'some'}"
        )
    options = {"method": RECIPES[theirs].name, **_numbers(theirs, names, own, common)}
    chosen, notes = _tokenizer(raw, base, names)
    options |= {} if chosen is None else {"tokenizer_from": chosen}
    if (dtype := raw.get("out_dtype") or raw.get("dtype")) is not None:
        options["dtype"] = dtype
    if "int8_mask" in common:
        notes.append("int8_mask only saves memory in mergekit: nothing to do here")
    if theirs == "slerp" and "t" not in common:
        raise UserError("parameters.t is missing; slerp needs it")
    return Recipe(base, tuple(names), options, common.get("t"), layers, tuple(notes))


def _entries(raw: Mapping) -> tuple[list[dict], dict, int | None]:
    """The models with their parameters, the parameters of all, and where the slices end."""
    common = dict(mapping(raw.get("parameters") or {}, "parameters"))
    if ("models" in raw) == ("slices" in raw):
        raise UserError("give models or slices, one of the two")
    if "models" in raw:
        return (
            [_entry(e, ("model", "parameters")) for e in _list(raw["models"], "models")],
            common,
            None,
        )
    slices = [
        mapping(s, "a slice", ("sources", "parameters", "base_model", "residual_weight"))
        for s in _list(raw["slices"], "slices")
    ]
    end, models = 0, []
    for number, piece in enumerate(slices):
        for key in ("base_model", "residual_weight"):
            if key in piece:
                raise UserError(f"{key} of a slice is not done here: the whole model is merged")
        sources = [
            _entry(e, ("model", "layer_range", "parameters"))
            for e in _list(piece.get("sources"), "sources")
        ]
        ranges = [_list(source.get("layer_range"), "layer_range") for source in sources]
        span = ranges[0]
        whole = len(span) == 2 and span[0] == end and isinstance(span[1], int)
        if not whole or any(other != span for other in ranges):
            raise UserError(
                f"layer_range {ranges}: only the whole model in its own order is "
                f"merged, here from layer {end}; give models instead of slices"
            )
        end = span[1]
        merged = [
            {k: source[k] for k in ("model", "parameters") if k in source} for source in sources
        ]
        models = models if number else merged
        if merged != models or (len(slices) > 1 and piece.get("parameters")):
            raise UserError("slices with models or parameters of their own are not done here")
        common |= mapping(piece.get("parameters") or {}, "parameters of a slice")
    return models, common, end


def _numbers(theirs: str, names: list[str], own: list[dict], common: dict) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if common.get("filter_wise"):
        options["unit"] = "filter"
    if "weight" in RECIPES[theirs].mergekit_keys:
        given = [mine.get("weight", common.get("weight")) for mine in own]
        if lost := [name for name, value in zip(names, given, strict=True) if value is None]:
            raise UserError(f"weight is missing for {', '.join(lost)}")
        options["weights"] = tuple(constant(value, "weight") for value in given)
    if "density" in RECIPES[theirs].mergekit_keys:
        options["density"] = tuple(
            constant(mine.get("density", common.get("density", 1.0)), "density") for mine in own
        )
    if "lambda" in common:
        options["scale"] = constant(common["lambda"], "lambda")
    if "normalize" in common:
        options["normalize"] = bool(common["normalize"])
        total = sum(options["weights"])
        if theirs == "linear" and not common["normalize"] and abs(total - 1.0) > 1e-6:
            raise UserError(
                f"normalize false of weights that add up to {total:g}: a linear mean "
                "is taken here, so let them add up to 1"
            )
    return options


def _tokenizer(
    raw: Mapping, base: str | None, names: Sequence[str]
) -> tuple[str | None, list[str]]:
    """`tokenizer_from` that a recipe's `tokenizer_source` means, and notes."""
    tokenizer = mapping(raw.get("tokenizer") or {}, "tokenizer", ("source",))
    source = raw.get("tokenizer_source") or tokenizer.get("source") or "base"
    chosen = None
    if source != "base" and (model := _model(source, "tokenizer_source")) != base:
        if model not in names:
            raise UserError(
                f"tokenizer_source {source!r} is not done here: give base or one of "
                "the models; --vocabulary says what becomes of rows that differ"
            )
        # Without a base the first model is opened in its place as well.
        chosen = f"model:{names.index(model) + 1}"
    if raw.get("chat_template") not in (None, "auto"):
        raise UserError(
            "chat_template is not done here: tokenizer_source says whose is copied; delete the key"
        )
    notes = ["chat_template auto: the tokenizer's is copied"] if raw.get("chat_template") else []
    return chosen, notes


def _entry(entry: Any, known: Collection[str]) -> dict:
    entry = mapping(entry, "a model's entry", known)
    if "model" not in entry:
        raise UserError("an entry of the models has no 'model'")
    return entry


def _model(value: Any, where: str) -> str:
    """A model as one text: 'path', 'path@revision' or 'path+lora'."""
    if isinstance(value, str):
        return value
    value = mapping(value, where, ("model", "lora", "path", "revision"))
    if "path" in value:
        return str(value["path"]) + (f"@{value['revision']}" if value.get("revision") else "")
    parts = [_model(value[key], where) for key in ("model", "lora") if value.get(key)]
    if "model" not in value or not parts:
        raise UserError(f"{where}: {value!r} names no model")
    return "+".join(parts)


def _list(value: Any, where: str) -> list:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: expected a list, not {value!r}")
    return value


# Values in a recipe: checked mappings, numbers, and numbers that change over the layers.

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
    places = block_position(names)
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
        raise UserError(
            f"{key} {setting!r}: lists over layers and filters are read for slerp's "
            "t alone; give one number"
        )
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
