"""Files next to the tensors: whose config and tokenizer are written, and what changes in them."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from modelstock_jax.checkpoint_merge import quantization
from modelstock_jax.checkpoint_merge.agreement import (
    TEMPLATES,
    compare_configs,
    compare_processors,
    compare_tokenizers,
    read_object,
)
from modelstock_jax.checkpoint_merge.components import (
    MODULES,
    PIPELINE,
    folders,
    tokenizer_folders,
)
from modelstock_jax.checkpoint_merge.config import (
    CONFIG,
    flat,
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
_TOKENIZER = re.compile(
    r"tokenizer.*\.(?:json|model)|special_tokens_map\.json|added_tokens\.json|vocab.*\.(?:json|txt)|"
    r"merges\.txt|chat_template.*|.*\.(?:model|spm|tiktoken|jinja)|normalizer\.json|"
    r"generation_config\.json"
)
_PROCESSOR, _TEMPLATE = "processor_config.json", "chat_template"
# What a config says of its classifier; the last three are timm's.
_LABELS = ("id2label", "label2id", "num_labels", "architectures", "problem_type", "num_classes",
           "label_names", "label_descriptions")
# Files that nobody misses in a merged model.
_OF_TRAINING = re.compile(
    r"README.*|\..*|.*\.(?:md|safetensors|h5|msgpack|onnx|gguf|ot|tflite|png|jpg|log|lock|zip)|"
    r"(?:optimizer|scheduler|training_args|rng_state|scaler|random_states).*|runs|checkpoint-\d+|"
    r"events\.out.*|__pycache__"
)


@dataclasses.dataclass(frozen=True)
class Companions:
    """Which model the files next to the tensors come from.

    Attributes:
        config_model: Whose config and processor files are written; 0 is the base.
        tokenizer_model: Whose tokenizer files are.
        changes: Dotted key of config.json -> value that the merge changes; None removes the key.
        dequantized: Whether the config's quantization is taken out.
        folder: Where that config.json is: in the model's directory, or in a component's.
    """

    config_model: int = 0
    tokenizer_model: int = 0
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dequantized: bool = False
    folder: str = ""


def decide_companions(
    sources: Sequence[Source], options: Options, findings: Findings
) -> Companions:
    """Chooses config and tokenizer; what models disagree on goes to `findings`."""
    if not _exist(sources, options, findings):
        return Companions()
    config_model = model_index(options.config_from)
    tokenizer_model = (findings.companion if options.tokenizer_from is None
                       else model_index(options.tokenizer_from))
    compare_configs(sources, options, findings)
    compare_processors(sources, options, findings)
    if options.tokenizer_from is None and not findings.companion:
        compare_tokenizers(sources, findings)
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
    folder = _config_folder(sources[config_model].directory, findings)
    changes = _changes(sources, config_model, tokenizer_model, folder, findings)
    return Companions(config_model, tokenizer_model, changes, said or options.dequantize, folder)


def _exist(sources: Sequence[Source], options: Options, findings: Findings) -> bool:
    """Whether the models that files are asked of exist and have such files."""
    before = len(findings.problems)
    for name, what in (("config_from", CONFIG), ("tokenizer_from", "tokenizer files")):
        if (choice := getattr(options, name)) is None:
            continue
        option = f"--{name.replace('_', '-')} {choice}"
        if (model := model_index(choice)) >= len(sources):
            findings.problems.append(f"{option}: there are {len(sources) - 1} fine-tunes, give "
                                     f"base or model:1 to model:{len(sources) - 1}")
        elif model and not (_has_tokenizer(sources[model], sources[0]) if name == "tokenizer_from"
                            else sources[model].directory is not None):
            findings.problems.append(f"{option}: {sources[model].label} has no {what}; choose a "
                                     "model that has")
    return len(findings.problems) == before


def _changes(
    sources: Sequence[Source], config_model: int, tokenizer_model: int, folder: str,
    findings: Findings,
) -> dict[str, Any]:
    """What the merge changes in config.json."""
    def config_of(model: int) -> dict[str, Any] | None:
        directory = sources[model].directory
        return None if directory is None else read_config(directory / folder)

    changes = dict(findings.config)
    config = config_of(config_model)
    if config is None:
        return changes
    for rows, written in findings.vocabulary.items():
        changes |= dict.fromkeys(vocabulary_keys(config, rows), written)
    if tokenizer_model != config_model:
        theirs = config_of(tokenizer_model) or {}
        # A special token that their config lacks has no value in the merged config either.
        changes |= {key: None for key in generation_keys(config) if "_token_id" in key}
        changes |= _placed(config, generation_keys(theirs))
    if findings.new_head:
        theirs = config_of(1) or {}
        changes |= {key: theirs[key] for key in _LABELS if key in theirs}
        timm = "pretrained_cfg.num_classes"
        changes |= {timm: flat(theirs)[timm]} if timm in flat(theirs) else {}
    return changes


def _config_folder(directory: Path | None, findings: Findings) -> str:
    """Folder of the config that a merge changes; `''` where the model has one at its top."""
    configs = {} if directory is None else {
        folder: config for folder in folders(directory)
        if (config := read_config(directory / folder)) is not None}
    if "" in configs:
        return ""
    resized = [folder for folder, config in configs.items() if any(
        x in findings.vocabulary for key, x in flat(config).items()
        if key.endswith("vocab_size") and isinstance(x, int))]
    models = [folder for folder, config in configs.items() if "model_type" in config]
    return (*resized, *models, "")[0]


def _placed(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values under the dotted keys that a config keeps them at: at the top or in `text_config`."""
    found = {}
    for key, value in values.items():
        tower, _, last = key.rpartition(".")
        nested = tower and isinstance(config.get(tower), dict)
        found[key if nested or not tower else last] = value
    return found


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
        theirs = tokenizer_folders(source) if apart else []
        for folder in folders(source):
            mine = folder not in theirs and not (apart and not folder)
            _copy(source / folder, directory / folder, lambda name, mine=mine: (
                _wanted(name, companions.dequantized)
                and (mine or not _TOKENIZER.fullmatch(name))))
            if mine:
                _copy_templates(source / folder, directory / folder)
    if apart and tokenizer is not None:
        for folder in dict.fromkeys(("", *tokenizer_folders(tokenizer))):
            _copy(tokenizer / folder, directory / folder,
                  lambda name: bool(_TOKENIZER.fullmatch(name)))
            _copy_templates(tokenizer / folder, directory / folder)
        _take_template(tokenizer, directory)
    place = directory / companions.folder
    config = read_config(place)
    if config is not None and (companions.changes or companions.dequantized):
        if companions.dequantized:
            config = quantization.without_keys(config)
        write_json(place / CONFIG, updated(config, companions.changes))


