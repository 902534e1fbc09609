"""Whether the files next to the tensors agree: configs, image processors, tokenizers, templates."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from modelstock_jax.checkpoint_merge.hf_config import (
    CONFIG,
    Disagreements,
    as_text,
    disagreements,
    generation_keys,
    read_config,
)
from modelstock_jax.checkpoint_merge.matching import PlanIssues
from modelstock_jax.checkpoint_merge.options import Options
from modelstock_jax.checkpoint_merge.sources import MODULES, Source, folders, tokenizer_folders
from modelstock_jax.checkpoint_merge.tensor_names import is_embedding
from modelstock_jax.checkpoint_merge.tensor_plan import TensorPlan
from modelstock_jax.errors import UserError, listed
from modelstock_jax.tensor_files.reader import read_json

# Which token each id is in the models' tokenizers: rows of one id are averaged.


# The first of these that a tokenizer has holds its vocabulary.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt")
# Rows that a model keeps free: a fine-tune gives them a token.
_FREE = re.compile(
    r"\W*\w*(?:unused|reserved|extra|placeholder|control|dummy|madeupword|"
    r"filler|pad)\w*\d\W*",
    re.IGNORECASE,
)
_MAX_NAMED = 3
Ids = dict[int, str]


class Read(NamedTuple):
    """Token ids of the models in one folder.

    Attributes:
        folder: Of the tokenizer, in the model's directory.
        ids: Id -> token for each model; None for a model without a tokenizer of its own there.
    """

    folder: str
    ids: list[Ids | None]


def read_tokens(sources: Sequence[Source]) -> list[Read]:
    """The token ids of all models, by folder of the tokenizer; empty where all files are equal."""
    places = [source.tokenizer_directory for source in sources]
    names = [[] if place is None else tokenizer_folders(place) for place in places]
    found = []
    for folder in next(filter(None, names), []):
        # A model with one tokenizer may keep it in another folder.
        here = [
            None if place is None else place / (theirs[0] if len(theirs) == 1 else folder)
            for place, theirs in zip(places, names, strict=True)
        ]
        found.append(Read(folder, _read_all(here)))
    return found


def compare_ids(
    read: Sequence[Read],
    sources: Sequence[Source],
    components: Mapping[str, Mapping[str, TensorPlan]],
    options: Options,
    findings: PlanIssues,
) -> None:
    """A problem where rows of different tokens are averaged, unless a tokenizer was chosen."""
    for folder, ids in read:
        rows = _merged_rows(folder, components)
        named = _conflicts(ids, sources, rows)
        if not named:
            continue
        where = f"the tokenizers in {folder}" if folder else "the tokenizers"
        text = f"{where} disagree: {listed(named, _MAX_NAMED)}"
        if not rows or options.tokenizer_from is not None:
            why = "their rows are averaged" if rows else "no embedding is merged"
            findings.notes.append(
                f"{text}; {why}, and the tokenizer of {options.tokenizer_from or 'base'} is written"
            )
            continue
        findings.add_problem(
            f"{text}: rows of different tokens would be averaged. Add tokens in one order and "
            "train again, or pass --tokenizer-from model:1 (or base, model:2, ...) to write that "
            "model's tokenizer all the same"
        )


def added(read: Sequence[Read], model: int) -> dict[str, Any]:
    """Tokens of a model that the base has not, for a note: {'added tokens': {id: token}}."""
    found: dict[str, Any] = {}
    for folder, ids in read:
        ours, theirs = ids[0], ids[model]
        if ours is None or theirs is None or not any(ids):
            continue
        more = {i: token for i, token in theirs.items() if ours.get(i) != token}
        name = "added tokens"
        found[f"{folder} {name}" if folder else name] = more
    return found


def _conflicts(ids: Sequence[Ids | None], sources: Sequence[Source], rows: int) -> list[str]:
    """Ids below `rows` (any, if 0) that are different tokens in two models, in words."""
    known: dict[int, tuple[str, str]] = {}
    seen: dict[int, str] = {}
    for model, (own, source) in enumerate(zip(ids, sources, strict=True)):
        if own is None or own in ids[:model]:
            continue
        for i, token in own.items():
            first, label = known.setdefault(i, (token, source.label))
            if first == token or (rows and i >= rows) or _FREE.fullmatch(token):
                continue
            if _FREE.fullmatch(first):
                known[i] = token, source.label
            else:
                seen.setdefault(
                    i, f"id {i} is {first!r} in {label} and {token!r} in {source.label}"
                )
    return [seen[i] for i in sorted(seen)]


def _merged_rows(folder: str, components: Mapping[str, Mapping[str, TensorPlan]]) -> int:
    """Rows of the token embedding that are averaged; 0 where none are."""
    names = (folder.replace("tokenizer", "text_encoder"), folder)
    here = next((components[name] for name in names if name in components), None)
    parts = components.values() if here is None else [here]
    return max(
        (
            tensor.shape[0] if tensor.rows is None else tensor.rows
            for part in parts
            for name, tensor in part.items()
            if is_embedding(name) and len(tensor.shape) == 2 and tensor.action in ("merge", "mean")
        ),
        default=0,
    )


def _read_all(places: Sequence[Path | None]) -> list[Ids | None]:
    """Token ids for each place; equal files are read once, and not at all where all are equal."""
    digests: dict[Path, tuple[str, str]] = {}  # Place -> its vocabulary's file and checksum.
    for place in filter(None, places):
        for name in _VOCABULARIES:
            if (place / name).is_file():
                digests[place] = name, hashlib.sha256(_bytes(place / name)).hexdigest()
                break
    more = {place: _added(place) for place in filter(None, places)}
    if len(set(digests.values())) < 2 and len({*map(str, more.values())}) < 2:
        return [
            None if place is None or not (place in digests or more[place]) else {}
            for place in places
        ]
    one_of = {digest: place for place, digest in digests.items()}
    files = {digest: _vocabulary(place / digest[0]) for digest, place in one_of.items()}
    return [
        None
        if place is None or not (place in digests or more[place])
        else {**files.get(digests.get(place, ("", "")), {}), **more[place]}
        for place in places
    ]


def _added(place: Path) -> Ids:
    """Added tokens in the two small files."""
    tokens = _json_object(place / "added_tokens.json")
    found = {i: token for token, i in tokens.items() if isinstance(i, int)}
    decoder = _json_object(place / "tokenizer_config.json").get("added_tokens_decoder")
    for key, token in decoder.items() if isinstance(decoder, dict) else ():
        content = token.get("content") if isinstance(token, dict) else token
        if key.isdigit() and isinstance(content, str):
            found[int(key)] = content
    return found


def _vocabulary(path: Path) -> Ids:
    """Id -> token of a vocabulary's file; empty where it has another form."""
    if path.suffix == ".txt":
        lines = _bytes(path).decode("utf-8", "replace").split("\n")
        # Some files hold a count after each token, and ids that are not line numbers.
        return (
            {}
            if any(" " in line.strip() for line in lines[:64])
            else {i: line.rstrip("\r") for i, line in enumerate(lines) if line}
        )
    value = _json_object(path)
    added, model = value.get("added_tokens"), value.get("model")
    vocabulary = (
        value
        if path.name == "vocab.json"
        else (model.get("vocab") if isinstance(model, dict) else None)
    )
    if isinstance(vocabulary, list):  # Unigram: [token, score]
        found = {
            i: entry[0] for i, entry in enumerate(vocabulary) if isinstance(entry, list) and entry
        }
    else:
        found = (
            {i: token for token, i in vocabulary.items() if isinstance(i, int)}
            if isinstance(vocabulary, dict)
            else {}
        )
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and isinstance(token.get("id"), int):
            found[token["id"]] = str(token.get("content"))
    return found


