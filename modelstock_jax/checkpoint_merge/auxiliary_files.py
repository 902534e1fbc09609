"""Configs, tokenizers and other auxiliary files: which model they come from, and their changes."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from modelstock_jax.checkpoint_merge import quantization
from modelstock_jax.checkpoint_merge.config_edits import (
    by_folder,
    check_labels,
    config_changes,
    written_dtypes,
)
from modelstock_jax.checkpoint_merge.consistency import (
    TEMPLATES,
    compare_configs,
    compare_lengths,
    compare_processors,
    compare_tokenizers,
    read_object,
)
from modelstock_jax.checkpoint_merge.hf_config import CONFIG, KEYS, read_config, set_dtype, updated
from modelstock_jax.checkpoint_merge.matching import PlanIssues
from modelstock_jax.checkpoint_merge.options import Options, model_index
from modelstock_jax.checkpoint_merge.sources import (
    ENDINGS,
    HEAD_PREFIX,
    LICENSES,
    MODULES,
    PIPELINE,
    Source,
    folders,
    tokenizer_folders,
)
from modelstock_jax.checkpoint_merge.tensor_plan import TensorPlan
from modelstock_jax.checkpoint_merge.token_ids import compare_ids, read_tokens
from modelstock_jax.checkpoint_merge.vocabulary import add_tokens, write_chat_template
from modelstock_jax.errors import UserError, listed
from modelstock_jax.tensor_files.reader import PICKLES, read_json
from modelstock_jax.tensor_files.writer import write_indented_json

_NOT_COPIED = ("adapter_config.json", "merge_report.json")
_QUANTIZATION_FILES = (
    quantization.QUANT_FILE,
    "quantize_config.json",
    "quanto_qmap.json",
    "quantization_config.json",
)
_TOKENIZER = re.compile(
    r"tokenizer.*\.(?:json|model)|special_tokens_map\.json|added_tokens\.json|vocab.*\.(?:json|txt)|"
    r"merges\.txt|chat_template.*|.*\.(?:model|spm|tiktoken|jinja)|normalizer\.json|"
    r"generation_config\.json"
)
_PROCESSOR, _TEMPLATE = "processor_config.json", "chat_template"
# Files that a merged model does not need: no note names them.
_NOT_NEEDED = re.compile(
    r"README.*|\..*|.*\.(?:md|safetensors|h5|msgpack|onnx|gguf|ot|tflite|png|jpg|log|lock|zip)|"
    r"(?:optimizer|scheduler|training_args|rng_state|scaler|random_states).*|runs|checkpoint-\d+|"
    r"events\.out.*|__pycache__"
)


@dataclasses.dataclass(frozen=True)
class AuxiliaryFiles:
    """Models that the auxiliary files are copied from, and changes to the configs.

    Attributes:
      config_model: model whose config and processor files are written; 0 is the base
      tokenizer_model: model whose tokenizer files are written
      changes: folder -> dotted key of its config.json -> value that the merge changes; None removes
        the key
      plain: folders whose config loses its quantization entries
      dtypes: folder -> the dtype that its config states
      added_tokens: tokens that are added to the tokenizer, as tokenizer.json has them
      chat_template: Jinja template that is written; None for that of the tokenizer
    """

    config_model: int = 0
    tokenizer_model: int = 0
    changes: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    plain: tuple[str, ...] = ()
    dtypes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    added_tokens: tuple[dict[str, Any], ...] = ()
    chat_template: str | None = None


def plan_auxiliary_files(
    sources: Sequence[Source],
    tensors: Mapping[str, TensorPlan],
    options: Options,
    issues: PlanIssues,
) -> AuxiliaryFiles:
    """Choose the model of the config and of the tokenizer, and compare them in all models.

    Args:
      sources: the base and the fine-tunes
      tensors: tensors of the plan, by name
      options: options of the merge
      issues: receives the problems and notes
    """
    if not _check_choices(sources, options, issues):
        return AuxiliaryFiles()
    components = by_folder(tensors, sources)
    config_model = _config_model(sources, components, options, issues)
    tokenizer_model = _tokenizer_model(sources, config_model, options, issues)
    config_option = f"model:{config_model}" if config_model else "base"
    changes = config_changes(sources, tensors, config_model, tokenizer_model, issues)
    directory = sources[config_model].directory
    names = [] if directory is None else folders(directory)
    dtypes = written_dtypes(sources, tensors, options, names)
    plain = _without_quantization(directory, names, options)
    changed_keys = _changed_keys(changes, dtypes, plain)
    compare_configs(sources, options, issues, config_option, changed_keys)
    compare_processors(sources, issues, config_option)
    compare_lengths(sources[config_model], sources[tokenizer_model], config_option, issues)
    check_labels(components, sources, issues)
    token_ids = read_tokens(sources)
    compare_ids(token_ids, sources, components, options, issues)
    if options.tokenizer_from is None and not tokenizer_model:
        compare_tokenizers(sources, issues, token_ids)
    if options.tokenizer_from is None:
        _report_several_vocabularies(sources, tensors, issues)
    if issues.vocabulary_model and not _has_tokenizer(sources[tokenizer_model], sources[0]):
        issues.notes.append(
            f"no tokenizer files in {sources[tokenizer_model].label}, whose vocabulary is written: "
            "copy its tokenizer into the merged model"
        )
    if plain and not options.dequantize:
        paths = listed(f"{name}/{CONFIG}" if name else CONFIG for name in plain)
        issues.notes.append(
            f"{sources[config_model].label}: {paths} describes a quantization, but the weights are "
            "not quantized; the merged config leaves these entries out"
        )
    _note_files_not_copied(sources[config_model], issues)
    return AuxiliaryFiles(
        config_model,
        tokenizer_model,
        changes,
        plain,
        dtypes,
        sources[tokenizer_model].added_tokens,
        options.chat_template,
    )


def _without_quantization(
    directory: Path | None, names: Sequence[str], options: Options
) -> tuple[str, ...]:
    """Return the folders whose config loses its quantization entries."""
    if directory is None:
        return ()
    return tuple(
        name
        for name in names
        if options.dequantize or quantization.has_quantization_config(directory / name)
    )


def _config_model(
    sources: Sequence[Source],
    components: Mapping[str, Mapping[str, TensorPlan]],
    options: Options,
    issues: PlanIssues,
) -> int:
    """Return the model whose config files are written: a fine-tune if only these have a module."""
    base_folders = _component_folders(sources[0].directory)
    chosen = model_index(options.config_from)
    if options.config_from is None:
        new_modules = [
            name
            for name, tensors in components.items()
            if name not in base_folders and any(tensor in issues.new_head for tensor in tensors)
        ]
        if new_modules:
            issues.notes.append(
                f"{listed(new_modules, 3)}: only the fine-tunes have it, so the config files of "
                "model:1 are written"
            )
            chosen = 1
        elif not issues.lenient:
            _report_lost_modules(sources, components, issues)
    if issues.lenient:  # Nothing is written.
        return chosen
    option, label = options.config_from or f"model:{chosen}", sources[chosen].label
    chosen_folders = _component_folders(sources[chosen].directory)
    if missing := [name for name in components if name not in chosen_folders]:
        issues.add_problem(
            f"--config-from {option}: {label} has no {listed(missing, 3)}, where merged tensors "
            "are written; choose another model"
        )
    if chosen and (
        extra := [name for name in _weight_folders(sources[chosen]) if name not in components]
    ):
        issues.add_problem(
            f"--config-from {option}: the files of {label} name {listed(map(repr, extra), 3)}, but "
            "the merged model has no tensors there; pass --head finetuned to write modules that "
            "BASE lacks, or save BASE with the same folders"
        )
    return chosen


def _report_lost_modules(
    sources: Sequence[Source],
    components: Mapping[str, Mapping[str, TensorPlan]],
    issues: PlanIssues,
) -> None:
    """Report a problem if fine-tunes are sentence-transformers models and the base is not."""

    def has_modules(source: Source) -> bool:
        return source.directory is not None and (source.directory / MODULES).is_file()

    models = [i for i, source in enumerate(sources) if has_modules(source)]
    if not models or has_modules(sources[0]):
        return
    complete = [
        i for i in models if all(name in components for name in _weight_folders(sources[i]))
    ]
    if not complete and issues.problems:
        return  # Tensors of modules are missing: that problem names its own options.
    source = sources[(complete or models)[0]]
    assert source.directory is not None, "`has_modules` found a file in it"
    lost = [MODULES, *(name for name in folders(source.directory) if name)]
    keep = f"--config-from model:{complete[0]} to write them, or " if complete else ""
    issues.add_problem(
        f"{listed(lost, 6)} of {source.label} would be lost, because {sources[0].label} "
        f"has no {MODULES}: pass {keep}--config-from base to write a model without them"
    )


def _report_several_vocabularies(
    sources: Sequence[Source], tensors: Mapping[str, TensorPlan], issues: PlanIssues
) -> None:
    """Report a problem if rows of two embeddings come from two models: only one tokenizer fits."""
    longest: dict[int, str] = {}
    for name, tensor in tensors.items():
        if tensor.rows is not None and tensor.rest:
            longest.setdefault(tensor.rest, name)
    if len(longest) > 1:
        rows = listed(
            f"{name} from {sources[model].label}" for model, name in sorted(longest.items())
        )
        issues.add_problem(
            f"the longest vocabularies come from several models: {rows}; pass "
            "--tokenizer-from model:1 (or another) to write that model's tokenizers, "
            "or --vocab-mismatch base"
        )


def _weight_folders(source: Source) -> list[str]:
    """Return the folders of a model that have weights; `''` is the top."""
    return ["" if prefix == HEAD_PREFIX else prefix.rstrip("/") for prefix in source.components]


def _component_folders(directory: Path | None) -> list[str]:
    """Return `folders` of a directory; `['']` for a single file."""
    return [""] if directory is None else folders(directory)


def _tokenizer_model(
    sources: Sequence[Source], config_model: int, options: Options, issues: PlanIssues
) -> int:
    """Return the model whose tokenizer is written.

    The one given by the option, else that of a longer vocabulary, else BASE. If BASE has no
    tokenizer, it is the model of the config.
    """
    if options.tokenizer_from is not None:
        return model_index(options.tokenizer_from)
    base, other = sources[0], sources[config_model]
    if (
        not issues.vocabulary_model
        and config_model
        and not _has_tokenizer(base, base)
        and (_has_tokenizer(other, base))
    ):
        return config_model
    return issues.vocabulary_model


def _changed_keys(
    changes: Mapping[str, Mapping[str, Any]], dtypes: Mapping[str, str], plain: Sequence[str]
) -> dict[str, list[str]]:
    """Map the path of each config.json to its keys that the merge itself sets or removes."""
    keys: dict[str, list[str]] = {}
    for folder in {*changes, *dtypes, *plain}:
        keys[f"{folder}/{CONFIG}" if folder else CONFIG] = [
            *changes.get(folder, ()),
            *(KEYS if folder in dtypes else ()),
            *(quantization.CONFIG_KEYS if folder in plain else ()),
        ]
    return keys


def _check_choices(sources: Sequence[Source], options: Options, issues: PlanIssues) -> bool:
    """Return whether the models that the options choose exist and have the files."""
    before = len(issues.problems)
    for name, files in (("config_from", CONFIG), ("tokenizer_from", "tokenizer files")):
        if (choice := getattr(options, name)) is None:
            continue
        option = f"--{name.replace('_', '-')} {choice}"
        if (model := model_index(choice)) >= len(sources):
            issues.problems.append(
                f"{option}: there are {len(sources) - 1} fine-tunes; choose "
                f"base or model:1 to model:{len(sources) - 1}"
            )
        elif model and not (
            _has_tokenizer(sources[model], sources[0])
            if name == "tokenizer_from"
            else sources[model].directory is not None
        ):
            issues.problems.append(
                f"{option}: {sources[model].label} has no {files}; choose a model that has"
            )
    return len(issues.problems) == before


def copy_auxiliary_files(
    sources: Sequence[Source], auxiliary_files: AuxiliaryFiles, directory: Path
) -> None:
    """Copy the auxiliary files of a model, and apply the changes of the merge to its configs.

    Code (`*.py`) and pickles are not copied.

    Args:
      sources: the base and the fine-tunes
      auxiliary_files: from `plan_auxiliary_files`
      directory: destination

    Raises:
      UserError: a file cannot be copied
    """
    source = sources[auxiliary_files.config_model].directory or sources[0].directory
    tokenizer = sources[auxiliary_files.tokenizer_model].tokenizer_directory
    other_tokenizer = tokenizer is not None and tokenizer != source
    if source is not None:
        replaced = ["", *tokenizer_folders(source)] if other_tokenizer else []
        for folder in folders(source):
            with_tokenizer = folder not in replaced
            _copy(
                source / folder,
                directory / folder,
                lambda name, with_tokenizer=with_tokenizer: (
                    _is_copied(name, bool(auxiliary_files.plain))
                    and (with_tokenizer or not _TOKENIZER.fullmatch(name))
                ),
            )
            if with_tokenizer:
                _copy_templates(source / folder, directory / folder)
    if other_tokenizer and tokenizer is not None:
        for folder in dict.fromkeys(("", *tokenizer_folders(tokenizer))):
            _copy(
                tokenizer / folder,
                directory / folder,
                lambda name: bool(_TOKENIZER.fullmatch(name)),
            )
            _copy_templates(tokenizer / folder, directory / folder)
        _copy_processor_template(tokenizer, directory)
    _rewrite_configs(auxiliary_files, directory)
    if auxiliary_files.added_tokens:
        add_tokens(directory, auxiliary_files.added_tokens)
    if auxiliary_files.chat_template is not None:
        write_chat_template(directory, auxiliary_files.chat_template)


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Copy the tokenizer files of a directory.

    Args:
      source: directory of a model or an adapter
      directory: destination

    Raises:
      UserError: a file cannot be copied
    """
    _copy(source, directory, lambda name: bool(_TOKENIZER.fullmatch(name)))
    _copy_templates(source, directory)


