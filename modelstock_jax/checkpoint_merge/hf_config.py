"""config.json of a model: reading, comparing with other configs, and changing values."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from modelstock_jax.errors import UserError
from modelstock_jax.tensor_files.reader import read_json
from modelstock_jax.tensor_files.writer import write_indented_json

CONFIG = "config.json"
KEYS = ("torch_dtype", "dtype")  # Of transformers 4 and 5; version 5 reads both.
# Keys that do not change a forward pass at inference: paths, versions, labels, dtypes, kernels,
# caches, initialization and training. They match any part of a dotted key.
_HARMLESS = re.compile(
    r"_?name_or_path|model_name|hf_tokenizer_name|mm_vision_tower|_commit_hash|\w*_version|"
    r"_?unsloth\w*|transformers\.js_config|architectures|auto_map|"
    r"torch_dtype|dtype|\w*use_cache|cache_\w+|_?attn_impl\w*|_?use_flash_att\w+|_?flash_att\w+|"
    r"deterministic_flash_attn|use_memory_efficient_attention|use_xformers\w*|use_sdpa|"
    r"unpad_inputs|reference_compile|slow_but_exact|chunk_size_feed_forward|pretraining_tp|"
    r"id2label|label2id|_?num_labels|num_classes|label_names|label_descriptions|problem_type|"
    r"finetuning_task|task_specific_params|pretrained_cfg|"
    r"\w*dropout\w*|\w*drop_?path\w*|(?:attn|proj|pos|path|head|embe?d?|mlp|ffn?|act)_drop|\w*_pdrop|\w*layerdrop|stochastic_depth\w*|"
    r"mask_time_\w+|mask_feature_\w+|mask_channel_\w+|apply_spec_augment|"
    r"initializer_\w+|\w*_init_std|init_std|init_logit_\w+|\w*_init_value|\w*jitter_noise|"
    r"output_attentions|output_hidden_states|output_past|output_scores|return_dict\w*|"
    r"use_return_dict|torchscript|gradient_checkpointing\w*|use_gradient_checkpointing|"
    r"output_router_logits|\w*loss\w*|seq_aux|ctc_zero_infinity|label_smoothing|\w*ignore_index|"
    r"sparse_prediction|repad_logits_with_grad|\w*_cost|eos_coefficient|\w*_lr|tune_\w+|"
    r"(?:un)?freeze_\w+|optimization_step|update_after_step|use_ema_warmup|inv_gamma|min_decay|"
    r"decay|timm_model_pretrained|hf_model_pretrained|"
    r"tie_word_embeddings|vocab_size|\w*_vocab_size|quantization_config|quantization|"
    r"compression_config|prefix|pruned_heads|use_bfloat16|xla_device|tokenizer_\w+|"
    r"processor_class|model_max_length"
)
# Defaults of `generate` in older configs: a difference is a note, as in generation_config.json.
_GENERATION = re.compile(
    r"\w*_token_ids?|max_length|min_length|max_new_tokens|do_sample|early_stopping|num_beams|"
    r"num_beam_groups|diversity_penalty|temperature|top_k|top_p|typical_p|repetition_penalty|"
    r"length_penalty|no_repeat_ngram_size|encoder_no_repeat_ngram_size|bad_words_ids|"
    r"num_return_sequences|remove_invalid_values|suppress_tokens|begin_suppress_tokens|"
    r"exponential_decay_length_penalty|forced_\w+|sep_token|median_filter_width"
)
_TOKENS = re.compile(
    r"\w*_token_ids?|forced_\w+|(?:begin_)?suppress_tokens|bad_words_ids|sep_token"
)
# Other spellings of a key or a value in versions of transformers -> the spelling to compare.
# Values of equal formulas count as spellings.
_KEYS = {
    "rotary_emb_base": "rope_theta",
    "global_rope_theta": "rope_theta",
    "rotary_pct": "partial_rotary_factor",
    "local_rope_theta": "rope_local_base_freq",
}
_VALUES = {
    "swish": "silu",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
    "gelu_accurate": "gelu_pytorch_tanh",
    "su": "longrope",
}
# `pooling_mode` of sentence-transformers 6 -> the key of earlier releases, which is true.
_POOLING = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
# Keys that are true if a config lacks them: `include_prompt` of sentence-transformers.
_TRUE = ("include_prompt",)
# Keys whose default null is written as its value by transformers 5.
_COMPUTED = ("no_rope_layers", "layer_types", "hidden_activation", "n_inner")
# Keys that change positions -> the defaults of libraries if a config lacks the key.
_POSITIONS: dict[str, tuple[Any, ...]] = {
    "rope_theta": (1e4,),
    "rope_local_base_freq": (1e4,),
    "partial_rotary_factor": (1.0,),
    "rotary_dim": (64,),
    "relative_attention_num_buckets": (32,),
    "relative_attention_max_distance": (128,),
    "max_relative_positions": (-1,),
    "relative_attention": (),
    "position_biased_input": (True,),
    "pos_att_type": (),
    "alibi": (),
    "position_embedding_type": ("absolute", "sine"),
    "position_embeddings_type": (),
    "use_rotary_embeddings": (),
    "rotary": (),
    "rope_scaling": (),
}
# Other defaults of transformers, by key and model_type.
_DEFAULTS = {
    **dict.fromkeys(
        [
            ("partial_rotary_factor", kind)
            for kind in (
                "glm",
                "glm4",
                "glm4_moe",
                "nemotron",
                "persimmon",
                "phi",
                "recurrent_gemma",
            )
        ],
        0.5,
    ),
    **dict.fromkeys(
        [("partial_rotary_factor", kind) for kind in ("gpt_neox", "stablelm", "qwen3_next")], 0.25
    ),
    **dict.fromkeys(
        [
            ("rope_theta", kind)
            for kind in (
                "mixtral",
                "phimoe",
                "minimax",
                "ministral3",
                "lfm2",
                "lfm2_moe",
                "gemma3_text",
                "gemma3n_text",
                "qwen2_vl",
                "qwen2_vl_text",
                "qwen2_5_vl",
                "qwen2_5_vl_text",
            )
        ],
        1e6,
    ),
    **dict.fromkeys(
        [
            ("rope_theta", kind)
            for kind in (
                "bitnet",
                "cohere",
                "csm",
                "ernie4_5",
                "ernie4_5_moe",
                "exaone",
                "flex_olmo",
                "olmo3",
                "llama4_text",
                "mllama_text_model",
                "qwen3_vl_text",
                "qwen3_vl_moe_text",
            )
        ],
        5e5,
    ),
    **dict.fromkeys([("rope_theta", kind) for kind in ("modernbert", "modernbert-decoder")], 1.6e5),
    ("rope_theta", "smollm3"): 2e6,
    ("rope_theta", "gpt_oss"): 1.5e5,
    ("rope_theta", "helium"): 1e5,
    ("rope_theta", "dinov3_vit"): 100.0,
    ("rope_theta", "nomic_bert"): 1e3,
}
_NO_SCALING = ("default", "mrope", "axial", None)
_CLOSE = 1e-6  # Relative tolerance: 1e-6 and its float32 spelling are the same value.
_ABSENT = object()
# Defaults of transformers' configs of the two towers, which a saved config leaves out, by the
# start of `model_type`: vision, text.
_DEFAULT_HEADS = {"clip": (12, 8), "siglip": (12, 12)}
OPEN_CLIP_HEAD_WIDTH = 64


def read_config(directory: Path | None) -> dict[str, Any] | None:
    """Return the config.json in a model's directory; None if it is missing or no JSON object.

    Args:
      directory: directory of the model; None for a single file

    Raises:
      UserError: config.json cannot be read or is not JSON

    Example:
      >>> read_config(None) is None
      True
    """
    if directory is None or not (directory / CONFIG).is_file():
        return None
    config = read_json(directory / CONFIG)
    return config if isinstance(config, dict) else None


def set_dtype(directory: Path, dtype: str) -> None:
    """Set the dtype in config.json and in its nested configs of towers.

    Args:
      directory: directory of the model; without a config.json, nothing is written
      dtype: name of the dtype in transformers, such as `bfloat16`
    """
    config = read_config(directory)
    if config is not None:
        changed = _with_dtype(config, dtype)
        # Configs of pooling modules and of diffusers have no dtype.
        if not any(key in config for key in KEYS) and config.keys() & {
            "model_type",
            "architectures",
        }:
            changed["torch_dtype"] = dtype
        if changed != config:
            write_indented_json(directory / CONFIG, changed)


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Replace the dtype wherever a config has one.

    Example:
      >>> _with_dtype({"dtype": "float32", "text_config": {"torch_dtype": "float32"}}, "float16")
      {'dtype': 'float16', 'text_config': {'torch_dtype': 'float16'}}
    """
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if key in KEYS:
            changed[key] = dtype
        elif isinstance(value, dict) and key.endswith("_config"):
            changed[key] = _with_dtype(value, dtype)
        else:
            changed[key] = value
    return changed


