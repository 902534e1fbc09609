"""What a merge changes in each config.json: vocabulary, tied heads, labels, tokens, dtype."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from modelstock_jax.checkpoint_merge.buffers import is_embedding
from modelstock_jax.checkpoint_merge.components import HEAD_PREFIX, folders, prefix_of
from modelstock_jax.checkpoint_merge.config import CONFIG, flat, generation_keys, read_config
from modelstock_jax.checkpoint_merge.decide import Planned
from modelstock_jax.checkpoint_merge.labels import labels_from
from modelstock_jax.checkpoint_merge.match import Findings
from modelstock_jax.checkpoint_merge.options import DTYPES, Options
from modelstock_jax.checkpoint_merge.sources import Source
from modelstock_jax.errors import listed

TIED = "tie_word_embeddings"
# What a config says of its classifier; the last three are timm's.
_LABELS = ("id2label", "label2id", "num_labels", "architectures", "problem_type", "num_classes",
           "label_names", "label_descriptions", "pretrained_cfg.num_classes")
# Keys that hold the rows of a token embedding, and the side of an encoder-decoder they are for.
_SIDES = {"vocab_size": "", "encoder_vocab_size": "encoder", "src_vocab_size": "encoder",
          "decoder_vocab_size": "decoder", "tgt_vocab_size": "decoder"}
# Parts of a config that never describe a token embedding of text.
_OTHER_TOWER = re.compile(r"vision|image|visual|audio|speech|codec|vocoder|hifi")
# `decoder.embed_tokens.weight`, and not a linear layer called `decoder` (BERT's head).
_SIDE = re.compile(r"(?:model\.|\w+_model\.)?(encoder|decoder)\..*\.")


class Rows(NamedTuple):
    """Rows of a token embedding, or of another tensor with an axis of the vocabulary.

    Attributes:
        name: In its own file.
        lengths: In the base and in each fine-tune.
        written: In the output.
        side: `encoder` or `decoder` of a model with both; else empty.
    """

    name: str
    lengths: tuple[int, ...]
    written: int
    side: str


def by_folder(
    tensors: Mapping[str, Planned], sources: Sequence[Source]
) -> dict[str, dict[str, Planned]]:
    """The planned tensors of each component, by its folder; `''` is the top."""
    prefixes: dict[str, str] = {}
    for source in sources:
        prefixes |= source.components
    found: dict[str, dict[str, Planned]] = {}
    for name, tensor in tensors.items():
        prefix = prefix_of(name, prefixes)
        folder = "" if prefix == HEAD_PREFIX else prefix.rstrip("/")
        found.setdefault(folder, {})[name] = tensor
    return found


def config_changes(
    sources: Sequence[Source], tensors: Mapping[str, Planned], config_model: int,
    tokenizer_model: int, findings: Findings,
) -> dict[str, dict[str, Any]]:
    """Folder -> dotted key of its config.json -> value that the merge changes; None removes it.

    Args:
        sources: The base and the fine-tunes.
        tensors: The plan.
        config_model: Whose config is written.
        tokenizer_model: Whose tokenizer is.
        findings: What planning found; a key that may be wrong becomes a note.
    """
    directory = sources[config_model].directory
    if directory is None:
        return {}
    components = by_folder(tensors, sources)
    found: dict[str, dict[str, Any]] = {}
    for folder in folders(directory):
        config = read_config(directory / folder)
        if config is None:
            continue
        here = components.get(folder, {})
        path = f"{folder}/{CONFIG}" if folder else CONFIG
        made = _of_vocabulary(path, folder, config, here, findings)
        if any(name in findings.untied for name in here):
            made |= _untied(config)
        elif config_model:
            made |= _ties(config, _config_in(sources[0], folder))
        if tokenizer_model != config_model:
            made |= _of_tokens(config, _config_in(sources[tokenizer_model], folder))
        head = labels_from(here, findings.new_head)
        if head and head != config_model:
            theirs = flat(_config_in(sources[head], folder) or {})
            made |= {key: _nested(theirs, key) for key in _LABELS
                     if key in theirs or any(k.startswith(f"{key}.") for k in theirs)}
        if made:
            found[folder] = made
    return found


def written_dtypes(
    sources: Sequence[Source], tensors: Mapping[str, Planned], options: Options,
    names: Sequence[str],
) -> dict[str, str]:
    """Folder -> the dtype that its config.json gets: `--dtype`, or that of dequantized weights."""
    if options.dtype:
        return dict.fromkeys(names, options.dtype)
    called = {code: name for name, code in DTYPES.items()}
    found: dict[str, str] = {}
    for folder, here in by_folder(tensors, sources).items():
        formed = any(
            own is not None and source.tensors[own].written
            for t in here.values() for source, own in zip(sources, t.names, strict=False))
        sizes: dict[str, int] = {}
        for t in here.values():
            if t.code in called:
                sizes[t.code] = sizes.get(t.code, 0) + t.num_bytes
        if formed and sizes:
            found[folder] = called[max(sizes, key=lambda code: sizes[code])]
    return found


def _config_in(source: Source, folder: str) -> dict[str, Any] | None:
    return None if source.directory is None else read_config(source.directory / folder)


def _nested(values: Mapping[str, Any], key: str) -> Any:
    """A value of a flattened config, an object put together again."""
    if key in values:
        return values[key]
    return {name.removeprefix(f"{key}."): x for name, x in values.items()
            if name.startswith(f"{key}.")}


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """`tie_word_embeddings` false wherever a config says it, or a library looks for it."""
    said = [key for key in flat(config) if key.rpartition(".")[2] == TIED]
    text = [f"text_config.{TIED}"] if isinstance(config.get("text_config"), dict) else []
    return dict.fromkeys([TIED, *text, *said], False)


def _ties(config: Mapping[str, Any], base: Mapping[str, Any] | None) -> dict[str, Any]:
    """What BASE's config says of its head, for the merged model has the head that BASE has."""
    said = {key: x for key, x in flat(base or {}).items() if key.rpartition(".")[2] == TIED}
    return {key: said[key] for key, x in flat(config).items() if x != said.get(key, x)}