def _rewrite_configs(auxiliary_files: AuxiliaryFiles, directory: Path) -> None:
    """Apply the changes to the copied configs of all components."""
    for folder in {*auxiliary_files.changes, *auxiliary_files.plain}:
        config = read_config(directory / folder)
        if config is None:
            continue
        plain = folder in auxiliary_files.plain
        changed = quantization.without_keys(config) if plain else config
        changed = updated(changed, auxiliary_files.changes.get(folder, {}))
        if changed != config:
            write_indented_json(directory / folder / CONFIG, changed)
    for folder, dtype in auxiliary_files.dtypes.items():
        set_dtype(directory / folder, dtype)


def _copy_templates(source: Path, directory: Path) -> None:
    """Copy additional chat templates, one file per template in a folder."""
    for folder in TEMPLATES:
        if (source / folder).is_dir():
            _copy(source / folder, directory / folder, lambda name: name.endswith(".jinja"))


def _copy_processor_template(tokenizer: Path, directory: Path) -> None:
    """Copy the chat template that some processors store in their config."""
    chosen, written = (read_object(path / _PROCESSOR) for path in (tokenizer, directory))
    if written and chosen.get(_TEMPLATE) != written.get(_TEMPLATE):
        written.pop(_TEMPLATE, None)
        template = {_TEMPLATE: chosen[_TEMPLATE]} if _TEMPLATE in chosen else {}
        write_indented_json(directory / _PROCESSOR, written | template)