class Disagreements(NamedTuple):
    """Keys in which two configs differ: dotted key -> the two values as JSON.

    Attributes:
      grave: keys that change a forward pass
      harmless: keys that do not
      lacking: keys that one config leaves out ('(none)') and whose default is not known
    """

    grave: dict[str, tuple[str, str]]
    harmless: dict[str, tuple[str, str]]
    lacking: dict[str, tuple[str, str]]


def disagreements(
    base: Mapping[str, Any], other: Mapping[str, Any], *, complete: bool = False
) -> Disagreements:
    """Compare two configs key by key; spellings of transformers 4 and 5 are equal.

    If only one config has a key, the result depends on its value. The configs agree if the value is
    off (null, false, 0 or empty). The key is grave if it changes positions (`rope_theta`) and the
    value is not the default of the libraries. All other keys are `lacking`. Generation settings are
    not compared.

    Args:
      base: a config
      other: another config
      complete: a missing key is off, as in OpenCLIP's configs, and grave if the other value is on

    Example:
      >>> a = {"rope_theta": 1e6, "torch_dtype": "float32"}
      >>> b = {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}, "dtype": "float16"}
      >>> disagreements(a, b).grave
      {'rope_theta': ('1000000.0', '10000.0')}
    """
    ours, theirs = map(_canonical, _one_level(base, other))
    result = Disagreements({}, {}, {})
    for key in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(key, _ABSENT), theirs.get(key, _ABSENT)
        parts = key.split(".")
        if _agree(key, a, b) or _is_generation(key, ours) or _is_generation(key, theirs):
            continue
        if any(map(_HARMLESS.fullmatch, parts)):
            kind = result.harmless
        elif _ABSENT in (a, b) and not complete and not _changes_positions(key, ours, theirs):
            kind = result.lacking
        else:
            kind = result.grave
        key, a, b = _first_difference(key, a, b)
        kind[key] = (_shown(a), _shown(b))
    return result