def _of_tokens(config: Mapping[str, Any], theirs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Special tokens and generation settings of the model whose tokenizer is written."""
    if theirs is None:
        return {}
    # A special token that their config lacks has no value in the merged config either.
    made = {key: None for key in generation_keys(config) if "_token_id" in key}
    return made | _placed(config, generation_keys(theirs))


def _placed(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values under the dotted keys that a config keeps them at: at the top or in `text_config`."""
    found = {}
    for key, value in values.items():
        tower, _, last = key.rpartition(".")
        nested = tower and isinstance(config.get(tower), dict)
        found[key if nested or not tower else last] = value
    return found


def _of_vocabulary(
    path: str, folder: str, config: Mapping[str, Any], tensors: Mapping[str, Planned],
    findings: Findings,
) -> dict[str, int]:
    """The keys that certainly hold the rows of a resized embedding; a note for any other."""
    rows = _rows(folder, tensors, findings.vocabulary)
    resized = [one for one in rows if len(set(one.lengths)) > 1]
    if not resized:
        return {}
    keys = {key: x for key, x in flat(config).items()
            if key.rpartition(".")[2].endswith("vocab_size") and isinstance(x, int)}
    sided = {side for key in keys if (side := _side(key))}
    made, doubtful = {}, []
    for key, value in keys.items():
        meant = [one for one in _meant(_side(key), sided, rows) if value in one.lengths]
        sizes = {one.written for one in meant}
        if not any(one in resized for one in meant):
            continue
        if _certain(key) and len(sizes) == 1:
            made[key] = sizes.pop()
        else:
            doubtful.append(key)
    main = [key for key in ("text_config.vocab_size", "vocab_size") if key in keys]
    if not made and not doubtful and main and len({one.written for one in rows}) == 1:
        made[main[0]] = rows[0].written  # It said another number than the embedding had rows.
    said = {*made.values()}
    unsaid = [one for one in resized if one.written not in said]
    named = doubtful or [key for key in keys if unsaid and _certain(key)]
    if named:
        findings.notes.append(_check(path, named, unsaid or resized))
    return {key: value for key, value in made.items() if value != keys[key]}


def _check(path: str, keys: Sequence[str], rows: Iterable[Rows]) -> str:
    sizes = listed((f"{one.name} has {one.written} rows" for one in rows), 3)
    return (f"{path}: check {listed(keys, 4)}, which may have to change and is written as it was: "
            f"in the merged model {sizes}")


def _rows(
    folder: str, tensors: Mapping[str, Planned], lengths: Mapping[str, tuple[int, ...]]
) -> list[Rows]:
    """Tensors with an axis of the vocabulary, those that all models have alike too."""
    found = []
    for name, tensor in tensors.items():
        own = name.removeprefix(f"{folder}/") if folder else name
        side = match[1] if (match := _SIDE.match(own)) else ""
        if name in lengths:
            found.append(Rows(own, lengths[name], tensor.shape[tensor.axis], side))
        elif is_embedding(own) and len(tensor.shape) == 2:
            found.append(Rows(own, tensor.shape[:1], tensor.shape[0], side))
    if {"encoder", "decoder"} <= {one.side for one in found}:  # Heads are the decoder's.
        head = re.compile(r"(?:.*\.)?(?:lm_head|final_logits|output_projection)\b.*|.*logits_bias")
        found = [one._replace(side="decoder") if not one.side and head.fullmatch(one.name) else one
                 for one in found]
    return found


def _side(key: str) -> str:
    """The side of an encoder-decoder that a key is for.

    Example:
        >>> _side("decoder_vocab_size"), _side("encoder.vocab_size"), _side("vocab_size")
        ('decoder', 'encoder', '')
    """
    *parents, last = key.split(".")
    inside = [p for part in parents if (p := part.removesuffix("_config")) in (
        "encoder", "decoder")]
    return _SIDES.get(last, "") or (inside[-1] if inside else "")


def _meant(side: str, sided: set[str], rows: Sequence[Rows]) -> list[Rows]:
    """The tensors that a key of a side may speak of."""
    wanted = side or ("encoder" if "decoder" in sided else "")
    found = [one for one in rows if one.side == wanted] if wanted else list(rows)
    return found or list(rows)


def _certain(key: str) -> bool:
    *parents, last = key.split(".")
    return last in _SIDES and not any(map(_OTHER_TOWER.search, parents))