def _copy(source: Path, directory: Path, is_copied: Callable[[str], bool]) -> None:
    try:
        directory.mkdir(exist_ok=True, parents=True)
        for path in sorted(source.iterdir()):
            if path.is_file() and is_copied(path.name):
                shutil.copyfile(path, directory / path.name)
    except OSError as error:
        path = error.filename or source
        raise UserError(f"{path}: cannot be copied ({error.strerror or error})") from None


def _is_copied(name: str, dequantized: bool = False) -> bool:
    if name in _NOT_COPIED or name.endswith(".index.json") or name.startswith("."):
        return False
    if dequantized and name in _QUANTIZATION_FILES:
        return False
    return name.endswith(ENDINGS) or name.startswith(LICENSES)


def _has_tokenizer(source: Source, base: Source) -> bool:
    """Return whether a model has own tokenizer files; an adapter's base does not count."""
    directory = source.tokenizer_directory
    is_of_base = source is not base and not source.shares_tokenizer
    if directory is None or (is_of_base and directory == base.tokenizer_directory):
        return False
    return any(
        _TOKENIZER.fullmatch(path.name) and path.name != "generation_config.json"
        for folder in tokenizer_folders(directory)
        for path in (directory / folder).iterdir()
    )


def _note_files_not_copied(source: Source, issues: PlanIssues) -> None:
    """Note the auxiliary files that are not copied, so that the user can copy them."""
    if source.directory is None:
        return
    other, code, code_entry = [], [], _entry_with_code(source.directory)
    for folder in folders(source.directory):
        for path in sorted((source.directory / folder).iterdir()):
            name = f"{folder}/{path.name}" if folder else path.name
            if not path.is_file():
                continue
            if path.suffix == ".py":
                code.append(name)
            elif not (
                _is_copied(path.name)
                or path.name in _NOT_COPIED
                or path.suffix in PICKLES
                or _NOT_NEEDED.fullmatch(path.name)
                or path.name.endswith(".index.json")
            ):
                other.append(name)
    if other:
        issues.notes.append(
            f"not copied from {source.label}: {listed(other, 6)}; copy what the "
            "model needs into the merged model"
        )
    if code_entry:
        files = listed(code, 6) if code else "the files that it names"
        issues.notes.append(
            f"{code_entry} of {source.label} loads code, which is never copied or "
            f"run: copy {files} into the merged model"
        )


def _entry_with_code(directory: Path) -> str | None:
    """Return the entry of a config or an index that refers to code in the checkpoint."""
    for folder in folders(directory):
        for name in (CONFIG, "tokenizer_config.json", _PROCESSOR, "preprocessor_config.json"):
            if read_object(directory / folder / name).get("auto_map"):
                return f"auto_map in {folder}/{name}" if folder else f"auto_map in {name}"
    for entry in read_object(directory / PIPELINE).values():
        if (
            isinstance(entry, list)
            and entry
            and any(
                isinstance(entry[0], str) and (directory / folder / f"{entry[0]}.py").is_file()
                for folder in folders(directory)
            )
        ):
            return PIPELINE
    if (directory / MODULES).is_file():
        index = read_json(directory / MODULES)
        for entry in index if isinstance(index, list) else []:
            kind = str(entry.get("type")) if isinstance(entry, dict) else ""
            if "." in kind and not kind.startswith("sentence_transformers."):
                return MODULES
    return None