def generation_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the special tokens and generation settings of a config, by dotted key."""
    values = flat(config)
    return {key: value for key, value in values.items() if _is_generation(key, values)}


def _is_generation(key: str, config: Mapping[str, Any]) -> bool:
    """Return whether a dotted key of a flat config is a setting of `generate`; not `moe.top_k`."""
    parent, _, last = key.rpartition(".")
    if _GENERATION.fullmatch(last) is None:
        return False
    # Older configs repeat all of these settings in each tower.
    return (
        not parent
        or _TOKENS.fullmatch(last) is not None
        or any(f"{parent}.{other}" in config for other in ("num_beams", "do_sample"))
    )


def _agree(key: str, a: Any, b: Any) -> bool:
    """Return whether two configs, of which one may lack the key, agree on it."""
    if _ABSENT not in (a, b):
        return _same(a, b)
    if key.rpartition(".")[2] in _TRUE:
        return True in (a, b)
    return _same(a, b) and not _default_is_on(key, a, b)


def _default_is_on(key: str, *values: Any) -> bool:
    """Return whether a value is false and the default of the key is true."""
    return False in values and True in _POSITIONS.get(key.rpartition(".")[2], ())


def _changes_positions(key: str, base: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether a key that only one config has changes positions by its value."""
    parts = key.split(".")
    name = next((part for part in parts if part in _POSITIONS), None)
    if name is None:
        return False
    value = base.get(key, other.get(key))
    model_type = ".".join([*parts[:-1], "model_type"])
    special = [
        x
        for config in (base, other)
        if (x := _DEFAULTS.get((name, str(config.get(model_type))))) is not None
    ]
    return not any(_same(value, default) for default in special or _POSITIONS[name])


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a config to dotted keys; lists are values.

    Example:
      >>> flat({"a": 1, "text_config": {"b": [2]}})
      {'a': 1, 'text_config.b': [2]}
    """
    values: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[f"{prefix}{key}"] = value
    return values


def updated(config: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a config with changed values.

    Args:
      config: nested config
      changes: dotted key -> value; None removes the key

    Example:
      >>> updated({"a": 1, "text_config": {"b": 2}}, {"text_config.b": 3, "a": None})
      {'text_config': {'b': 3}}
    """
    result = json.loads(json.dumps(config))
    for dotted, value in changes.items():
        parent, keys = result, dotted.split(".")
        for key in keys[:-1]:
            parent = parent.setdefault(key, {})
        if value is None:
            parent.pop(keys[-1], None)
        else:
            parent[keys[-1]] = value
    return result


