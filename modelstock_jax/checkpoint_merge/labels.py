"""Whether the rows of classifiers that are averaged stand for the same classes."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from modelstock_jax.checkpoint_merge.config import CONFIG, read_config
from modelstock_jax.checkpoint_merge.decide import Planned
from modelstock_jax.checkpoint_merge.depth import is_classifier
from modelstock_jax.checkpoint_merge.match import Findings
from modelstock_jax.checkpoint_merge.sources import Source
from modelstock_jax.errors import listed

_MAX_NAMED = 3
# Of detection and segmentation, with layers or a head for each decoder layer.
_CLASSES = re.compile(r"(?:.*[./])?(?:class_(?:predictor|labels_classifier|embed|head)|cls_head|"
                      r"cls_score|conv_seg)\.(?:.*\.)?(?:weight|bias)")


def check_labels(
    components: Mapping[str, Mapping[str, Planned]], sources: Sequence[Source], findings: Findings
) -> None:
    """A problem where a classifier's row is one class in one model and another class in the next.

    Args:
        components: Folder of a component -> its planned tensors.
        sources: The base and the fine-tunes.
        findings: Where problems go.
    """
    for folder, tensors in components.items():
        labels = [_labels(None if source.directory is None else
                          read_config(source.directory / folder)) for source in sources]
        sizes = {len(one) + more for one in labels if one for more in (0, 1)}  # DETR: no object.
        heads = {name: tensor for name, tensor in tensors.items()
                 if _has_classes(name) and tensor.shape and tensor.shape[0] in sizes}
        merged = any(tensor.action == "merge" for tensor in heads.values())
        if not merged and not any(tensor.action == "mean" for tensor in heads.values()):
            continue
        rows = _differing(labels, sources, 0 if merged else 1)
        if not rows:
            continue
        path = f"{folder}/{CONFIG}" if folder else CONFIG
        findings.object(
            f"{path}: id2label: {listed(rows, _MAX_NAMED)}, and {listed(sorted(heads), 2)} has a "
            "row per class: the mean of two classes is none, and --config-from does not change "
            f"that. {_fix(heads, bool(_differing(labels, sources, 1)))}")


def labels_from(tensors: Mapping[str, Planned], new_head: Collection[str]) -> int:
    """The model whose classes the classifier of a component has: 0 is the base."""
    heads = [tensor for name, tensor in tensors.items()
             if _has_classes(name) or name in new_head]
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
        said = {one[i].casefold(): (one[i], source.label)
                for one, source in reversed([*zip(labels[first:], sources[first:], strict=True)])
                if one.get(i, str(i)) not in (f"LABEL_{i}", str(i))}  # Those say nothing.
        if len(said) > 1:
            (a, ours), (b, theirs) = list(reversed(said.values()))[:2]
            rows.append(f"class {i} is {a!r} in {ours} and {b!r} in {theirs}")
    return rows


def _fix(heads: Mapping[str, Planned], tuned: bool) -> str:
    """What a user can do: `tuned` where fine-tunes differ from each other."""
    modules = sorted({re.sub(r"\.?(?:weight|bias)$", "", name) for name in heads})
    pattern = f"{modules[0]}.*" if modules[0] else next(iter(heads))
    if all(tensor.names[:1] == (None,) for tensor in heads.values()):
        other = "leave --head finetuned out and pass --missing base, which writes no classifier"
    elif tuned:
        other = f"pass --exclude {pattern!r}, which keeps the base's classifier"
    else:
        other = (f"pass --exclude {pattern!r} --excluded mean, which writes the mean of the "
                 "fine-tunes' classifiers and their labels")
    return ("Train the models with one order of labels, or put the rows of one in the order of "
            f"the others; or {other}. If two names mean one class, write one name in both config "
            "files")
