"""Compare the auxiliary files of the models: configs, image processors, tokenizers, templates."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from modelstock_jax.checkpoint_merge.config_edits import TIED
from modelstock_jax.checkpoint_merge.hf_config import (
    CONFIG,
    Disagreements,
    as_text,
    disagreements,
    generation_keys,
    read_config,
    updated,
)
from modelstock_jax.checkpoint_merge.matching import PlanIssues
from modelstock_jax.checkpoint_merge.options import Options
from modelstock_jax.checkpoint_merge.sources import MODULES, Source, folders, tokenizer_folders
from modelstock_jax.checkpoint_merge.token_ids import TokenIds, added
from modelstock_jax.errors import UserError, listed
from modelstock_jax.tensor_files.reader import read_json

# Keys that describe the stored tensors: a note does not claim that a difference has no effect.
_OF_TENSORS = re.compile(r"(?:\w*_)?vocab_size|quantization\w*|compression_config|pruned_heads")

OPEN_CLIP, SCHEDULER = "open_clip_config.json", "scheduler_config.json"
# Configs that determine what a model computes, compared key by key.
_COMPARED = (CONFIG, OPEN_CLIP, SCHEDULER, MODULES)
# Keys of a scheduler that define the prediction target; all others are chosen when sampling.
_SCHEDULER_TRAINING_KEYS = (
    "prediction_type",
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "rescale_betas_zero_snr",
)
_IMAGES = (
    "image_mean",
    "image_std",
    "size",
    "crop_size",
    "rescale_factor",
    "resample",
    "do_rescale",
    "do_normalize",
    "do_resize",
    "do_center_crop",
)
_SENTENCES = ("sentence_bert_config.json", "config_sentence_transformers.json")
# Settings of a sentence-transformers model whose config lacks them or states null.
_SENTENCE_DEFAULTS = {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"}
TEMPLATES = ("additional_chat_templates", "chat_templates")


def compare_configs(
    sources: Sequence[Source],
    options: Options,
    issues: PlanIssues,
    config_option: str,
    changes: Mapping[str, Iterable[str]],
) -> None:
    """Report a problem for keys that change a forward pass, and one note for all other keys.

    Args:
      sources: the base and the fine-tunes
      options: options of the merge
      issues: receives the problems and notes
      config_option: model whose config is written, as in `--config-from`
      changes: path of a config -> keys that the merge itself sets or removes, which need no note
    """
    base = sources[0]
    harmless: dict[tuple[str, str], list[str]] = {}
    missing: dict[str, list[str]] = {}
    reported: set[tuple[str, str]] = set()
    for number, source in enumerate(sources[1:], 1):
        for path, keys in _disagreements(base, source):
            reported |= {(path, key) for key in keys.grave}
            written = changes.get(path, ())
            unchanged = [key for key in keys.harmless if not _written(key, written)]
            for text in _harmless_differences(path, unchanged, config_option):
                harmless.setdefault(text, []).append(source.label)
            if lacking := [key for key in keys.lacking if not _written(key, written)]:
                missing.setdefault(f"{path}: {listed(lacking, 6)}", []).append(source.label)
            _report_grave(path, keys.grave, (base, source), number, options, issues)
    # Two fine-tunes may disagree on a key that the base lacks.
    for number, source in enumerate(sources[2:], 2):
        for path, keys in _disagreements(sources[1], source):
            grave = {key: x for key, x in keys.grave.items() if (path, key) not in reported}
            _report_grave(path, grave, (sources[1], source), number, options, issues)
    for (differs, consequence), labels in harmless.items():
        issues.notes.append(f"{differs} in {listed(labels)}{consequence}")
    for names, labels in missing.items():
        issues.notes.append(
            f"{names}: in only one of the configs of {base.label} and "
            f"{listed(labels)}; the config of {config_option} is written"
        )


def _harmless_differences(
    path: str, keys: Sequence[str], config_option: str
) -> Iterable[tuple[str, str]]:
    """Yield the parts of a note before and after the labels, for each kind of key that differs."""
    kinds: dict[str, list[str]] = {}
    for key in keys:
        last = key.rpartition(".")[2]
        kind = "tied" if last == TIED else "tensors" if _OF_TENSORS.fullmatch(last) else "other"
        kinds.setdefault(kind, []).append(key)
    for kind, names in kinds.items():
        several = len(names) > 1
        values = "the values" if several else "the value"
        consequence = f"; {values} of {config_option} {'are' if several else 'is'} written"
        if kind == "tied":
            # `config_edits` sets these keys if the written config does not match the tensors.
            consequence += f", which {'match' if several else 'matches'} the merged tensors"
        elif kind == "other":
            consequence = f", which does not change what the model computes{consequence}"
        yield f"{path}: {listed(names, 6)} differ{'' if several else 's'}", consequence


def _written(key: str, changes: Iterable[str]) -> bool:
    """Return whether a key is one of the keys that the merge changes, or inside one of them."""
    return any(f"{key}.".startswith(f"{other}.") or other.endswith(f".{key}") for other in changes)


def _report_grave(
    path: str,
    grave: dict[str, tuple[str, str]],
    pair: tuple[Source, Source],
    number: int,
    options: Options,
    issues: PlanIssues,
) -> None:
    if grave and options.config_from is None:
        labels = pair[0].label, pair[1].label
        issues.add_problem(
            f"{path}: {as_text(grave, labels)} (pass --config-from base or "
            f"--config-from model:{number} to choose the config that is written)"
        )


def _disagreements(base: Source, source: Source) -> Iterable[tuple[str, Disagreements]]:
    for path, *pair in _config_pairs(base, source):
        name = Path(path).name
        if name == SCHEDULER:
            pair = [
                {key: x for key, x in config.items() if key in _SCHEDULER_TRAINING_KEYS}
                for config in pair
            ]
        yield path, disagreements(*pair, complete=name in (OPEN_CLIP, MODULES))


def config_disagreements(base: Source, source: Source) -> list[str]:
    """Return the keys of configs that differ and change a forward pass."""
    return [key for _, keys in _disagreements(base, source) for key in keys.grave]


def _config_pairs(base: Source, source: Source) -> Iterable[tuple[str, dict, dict]]:
    """Yield the configs that both models have: path, config of the base, config of the other."""
    if base.directory is None or source.directory in (None, base.directory):
        return
    for folder in folders(base.directory):
        for name in _COMPARED:
            local = f"{folder}/{name}" if folder else name
            paths = [s.directory / local for s in (base, source)]  # type: ignore[operator]
            if not all(path.is_file() for path in paths):
                continue
            ours, theirs = map(read_json, paths)
            if name == CONFIG and isinstance(ours, dict) and isinstance(theirs, dict):
                # As they are written for layers and tokens of several models.
                ours = updated(ours, base.config_values(ours))
                theirs = updated(theirs, source.config_values(theirs))
            if name == MODULES:
                ours, theirs = map(_modules, (ours, theirs))
            if isinstance(ours, dict) and isinstance(theirs, dict):
                yield local, ours, theirs


def _modules(index: Any) -> dict[str, Any]:
    """Return the classes of a sentence-transformers model in order.

    Without their packages: releases of the library moved the classes.
    """
    entries = index if isinstance(index, list) else []
    return {
        "modules": [
            str(entry.get("type")).rpartition(".")[2]
            for entry in entries
            if isinstance(entry, dict)
        ]
    }


def compare_processors(sources: Sequence[Source], issues: PlanIssues, config_option: str) -> None:
    """Note where models preprocess images or sentences differently.

    Args:
      sources: the base and the fine-tunes
      issues: receives the notes
      config_option: model whose files are written, as in `--config-from`
    """
    base = _processing(sources[0])
    for number, source in enumerate(sources[1:], 1):
        other = _processing(source)
        keys = [key for key in base if key in other and base[key] != other[key]]
        if keys:
            own = f"model:{number}"
            choice = "" if own == config_option else f" (pass --config-from {own} for its files)"
            issues.notes.append(
                f"{listed(keys, 6)} of {source.label} differ from the base's; the files of "
                f"{config_option} are written{choice}"
            )


def _processing(source: Source) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    if source.directory is None:
        return settings
    for folder in folders(source.directory):
        directory = source.directory / folder
        prefix = f"{folder}/" if folder else ""
        nested = read_object(directory / "processor_config.json").get("image_processor")
        images = (nested if isinstance(nested, dict) else {}) | read_object(
            directory / "preprocessor_config.json"
        )
        settings |= {
            f"{prefix}preprocessor_config.json {key}": images[key]
            for key in _IMAGES
            if key in images
        }
        for name in _SENTENCES:
            settings |= {
                f"{prefix}{name} {key}": value
                for key, value in _sentence_settings(directory / name).items()
                if key != "__version__"
            }
    return settings


def _sentence_settings(path: Path) -> dict[str, Any]:
    """Return the settings in a file of sentence-transformers, without empty prompts."""
    settings = read_object(path)
    if path.name == _SENTENCES[1] and (path.parent / MODULES).is_file():
        stated = {key: value for key, value in settings.items() if value is not None}
        settings = {**_SENTENCE_DEFAULTS, **stated}
        if isinstance(prompts := settings["prompts"], dict):
            settings["prompts"] = {name: prompt for name, prompt in prompts.items() if prompt}
    return settings


def compare_lengths(config: Source, tokenizer: Source, option: str, issues: PlanIssues) -> None:
    """Note if the tokenizer of another model changes the maximum length of a sentence encoder.

    sentence-transformers 6 no longer writes `max_seq_length`; it reads the tokenizer's length.

    Args:
      config: model whose config files are written
      tokenizer: model whose tokenizer is written
      option: model of the config, as in `--tokenizer-from`
      issues: receives the notes
    """
    if config.directory is None or tokenizer.tokenizer_directory is None:
        return
    for folder in folders(config.directory):
        settings = config.directory / folder / _SENTENCES[0]
        if not settings.is_file() or "max_seq_length" in read_object(settings):
            continue
        limit = (read_config(config.directory / folder) or {}).get("max_position_embeddings")
        own, written = (
            _max_length(directory / folder, limit)
            for directory in (config.directory, tokenizer.tokenizer_directory)
        )
        if own != written and None not in (own, written):
            issues.notes.append(
                f"the maximum sequence length is {own} in {config.label}, but {written} in the "
                f"tokenizer of {tokenizer.label}, which is written (pass --tokenizer-from {option} "
                f"to keep {own})"
            )


def _max_length(directory: Path, limit: Any) -> int | None:
    """Return the number of tokens at which a tokenizer truncates; None if it is not stated."""
    length = read_object(directory / "tokenizer_config.json").get("model_max_length")
    lengths = [int(x) for x in (length, limit) if isinstance(x, (int, float))]
    return min(lengths) if lengths else None


def compare_tokenizers(
    sources: Sequence[Source], issues: PlanIssues, token_ids: Sequence[TokenIds]
) -> None:
    """Note where the fine-tunes' templates, tokens or generation settings differ from the base's.

    Args:
      sources: the base and the fine-tunes
      issues: receives the notes
      token_ids: from `read_tokens`
    """
    settings = [_settings(source) | added(token_ids, i) for i, source in enumerate(sources)]
    agreed, different = [], []
    for key in sorted(set().union(*settings)):
        values = [setting.get(key) for setting in settings]
        if None in values[1:] or all(value == values[0] for value in values[1:]):
            continue
        (agreed if all(value == values[1] for value in values[1:]) else different).append(key)
    base = sources[0].label
    if agreed:
        issues.notes.append(
            f"{listed(agreed, 6)}: the fine-tunes agree and {base} differs; the files of {base} "
            "are written (pass --tokenizer-from model:1 to write those of the fine-tunes)"
        )
    if different:
        issues.notes.append(
            f"{listed(different, 6)}: the fine-tunes differ from {base} and from each other; the "
            f"files of {base} are written (pass --tokenizer-from model:1 to write those of the "
            "first fine-tune)"
        )


def _settings(source: Source) -> dict[str, Any]:
    """Return chat templates, special tokens and generation settings of a model, by name."""
    directory = source.tokenizer_directory
    if directory is None:
        return {}
    settings: dict[str, Any] = {}
    for folder in tokenizer_folders(directory):
        prefix = f"{folder} " if folder else ""
        settings |= {f"{prefix}{key}": value for key, value in _tokens(directory / folder).items()}
    generation = read_object(directory / "generation_config.json")
    settings |= {
        f"generation_config {key}": value
        for key, value in generation.items()
        if key not in ("transformers_version", "_from_model_config")
    }
    if source.directory is not None:
        settings |= generation_keys(read_config(source.directory) or {})
    return {key: value for key, value in settings.items() if value is not None}


def _tokens(directory: Path) -> dict[str, Any]:
    """Return the chat templates and special tokens in a tokenizer's directory."""
    tokenizer = read_object(directory / "tokenizer_config.json")
    values: dict[str, Any] = {}
    for name in ("processor_config.json", "chat_template.json", "tokenizer_config.json"):
        if template := read_object(directory / name).get("chat_template"):
            values["chat template"] = _template(template)
    jinja = [
        directory / "chat_template.jinja",
        *(path for name in TEMPLATES for path in sorted((directory / name).glob("*.jinja"))),
    ]
    for path in jinja:
        if path.is_file():
            name = "chat template" if path.parent == directory else f"chat template {path.stem}"
            values[name] = _read(path)
    for key, value in (tokenizer | read_object(directory / "special_tokens_map.json")).items():
        if key.endswith("_token"):
            values[key] = value.get("content") if isinstance(value, dict) else value
    return values


def _template(value: Any) -> str:
    """Return one template, or several by name, as text; a sole `default` counts as one."""
    if isinstance(value, list):
        named = {t.get("name"): t.get("template") for t in value if isinstance(t, dict)}
        value = named["default"] if set(named) == {"default"} else named
    return str(value).strip()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def read_object(path: Path) -> dict[str, Any]:
    """Return a JSON object; empty if the file is missing or contains another value."""
    if not path.is_file():
        return {}
    value = read_json(path)
    return value if isinstance(value, dict) else {}
