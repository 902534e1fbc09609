"""Changes of a merge to each config.json: vocabulary, tied heads, labels, tokens, dtype."""

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
# Keys that describe a classifier; the last three are timm's.
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
# Keys with the number of rows of a token embedding -> the side of an encoder-decoder they describe.
_SIDES = {
    "vocab_size": "",
    "encoder_vocab_size": "encoder",
    "src_vocab_size": "encoder",
    "decoder_vocab_size": "decoder",
    "tgt_vocab_size": "decoder",
}
# Nested configs that never describe a token embedding of text.
_OTHER_TOWER = re.compile(r"vision|image|visual|audio|speech|codec|vocoder|hifi")
# `decoder.embed_tokens.weight`, but not a linear layer named `decoder` (BERT's head).
_SIDE = re.compile(r"(?:model\.|\w+_model\.)?(encoder|decoder)\..*\.")
_MAX_NAMED = 3
# Classifiers of detection and segmentation models, with layers or with one head per decoder layer.
_CLASSES = re.compile(
    r"(?:.*[./])?(?:class_(?:predictor|labels_classifier|embed|head)|cls_head|"
    r"cls_score|conv_seg)\.(?:.*\.)?(?:weight|bias)"
)


class Rows(NamedTuple):
    """Rows of a token embedding, or of another tensor with an axis of the vocabulary.

    Attributes:
      name: name of the tensor in its file
      lengths: number of rows in the base and in each fine-tune
      written: number of rows in the output
      side: `encoder` or `decoder` of a model with both, else empty
    """

    name: str
    lengths: tuple[int, ...]
    written: int
    side: str


def by_folder(
    tensors: Mapping[str, TensorPlan], sources: Sequence[Source]
) -> dict[str, dict[str, TensorPlan]]:
    """Group the planned tensors by the folder of their component; `''` is the top."""
    prefixes: dict[str, str] = {}
    for source in sources:
        prefixes |= source.components
    groups: dict[str, dict[str, TensorPlan]] = {}
    for name, tensor in tensors.items():
        prefix = prefix_of(name, prefixes)
        folder = "" if prefix == HEAD_PREFIX else prefix.rstrip("/")
        groups.setdefault(folder, {})[name] = tensor
    return groups


def config_changes(
    sources: Sequence[Source],
    tensors: Mapping[str, TensorPlan],
    config_model: int,
    tokenizer_model: int,
    issues: PlanIssues,
) -> dict[str, dict[str, Any]]:
    """Return the values that the merge changes in each config.json.

    Args:
      sources: the base and the fine-tunes
      tensors: tensors of the plan, by name
      config_model: model whose config is written
      tokenizer_model: model whose tokenizer is written
      issues: issues of the plan; receives a note for each key that may be wrong

    Returns:
      folder -> dotted key -> new value; None removes the key
    """
    directory = sources[config_model].directory
    if directory is None:
        return {}
    components = by_folder(tensors, sources)
    changes: dict[str, dict[str, Any]] = {}
    for folder in folders(directory):
        config = read_config(directory / folder)
        if config is None:
            continue
        component = components.get(folder, {})
        path = f"{folder}/{CONFIG}" if folder else CONFIG
        changed = _vocabulary_keys(path, folder, config, component, issues)
        changed |= sources[config_model].config_values(config)
        if any(name in issues.untied for name in component):
            changed |= _untied_keys(config)
        elif config_model:
            changed |= _tied_keys_of_base(config, _config_in(sources[0], folder))
        if tokenizer_model != config_model:
            changed |= _token_keys(config, _config_in(sources[tokenizer_model], folder))
        head = labels_from(component, issues.new_head)
        if head and head != config_model:
            labels = flat(_config_in(sources[head], folder) or {})
            changed |= {
                key: _nested(labels, key)
                for key in _LABELS
                if key in labels or any(k.startswith(f"{key}.") for k in labels)
            }
        if changed:
            changes[folder] = changed
    return changes


def written_dtypes(
    sources: Sequence[Source],
    tensors: Mapping[str, TensorPlan],
    options: Options,
    names: Sequence[str],
) -> dict[str, str]:
    """Return the dtype of each config.json: `--dtype`, or that of dequantized weights.

    Args:
      sources: the base and the fine-tunes
      tensors: tensors of the plan, by name
      options: options of the merge
      names: folders whose config is written

    Returns:
      folder -> dtype
    """
    if options.dtype:
        return dict.fromkeys(names, options.dtype)
    dtype_names = {code: name for name, code in DTYPES.items()}
    dtypes: dict[str, str] = {}
    for folder, component in by_folder(tensors, sources).items():
        dequantized = any(
            name is not None and source.tensors[name].output_code
            for tensor in component.values()
            for source, name in zip(sources, tensor.names, strict=False)
        )
        sizes: dict[str, int] = {}
        for tensor in component.values():
            if tensor.code in dtype_names:
                sizes[tensor.code] = sizes.get(tensor.code, 0) + tensor.num_bytes
        if dequantized and sizes:
            dtypes[folder] = dtype_names[max(sizes, key=lambda code: sizes[code])]
    return dtypes