def _copy_templates(source: Path, directory: Path) -> None:
    """Further chat templates, each a file in a folder."""
    for folder in TEMPLATES:
        if (source / folder).is_dir():
            _copy(source / folder, directory / folder, lambda name: name.endswith(".jinja"))


def _take_template(tokenizer: Path, directory: Path) -> None:
    """The chat template that some processors keep in their config."""
    theirs, ours = (read_object(place / _PROCESSOR) for place in (tokenizer, directory))
    if ours and theirs.get(_TEMPLATE) != ours.get(_TEMPLATE):
        ours.pop(_TEMPLATE, None)
        kept = {_TEMPLATE: theirs[_TEMPLATE]} if _TEMPLATE in theirs else {}
        write_json(directory / _PROCESSOR, ours | kept)


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


def _has_tokenizer(source: Source, base: Source) -> bool:
    """Whether a model, not the base below its adapter, has a tokenizer's files."""
    directory = source.tokenizer_directory
    if directory is None or (source is not base and directory == base.tokenizer_directory):
        return False
    return any(
        _TOKENIZER.fullmatch(path.name) and path.name != "generation_config.json"
        for folder in tokenizer_folders(directory) for path in (directory / folder).iterdir())


def _name_left_behind(source: Source, findings: Findings) -> None:
    """Names the files next to a model that are not copied, for the user to copy."""
    if source.directory is None:
        return
    left, code, loaded = [], [], _loads_code(source.directory)
    for folder in folders(source.directory):
        place = source.directory / folder
        for path in sorted(place.iterdir()):
            name = f"{folder}/{path.name}" if folder else path.name
            if not path.is_file():
                continue
            if path.suffix == ".py":
                code.append(name)
            elif not (
                _wanted(path.name) or path.name in _NOT_COPIED or path.suffix in PICKLES
                or _OF_TRAINING.fullmatch(path.name) or path.name.endswith(".index.json")
            ):
                left.append(name)
    if left:
        findings.notes.append(f"not copied from {source.label}: {listed(left, 6)}; copy what the "
                              "model needs into the merged model")
    if loaded:
        what = listed(code, 6) if code else "the files that it names"
        findings.notes.append(f"{loaded} of {source.label} loads code, which is never copied or "
                              f"run: copy {what} into the merged model")


def _loads_code(directory: Path) -> str | None:
    """The entry of a config or an index that refers to code of the checkpoint's own."""
    for folder in folders(directory):
        for name in (CONFIG, "tokenizer_config.json", _PROCESSOR, "preprocessor_config.json"):
            if read_object(directory / folder / name).get("auto_map"):
                return f"auto_map in {folder}/{name}" if folder else f"auto_map in {name}"
    for entry in read_object(directory / PIPELINE).values():
        if isinstance(entry, list) and entry and any(
            isinstance(entry[0], str) and (directory / place / f"{entry[0]}.py").is_file()
            for place in folders(directory)
        ):
            return PIPELINE
    if (directory / MODULES).is_file():
        index = read_json(directory / MODULES)
        for entry in index if isinstance(index, list) else []:
            kind = str(entry.get("type")) if isinstance(entry, dict) else ""
            if "." in kind and not kind.startswith("sentence_transformers."):
                return MODULES
    return None
