"""Vocabularies of a merge: rows of embeddings in the order of one tokenizer, by token string."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from modelstock_jax.checkpoint_merge.consistency import read_object
from modelstock_jax.checkpoint_merge.hf_config import flat
from modelstock_jax.checkpoint_merge.kernels import FLOATS, narrow, recode, widen
from modelstock_jax.checkpoint_merge.sources import Source
from modelstock_jax.checkpoint_merge.tensor_names import is_embedding
from modelstock_jax.checkpoint_merge.token_ids import read_vocabulary
from modelstock_jax.errors import UserError, listed
from modelstock_jax.fileio import write_text
from modelstock_jax.merging.tensor_roles import block_position
from modelstock_jax.tensor_files.reader import DTYPES, read_json
from modelstock_jax.tensor_files.writer import write_indented_json

_FILE, _CONFIG = "tokenizer.json", "tokenizer_config.json"
# Of a token that another model has in its vocabulary, as `add_tokens` of transformers writes it.
_PLAIN = {
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": True,
    "special": False,
}


class TokenRule(NamedTuple):
    """The row of a token in models that lack it.

    Attributes:
      model: label of the model that has the row; None for zeros
      token: token of that model; None for the same token
      row: row of that model, instead of a token
      force: use the row in all models
    """

    model: str | None
    token: str | None = None
    row: int | None = None
    force: bool = False


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of a merged model, as a recipe describes it.

    Attributes:
      source: label of a model, `base` or `union` (the tokens of all models)
      tokens: rules of single tokens; tokens that the tokenizer lacks are added
      multiple: the number of rows is rounded up to a multiple of it
    """

    source: str = "base"
    tokens: Mapping[str, TokenRule] = dataclasses.field(default_factory=dict)
    multiple: int = 1


_ZERO, _MEAN, _NO_TOKEN = -1, -2, -3


class _Model(NamedTuple):
    """A model and the ids of its tokens, without those beyond its embedding."""

    source: Source
    ids: dict[str, int]


class _Origin(NamedTuple):
    """Where the rows of a model's new embedding are from.

    Attributes:
      model: index of the model of each row; `_ZERO`, `_MEAN`, or `_NO_TOKEN` for a row that no
        token has
      row: row of that model
      means: row -> (model, row) of each row of the mean
    """

    model: np.ndarray
    row: np.ndarray
    means: dict[int, list[tuple[int, int]]]


