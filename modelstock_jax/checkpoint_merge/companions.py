"""Files next to the tensors: whose config and tokenizer are written, and what changes in them."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from modelstock_jax.checkpoint_merge import quantization
from modelstock_jax.checkpoint_merge.components import folders
from modelstock_jax.checkpoint_merge.config import (
    CONFIG,
    as_text,
    disagreements,
    generation_keys,
    read_config,
    updated,
    vocabulary_keys,
)
from modelstock_jax.checkpoint_merge.match import Findings
from modelstock_jax.checkpoint_merge.options import Options, model_index
from modelstock_jax.checkpoint_merge.sources import ENDINGS, LICENCES, Source
from modelstock_jax.errors import UserError, listed
from modelstock_jax.tensor_files.reader import PICKLES, read_json
from modelstock_jax.tensor_files.writer import write_json

_NOT_COPIED = ("adapter_config.json", "merge_report.json")
_OF_QUANTIZATION = (quantization.QUANT_FILE, "quantize_config.json", "quanto_qmap.json",
                    "quantization_config.json")
# Configs that say what a model computes, compared key by key.
_COMPARED = (CONFIG, "open_clip_config.json")
_TOKENIZER = re.compile(
    r"tokenizer.*\.(?:json|model)|special_tokens_map\.json|added_tokens\.json|vocab.*\.(?:json|txt)|"
    r"merges\.txt|.*\.(?:model|spm|tiktoken|jinja)|normalizer\.json|generation_config\.json"
)
_TEMPLATES = ("additional_chat_templates", "chat_templates")
_LABELS = ("id2label", "label2id", "num_labels", "architectures", "problem_type")
# Files that nobody misses in a merged model.
_OF_TRAINING = re.compile(
    r"README.*|\..*|.*\.(?:md|safetensors|h5|msgpack|onnx|gguf|ot|tflite|png|jpg|log|lock|zip)|"
    r"(?:optimizer|scheduler|training_args|rng_state|scaler|random_states).*|runs|checkpoint-\d+|"
    r"events\.out.*|__pycache__"
)
_IMAGES = ("image_mean", "image_std", "size", "crop_size", "rescale_factor", "resample")


@dataclasses.dataclass(frozen=True)
class Companions:
    """Which model the files next to the tensors come from.

    Attributes:
        config_model: Whose config and processor files are written; 0 is the base.
        tokenizer_model: Whose tokenizer files are.
        changes: Dotted key of config.json -> value that the merge changes.
        dequantized: Whether the config's quantization is taken out.
    """

    config_model: int = 0
    tokenizer_model: int = 0
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dequantized: bool = False


def decide_companions(
    sources: Sequence[Source], options: Options, findings: Findings
) -> Companions:
    """Chooses config and tokenizer; what models disagree on goes to `findings`."""
    number = len(sources) - 1
    for name in ("config_from", "tokenizer_from"):
        if model_index(getattr(options, name)) > number:
            findings.problems.append(f"{name} is {getattr(options, name)}, and there are {number} "
                                     "fine-tunes")
            return Companions()
    config_model = model_index(options.config_from)
    tokenizer_model = (findings.companion if options.tokenizer_from is None
                       else model_index(options.tokenizer_from))
    _compare_configs(sources, options, findings)
    _compare_images(sources, findings)
    if options.tokenizer_from is None and not findings.companion:
        _compare_tokenizers(sources, findings)
    changes = dict(findings.config)
    config = read_config(sources[config_model].directory)
    if config is not None:
        for rows, written in findings.vocabulary.items():
            changes |= dict.fromkeys(vocabulary_keys(config, rows), written)
        if tokenizer_model != config_model:
            changes |= generation_keys(read_config(sources[tokenizer_model].directory) or {})
        if findings.new_head:
            theirs = read_config(sources[1].directory) or {}
            changes |= {key: theirs[key] for key in _LABELS if key in theirs}
    if findings.companion and not _has_tokenizer(sources[tokenizer_model], sources[0]):
        findings.notes.append(
            f"no tokenizer files in {sources[tokenizer_model].label}, whose vocabulary is written: "
            "copy its tokenizer into the merged model")
    said = quantization.said_only(sources[config_model].directory)
    if said and not options.dequantize:
        findings.notes.append(
            f"{sources[config_model].label}: config.json speaks of a quantization, and the weights "
            "are plain; the merged config does not")
    _name_left_behind(sources[config_model], findings)
    return Companions(config_model, tokenizer_model, changes, said or options.dequantize)


def copy_companions(
    sources: Sequence[Source], companions: Companions, directory: Path
) -> None:
    """Copies what a model needs next to its tensors; the config with what the merge changed.

    Code (``*.py``) and pickles are left where they are.

    Args:
        sources: The base and the fine-tunes.
        companions: From `decide_companions`.
        directory: Where to.
    """
    source = sources[companions.config_model].directory or sources[0].directory
    tokenizer = sources[companions.tokenizer_model].tokenizer_directory
    apart = tokenizer is not None and tokenizer != source
    if source is not None:
        templates = [] if apart else _present(source)
        for folder in dict.fromkeys(("", *folders(source), *templates)):
            _copy(source / folder, directory / folder, lambda name, folder=folder: (
                _wanted(name, companions.dequantized)
                and not (apart and not folder and _TOKENIZER.fullmatch(name))))
    if apart and tokenizer is not None:
        _copy(tokenizer, directory, lambda name: bool(_TOKENIZER.fullmatch(name)))
        for folder in _present(tokenizer):
            _copy(tokenizer / folder, directory / folder, lambda name: name.endswith(".jinja"))
    config = read_config(directory)
    if config is not None and (companions.changes or companions.dequantized):
        if companions.dequantized:
            config = quantization.without_keys(config)
        write_json(directory / CONFIG, updated(config, companions.changes))


def _present(directory: Path) -> list[str]:
    """Folders with further chat templates."""
    return [name for name in _TEMPLATES if (directory / name).is_dir()]


def _copy(source: Path, directory: Path, wanted: Callable[[str], bool]) -> None:
    try:
        directory.mkdir(exist_ok=True, parents=True)
        for path in sorted(source.iterdir()):
            if path.is_file() and wanted(path.name):
                shutil.copyfile(path, directory / path.name)
    except OSError as error:
        where = error.filename or source
        raise UserError(f"{where}: cannot be copied ({error.strerror or error}).") from None


def _wanted(name: str, dequantized: bool = False) -> bool:
    if name in _NOT_COPIED or name.endswith(".index.json") or name.startswith("."):
        return False
    if dequantized and name in _OF_QUANTIZATION:
        return False
    return name.endswith(ENDINGS) or name.startswith(LICENCES)


def _compare_configs(
    sources: Sequence[Source], options: Options, findings: Findings
) -> None:
    base = sources[0]
    harmless: dict[str, list[str]] = {}
    for source in sources[1:]:
        for path, ours, theirs in _pairs(base, source):
            grave, rest = disagreements(ours, theirs)
            if rest:
                harmless.setdefault(f"{path}: {listed(rest, 6)}", []).append(source.label)
            if grave and options.config_from is None:
                findings.object(
                    f"{path}: {as_text(grave, (base.label, source.label))} (--config-from base or "
                    f"model:{sources.index(source)} says whose is right)")
    for keys, labels in harmless.items():
        findings.notes.append(f"{keys} differ in {listed(labels)}, which changes no number of the "
                              f"model; {options.config_from or 'base'}'s are written")


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
            if isinstance(ours, dict) and isinstance(theirs, dict):
                yield place, ours, theirs


def _compare_images(sources: Sequence[Source], findings: Findings) -> None:
    """A note where processors differ in what they make of an image."""
    ours = _json(sources[0].directory, "preprocessor_config.json")
    for source in sources[1:]:
        theirs = _json(source.directory, "preprocessor_config.json")
        keys = [k for k in _IMAGES if k in ours and k in theirs and ours[k] != theirs[k]]
        if keys:
            findings.notes.append(f"preprocessor_config.json: {listed(keys)} of {source.label} "
                                  "differ from the base's, which are written")


def _compare_tokenizers(sources: Sequence[Source], findings: Findings) -> None:
    """A note where the fine-tunes' templates, tokens or settings are not the base's."""
    found = [_settings(source) for source in sources]
    labels = [source.label for source in sources]
    agreed, apart = [], []
    for key in sorted(set().union(*found)):
        values = [settings.get(key) for settings in found]
        if None in values[1:] or all(value == values[0] for value in values[1:]):
            continue
        (agreed if all(value == values[1] for value in values[1:]) else apart).append(key)
    if agreed:
        findings.notes.append(
            f"{listed(agreed, 6)}: the fine-tunes agree and {labels[0]} differs; its files are "
            "written (--tokenizer-from model:1 writes theirs)")
    if apart:
        findings.notes.append(
            f"{listed(apart, 6)}: the fine-tunes differ from {labels[0]} and from each other; its "
            "files are written (--tokenizer-from model:1 writes the first one's)")


def _settings(source: Source) -> dict[str, Any]:
    """Chat template, special tokens and generation settings of a model, by name."""
    directory = source.tokenizer_directory
    if directory is None:
        return {}
    tokenizer = _json(directory, "tokenizer_config.json")
    found: dict[str, Any] = {}
    template = directory / "chat_template.jinja"
    if template.is_file():
        found["chat template"] = template.read_text(encoding="utf-8", errors="replace").strip()
    elif "chat_template" in tokenizer:
        found["chat template"] = str(tokenizer["chat_template"]).strip()
    special = tokenizer | _json(directory, "special_tokens_map.json")
    for key, value in special.items():
        if key.endswith("_token"):
            found[key] = value.get("content") if isinstance(value, dict) else value
    generation = _json(directory, "generation_config.json")
    found |= {f"generation_config {key}": value for key, value in generation.items()
              if key not in ("transformers_version", "_from_model_config")}
    if source.directory is not None:
        found |= generation_keys(read_config(source.directory) or {})
    return {key: value for key, value in found.items() if value is not None}


def _has_tokenizer(source: Source, base: Source) -> bool:
    """Whether a model, not the base below its adapter, has a tokenizer's files."""
    directory = source.tokenizer_directory
    if directory is None or (source is not base and directory == base.tokenizer_directory):
        return False
    return any(_TOKENIZER.fullmatch(path.name) and path.name != "generation_config.json"
               for path in directory.iterdir())


def _name_left_behind(source: Source, findings: Findings) -> None:
    """Names the files next to a model that are not copied, for the user to copy."""
    if source.directory is None:
        return
    left = [path.name for path in sorted(source.directory.iterdir())
            if path.is_file() and not _wanted(path.name) and path.name not in _NOT_COPIED
            and not _OF_TRAINING.fullmatch(path.name) and path.suffix not in PICKLES
            and not path.name.endswith(".index.json") and path.suffix != ".py"]
    if left:
        findings.notes.append(f"not copied from {source.label}, for it may not be needed: "
                              f"{listed(left, 6)}; copy it if the model needs it")
    code = sorted(path.name for path in source.directory.glob("*.py"))
    if (read_config(source.directory) or {}).get("auto_map"):
        what = listed(code, 4) if code else "the files that auto_map names"
        findings.notes.append(f"config.json's auto_map loads code, which is never copied or run: "
                              f"copy {what} from {source.label} into the merged model")


def _json(directory: Path | None, name: str) -> dict[str, Any]:
    if directory is None or not (directory / name).is_file():
        return {}
    value = read_json(directory / name)
    return value if isinstance(value, dict) else {}
