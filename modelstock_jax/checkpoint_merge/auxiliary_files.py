"""Files next to the tensors: whose config and tokenizer are written, and what changes in them."""

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
    compare_ids,
    compare_processors,
    compare_tokenizers,
    read_object,
    read_tokens,
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
from modelstock_jax.errors import UserError, listed
from modelstock_jax.tensor_files.reader import PICKLES, read_json
from modelstock_jax.tensor_files.writer import write_indented_json

_NOT_COPIED = ("adapter_config.json", "merge_report.json")
_OF_QUANTIZATION = (
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
# Files that nobody misses in a merged model.
_OF_TRAINING = re.compile(
    r"README.*|\..*|.*\.(?:md|safetensors|h5|msgpack|onnx|gguf|ot|tflite|png|jpg|log|lock|zip)|"
    r"(?:optimizer|scheduler|training_args|rng_state|scaler|random_states).*|runs|checkpoint-\d+|"
    r"events\.out.*|__pycache__"
)


@dataclasses.dataclass(frozen=True)
class AuxiliaryFiles:
    """Which model the files next to the tensors come from.

    Attributes:
        config_model: Whose config and processor files are written; 0 is the base.
        tokenizer_model: Whose tokenizer files are.
        changes: Folder -> dotted key of its config.json -> value that the merge changes; None
            removes the key.
        plain: Folders whose config loses what it says of a quantization.
        dtypes: Folder -> the dtype that its config says.
    """

    config_model: int = 0
    tokenizer_model: int = 0
    changes: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    plain: tuple[str, ...] = ()
    dtypes: Mapping[str, str] = dataclasses.field(default_factory=dict)


def plan_auxiliary_files(
    sources: Sequence[Source],
    tensors: Mapping[str, TensorPlan],
    options: Options,
    findings: PlanIssues,
) -> AuxiliaryFiles:
    """Chooses config and tokenizer; what models disagree on goes to `findings`."""
    if not _exist(sources, options, findings):
        return AuxiliaryFiles()
    components = by_folder(tensors, sources)
    config_model = _config_model(sources, components, options, findings)
    tokenizer_model = _tokenizer_model(sources, config_model, options, findings)
    whose = f"model:{config_model}" if config_model else "base"
    changes = config_changes(sources, tensors, config_model, tokenizer_model, findings)
    directory = sources[config_model].directory
    names = [] if directory is None else folders(directory)
    dtypes = written_dtypes(sources, tensors, options, names)
    plain = (
        ()
        if directory is None
        else tuple(
            name for name in names if options.dequantize or quantization.said_only(directory / name)
        )
    )
    compare_configs(sources, options, findings, whose, _written_keys(changes, dtypes, plain))
    compare_processors(sources, findings, whose)
    check_labels(components, sources, findings)
    read = read_tokens(sources)
    compare_ids(read, sources, components, options, findings)
    if options.tokenizer_from is None and not tokenizer_model:
        compare_tokenizers(sources, findings, read)
    if options.tokenizer_from is None:
        _object_to_several_vocabularies(sources, tensors, findings)
    if findings.companion and not _has_tokenizer(sources[tokenizer_model], sources[0]):
        findings.notes.append(
            f"no tokenizer files in {sources[tokenizer_model].label}, whose vocabulary is written: "
            "copy its tokenizer into the merged model"
        )
    if plain and not options.dequantize:
        said = listed(f"{name}/{CONFIG}" if name else CONFIG for name in plain)
        findings.notes.append(
            f"{sources[config_model].label}: {said} speaks of a quantization, and the weights "
            "are plain; the merged config does not"
        )
    _name_left_behind(sources[config_model], findings)
    return AuxiliaryFiles(config_model, tokenizer_model, changes, plain, dtypes)


def _config_model(
    sources: Sequence[Source],
    components: Mapping[str, Mapping[str, TensorPlan]],
    options: Options,
    findings: PlanIssues,
) -> int:
    """The model whose config files are written; modules that only fine-tunes have are theirs."""
    here = component_folders(sources[0].directory)
    chosen = model_index(options.config_from)
    if options.config_from is None:
        own = [
            name
            for name, tensors in components.items()
            if name not in here and any(tensor in findings.new_head for tensor in tensors)
        ]
        if own:
            findings.notes.append(
                f"{listed(own, 3)}: the fine-tunes' own, so the config files of model:1 are written"
            )
            chosen = 1
        elif not findings.lenient:
            _object_to_lost_modules(sources, components, findings)
    if findings.lenient:  # Nothing is written.
        return chosen
    whose, label = options.config_from or f"model:{chosen}", sources[chosen].label
    there = component_folders(sources[chosen].directory)
    if lacking := [name for name in components if name not in there]:
        findings.add_problem(
            f"--config-from {whose}: {label} has no {listed(lacking, 3)}, where merged "
            "tensors are written; give another model"
        )
    if chosen and (
        more := [name for name in _of_weights(sources[chosen]) if name not in components]
    ):
        findings.add_problem(
            f"--config-from {whose}: the files of {label} name {listed(map(repr, more), 3)}, and "
            "the merged model has no tensors there (--head finetuned writes modules that BASE "
            "lacks; else save BASE with the same folders)"
        )
    return chosen


def _object_to_lost_modules(
    sources: Sequence[Source],
    components: Mapping[str, Mapping[str, TensorPlan]],
    findings: PlanIssues,
) -> None:
    """A problem where fine-tunes are sentence-transformers models and the base is not."""

    def has(source: Source) -> bool:
        return source.directory is not None and (source.directory / MODULES).is_file()

    tuned = [i for i, source in enumerate(sources) if has(source)]
    if not tuned or has(sources[0]):
        return
    fits = [i for i in tuned if all(name in components for name in _of_weights(sources[i]))]
    if not fits and findings.problems:
        return  # Tensors of modules are lacking, which has options of its own.
    source = sources[(fits or tuned)[0]]
    assert source.directory is not None, "`has` saw a file in it"
    lost = [MODULES, *(name for name in folders(source.directory) if name)]
    theirs = f"--config-from model:{fits[0]} to write them, or " if fits else ""
    findings.add_problem(
        f"{listed(lost, 6)} of {source.label} would be lost, for {sources[0].label} "
        f"has no {MODULES}: pass {theirs}--config-from base to write a model without "
        "them"
    )


def _object_to_several_vocabularies(
    sources: Sequence[Source], tensors: Mapping[str, TensorPlan], findings: PlanIssues
) -> None:
    """A problem where the rows of two embeddings come from two models: one tokenizer is written."""
    longest: dict[int, str] = {}
    for name, tensor in tensors.items():
        if tensor.rows is not None and tensor.rest:
            longest.setdefault(tensor.rest, name)
    if len(longest) > 1:
        which = listed(
            f"{name} is of {sources[model].label}" for model, name in sorted(longest.items())
        )
        findings.add_problem(
            f"the longest vocabularies are of several models: {which}; pass "
            "--tokenizer-from model:1 (or another) to write that model's tokenizers, "
            "or --vocabulary base"
        )


def _of_weights(source: Source) -> list[str]:
    """Folders of a model that have weights; `''` is the top."""
    return ["" if prefix == HEAD_PREFIX else prefix.rstrip("/") for prefix in source.components]


def component_folders(directory: Path | None) -> list[str]:
    """`folders` of a directory; `['']` of a single file."""
    return [""] if directory is None else folders(directory)


def _tokenizer_model(
    sources: Sequence[Source], config_model: int, options: Options, findings: PlanIssues
) -> int:
    """The model whose tokenizer is written: one asked for, that of a longer vocabulary, BASE's."""
    if options.tokenizer_from is not None:
        return model_index(options.tokenizer_from)
    base, other = sources[0], sources[config_model]
    if (
        not findings.companion
        and config_model
        and not _has_tokenizer(base, base)
        and (_has_tokenizer(other, base))
    ):
        return config_model
    return findings.companion


def _written_keys(
    changes: Mapping[str, Mapping[str, Any]], dtypes: Mapping[str, str], plain: Sequence[str]
) -> dict[str, list[str]]:
    """Path of a config.json -> keys that the merge writes otherwise than any model."""
    found: dict[str, list[str]] = {}
    for folder in {*changes, *dtypes, *plain}:
        found[f"{folder}/{CONFIG}" if folder else CONFIG] = [
            *changes.get(folder, ()),
            *(KEYS if folder in dtypes else ()),
            *(quantization.CONFIG_KEYS if folder in plain else ()),
        ]
    return found


def _exist(sources: Sequence[Source], options: Options, findings: PlanIssues) -> bool:
    """Whether the models that files are asked of exist and have such files."""
    before = len(findings.problems)
    for name, what in (("config_from", CONFIG), ("tokenizer_from", "tokenizer files")):
        if (choice := getattr(options, name)) is None:
            continue
        option = f"--{name.replace('_', '-')} {choice}"
        if (model := model_index(choice)) >= len(sources):
            findings.problems.append(
                f"{option}: there are {len(sources) - 1} fine-tunes, give "
                f"base or model:1 to model:{len(sources) - 1}"
            )
        elif model and not (
            _has_tokenizer(sources[model], sources[0])
            if name == "tokenizer_from"
            else sources[model].directory is not None
        ):
            findings.problems.append(
                f"{option}: {sources[model].label} has no {what}; choose a model that has"
            )
    return len(findings.problems) == before


def copy_auxiliary_files(
    sources: Sequence[Source], companions: AuxiliaryFiles, directory: Path
) -> None:
    """Copies what a model needs next to its tensors; the config with what the merge changed.

    Code (``*.py``) and pickles are left where they are.

    Args:
        sources: The base and the fine-tunes.
        companions: From `plan_auxiliary_files`.
        directory: Where to.
    """
    source = sources[companions.config_model].directory or sources[0].directory
    tokenizer = sources[companions.tokenizer_model].tokenizer_directory
    apart = tokenizer is not None and tokenizer != source
    if source is not None:
        theirs = tokenizer_folders(source) if apart else []
        for folder in folders(source):
            mine = folder not in theirs and not (apart and not folder)
            _copy(
                source / folder,
                directory / folder,
                lambda name, mine=mine: (
                    _wanted(name, bool(companions.plain))
                    and (mine or not _TOKENIZER.fullmatch(name))
                ),
            )
            if mine:
                _copy_templates(source / folder, directory / folder)
    if apart and tokenizer is not None:
        for folder in dict.fromkeys(("", *tokenizer_folders(tokenizer))):
            _copy(
                tokenizer / folder,
                directory / folder,
                lambda name: bool(_TOKENIZER.fullmatch(name)),
            )
            _copy_templates(tokenizer / folder, directory / folder)
        _take_template(tokenizer, directory)
    _rewrite_configs(companions, directory)


def _rewrite_configs(companions: AuxiliaryFiles, directory: Path) -> None:
    """Changes the copied configs of all components."""
    for folder in {*companions.changes, *companions.plain}:
        config = read_config(directory / folder)
        if config is None:
            continue
        made = quantization.without_keys(config) if folder in companions.plain else config
        made = updated(made, companions.changes.get(folder, {}))
        if made != config:
            write_indented_json(directory / folder / CONFIG, made)
    for folder, dtype in companions.dtypes.items():
        set_dtype(directory / folder, dtype)


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
        write_indented_json(directory / _PROCESSOR, ours | kept)


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
    return name.endswith(ENDINGS) or name.startswith(LICENSES)


def _has_tokenizer(source: Source, base: Source) -> bool:
    """Whether a model, not the base below its adapter, has a tokenizer's files."""
    directory = source.tokenizer_directory
    if directory is None or (source is not base and directory == base.tokenizer_directory):
        return False
    return any(
        _TOKENIZER.fullmatch(path.name) and path.name != "generation_config.json"
        for folder in tokenizer_folders(directory)
        for path in (directory / folder).iterdir()
    )


def _name_left_behind(source: Source, findings: PlanIssues) -> None:
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
                _wanted(path.name)
                or path.name in _NOT_COPIED
                or path.suffix in PICKLES
                or _OF_TRAINING.fullmatch(path.name)
                or path.name.endswith(".index.json")
            ):
                left.append(name)
    if left:
        findings.notes.append(
            f"not copied from {source.label}: {listed(left, 6)}; copy what the "
            "model needs into the merged model"
        )
    if loaded:
        what = listed(code, 6) if code else "the files that it names"
        findings.notes.append(
            f"{loaded} of {source.label} loads code, which is never copied or "
            f"run: copy {what} into the merged model"
        )


def _loads_code(directory: Path) -> str | None:
    """The entry of a config or an index that refers to code of the checkpoint's own."""
    for folder in folders(directory):
        for name in (CONFIG, "tokenizer_config.json", _PROCESSOR, "preprocessor_config.json"):
            if read_object(directory / folder / name).get("auto_map"):
                return f"auto_map in {folder}/{name}" if folder else f"auto_map in {name}"
    for entry in read_object(directory / PIPELINE).values():
        if (
            isinstance(entry, list)
            and entry
            and any(
                isinstance(entry[0], str) and (directory / place / f"{entry[0]}.py").is_file()
                for place in folders(directory)
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
