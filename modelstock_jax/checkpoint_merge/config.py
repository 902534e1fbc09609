"""config.json: what it says of a model, where models disagree, and what a merge changes in it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from modelstock_jax.tensor_files.reader import read_json
from modelstock_jax.tensor_files.writer import write_json

CONFIG = "config.json"
KEYS = ("torch_dtype", "dtype")  # transformers 4 and 5; 5 reads both
# Keys that change no number of a forward pass: paths, versions, labels, dtypes, caches, training.
_HARMLESS = re.compile(
    r"_?name_or_path|_commit_hash|\w*_version|unsloth_\w+|architectures|auto_map|_class_name|"
    r"torch_dtype|dtype|\w*use_cache|cache_\w+|_?attn_implementation\w*|"
    r"id2label|label2id|num_labels|_num_labels|problem_type|finetuning_task|task_specific_params|"
    r"\w*dropout\w*|\w*drop_?path\w*|\w*_drop|\w*_pdrop|layerdrop|\w*layerdrop|mask_time_\w+|"
    r"mask_feature_\w+|apply_spec_augment|initializer_\w+|\w*_init_std|init_std|"
    r"output_attentions|output_hidden_states|return_dict|torchscript|gradient_checkpointing|"
    r"output_router_logits|router_\w*loss\w*|\w*_loss_\w*|label_smoothing|pretraining_tp|"
    r"tie_word_embeddings|vocab_size|\w*_vocab_size|quantization_config|quantization|"
    r"compression_config|prefix|use_return_dict|is_decoder|chunk_size_feed_forward|"
    r"pruned_heads|tf_legacy_loss|use_bfloat16|tokenizer_class|processor_class|"
    r"model_max_length"
)
# Defaults of `generate` that older configs hold: a note, as generation_config.json's are.
_GENERATION = re.compile(
    r"\w*_token_id|max_length|min_length|max_new_tokens|do_sample|early_stopping|num_beams|"
    r"num_beam_groups|diversity_penalty|temperature|top_k|top_p|typical_p|repetition_penalty|"
    r"length_penalty|no_repeat_ngram_size|encoder_no_repeat_ngram_size|bad_words_ids|"
    r"num_return_sequences|remove_invalid_values|suppress_tokens|begin_suppress_tokens|"
    r"exponential_decay_length_penalty|forced_\w+|sep_token"
)
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
        if not any(key in config for key in KEYS):
            config["torch_dtype"] = dtype
        write_json(directory / CONFIG, config)


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


def disagreements(
    base: Mapping[str, Any], other: Mapping[str, Any]
) -> tuple[dict[str, tuple[str, str]], dict[str, tuple[str, str]]]:
    """Keys in which two configs differ: those that change a forward pass, and harmless ones.

    A key that one config leaves out has a default that is not known here; it counts where it says
    how positions are encoded, and is harmless where it is off (null, false, 0, empty). What
    transformers 4 and 5 spell differently is compared in one spelling.

    Returns:
        Two mappings, dotted key -> the two values as JSON ('(none)' where a key is left out).

    Example:
        >>> a = {"rope_theta": 1e6, "torch_dtype": "float32"}
        >>> b = {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}, "dtype": "float16"}
        >>> disagreements(a, b)[0]
        {'rope_theta': ('1000000.0', '10000.0')}
    """
    ours, theirs = _canonical(base), _canonical(other)
    grave: dict[str, tuple[str, str]] = {}
    harmless: dict[str, tuple[str, str]] = {}
    for key in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(key, _ABSENT), theirs.get(key, _ABSENT)
        if a == b or all(not x or x is _ABSENT for x in (a, b)) and _ABSENT in (a, b):
            continue
        last = key.rpartition(".")[2]
        if _HARMLESS.fullmatch(last) or _GENERATION.fullmatch(last) or _HARMLESS.fullmatch(
                key.partition(".")[0]):
            harmless[key] = (_said(a), _said(b))
        elif _ABSENT in (a, b) and "rope_scaling" not in key:
            harmless[key] = (_said(a), _said(b))
        else:
            grave[key] = (_said(a), _said(b))
    return grave, harmless


def generation_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key -> value of what a config says of special tokens and generation."""
    return {key: value for key, value in flat(config).items()
            if _GENERATION.fullmatch(key.rpartition(".")[2])}


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
    """A config with other values under dotted keys.

    Example:
        >>> updated({"a": 1, "text_config": {"b": 2}}, {"text_config.b": 3, "c": 4})
        {'a': 1, 'text_config': {'b': 3}, 'c': 4}
    """
    made = json.loads(json.dumps(config))
    for dotted, value in changes.items():
        place, keys = made, dotted.split(".")
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = value
    return made


def vocabulary_keys(config: Mapping[str, Any], rows: int) -> list[str]:
    """Dotted keys of a config that say how many rows a vocabulary has.

    Example:
        >>> vocabulary_keys({"vocab_size": 65, "decoder_vocab_size": 65, "type_vocab_size": 2}, 65)
        ['vocab_size', 'decoder_vocab_size']
    """
    found = flat(config)
    sizes = [key for key, value in found.items()
             if key.rpartition(".")[2].endswith("vocab_size") and value == rows]
    return sizes or [key for key in ("text_config.vocab_size", "vocab_size") if key in found][:1]


def _canonical(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config in one spelling: transformers 5's `rope_parameters` as 4 writes them."""
    made: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
            made |= _rope(value)
        elif key == "rope_scaling":
            made.setdefault(key, None)
        elif key in KEYS:
            made["dtype"] = value
        elif isinstance(value, dict) and value:
            made |= {f"{key}.{name}": x for name, x in _canonical(value).items()}
        else:
            made[key] = value
    return made


def _rope(value: Mapping[str, Any]) -> dict[str, Any]:
    if "full_attention" in value and isinstance(value["full_attention"], dict):  # Gemma 3
        local = value.get("sliding_attention")
        found = _rope(value["full_attention"])
        if isinstance(local, dict) and "rope_theta" in local:
            found["rope_local_base_freq"] = local["rope_theta"]
        return found
    rest = {("rope_type" if key == "type" else key): x for key, x in value.items()}
    found = {key: rest.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in rest}
    if rest.get("rope_type") == "default" or not rest:
        return found | {"rope_scaling": None}
    return found | {"rope_scaling": dict(sorted(rest.items()))}


def _said(value: Any) -> str:
    if value is _ABSENT:
        return "(none)"
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def as_text(found: Mapping[str, tuple[str, str]], names: Iterable[str]) -> str:
    """Keys with the values that two models say, for one line."""
    a, b = names
    return ", ".join(f"{key} is {x} in {a} and {y} in {b}" for key, (x, y) in found.items())