def _one_level(*configs: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Move `text_config` to the top level if only some of the configs have it."""
    nested = [isinstance(config.get("text_config"), dict) for config in configs]
    if all(nested) or not any(nested):
        return list(configs)
    return [
        {**config["text_config"], **{k: x for k, x in config.items() if k != "text_config"}}
        if inside
        else config
        for config, inside in zip(configs, nested, strict=True)
    ]


def _canonical(config: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten a config, with one spelling for keys and values that libraries spell differently."""
    result: dict[str, Any] = {}
    for key, value in _pooling(config).items():
        if key in ("rope_parameters", "rope_scaling"):
            result |= _rope(value) if isinstance(value, dict) else {}
        elif key in KEYS:
            result["dtype"] = str(value).removeprefix("torch.")
        elif isinstance(value, dict) and value:
            result |= {f"{key}.{name}": x for name, x in _canonical(value).items()}
        else:
            result[_KEYS.get(key, key)] = (
                _VALUES.get(value, value) if isinstance(value, str) else value
            )
    return _filled(result)


def _pooling(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config of a pooling module in the spelling before sentence-transformers 6.

    Example:
      >>> old = _pooling({"embedding_dimension": 4, "pooling_mode": "mean"})
      >>> [key for key, value in old.items() if value]
      ['word_embedding_dimension', 'pooling_mode_mean_tokens']
    """
    modes = config.get("pooling_mode")
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or not {*map(str, modes)} <= _POOLING.keys():
        return config
    old = {"embedding_dimension": "word_embedding_dimension"}
    renamed = {old.get(key, key): x for key, x in config.items() if key != "pooling_mode"}
    return renamed | {key: mode in modes for mode, key in _POOLING.items()}


def _filled(config: dict[str, Any]) -> dict[str, Any]:
    """Replace null by the value that transformers computes, and remove keys that it ignores."""
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    if heads and config.get("num_key_value_heads", 0) is None:
        config["num_key_value_heads"] = heads
    if heads and isinstance(width, int) and config.get("head_dim", 0) is None:
        config["head_dim"] = width // heads
    if config.get("use_sliding_window") is False:
        config = {
            k: x for k, x in config.items() if k not in ("sliding_window", "max_window_layers")
        }
    if config.get("model_type") in ("gemma", "gemma2"):  # They read only hidden_activation.
        config.pop("hidden_act", None)
    if isinstance(config.get("pos_att_type"), str):  # DeBERTa
        config["pos_att_type"] = config["pos_att_type"].split("|")
    return {k: x for k, x in config.items() if x is not None or k not in _COMPUTED}


def _rope(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return RoPE settings in transformers 4's spelling; scaling keys are in `rope_scaling.`."""
    if isinstance(value.get("full_attention"), dict):  # Gemma 3, ModernBERT
        local = value.get("sliding_attention")
        settings = _rope(value["full_attention"])
        if isinstance(local, dict) and "rope_theta" in local:
            settings["rope_local_base_freq"] = local["rope_theta"]
        return settings
    settings = {("rope_type" if key == "type" else key): x for key, x in value.items()}
    kind = settings.get("rope_type")
    settings["rope_type"] = _VALUES.get(kind, kind) if isinstance(kind, str) else kind
    if settings["rope_type"] in _NO_SCALING:
        del settings["rope_type"]
    top = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    return {(key if key in top else f"rope_scaling.{key}"): x for key, x in settings.items()}


def _same(a: Any, b: Any) -> bool:
    """Return whether two values are equal as numbers or lists, or both are off."""
    if a is _ABSENT or b is _ABSENT:
        return not (b if a is _ABSENT else a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in (a, b)):
        return math.isclose(a, b, rel_tol=_CLOSE)
    off = all(x is None or x is False or x in ("", [], {}) for x in (a, b))
    return off or a == b


def _first_difference(key: str, a: Any, b: Any) -> tuple[str, Any, Any]:
    """Return the first elements in which two long lists differ, with their index."""
    if isinstance(a, list) and isinstance(b, list) and _shown(a) == _shown(b):
        pairs = enumerate(zip(a, b, strict=False))
        index = next((i for i, pair in pairs if not _same(*pair)), None)
        if index is not None:
            return f"{key}[{index}]", a[index], b[index]
        return f"length of {key}", len(a), len(b)
    return key, a, b


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "(none)"
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def as_text(differences: Mapping[str, tuple[str, str]], names: Iterable[str]) -> str:
    """Describe the keys in which two models differ, with both values, in one line.

    Args:
      differences: key -> the two values, from `Disagreements`
      names: names of the two models
    """
    a, b = names
    return ", ".join(f"{key} is {x} in {a} and {y} in {b}" for key, (x, y) in differences.items())


def num_heads(directory: Path | None, names: Iterable[str]) -> int | dict[str, int]:
    """Return the number of query heads for `units.assign`: one number, or name prefix -> number.

    Read from `num_attention_heads` (of the vision and the text config if there are two), or from
    OpenCLIP's `open_clip_config.json`.

    Args:
      directory: directory of the base model; None for a single file
      names: names of its tensors, to find the prefix of the image tower

    Raises:
      UserError: the config does not contain the number of heads
    """
    vision, text = _heads_of_towers(directory) if directory else (None, None)
    if text is None:
        source = f"{directory}/config.json" if directory else "a single file"
        raise UserError(
            f"unit 'head': {source} does not contain the number of attention heads; pass "
            "--num-heads 12, or --num-heads vision_model=12,text_model=8"
        )
    if vision is None:
        return text
    towers = {prefix for name in names if (prefix := _vision_prefix(name))}
    return {"": text} | dict.fromkeys(sorted(towers), vision)


def parse_num_heads(text: str) -> int | dict[str, int]:
    """Parse `12` or `vision_model=12,text_model=8`.

    Raises:
      UserError: any other text

    Example:
      >>> parse_num_heads("12"), parse_num_heads("visual=12,=8")
      (12, {'visual': 12, '': 8})
    """
    try:
        if "=" not in text:
            return int(text)
        pairs = (part.split("=") for part in text.split(","))
        return {prefix.strip(): int(number) for prefix, number in pairs}
    except ValueError:
        raise UserError(f"--num-heads {text!r}: expected 12, or vision=12,text=8") from None


def _heads_of_towers(directory: Path) -> tuple[int | None, int | None]:
    """Return the number of heads of the image tower (None if there is none) and of the rest."""
    config = read_config(directory) or {}
    if (number := _count(config.get("num_attention_heads"))) is not None:
        return None, number
    kind = str(config.get("model_type", ""))
    known = next((start for start in _DEFAULT_HEADS if kind.startswith(start)), "")
    defaults = _DEFAULT_HEADS.get(known, (None, None))
    vision, text = (
        _count(_object(config.get(key)).get("num_attention_heads", default))
        for key, default in zip(("vision_config", "text_config"), defaults, strict=True)
    )
    if text is not None:
        return vision, text
    if (path := directory / "open_clip_config.json").is_file():
        config = _object(_object(read_json(path)).get("model_cfg"))
        vision_config, text_config = (_object(config.get(k)) for k in ("vision_cfg", "text_cfg"))
        head_width = _count(vision_config.get("head_width")) or OPEN_CLIP_HEAD_WIDTH
        if (width := _count(vision_config.get("width"))) is not None:
            return width // head_width, _count(text_config.get("heads"))
    return None, None


def _vision_prefix(name: str) -> str | None:
    parts = name.split(".")
    for i, part in enumerate(parts[:3]):
        if part.startswith("vis"):
            return ".".join(parts[: i + 1])
    return None


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(value: Any) -> int | None:
    valid = isinstance(value, int) and not isinstance(value, bool) and value > 0
    return value if valid else None