def _json_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_bytes(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}).") from None
    return value if isinstance(value, dict) else {}


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


# Configs, image processors, tokenizers and their templates, compared model by model.

OPEN_CLIP, SCHEDULER = "open_clip_config.json", "scheduler_config.json"
# Configs that say what a model computes, compared key by key.
_COMPARED = (CONFIG, OPEN_CLIP, SCHEDULER, MODULES)
# Of a scheduler these are what a model was trained to predict; the rest is chosen when sampling.
_OF_TRAINING = (
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
TEMPLATES = ("additional_chat_templates", "chat_templates")
_DIFFERS = "differ"


def compare_configs(
    sources: Sequence[Source],
    options: Options,
    findings: PlanIssues,
    whose: str,
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
        findings.notes.append(
            f"{keys} {_DIFFERS} in {listed(labels)}, which does not change what "
            f"the model computes; the values of {whose} are written"
        )
    for keys, labels in lacking.items():
        findings.notes.append(
            f"{keys}: in only one of the configs of {base.label} and "
            f"{listed(labels)}; the config of {whose} is written"
        )


def _written(key: str, changes: Iterable[str]) -> bool:
    """Whether a key is one of those that the merge changes, or is in one of them."""
    return any(f"{key}.".startswith(f"{other}.") or other.endswith(f".{key}") for other in changes)


def _object(
    path: str,
    grave: dict[str, tuple[str, str]],
    pair: tuple[Source, Source],
    number: int,
    options: Options,
    findings: PlanIssues,
) -> None:
    if grave and options.config_from is None:
        labels = pair[0].label, pair[1].label
        findings.add_problem(
            f"{path}: {as_text(grave, labels)} (pass --config-from base or "
            f"--config-from model:{number} to choose the config that is written)"
        )


def _disagreements(base: Source, source: Source) -> Iterable[tuple[str, Disagreements]]:
    for path, ours, theirs in _pairs(base, source):
        name = Path(path).name
        if name == SCHEDULER:
            ours, theirs = (
                {k: x for k, x in config.items() if k in _OF_TRAINING} for config in (ours, theirs)
            )
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
    return {
        "modules": [
            str(entry.get("type")).rpartition(".")[2]
            for entry in entries
            if isinstance(entry, dict)
        ]
    }


def compare_processors(sources: Sequence[Source], findings: PlanIssues, whose: str) -> None:
    """A note where models prepare images or sentences differently; `whose` files are written."""
    ours = _processing(sources[0])
    for source in sources[1:]:
        theirs = _processing(source)
        keys = [k for k in ours if k in theirs and ours[k] != theirs[k]]
        if keys:
            findings.notes.append(
                f"{listed(keys, 6)} of {source.label} differ from the base's; "
                f"the files of {whose} are written"
            )


def _processing(source: Source) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if source.directory is None:
        return found
    for folder in folders(source.directory):
        place = source.directory / folder
        prefix = f"{folder}/" if folder else ""
        nested = read_object(place / "processor_config.json").get("image_processor")
        images = (nested if isinstance(nested, dict) else {}) | read_object(
            place / "preprocessor_config.json"
        )
        found |= {
            f"{prefix}preprocessor_config.json {key}": images[key]
            for key in _IMAGES
            if key in images
        }
        for name in _SENTENCES:
            found |= {
                f"{prefix}{name} {key}": value
                for key, value in read_object(place / name).items()
                if key != "__version__"
            }
    return found


def compare_tokenizers(
    sources: Sequence[Source], findings: PlanIssues, read: Sequence[Read]
) -> None:
    """A note where the fine-tunes' templates, tokens or settings are not the base's."""
    found = [_settings(source) | added(read, model) for model, source in enumerate(sources)]
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
            "are written (pass --tokenizer-from model:1 to write those of the fine-tunes)"
        )
    if apart:
        findings.notes.append(
            f"{listed(apart, 6)}: the fine-tunes differ from {base} and from each other; the files "
            f"of {base} are written (pass --tokenizer-from model:1 to write those of the first)"
        )


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
    found |= {
        f"generation_config {key}": value
        for key, value in generation.items()
        if key not in ("transformers_version", "_from_model_config")
    }
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
    jinja = [
        directory / "chat_template.jinja",
        *(path for name in TEMPLATES for path in sorted((directory / name).glob("*.jinja"))),
    ]
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
