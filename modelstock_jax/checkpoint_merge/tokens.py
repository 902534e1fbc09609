"""Which token each id is in the models' tokenizers: rows of one id are averaged."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from modelstock_jax.checkpoint_merge.buffers import is_embedding
from modelstock_jax.checkpoint_merge.components import tokenizer_folders
from modelstock_jax.checkpoint_merge.decide import Planned
from modelstock_jax.checkpoint_merge.match import Findings
from modelstock_jax.checkpoint_merge.options import Options
from modelstock_jax.checkpoint_merge.sources import Source
from modelstock_jax.errors import UserError, listed

# The first of these that a tokenizer has holds its vocabulary.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt")
# Rows that a model keeps free: a fine-tune gives them a token.
_FREE = re.compile(r"\W*\w*(?:unused|reserved|extra|placeholder|control|dummy|madeupword|"
                   r"filler|pad)\w*\d\W*", re.IGNORECASE)
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
        here = [None if place is None else
                place / (theirs[0] if len(theirs) == 1 else folder)
                for place, theirs in zip(places, names, strict=True)]
        found.append(Read(folder, _read_all(here)))
    return found


def compare_ids(
    read: Sequence[Read], sources: Sequence[Source],
    components: Mapping[str, Mapping[str, Planned]], options: Options, findings: Findings,
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
            findings.notes.append(f"{text}; {why}, and the tokenizer of "
                                  f"{options.tokenizer_from or 'base'} is written")
            continue
        findings.object(
            f"{text}: rows of different tokens would be averaged. Add tokens in one order and "
            "train again, or pass --tokenizer-from model:1 (or base, model:2, ...) to write that "
            "model's tokenizer all the same")


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
                seen.setdefault(i, f"id {i} is {first!r} in {label} and {token!r} in "
                                   f"{source.label}")
    return [seen[i] for i in sorted(seen)]


def _merged_rows(folder: str, components: Mapping[str, Mapping[str, Planned]]) -> int:
    """Rows of the token embedding that are averaged; 0 where none are."""
    names = (folder.replace("tokenizer", "text_encoder"), folder)
    here = next((components[name] for name in names if name in components), None)
    parts = components.values() if here is None else [here]
    return max((tensor.shape[0] if tensor.rows is None else tensor.rows
                for part in parts for name, tensor in part.items()
                if is_embedding(name) and len(tensor.shape) == 2
                and tensor.action in ("merge", "mean")), default=0)


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
        return [None if place is None or not (place in digests or more[place]) else {}
                for place in places]
    one_of = {digest: place for place, digest in digests.items()}
    files = {digest: _vocabulary(place / digest[0]) for digest, place in one_of.items()}
    return [None if place is None or not (place in digests or more[place]) else
            {**files.get(digests.get(place, ("", "")), {}), **more[place]} for place in places]


def _added(place: Path) -> Ids:
    """Added tokens in the two small files."""
    tokens = _object(place / "added_tokens.json")
    found = {i: token for token, i in tokens.items() if isinstance(i, int)}
    decoder = _object(place / "tokenizer_config.json").get("added_tokens_decoder")
    for key, token in (decoder.items() if isinstance(decoder, dict) else ()):
        content = token.get("content") if isinstance(token, dict) else token
        if key.isdigit() and isinstance(content, str):
            found[int(key)] = content
    return found


def _vocabulary(path: Path) -> Ids:
    """Id -> token of a vocabulary's file; empty where it has another form."""
    if path.suffix == ".txt":
        lines = _bytes(path).decode("utf-8", "replace").split("\n")
        # Some files hold a count after each token, and ids that are not line numbers.
        return {} if any(" " in line.strip() for line in lines[:64]) else {
            i: line.rstrip("\r") for i, line in enumerate(lines) if line}
    value = _object(path)
    added, model = value.get("added_tokens"), value.get("model")
    vocabulary = value if path.name == "vocab.json" else (
        model.get("vocab") if isinstance(model, dict) else None)
    if isinstance(vocabulary, list):  # Unigram: [token, score]
        found = {i: entry[0] for i, entry in enumerate(vocabulary)
                 if isinstance(entry, list) and entry}
    else:
        found = {i: token for token, i in vocabulary.items()
                 if isinstance(i, int)} if isinstance(vocabulary, dict) else {}
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and isinstance(token.get("id"), int):
            found[token["id"]] = str(token.get("content"))
    return found


def _object(path: Path) -> dict[str, Any]:
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
