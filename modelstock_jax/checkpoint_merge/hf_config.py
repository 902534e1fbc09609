"""config.json: what it says of a model, where models disagree, and what a merge changes in it."""

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
KEYS = ("torch_dtype", "dtype")  # transformers 4 and 5; 5 reads both
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
# Defaults of `generate` that older configs hold: a note, as generation_config.json's are.
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
# Other spellings of a key or a value that transformers has used, and its formulas in common.
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
# Where null is a default that transformers 5 writes out.
_COMPUTED = ("no_rope_layers", "layer_types", "hidden_activation", "n_inner")
# Keys that change positions, with the values that libraries take where a config lacks them.
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
# Defaults of transformers that are others for a model_type.
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
_CLOSE = 1e-6  # Relative: 1e-6 and its float32 spelling are one number.
_ABSENT = object()


def read_config(directory: Path | None) -> dict[str, Any] | None:
    """The config.json of a model's directory; None where there is none, or no JSON object in it.

    Args:
      directory: None for a model that is a single file.

    Raises:
      UserError: a config.json that cannot be read, or is not JSON.

    Example:
      >>> read_config(None) is None
      True
    """
    if directory is None or not (directory / CONFIG).is_file():
        return None
    config = read_json(directory / CONFIG)
    return config if isinstance(config, dict) else None


def set_dtype(directory: Path, dtype: str) -> None:
    """Makes config.json, and the configs of towers within it, say `dtype`.

    Args:
      directory: with a config.json, or without one: then nothing is done.
      dtype: as transformers writes it, like `bfloat16`.
    """
    config = read_config(directory)
    if config is not None:
        config = _with_dtype(config, dtype)
        # Not to configs of pooling modules and of diffusers, which say no dtype.
        if not any(key in config for key in KEYS) and config.keys() & {
            "model_type",
            "architectures",
        }:
            config["torch_dtype"] = dtype
        write_indented_json(directory / CONFIG, config)


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The config with the dtype wherever one was said.

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
        grave: Keys that change a forward pass.
        harmless: Keys that do not.
        lacking: Keys that one config leaves out ('(none)'); their defaults are unknown here.
    """

    grave: dict[str, tuple[str, str]]
    harmless: dict[str, tuple[str, str]]
    lacking: dict[str, tuple[str, str]]


def disagreements(
    base: Mapping[str, Any], other: Mapping[str, Any], *, complete: bool = False
) -> Disagreements:
    """Compares two configs key by key; spellings of transformers 4 and 5 are compared as one.

    A key that one config lacks is equal where the other value is off (null, false, 0, empty), an
    error where it changes positions (`rope_theta`) and the other value is not the libraries'
    default, and else `lacking`. Generation settings are not compared here.

    Args:
        base: A config.
        other: Another one.
        complete: A lacking key is off, as in OpenCLIP's configs: an error where the other is on.

    Example:
        >>> a = {"rope_theta": 1e6, "torch_dtype": "float32"}
        >>> b = {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}, "dtype": "float16"}
        >>> disagreements(a, b).grave
        {'rope_theta': ('1000000.0', '10000.0')}
    """
    ours, theirs = map(_canonical, _one_level(base, other))
    found = Disagreements({}, {}, {})
    for key in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(key, _ABSENT), theirs.get(key, _ABSENT)
        parts = key.split(".")
        off = _same(a, b) and not (_ABSENT in (a, b) and _default_is_on(key, a, b))
        if off or _is_generation(key, ours) or _is_generation(key, theirs):
            continue
        if any(map(_HARMLESS.fullmatch, parts)):
            kind = found.harmless
        elif _ABSENT in (a, b) and not complete and not _moves(key, ours, theirs):
            kind = found.lacking
        else:
            kind = found.grave
        key, a, b = _first_difference(key, a, b)
        kind[key] = (_said(a), _said(b))
    return found


def generation_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key -> value of what a config says of special tokens and generation."""
    found = flat(config)
    return {key: value for key, value in found.items() if _is_generation(key, found)}