def align(
    sources: Sequence[Source], tokenizer: Tokenizer, *, anchored: bool = True
) -> list[Source]:
    """Return the models with the rows of one tokenizer, in its order.

    A model keeps its own row of a token. For a token that it lacks, it gets the row of the rule of
    this token, else that of the only model with this token, else the base's, else the mean over the
    models with this token, else zeros: the rules of mergekit. Rows that no token has are the mean
    of all others.

    Args:
      sources: the base and the fine-tunes
      tokenizer: the tokenizer of the merged model
      anchored: whether there is a base; without one, the first source is the first model again

    Returns:
      The same models if all have the tokens of the tokenizer in its order already.

    Raises:
      UserError: a tokenizer cannot be read, or a rule names a model or a token that does not exist
    """
    is_plain = tokenizer.source != "union" and not tokenizer.tokens and tokenizer.multiple == 1
    try:
        models = [_Model(source, _token_ids(source, sources[0])) for source in sources]
    except UserError as error:
        if is_plain:  # The rows are merged by index, after the usual checks.
            problem = str(error).partition(";")[0]
            sources[0].notes.append(f"{problem}: rows of embeddings are merged by their index")
            return list(sources)
        raise
    chosen = _chosen(models, tokenizer.source)
    ids, added = _output_ids(models, chosen, tokenizer)
    is_equal = all(m.ids == ids for m in models) and len({_num_rows(s) for s in sources}) == 1
    forced = any(rule.force for rule in tokenizer.tokens.values())
    if is_equal and not added and not forced and tokenizer.multiple == 1:
        return list(sources)
    last = max(ids.values()) + 1
    rows = -(-last // tokenizer.multiple) * tokenizer.multiple
    origins = _origins(models, ids, tokenizer, last, anchored=anchored)
    directory = chosen.source.tokenizer_directory
    return [
        AlignedSource(model, models, origin, rows, directory, added)
        for model, origin in zip(models, origins, strict=True)
    ]


def _token_ids(source: Source, base: Source) -> dict[str, int]:
    """Return the ids of a model's tokens, or those of the base's if it has no tokenizer."""
    rows = _num_rows(source)
    for owner in (source, base):
        if owner.tokenizer_directory is not None:
            if ids := read_vocabulary(owner.tokenizer_directory):
                return {token: i for i, token in sorted(ids.items()) if 0 <= i < rows}
    raise UserError(
        f"{source.label}: no tokenizer whose tokens can be read, so the rows of its embedding "
        "cannot be aligned; add its tokenizer.json, or remove tokenizer_source"
    )


def _num_rows(source: Source) -> int:
    rows = {source.tensors[name].shape[0] for name in _embeddings(source)}
    if len(rows) != 1:
        found = "several vocabularies" if rows else "no embedding of tokens"
        raise UserError(f"{source.label}: {found}; remove tokenizer_source and tokenizer")
    return rows.pop()


def _embeddings(source: Source) -> list[str]:
    return [n for n, info in source.tensors.items() if is_embedding(n) and len(info.shape) == 2]


def _chosen(models: Sequence[_Model], source: str) -> _Model:
    """Return the model whose tokenizer is written."""
    if source in ("base", "union"):
        return models[0]
    for model in models:
        if source in _labels(model.source):
            return model
    raise UserError(f"tokenizer_source {source!r}: give base, union or one of the models")


def _labels(source: Source) -> list[str]:
    """Return the labels of a model; one of layers has the embedding of the first of its models."""
    return [source.label, *(part.label for part in source.parts[:1])]


def _output_ids(
    models: Sequence[_Model], chosen: _Model, tokenizer: Tokenizer
) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Return the ids of all tokens, and the tokens that are added to the chosen tokenizer."""
    ids, added = dict(chosen.ids), []
    flags = {token: entry for m in models[::-1] for token, entry in _added(m.source).items()}
    new = list(tokenizer.tokens)
    if tokenizer.source == "union":
        others = [token for model in models for token in model.ids]
        # As in mergekit: first the tokens of the vocabularies, then those that models added.
        new = [*sorted(others, key=lambda token: token in flags), *new]
    for token in dict.fromkeys(new):
        if token not in ids:
            ids[token] = max(ids.values()) + 1 if not added else added[-1]["id"] + 1
            added.append({"id": ids[token], "content": token, **flags.get(token, _PLAIN)})
    if added and _beyond(chosen):
        raise UserError(
            f"{chosen.source.label}: its tokenizer has tokens without a row in the embedding, so "
            f"no tokens can be added ({listed(_beyond(chosen), 3)}); remove them from {_FILE}"
        )
    if added and _json(chosen.source) is None:
        raise UserError(
            f"{chosen.source.label} has no {_FILE}, to which tokens could be added; save its "
            "tokenizer with a recent version of transformers"
        )
    return ids, added


def _beyond(model: _Model) -> list[str]:
    """Return the tokens of a tokenizer that have no row in the embedding."""
    directory = model.source.tokenizer_directory
    tokens = {} if directory is None else read_vocabulary(directory)
    return [token for token in tokens.values() if token not in model.ids]


def _json(source: Source) -> Path | None:
    """Return the tokenizer.json of a model; None if it has none."""
    directory = source.tokenizer_directory
    path = None if directory is None else directory / _FILE
    return path if path is not None and path.is_file() else None


def _added(source: Source) -> dict[str, dict[str, Any]]:
    """Return the flags of the tokens that are added to the vocabulary of a tokenizer.json."""
    path = _json(source)
    entries = [] if path is None else read_object(path).get("added_tokens") or []
    return {
        entry["content"]: {key: entry.get(key, default) for key, default in _PLAIN.items()}
        for entry in entries
        if isinstance(entry, dict) and isinstance(entry.get("content"), str)
    }


def _origins(
    models: Sequence[_Model],
    ids: Mapping[str, int],
    tokenizer: Tokenizer,
    last: int,
    *,
    anchored: bool,
) -> list[_Origin]:
    """Return where the rows of each model are from."""
    origins = [
        _Origin(np.full(last, _NO_TOKEN, np.int64), np.zeros(last, np.int64), {}) for _ in models
    ]
    for token, i in ids.items():
        default = _default(token, models, tokenizer, anchored=anchored)
        force = token in tokenizer.tokens and tokenizer.tokens[token].force
        for number, (model, origin) in enumerate(zip(models, origins, strict=True)):
            found = [(number, model.ids[token])] if token in model.ids and not force else default
            if len(found) == 1:
                origin.model[i], origin.row[i] = found[0]
            else:
                origin.model[i] = _MEAN if found else _ZERO
                origin.means[i] = found
    return origins


def _default(
    token: str, models: Sequence[_Model], tokenizer: Tokenizer, *, anchored: bool
) -> list[tuple[int, int]]:
    """Return the rows whose mean is the row of a token in models that lack it."""
    if token in tokenizer.tokens:
        return _ruled(token, tokenizer.tokens[token], models)
    having = [(number, m.ids[token]) for number, m in enumerate(models) if token in m.ids]
    if not anchored:
        return [(number, row) for number, row in having if number > 0]
    return having[:1] if having and having[0][0] == 0 else having


def _ruled(token: str, rule: TokenRule, models: Sequence[_Model]) -> list[tuple[int, int]]:
    if rule.model is None:
        return []
    for number, model in enumerate(models):
        if rule.model in _labels(model.source):
            name = token if rule.token is None else rule.token
            row = model.ids.get(name) if rule.row is None else rule.row
            if row is None or not 0 <= row < _num_rows(model.source):
                wanted = repr(name) if rule.row is None else f"row {rule.row}"
                raise UserError(f"tokens: {token!r}: {rule.model} has no {wanted}")
            return [(number, row)]
    raise UserError(f"tokens: {token!r}: {rule.model!r} is not one of the models")


class AlignedSource(Source):
    """A model whose embedding has the rows of the merged tokenizer.

    Args:
      model: the model
      models: all models of the merge, which rows may be from
      origin: where the rows are from
      rows: number of rows, with those beyond the last token
      directory: directory of the tokenizer that is written
      added: tokens that are added to this tokenizer, as tokenizer.json has them
    """

    shares_tokenizer = True

    def __init__(
        self,
        model: _Model,
        models: Sequence[_Model],
        origin: _Origin,
        rows: int,
        directory: Path | None,
        added: Sequence[dict[str, Any]],
    ):
        inner = model.source
        self.label, self.directory, self.components = inner.label, inner.directory, inner.components
        self.aliases, self.formed, self.parts = inner.aliases, inner.formed, inner.parts
        self.notes = inner.notes
        self.added_tokens = tuple(added)
        self._inner, self._models, self._origin = inner, models, origin
        self._rows, self._directory = rows, directory
        self._padding: dict[str, np.ndarray] = {}
        own = _num_rows(inner)
        self.tensors = dict(inner.tensors)
        self.aligned = {
            name: math.prod(self.tensors[name].shape[1:]) for name in _of_tokens(inner, own)
        }
        for name in self.aligned:
            info = self.tensors[name]
            if info.code not in FLOATS:
                raise UserError(f"{self.label}: {name} is quantized, so its rows cannot be aligned")
            self.tensors[name] = info._replace(shape=(rows, *info.shape[1:]))
        kept = np.count_nonzero(origin.model == models.index(model))
        means = sorted(origin.means.items())
        self.derivation = [
            inner.derivation, rows, origin.model.tolist(), origin.row.tolist(), means
        ]  # fmt: skip
        if kept < len(origin.model) or rows != own:
            self.notes = [
                *inner.notes,
                f"{self.label}: the embedding has {rows} rows in the order of the merged "
                f"tokenizer: {kept} of the {own} rows of this model, {rows - kept} from other "
                "models, means or zero",
            ]

    @property
    def tokenizer_directory(self) -> Path | None:
        """The directory of the tokenizer that is written, so that all models agree."""
        return self._directory

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that are read."""
        return self._inner.files

    def config_values(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keys of a config that contain the number of rows, with their new values.

        Args:
          config: content of the config.json
        """
        sizes = [key for key in ("text_config.vocab_size", "vocab_size") if key in flat(config)]
        return self._inner.config_values(config) | {
            key: self._rows for key in sizes if flat(config)[key] != self._rows
        }

    def read(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Read elements [start, stop), as `Source.read`."""
        if name not in self.aligned:
            return self._inner.read(name, start, stop, out)
        width = self.aligned[name]
        first, last = start // width, -(-stop // width)
        values = np.concatenate([self._read_run(name, *run) for run in self._runs(first, last)])
        return values[start - first * width : stop - first * width]

    def _runs(self, first: int, last: int) -> list[tuple[int, int]]:
        """Return ranges of rows that are consecutive rows of one model."""
        end = min(last, len(self._origin.model))
        padding = [(max(first, end), last)] if last > end else []
        if first >= end:
            return padding
        model, row = self._origin.model[first:end], self._origin.row[first:end]
        breaks = (np.diff(model) != 0) | (np.diff(row) != 1) | (model[1:] < 0)
        ends = [first, *(first + 1 + np.flatnonzero(breaks)).tolist(), end]
        return [*itertools.pairwise(ends), *padding]

    def _read_run(self, name: str, start: int, stop: int) -> np.ndarray:
        """Read rows of one origin, in the dtype of this model."""
        width, code = self.aligned[name], self.tensors[name].code
        if start >= len(self._origin.model) or self._origin.model[start] == _NO_TOKEN:
            return np.tile(self._mean_of_rows(name), stop - start)
        model, row = int(self._origin.model[start]), int(self._origin.row[start])
        if model >= 0:
            return self._rows_of(model, name, row, row + stop - start)
        if model == _ZERO:
            return np.zeros((stop - start) * width, DTYPES[code])
        total = np.zeros(width)
        for other, other_row in self._origin.means[start]:
            total += _wide(self._rows_of(other, name, other_row, other_row + 1))
        return narrow(total / len(self._origin.means[start]), code)

    def _rows_of(self, model: int, name: str, start: int, stop: int) -> np.ndarray:
        """Read rows of a model, which may have the tensor under a name with another prefix."""
        source, width = self._models[model].source, self.aligned[name]
        stored = name if name in source.tensors else _same_end(name, source)
        if source.tensors[stored].shape[1:] != self.tensors[name].shape[1:]:
            raise UserError(
                f"{name} differs in shape in {self.label} and {source.label}, so their rows cannot "
                "be aligned"
            )
        return recode(source.read(stored, start * width, stop * width), self.tensors[name].code)

    def _mean_of_rows(self, name: str) -> np.ndarray:
        """Return the mean of the rows of all tokens, for rows that no token has."""
        if name not in self._padding:
            width, last = self.aligned[name], len(self._origin.model)
            step, total, count = max(1, 2**18 // width), np.zeros(width), 0
            for start, stop in self._runs(0, last):
                if self._origin.model[start] == _NO_TOKEN:
                    continue
                for first in range(start, stop, step):
                    rows = self._read_run(name, first, min(first + step, stop))
                    total += _wide(rows).reshape(-1, width).sum(axis=0)
                count += stop - start
            self._padding[name] = narrow(total / count, self.tensors[name].code)
        return self._padding[name]

    def stored_dtype(self, name: str) -> np.dtype:
        """Return the dtype in which a tensor is stored."""
        return self._inner.stored_dtype(name)

    def half_ulp_squares(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return the maximum squared rounding error of the elements [start, stop), float64."""
        if name in self.aligned:
            return super().half_ulp_squares(name, start, stop)
        return self._inner.half_ulp_squares(name, start, stop)

    def note(self, name: str, start: int, values: np.ndarray) -> None:
        """Add values to the checksum of their file; aligned rows are read again for it."""
        if name not in self.aligned:
            self._inner.note(name, start, values)

    def watch(self) -> None:
        """Start the checksums of the files."""
        self._inner.watch()

    def checksums(self, kind: str = "crc32") -> dict[str, str]:
        """Return the checksum of each file."""
        return self._inner.checksums(kind)


def _of_tokens(source: Source, rows: int) -> list[str]:
    """Return the tensors with one row, or one element, for each token.

    They are the embeddings, and the weights and biases of the same length outside the layers.

    Raises:
      UserError: another axis of a tensor has this length (`final_logits_bias` [1, rows])
    """
    names = list(source.tensors)
    found, others = [], []
    for name, position in zip(names, block_position(names), strict=True):
        shape = source.tensors[name].shape
        is_outside = position.depth < 0 or position.depth == math.inf
        if rows in shape and (is_outside or is_embedding(name)):
            is_first = shape[0] == rows and len(shape) < 3 and rows not in shape[1:]
            (found if is_first else others).append(name)
    if others:
        raise UserError(
            f"{source.label}: {listed(others, 3)} has an entry for each token, which cannot be "
            "aligned; remove tokenizer_source and tokenizer"
        )
    return found


def _same_end(name: str, source: Source) -> str:
    """Return the tensor of a model whose name differs by a prefix, or that is the tied head."""
    if len(_embeddings(source)) == 1:  # Its head is its embedding.
        return _embeddings(source)[0]
    ends = [
        other
        for other in _embeddings(source)
        if other.endswith(f".{name}") or name.endswith(f".{other}")
    ]
    if len(ends) != 1:
        found = f" (it has {listed(_embeddings(source), 3)})"
        raise UserError(
            f"{source.label} has no {name}, so the vocabularies cannot be aligned{found}"
        )
    return ends[0]


def _wide(values: np.ndarray) -> np.ndarray:
    wide = np.empty(values.shape)
    widen(values, wide)
    return wide


def add_tokens(directory: Path, tokens: Sequence[Mapping[str, Any]]) -> None:
    """Add tokens to the tokenizer in a directory.

    Args:
      directory: directory with `tokenizer.json`
      tokens: as `added_tokens` of tokenizer.json has them
    """
    tokenizer = read_json(directory / _FILE)
    tokenizer["added_tokens"] = [*(tokenizer.get("added_tokens") or []), *tokens]
    write_indented_json(directory / _FILE, tokenizer)
    config = read_object(directory / _CONFIG)
    if isinstance(decoder := config.get("added_tokens_decoder"), dict):
        new = {str(t["id"]): {k: x for k, x in t.items() if k != "id"} for t in tokens}
        write_indented_json(directory / _CONFIG, config | {"added_tokens_decoder": decoder | new})


def write_chat_template(directory: Path, template: str) -> None:
    """Write a chat template where old and new releases of transformers read it.

    Args:
      directory: directory of the tokenizer
      template: Jinja
    """
    write_text(directory / "chat_template.jinja", template)
    config = read_object(directory / _CONFIG)
    write_indented_json(directory / _CONFIG, config | {"chat_template": template})
