"""Whether the files next to the tensors agree: configs, image processors, tokenizers, templates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from modelstock_jax.checkpoint_merge import tokens
from modelstock_jax.checkpoint_merge.components import MODULES, folders, tokenizer_folders
from modelstock_jax.checkpoint_merge.config import (
    CONFIG,
    Disagreements,
    as_text,
    disagreements,
    generation_keys,
    read_config,
)
from modelstock_jax.checkpoint_merge.match import Findings
from modelstock_jax.checkpoint_merge.options import Options
from modelstock_jax.checkpoint_merge.sources import Source
from modelstock_jax.errors import UserError, listed
from modelstock_jax.tensor_files.reader import read_json

OPEN_CLIP, SCHEDULER = "open_clip_config.json", "scheduler_config.json"
# Configs that say what a model computes, compared key by key.
_COMPARED = (CONFIG, OPEN_CLIP, SCHEDULER, MODULES)
# Of a scheduler these are what a model was trained to predict; the rest is chosen when sampling.
_OF_TRAINING = ("prediction_type", "num_train_timesteps", "beta_start", "beta_end", "beta_schedule",
                "rescale_betas_zero_snr")
_IMAGES = ("image_mean", "image_std", "size", "crop_size", "rescale_factor", "resample",
           "do_rescale", "do_normalize", "do_resize", "do_center_crop")
_SENTENCES = ("sentence_bert_config.json", "config_sentence_transformers.json")
TEMPLATES = ("additional_chat_templates", "chat_templates")
_DIFFERS = "differ"


def compare_configs(
    sources: Sequence[Source], options: Options, findings: Findings, whose: str,
    changes: Mapping[str, Iterable[str]],
) -> None:
    """A problem for keys that change a forward pass; one note for those that do not.

    Args:
        sources: The base and the fine-tunes.
        options: Of the merge.
        findings: Where problems and notes go.
        whose: The model whose config is written, as `--config-from` names it.
        changes: Path of a config -> keys that the merge writes otherwise, which need no note.
    """
    base = sources[0]
    harmless: dict[str, list[str]] = {}
    lacking: dict[str, list[str]] = {}
    found: set[tuple[str, str]] = set()
    for number, source in enumerate(sources[1:], 1):
        for path, seen in _disagreements(base, source):
            found |= {(path, key) for key in seen.grave}
            for said, lines in ((seen.harmless, harmless), (seen.lacking, lacking)):
                if keys := [key for key in said if not _written(key, changes.get(path, ()))]:
                    lines.setdefault(f"{path}: {listed(keys, 6)}", []).append(source.label)
            _object(path, seen.grave, (base, source), number, options, findings)
    # Two fine-tunes may disagree on a key that the base lacks.
    for number, source in enumerate(sources[2:], 2):
        for path, seen in _disagreements(sources[1], source):
            grave = {key: said for key, said in seen.grave.items() if (path, key) not in found}
            _object(path, grave, (sources[1], source), number, options, findings)
    for keys, labels in harmless.items():
        findings.notes.append(f"{keys} {_DIFFERS} in {listed(labels)}, which does not change what "
                              f"the model computes; the values of {whose} are written")
    for keys, labels in lacking.items():
        findings.notes.append(f"{keys}: in only one of the configs of {base.label} and "
                              f"{listed(labels)}; the config of {whose} is written")


def _written(key: str, changes: Iterable[str]) -> bool:
    """Whether a key is one of those that the merge changes, or is in one of them."""
    return any(f"{key}.".startswith(f"{other}.") or other.endswith(f".{key}")
               for other in changes)


def _object(
    path: str, grave: dict[str, tuple[str, str]], pair: tuple[Source, Source], number: int,
    options: Options, findings: Findings,
) -> None:
    if grave and options.config_from is None:
        labels = pair[0].label, pair[1].label
        findings.object(f"{path}: {as_text(grave, labels)} (pass --config-from base or "
                        f"--config-from model:{number} to choose the config that is written)")


def _disagreements(base: Source, source: Source) -> Iterable[tuple[str, Disagreements]]:
    for path, ours, theirs in _pairs(base, source):
        name = Path(path).name
        if name == SCHEDULER:
            ours, theirs = ({k: x for k, x in config.items() if k in _OF_TRAINING}
                            for config in (ours, theirs))
        yield path, disagreements(ours, theirs, complete=name in (OPEN_CLIP, MODULES))


def _pairs(base: Source, source: Source) -> Iterable[tuple[str, dict, dict]]:
    """Configs that both models have: name, the base's, the other's."""
    if base.directory is None or source.directory in (None, base.directory):
        return
    for folder in folders(base.directory):
        for name in _COMPARED:
            place = f"{folder}/{name}" if folder else name
            paths = [s.directory / place for s in (base, source)]  # type: ignore[operator]
            if not all(path.is_file() for path in paths):
                continue
            ours, theirs = map(read_json, paths)
            if name == MODULES:
                ours, theirs = map(_modules, (ours, theirs))
            if isinstance(ours, dict) and isinstance(theirs, dict):
                yield place, ours, theirs


def _modules(index: Any) -> dict[str, Any]:
    """Classes of a sentence-transformers model in order, without packages: releases moved them."""
    entries = index if isinstance(index, list) else []
    return {"modules": [str(entry.get("type")).rpartition(".")[2] for entry in entries
                        if isinstance(entry, dict)]}


def compare_processors(sources: Sequence[Source], findings: Findings, whose: str) -> None:
    """A note where models prepare images or sentences differently; `whose` files are written."""
    ours = _processing(sources[0])
    for source in sources[1:]:
        theirs = _processing(source)
        keys = [k for k in ours if k in theirs and ours[k] != theirs[k]]
        if keys:
            findings.notes.append(f"{listed(keys, 6)} of {source.label} differ from the base's; "
                                  f"the files of {whose} are written")


def _processing(source: Source) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if source.directory is None:
        return found
    for folder in folders(source.directory):
        place = source.directory / folder
        prefix = f"{folder}/" if folder else ""
        nested = read_object(place / "processor_config.json").get("image_processor")
        images = (nested if isinstance(nested, dict) else {}) | read_object(
            place / "preprocessor_config.json")
        found |= {f"{prefix}preprocessor_config.json {key}": images[key]
                  for key in _IMAGES if key in images}
        for name in _SENTENCES:
            found |= {f"{prefix}{name} {key}": value
                      for key, value in read_object(place / name).items() if key != "__version__"}
    return found


def compare_tokenizers(
    sources: Sequence[Source], findings: Findings, read: Sequence[tokens.Read]
) -> None:
    """A note where the fine-tunes' templates, tokens or settings are not the base's."""
    found = [_settings(source) | tokens.added(read, model)
             for model, source in enumerate(sources)]
    agreed, apart = [], []
    for key in sorted(set().union(*found)):
        values = [settings.get(key) for settings in found]
        if None in values[1:] or all(value == values[0] for value in values[1:]):
            continue
        (agreed if all(value == values[1] for value in values[1:]) else apart).append(key)
    base = sources[0].label
    if agreed:
        findings.notes.append(
            f"{listed(agreed, 6)}: the fine-tunes agree and {base} differs; the files of {base} "
            "are written (pass --tokenizer-from model:1 to write those of the fine-tunes)")
    if apart:
        findings.notes.append(
            f"{listed(apart, 6)}: the fine-tunes differ from {base} and from each other; the files "
            f"of {base} are written (pass --tokenizer-from model:1 to write those of the first)")


def _settings(source: Source) -> dict[str, Any]:
    """Chat templates, special tokens and generation settings of a model, by name."""
    directory = source.tokenizer_directory
    if directory is None:
        return {}
    found: dict[str, Any] = {}
    for folder in tokenizer_folders(directory):
        prefix = f"{folder} " if folder else ""
        found |= {f"{prefix}{key}": value for key, value in _tokens(directory / folder).items()}
    generation = read_object(directory / "generation_config.json")
    found |= {f"generation_config {key}": value for key, value in generation.items()
              if key not in ("transformers_version", "_from_model_config")}
    if source.directory is not None:
        found |= generation_keys(read_config(source.directory) or {})
    return {key: value for key, value in found.items() if value is not None}


def _tokens(directory: Path) -> dict[str, Any]:
    """Chat templates and special tokens of a tokenizer's directory."""
    tokenizer = read_object(directory / "tokenizer_config.json")
    found: dict[str, Any] = {}
    for name in ("processor_config.json", "chat_template.json", "tokenizer_config.json"):
        if template := read_object(directory / name).get("chat_template"):
            found["chat template"] = _template(template)
    jinja = [directory / "chat_template.jinja",
             *(path for name in TEMPLATES for path in sorted((directory / name).glob("*.jinja")))]
    for path in jinja:
        if path.is_file():
            name = "chat template" if path.parent == directory else f"chat template {path.stem}"
            found[name] = _read(path)
    for key, value in (tokenizer | read_object(directory / "special_tokens_map.json")).items():
        if key.endswith("_token"):
            found[key] = value.get("content") if isinstance(value, dict) else value
    return found


def _template(value: Any) -> str:
    """One template, or the one called default of several."""
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
    """A JSON object; empty where there is no such file or another value in it."""
    if not path.is_file():
        return {}
    value = read_json(path)
    return value if isinstance(value, dict) else {}
