"""What a merge changes in each config.json: vocabulary, tied heads, labels, tokens, dtype."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from modelstock_jax.checkpoint_merge.hf_config import CONFIG, flat, generation_keys, read_config
from modelstock_jax.checkpoint_merge.matching import PlanIssues
from modelstock_jax.checkpoint_merge.options import DTYPES, Options
from modelstock_jax.checkpoint_merge.sources import HEAD_PREFIX, Source, folders, prefix_of
from modelstock_jax.checkpoint_merge.tensor_names import is_classifier, is_embedding
from modelstock_jax.checkpoint_merge.tensor_plan import TensorPlan
from modelstock_jax.errors import listed

TIED = "tie_word_embeddings"
# What a config says of its classifier; the last three are timm's.
_LABELS = (
    "id2label",
    "label2id",
    "num_labels",
    "architectures",
    "problem_type",
    "num_classes",
    "label_names",
    "label_descriptions",
    "pretrained_cfg.num_classes",
)
# Keys that hold the rows of a token embedding, and the side of an encoder-decoder they are for.
_SIDES = {
    "vocab_size": "",
    "encoder_vocab_size": "encoder",
    "src_vocab_size": "encoder",
    "decoder_vocab_size": "decoder",
    "tgt_vocab_size": "decoder",
}
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
    tensors: Mapping[str, TensorPlan], sources: Sequence[Source]
) -> dict[str, dict[str, TensorPlan]]:
    """The planned tensors of each component, by its folder; `''` is the top."""
    prefixes: dict[str, str] = {}
    for source in sources:
        prefixes |= source.components
    found: dict[str, dict[str, TensorPlan]] = {}
    for name, tensor in tensors.items():
        prefix = prefix_of(name, prefixes)
        folder = "" if prefix == HEAD_PREFIX else prefix.rstrip("/")
        found.setdefault(folder, {})[name] = tensor
    return found


def config_changes(
    sources: Sequence[Source],
    tensors: Mapping[str, TensorPlan],
    config_model: int,
    tokenizer_model: int,
    findings: PlanIssues,
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
            made |= {
                key: _nested(theirs, key)
                for key in _LABELS
                if key in theirs or any(k.startswith(f"{key}.") for k in theirs)
            }
        if made:
            found[folder] = made
    return found


def written_dtypes(
    sources: Sequence[Source],
    tensors: Mapping[str, TensorPlan],
    options: Options,
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
            for t in here.values()
            for source, own in zip(sources, t.names, strict=False)
        )
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
    return {
        name.removeprefix(f"{key}."): x for name, x in values.items() if name.startswith(f"{key}.")
    }


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
    path: str,
    folder: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorPlan],
    findings: PlanIssues,
) -> dict[str, int]:
    """The keys that certainly hold the rows of a resized embedding; a note for any other."""
    rows = _rows(folder, tensors, findings.vocabulary)
    resized = [one for one in rows if len(set(one.lengths)) > 1]
    if not resized:
        return {}
    keys = {
        key: x
        for key, x in flat(config).items()
        if key.rpartition(".")[2].endswith("vocab_size") and isinstance(x, int)
    }
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
    return (
        f"{path}: check {listed(keys, 4)}, which may have to change and is written as it was: "
        f"in the merged model {sizes}"
    )


def _rows(
    folder: str, tensors: Mapping[str, TensorPlan], lengths: Mapping[str, tuple[int, ...]]
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
        found = [
            one._replace(side="decoder") if not one.side and head.fullmatch(one.name) else one
            for one in found
        ]
    return found


def _side(key: str) -> str:
    """The side of an encoder-decoder that a key is for.

    Example:
        >>> _side("decoder_vocab_size"), _side("encoder.vocab_size"), _side("vocab_size")
        ('decoder', 'encoder', '')
    """
    *parents, last = key.split(".")
    inside = [
        p for part in parents if (p := part.removesuffix("_config")) in ("encoder", "decoder")
    ]
    return _SIDES.get(last, "") or (inside[-1] if inside else "")


def _meant(side: str, sided: set[str], rows: Sequence[Rows]) -> list[Rows]:
    """The tensors that a key of a side may speak of."""
    wanted = side or ("encoder" if "decoder" in sided else "")
    found = [one for one in rows if one.side == wanted] if wanted else list(rows)
    return found or list(rows)


def _certain(key: str) -> bool:
    *parents, last = key.split(".")
    return last in _SIDES and not any(map(_OTHER_TOWER.search, parents))


# Whether the rows of classifiers that are averaged stand for the same classes.

_MAX_NAMED = 3
# Of detection and segmentation, with layers or a head for each decoder layer.
_CLASSES = re.compile(
    r"(?:.*[./])?(?:class_(?:predictor|labels_classifier|embed|head)|cls_head|"
    r"cls_score|conv_seg)\.(?:.*\.)?(?:weight|bias)"
)


def check_labels(
    components: Mapping[str, Mapping[str, TensorPlan]],
    sources: Sequence[Source],
    findings: PlanIssues,
) -> None:
    """A problem where a classifier's row is one class in one model and another class in the next.

    Args:
        components: Folder of a component -> its planned tensors.
        sources: The base and the fine-tunes.
        findings: Where problems go.
    """
    for folder, tensors in components.items():
        labels = [
            _labels(None if source.directory is None else read_config(source.directory / folder))
            for source in sources
        ]
        sizes = {len(one) + more for one in labels if one for more in (0, 1)}  # DETR: no object.
        heads = {
            name: tensor
            for name, tensor in tensors.items()
            if _has_classes(name) and tensor.shape and tensor.shape[0] in sizes
        }
        merged = any(tensor.action == "merge" for tensor in heads.values())
        if not merged and not any(tensor.action == "mean" for tensor in heads.values()):
            continue
        rows = _differing(labels, sources, 0 if merged else 1)
        if not rows:
            continue
        path = f"{folder}/{CONFIG}" if folder else CONFIG
        findings.add_problem(
            f"{path}: id2label: {listed(rows, _MAX_NAMED)}, and {listed(sorted(heads), 2)} has a "
            "row per class: the mean of two classes is none, and --config-from does not change "
            f"that. {_fix(heads, bool(_differing(labels, sources, 1)))}"
        )


def labels_from(tensors: Mapping[str, TensorPlan], new_head: Collection[str]) -> int:
    """The model whose classes the classifier of a component has: 0 is the base."""
    heads = [tensor for name, tensor in tensors.items() if _has_classes(name) or name in new_head]
    for tensor in heads:
        if tensor.action == "mean":
            return 1
        if tensor.action.startswith("model:"):
            return int(tensor.action.partition(":")[2])
    return 0


def _has_classes(name: str) -> bool:
    return is_classifier(name) or _CLASSES.fullmatch(name) is not None


def _labels(config: Mapping[str, Any] | None) -> dict[int, str]:
    """Class names by number; empty where a config gives none."""
    named = (config or {}).get("id2label") or (config or {}).get("label_names")
    if isinstance(named, list):
        named = dict(enumerate(named))
    if not isinstance(named, dict):
        return {}
    return {int(key): str(label).strip() for key, label in named.items() if str(key).isdigit()}


def _differing(
    labels: Sequence[Mapping[int, str]], sources: Sequence[Source], first: int
) -> list[str]:
    """Rows that are of two classes in models from `first` on; upper case is no other class."""
    rows = []
    for i in sorted(set().union(*labels[first:])):
        said = {
            one[i].casefold(): (one[i], source.label)
            for one, source in reversed([*zip(labels[first:], sources[first:], strict=True)])
            if one.get(i, str(i)) not in (f"LABEL_{i}", str(i))
        }  # Those say nothing.
        if len(said) > 1:
            (a, ours), (b, theirs) = list(reversed(said.values()))[:2]
            rows.append(f"class {i} is {a!r} in {ours} and {b!r} in {theirs}")
    return rows


def _fix(heads: Mapping[str, TensorPlan], tuned: bool) -> str:
    """What a user can do: `tuned` where fine-tunes differ from each other."""
    modules = sorted({re.sub(r"\.?(?:weight|bias)$", "", name) for name in heads})
    pattern = f"{modules[0]}.*" if modules[0] else next(iter(heads))
    if all(tensor.names[:1] == (None,) for tensor in heads.values()):
        other = "leave --head finetuned out and pass --missing base, which writes no classifier"
    elif tuned:
        other = f"pass --exclude {pattern!r}, which keeps the base's classifier"
    else:
        other = (
            f"pass --exclude {pattern!r} --excluded mean, which writes the mean of the "
            "fine-tunes' classifiers and their labels"
        )
    return (
        "Train the models with one order of labels, or put the rows of one in the order of "
        f"the others; or {other}. If two names mean one class, write one name in both config "
        "files"
    )