def _config_in(source: Source, folder: str) -> dict[str, Any] | None:
    return None if source.directory is None else read_config(source.directory / folder)


def _nested(values: Mapping[str, Any], key: str) -> Any:
    """Return a value of a flattened config; an object is nested again."""
    if key in values:
        return values[key]
    return {
        name.removeprefix(f"{key}."): x for name, x in values.items() if name.startswith(f"{key}.")
    }


def _untied_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Set `tie_word_embeddings` to false wherever a config has it or a library searches for it."""
    present = [key for key in flat(config) if key.rpartition(".")[2] == TIED]
    text = [f"text_config.{TIED}"] if isinstance(config.get("text_config"), dict) else []
    return dict.fromkeys([TIED, *text, *present], False)


def _tied_keys_of_base(config: Mapping[str, Any], base: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return `tie_word_embeddings` of BASE, because the merged model has the head of BASE."""
    tied = {key: x for key, x in flat(base or {}).items() if key.rpartition(".")[2] == TIED}
    return {key: tied[key] for key, x in flat(config).items() if x != tied.get(key, x)}


def _token_keys(
    config: Mapping[str, Any], tokenizer_config: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return special tokens and generation settings of the model whose tokenizer is written."""
    if tokenizer_config is None:
        return {}
    # A special token that is not in that model's config is removed from the merged config.
    removed = {key: None for key in generation_keys(config) if "_token_id" in key}
    return removed | _at_keys_of(config, generation_keys(tokenizer_config))


def _at_keys_of(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Move values to where a config stores them: at the top level or in `text_config`."""
    moved = {}
    for key, value in values.items():
        tower, _, last = key.rpartition(".")
        nested = tower and isinstance(config.get(tower), dict)
        moved[key if nested or not tower else last] = value
    return moved


def _vocabulary_keys(
    path: str,
    folder: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorPlan],
    issues: PlanIssues,
) -> dict[str, int]:
    """Return the keys that certainly contain the rows of a resized embedding; note all others."""
    all_rows = _rows(folder, tensors, issues.vocabulary)
    resized = [rows for rows in all_rows if len(set(rows.lengths)) > 1]
    if not resized:
        return {}
    keys = {
        key: x
        for key, x in flat(config).items()
        if key.rpartition(".")[2].endswith("vocab_size") and isinstance(x, int)
    }
    sides = {side for key in keys if (side := _side(key))}
    changed, doubtful = {}, []
    for key, value in keys.items():
        described = [
            rows for rows in _described_rows(_side(key), sides, all_rows) if value in rows.lengths
        ]
        sizes = {rows.written for rows in described}
        if not any(rows in resized for rows in described):
            continue
        if _is_certain(key) and len(sizes) == 1:
            changed[key] = sizes.pop()
        else:
            doubtful.append(key)
    main = [key for key in ("text_config.vocab_size", "vocab_size") if key in keys]
    if not changed and not doubtful and main and len({rows.written for rows in all_rows}) == 1:
        changed[main[0]] = all_rows[0].written  # The value differed from the embedding's rows.
    sizes = {*changed.values()}
    without_key = [rows for rows in resized if rows.written not in sizes]
    noted = doubtful or [key for key in keys if without_key and _is_certain(key)]
    if noted:
        issues.notes.append(_note_to_check(path, noted, without_key or resized))
    return {key: value for key, value in changed.items() if value != keys[key]}


def _note_to_check(path: str, keys: Sequence[str], resized: Iterable[Rows]) -> str:
    sizes = listed((f"{rows.name} has {rows.written} rows" for rows in resized), 3)
    return (
        f"{path}: check {listed(keys, 4)}, which may have to change but is written unchanged: "
        f"in the merged model {sizes}"
    )


def _rows(
    folder: str, tensors: Mapping[str, TensorPlan], lengths: Mapping[str, tuple[int, ...]]
) -> list[Rows]:
    """Return all tensors with an axis of the vocabulary, also those equal in all models."""
    found = []
    for name, tensor in tensors.items():
        local = name.removeprefix(f"{folder}/") if folder else name
        side = match[1] if (match := _SIDE.match(local)) else ""
        if name in lengths:
            found.append(Rows(local, lengths[name], tensor.shape[tensor.axis], side))
        elif is_embedding(local) and len(tensor.shape) == 2:
            found.append(Rows(local, tensor.shape[:1], tensor.shape[0], side))
    if {"encoder", "decoder"} <= {rows.side for rows in found}:  # Heads belong to the decoder.
        head = re.compile(r"(?:.*\.)?(?:lm_head|final_logits|output_projection)\b.*|.*logits_bias")
        found = [
            rows._replace(side="decoder") if not rows.side and head.fullmatch(rows.name) else rows
            for rows in found
        ]
    return found


