"""Tokens of the rows of embeddings: read the vocabularies of all models, and compare them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from modelstock_jax.checkpoint_merge.matching import PlanIssues
from modelstock_jax.checkpoint_merge.options import Options
from modelstock_jax.checkpoint_merge.sources import Source, tokenizer_folders
from modelstock_jax.checkpoint_merge.tensor_names import is_embedding
from modelstock_jax.checkpoint_merge.tensor_plan import TensorPlan
from modelstock_jax.errors import UserError, listed

# A tokenizer stores its vocabulary in the first of these files that exists.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt")
# Tokens of free rows, to which a fine-tune may assign another token.
_FREE = re.compile(
    r"\W*\w*(?:unused|reserved|extra|placeholder|control|dummy|madeupword|"
    r"filler|pad)\w*\d\W*",
    re.IGNORECASE,
)
_MAX_NAMED = 3
Ids = dict[int, str]


class TokenIds(NamedTuple):
    """Token ids of all models in one folder.

    Attributes:
      folder: folder of the tokenizer in the model's directory
      ids: id -> token for each model; None for a model without an own tokenizer in the folder
    """

    folder: str
    ids: list[Ids | None]


def read_tokens(sources: Sequence[Source]) -> list[TokenIds]:
    """Return the token ids of all models per tokenizer folder; empty where all files are equal."""
    directories = [source.tokenizer_directory for source in sources]
    names = [[] if path is None else tokenizer_folders(path) for path in directories]
    token_ids = []
    for folder in next(filter(None, names), []):
        # A model with a single tokenizer may store it in another folder.
        paths = [
            None if path is None else path / (own[0] if len(own) == 1 else folder)
            for path, own in zip(directories, names, strict=True)
        ]
        token_ids.append(TokenIds(folder, _read_all(paths)))
    return token_ids


def compare_ids(
    token_ids: Sequence[TokenIds],
    sources: Sequence[Source],
    components: Mapping[str, Mapping[str, TensorPlan]],
    options: Options,
    issues: PlanIssues,
) -> None:
    """Report a problem if rows of different tokens are averaged and no tokenizer was chosen.

    Args:
      token_ids: from `read_tokens`
      sources: the base and the fine-tunes
      components: folder of a component -> its planned tensors
      options: options of the merge
      issues: receives the problems and notes
    """
    for folder, ids in token_ids:
        rows = _merged_rows(folder, components)
        conflicts = _conflicts(ids, sources, rows)
        if not conflicts:
            continue
        which = f"the tokenizers in {folder}" if folder else "the tokenizers"
        text = f"{which} disagree: {listed(conflicts, _MAX_NAMED)}"
        if not rows or options.tokenizer_from is not None:
            effect = "their rows are averaged" if rows else "no embedding is merged"
            model = options.tokenizer_from or "base"
            issues.notes.append(f"{text}; {effect}, and the tokenizer of {model} is written")
            continue
        issues.add_problem(
            f"{text}: rows of different tokens would be averaged; add tokens in the same order and "
            "train again, or pass --tokenizer-from model:1 (or base, model:2, ...) to average them "
            "anyway and write the tokenizer of that model"
        )


def added(token_ids: Sequence[TokenIds], model: int) -> dict[str, Any]:
    """Return the tokens of a model that the base lacks: {'added tokens': {id: token}}."""
    found: dict[str, Any] = {}
    for folder, ids in token_ids:
        base, other = ids[0], ids[model]
        if base is None or other is None or not any(ids):
            continue
        name = "added tokens"
        found[f"{folder} {name}" if folder else name] = {
            i: token for i, token in other.items() if base.get(i) != token
        }
    return found


def _conflicts(ids: Sequence[Ids | None], sources: Sequence[Source], rows: int) -> list[str]:
    """Describe the ids below `rows` (all ids if it is 0) with different tokens in two models."""
    tokens: dict[int, tuple[str, str]] = {}
    conflicts: dict[int, str] = {}
    for model, (vocabulary, source) in enumerate(zip(ids, sources, strict=True)):
        if vocabulary is None or vocabulary in ids[:model]:
            continue
        for i, token in vocabulary.items():
            first, label = tokens.setdefault(i, (token, source.label))
            if first == token or (rows and i >= rows) or _FREE.fullmatch(token):
                continue
            if _FREE.fullmatch(first):
                tokens[i] = token, source.label
            else:
                conflicts.setdefault(
                    i, f"id {i} is {first!r} in {label} and {token!r} in {source.label}"
                )
    return [conflicts[i] for i in sorted(conflicts)]


def _merged_rows(folder: str, components: Mapping[str, Mapping[str, TensorPlan]]) -> int:
    """Return the number of averaged rows of the token embedding; 0 if none are averaged."""
    names = (folder.replace("tokenizer", "text_encoder"), folder)
    component = next((components[name] for name in names if name in components), None)
    candidates = components.values() if component is None else [component]
    return max(
        (
            tensor.shape[0] if tensor.rows is None else tensor.rows
            for tensors in candidates
            for name, tensor in tensors.items()
            if is_embedding(name) and len(tensor.shape) == 2 and tensor.action in ("merge", "mean")
        ),
        default=0,
    )


def _read_all(paths: Sequence[Path | None]) -> list[Ids | None]:
    """Return the token ids in each directory; equal files are parsed once, or not if all are."""
    keys: dict[Path, tuple[str, str]] = {}  # directory -> vocabulary file and its checksum
    for path in filter(None, paths):
        for name in _VOCABULARIES:
            if (path / name).is_file():
                keys[path] = name, hashlib.sha256(_bytes(path / name)).hexdigest()
                break
    added_ids = {path: _added_ids(path) for path in filter(None, paths)}
    if len(set(keys.values())) < 2 and len({*map(str, added_ids.values())}) < 2:
        return [
            None if path is None or not (path in keys or added_ids[path]) else {} for path in paths
        ]
    path_of = {key: path for path, key in keys.items()}
    vocabularies = {key: _vocabulary(path / key[0]) for key, path in path_of.items()}
    return [
        None
        if path is None or not (path in keys or added_ids[path])
        else {**vocabularies.get(keys.get(path, ("", "")), {}), **added_ids[path]}
        for path in paths
    ]


def read_vocabulary(directory: Path) -> Ids:
    """Return id -> token of the tokenizer in a directory; empty if it cannot be read.

    Args:
      directory: directory with `tokenizer.json`, `vocab.json` or `vocab.txt`
    """
    files = [directory / name for name in _VOCABULARIES if (directory / name).is_file()]
    vocabulary = _vocabulary(files[0]) if files else {}
    return {**vocabulary, **_added_ids(directory)} if vocabulary else {}


def _added_ids(directory: Path) -> Ids:
    """Return the added tokens of `added_tokens.json` and `tokenizer_config.json`."""
    tokens = _json_object(directory / "added_tokens.json")
    ids = {i: token for token, i in tokens.items() if isinstance(i, int)}
    decoder = _json_object(directory / "tokenizer_config.json").get("added_tokens_decoder")
    for key, token in decoder.items() if isinstance(decoder, dict) else ():
        content = token.get("content") if isinstance(token, dict) else token
        if key.isdigit() and isinstance(content, str):
            ids[int(key)] = content
    return ids


def _vocabulary(path: Path) -> Ids:
    """Return id -> token of a vocabulary file; empty if its form is not supported."""
    if path.suffix == ".txt":
        lines = _bytes(path).decode("utf-8", "replace").split("\n")
        # Some files store a count after each token, and their ids are not line numbers.
        return (
            {}
            if any(" " in line.strip() for line in lines[:64])
            else {i: line.rstrip("\r") for i, line in enumerate(lines) if line}
        )
    value = _json_object(path)
    added_tokens, model = value.get("added_tokens"), value.get("model")
    vocabulary = (
        value
        if path.name == "vocab.json"
        else (model.get("vocab") if isinstance(model, dict) else None)
    )
    if isinstance(vocabulary, list):  # Unigram: [token, score]
        ids = {
            i: entry[0] for i, entry in enumerate(vocabulary) if isinstance(entry, list) and entry
        }
    else:
        ids = (
            {i: token for token, i in vocabulary.items() if isinstance(i, int)}
            if isinstance(vocabulary, dict)
            else {}
        )
    for token in added_tokens if isinstance(added_tokens, list) else ():
        if isinstance(token, dict) and isinstance(token.get("id"), int):
            ids[token["id"]] = str(token.get("content"))
    return ids


def _json_object(path: Path) -> dict[str, Any]:
    """Return a JSON object; empty if the file is missing or contains another value."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_bytes(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    return value if isinstance(value, dict) else {}


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