def _is_generation(key: str, config: Mapping[str, Any]) -> bool:
    """Whether a dotted key of a flat config is a setting of `generate`: `moe.top_k` is none."""
    parent, _, last = key.rpartition(".")
    if _GENERATION.fullmatch(last) is None:
        return False
    # Older configs repeat all of these settings in each tower.
    return (
        not parent
        or _TOKENS.fullmatch(last) is not None
        or any(f"{parent}.{other}" in config for other in ("num_beams", "do_sample"))
    )


def _default_is_on(key: str, *values: Any) -> bool:
    """Whether false is another value than that of a config without the key."""
    return False in values and True in _POSITIONS.get(key.rpartition(".")[2], ())


def _moves(key: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Whether a key that one config lacks changes positions by its value in the other."""
    parts = key.split(".")
    named = next((part for part in parts if part in _POSITIONS), None)
    if named is None:
        return False
    value = ours.get(key, theirs.get(key))
    kind = ".".join([*parts[:-1], "model_type"])
    special = [
        x
        for config in (ours, theirs)
        if (x := _DEFAULTS.get((named, str(config.get(kind))))) is not None
    ]
    return not any(_same(value, default) for default in special or _POSITIONS[named])


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value; lists are values.

    Example:
        >>> flat({"a": 1, "text_config": {"b": [2]}})
        {'a': 1, 'text_config.b': [2]}
    """
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def updated(config: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A config with other values under dotted keys; None removes a key.

    Example:
        >>> updated({"a": 1, "text_config": {"b": 2}}, {"text_config.b": 3, "a": None})
        {'text_config': {'b': 3}}
    """
    made = json.loads(json.dumps(config))
    for dotted, value in changes.items():
        place, keys = made, dotted.split(".")
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        if value is None:
            place.pop(keys[-1], None)
        else:
            place[keys[-1]] = value
    return made


def _one_level(*configs: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Configs with `text_config` at the top where another one keeps those keys at the top."""
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
    """A config by dotted keys, in one spelling of those that libraries have used."""
    made: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("rope_parameters", "rope_scaling"):
            made |= _rope(value) if isinstance(value, dict) else {}
        elif key in KEYS:
            made["dtype"] = str(value).removeprefix("torch.")
        elif isinstance(value, dict) and value:
            made |= {f"{key}.{name}": x for name, x in _canonical(value).items()}
        else:
            made[_KEYS.get(key, key)] = (
                _VALUES.get(value, value) if isinstance(value, str) else value
            )
    return _filled(made)


def _filled(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers computes where a value is null, and without what it then ignores."""
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    if heads and config.get("num_key_value_heads", 0) is None:
        config["num_key_value_heads"] = heads
    if heads and isinstance(width, int) and config.get("head_dim", 0) is None:
        config["head_dim"] = width // heads
    if config.get("use_sliding_window") is False:
        config = {
            k: x for k, x in config.items() if k not in ("sliding_window", "max_window_layers")
        }
    if config.get("model_type") in ("gemma", "gemma2"):  # They read hidden_activation alone.
        config.pop("hidden_act", None)
    if isinstance(config.get("pos_att_type"), str):  # DeBERTa's
        config["pos_att_type"] = config["pos_att_type"].split("|")
    return {k: x for k, x in config.items() if x is not None or k not in _COMPUTED}


def _rope(value: Mapping[str, Any]) -> dict[str, Any]:
    """Rope settings as transformers 4 spelled them, `rope_scaling.` before those that scale."""
    if isinstance(value.get("full_attention"), dict):  # Gemma 3, ModernBERT
        local = value.get("sliding_attention")
        found = _rope(value["full_attention"])
        if isinstance(local, dict) and "rope_theta" in local:
            found["rope_local_base_freq"] = local["rope_theta"]
        return found
    rest = {("rope_type" if key == "type" else key): x for key, x in value.items()}
    kind = rest.get("rope_type")
    rest["rope_type"] = _VALUES.get(kind, kind) if isinstance(kind, str) else kind
    if rest["rope_type"] in _NO_SCALING:
        del rest["rope_type"]
    apart = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    return {(key if key in apart else f"rope_scaling.{key}"): x for key, x in rest.items()}


def _same(a: Any, b: Any) -> bool:
    """Whether two values are one number, one list or both off."""
    if a is _ABSENT or b is _ABSENT:
        return not (b if a is _ABSENT else a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in (a, b)):
        return math.isclose(a, b, rel_tol=_CLOSE)
    off = all(x is None or x is False or x in ("", [], {}) for x in (a, b))
    return off or a == b


def _first_difference(key: str, a: Any, b: Any) -> tuple[str, Any, Any]:
    """Of two long lists the first elements that differ, with their index."""
    if isinstance(a, list) and isinstance(b, list) and _said(a) == _said(b):
        pairs = enumerate(zip(a, b, strict=False))
        index = next((i for i, pair in pairs if not _same(*pair)), None)
        if index is not None:
            return f"{key}[{index}]", a[index], b[index]
        return f"length of {key}", len(a), len(b)
    return key, a, b


def _said(value: Any) -> str:
    if value is _ABSENT:
        return "(none)"
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def as_text(found: Mapping[str, tuple[str, str]], names: Iterable[str]) -> str:
    """Keys with the values that two models say, for one line."""
    a, b = names
    return ", ".join(f"{key} is {x} in {a} and {y} in {b}" for key, (x, y) in found.items())


# Attention heads of a model, from its config.json.


# Where a saved config leaves its defaults out: transformers' CLIPVisionConfig and CLIPTextConfig.
_CLIP = {"vision_config": 12, "text_config": 8}
OPEN_CLIP_HEAD_WIDTH = 64


def num_heads(directory: Path | None, names: Iterable[str]) -> int | dict[str, int]:
    """Query heads as `units.assign` takes them: one number, or beginning of a name -> number.

    Read from `num_attention_heads` (of the vision and the text config where there are two), or
    from OpenCLIP's `open_clip_config.json`.

    Args:
      directory: of the base model; None for a single file.
      names: of its tensors, to find where the image tower begins.

    Raises:
      UserError: they cannot be known.
    """
    vision, text = _known(directory) if directory else (None, None)
    if text is None:
        where = f"{directory}/config.json" if directory else "a single file"
        raise UserError(
            f"unit 'head': {where} does not say how many attention heads there are; give "
            "--num-heads 12, or --num-heads vision_model=12,text_model=8"
        )
    if vision is None:
        return text
    towers = {prefix for name in names if (prefix := _vision_prefix(name))}
    return {"": text} | dict.fromkeys(sorted(towers), vision)


def parse_num_heads(text: str) -> int | dict[str, int]:
    """Reads `12` or `vision_model=12,text_model=8`.

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


def _known(directory: Path) -> tuple[int | None, int | None]:
    """Heads of the image tower (None where there is none) and of the rest."""
    config = read_config(directory) or {}
    if (number := _count(config.get("num_attention_heads"))) is not None:
        return None, number
    clip = str(config.get("model_type", "")).startswith("clip")
    found = [
        _count(_object(config.get(key)).get("num_attention_heads", default if clip else None))
        for key, default in _CLIP.items()
    ]
    if found[1] is not None:
        return found[0], found[1]
    if (path := directory / "open_clip_config.json").is_file():
        config = _object(_object(read_json(path)).get("model_cfg"))
        vision, text = _object(config.get("vision_cfg")), _object(config.get("text_cfg"))
        head_width = _count(vision.get("head_width")) or OPEN_CLIP_HEAD_WIDTH
        if (width := _count(vision.get("width"))) is not None:
            return width // head_width, _count(text.get("heads"))
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
    whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
    return value if whole else None