def _side(key: str) -> str:
    """Return the side of an encoder-decoder that a key describes.

    Example:
      >>> _side("decoder_vocab_size"), _side("encoder.vocab_size"), _side("vocab_size")
      ('decoder', 'encoder', '')
    """
    *parents, last = key.split(".")
    sides = [
        name
        for parent in parents
        if (name := parent.removesuffix("_config")) in ("encoder", "decoder")
    ]
    return _SIDES.get(last, "") or (sides[-1] if sides else "")


def _described_rows(side: str, sides: set[str], all_rows: Sequence[Rows]) -> list[Rows]:
    """Return the tensors that a key of a side may describe."""
    side = side or ("encoder" if "decoder" in sides else "")
    return [rows for rows in all_rows if side and rows.side == side] or list(all_rows)


def _is_certain(key: str) -> bool:
    *parents, last = key.split(".")
    return last in _SIDES and not any(map(_OTHER_TOWER.search, parents))


def check_labels(
    components: Mapping[str, Mapping[str, TensorPlan]],
    sources: Sequence[Source],
    issues: PlanIssues,
) -> None:
    """Report a problem if an averaged row of a classifier has different classes in two models.

    Args:
      components: folder of a component -> its planned tensors
      sources: the base and the fine-tunes
      issues: receives the problems
    """
    for folder, tensors in components.items():
        labels = [
            _labels(None if source.directory is None else read_config(source.directory / folder))
            for source in sources
        ]
        # DETR has one more row, for no object.
        sizes = {len(classes) + extra for classes in labels if classes for extra in (0, 1)}
        heads = {
            name: tensor
            for name, tensor in tensors.items()
            if _has_classes(name) and tensor.shape and tensor.shape[0] in sizes
        }
        merged = any(tensor.action == "merge" for tensor in heads.values())
        if not merged and not any(tensor.action == "mean" for tensor in heads.values()):
            continue
        rows = _conflicting_rows(labels, sources, 0 if merged else 1)
        if not rows:
            continue
        path = f"{folder}/{CONFIG}" if folder else CONFIG
        issues.add_problem(
            f"{path}: id2label: {listed(rows, _MAX_NAMED)}, but {listed(sorted(heads), 2)} has one "
            "row per class: the mean of rows of two classes is meaningless, and --config-from does "
            f"not change that; {_fix(heads, bool(_conflicting_rows(labels, sources, 1)))}"
        )


def labels_from(tensors: Mapping[str, TensorPlan], new_head: Collection[str]) -> int:
    """Return the model whose classes the classifier of a component has; 0 is the base."""
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
    """Return the class names by index; empty if a config has none."""
    labels = (config or {}).get("id2label") or (config or {}).get("label_names")
    if isinstance(labels, list):
        labels = dict(enumerate(labels))
    if not isinstance(labels, dict):
        return {}
    return {int(key): str(label).strip() for key, label in labels.items() if str(key).isdigit()}


def _conflicting_rows(
    labels: Sequence[Mapping[int, str]], sources: Sequence[Source], first: int
) -> list[str]:
    """Describe rows with different classes in models from `first` on; case is ignored."""
    rows = []
    for i in sorted(set().union(*labels[first:])):
        names = {
            classes[i].casefold(): (classes[i], source.label)
            for classes, source in reversed([*zip(labels[first:], sources[first:], strict=True)])
            if classes.get(i, str(i)) not in (f"LABEL_{i}", str(i))  # Default names.
        }
        if len(names) > 1:
            (a, label_a), (b, label_b) = list(reversed(names.values()))[:2]
            rows.append(f"class {i} is {a!r} in {label_a} and {b!r} in {label_b}")
    return rows


def _fix(heads: Mapping[str, TensorPlan], fine_tunes_differ: bool) -> str:
    """Return how to fix a conflict of classes."""
    modules = sorted({re.sub(r"\.?(?:weight|bias)$", "", name) for name in heads})
    pattern = f"{modules[0]}.*" if modules[0] else next(iter(heads))
    if all(tensor.names[:1] == (None,) for tensor in heads.values()):
        option = "remove --head finetuned and pass --missing-tensors base to write no classifier"
    elif fine_tunes_differ:
        option = f"pass --exclude {pattern!r} to keep the base's classifier"
    else:
        option = (
            f"pass --exclude {pattern!r} --unmerged-from mean to write the mean of the fine-tunes' "
            "classifiers and their labels"
        )
    return (
        "train the models with the same order of labels, put the rows of one model in the order of "
        f"the others, or {option}; if two names mean the same class, use one name in both config "
        "files"
    )
