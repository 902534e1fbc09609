"""Match tensor names between models, and classify tensors by name.

Index buffers, masks, counters, embeddings and classification heads each have separate rules.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from modelstock_jax.errors import listed

# Parts of names that wrappers add: torch.compile, FSDP, activation checkpointing, DataParallel.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
# Final parts of names that libraries renamed: layer norms of TensorFlow, weight norm of torch.
_RENAMED = {
    ("gamma",): ("weight",),
    ("beta",): ("bias",),
    ("parametrizations", "weight", "original0"): ("weight_g",),
    ("parametrizations", "weight", "original1"): ("weight_v",),
}
# Maximum number of embeddings, heads and their biases that differ in shape if a vocabulary grew.
_MAX_RESIZED = 6
# Minimum fraction of a model's names that a rule must map to replace one prefix by another.
_MIN_REPLACED = 0.8
_FUSED_EXPERTS = re.compile(r".*experts\.(?!\d)[A-Za-z_.]*(?:gate|up|down|w\d|proj)\w*")
_SEPARATE_EXPERTS = re.compile(r".*experts\.\d+\..+")
# Projections that some models store as one tensor: its name, and the names of the separate tensors.
_FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "Wqkv": ("q_proj", "query"),
    "query_key_value": ("q_proj", "query"),
    "c_attn": ("q_proj", "q_attn"),
    "in_proj_weight": ("q_proj",),
    "qkv": ("q_proj", "query", "to_q", "q"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


class TensorInfo(NamedTuple):
    """The shape and safetensors dtype code of a tensor."""

    shape: tuple[int, ...]
    code: str
    output_code: str | None = None  # dtype code of the output if it is not `code`


_LAYER = re.compile(r"(?P<tower>.*?(?:layers?|blocks?|h|stages?))\.(?P<layer>\d+)\.")


class Rule(NamedTuple):
    """A prefix of a model's names, and the prefix of the base that replaces it."""

    model: str
    base: str

    def __str__(self) -> str:
        return f"{self.model or '(nothing)'} -> {self.base or '(nothing)'}"


class Renames(NamedTuple):
    """The names of a model that differ from those of the base.

    Attributes:
      names: name in the base -> name in the model
      rules: prefixes in which they differ
      ambiguous: names in the model that match more than one name of the base
    """

    names: dict[str, str]
    rules: tuple[Rule, ...]
    ambiguous: tuple[str, ...] = ()


def renames(
    base: Mapping[str, TensorInfo], other: Mapping[str, TensorInfo], *, partial: bool = False
) -> Renames:
    """Map names of a model to those of the base if exactly one prefix rule does so.

    A rule replaces a prefix of the model's names by a prefix of the base, so that the names become
    names of the base that the model lacks. The shapes must be equal, except for the rows of a
    vocabulary. A rule is not used if other names with that prefix match the base unchanged. The
    rule that maps the most names is used first, then the rule whose prefixes share the most words.
    If two rules are tied, neither is used and the names are ambiguous.

    Args:
      base: the tensors of the base
      other: the tensors of the model
      partial: whether the model contains only some of the tensors (an adapter)
    """
    unmatched = [name for name in other if name not in base]
    free = {name for name in base if name not in other}
    mapped = _match_spellings(unmatched, free)
    free -= mapped.keys()
    left = sorted(set(unmatched) - set(mapped.values()))
    unchanged = {name for name in other if name in base}
    rules: list[Rule] = []
    ambiguous: list[str] = []
    while left:
        candidates = _candidates(left, free, base, other)
        best = _best(candidates, left, free, base, other, unchanged, partial)
        if best is None:
            break
        rule, hits, tied = best
        if tied:
            ambiguous += sorted(hits)
            left = [name for name in left if name not in hits]
            continue
        rules.append(rule)
        for model_name, name in hits.items():
            mapped[name] = model_name
            free.discard(name)
        left = [name for name in left if name not in hits]
    return Renames(mapped, _summarize(mapped), tuple(ambiguous))


def explanation(base: Iterable[str], lacking: Iterable[str], extra: Iterable[str]) -> str:
    """Explain the difference between two sets of names if its cause is recognized.

    Args:
      base: names of the base
      lacking: names that the model lacks
      extra: names that only the model has

    Returns:
      the explanation, empty if there is none

    Example:
      >>> explanation([], ["mlp.experts.gate_up_proj"], ["mlp.experts.0.gate_proj.weight"])
      'the base stores experts fused (mlp.experts.gate_up_proj), this model stores them separately \
(mlp.experts.0.gate_proj.weight)'
    """
    lacking, extra = sorted(lacking), sorted(extra)
    if depth := _depth_difference(base, lacking, extra):
        return depth
    for one, other, text in (
        (lacking, extra, "the base stores experts fused ({}), this model stores them separately"),
        (extra, lacking, "this model stores experts fused ({}), the base stores them separately"),
    ):
        fused = next(
            (n for n in one if _FUSED_EXPERTS.fullmatch(n) and not _SEPARATE_EXPERTS.fullmatch(n)),
            None,
        )
        separate = next((n for n in other if _SEPARATE_EXPERTS.fullmatch(n)), None)
        if fused and separate:
            return f"{text.format(fused)} ({separate})"
    for one, other, text in (
        (lacking, extra, "the base stores {} as one tensor, this model stores its parts ({})"),
        (extra, lacking, "this model stores {} as one tensor, the base stores its parts ({})"),
    ):
        for name in one:
            for fused, parts in _FUSED.items():
                if fused not in name.split("."):
                    continue
                start = name.split(f".{fused}")[0]
                separate = next(
                    (n for n in other if n.startswith(start) and set(parts) & set(n.split("."))),
                    None,
                )
                if separate:
                    return text.format(name, separate)
    return ""


def _depth_difference(base: Iterable[str], lacking: Sequence[str], extra: Sequence[str]) -> str:
    """Explain that one model has layers beyond the last layer of the other, or return ''."""
    layers = {}
    for names in (set(base), set(base) - set(lacking) | set(extra)):
        matches = [match for name in names if (match := _LAYER.match(name))]
        layers[len(layers)] = {
            tower: {int(m["layer"]) for m in matches if m["tower"] == tower}
            for tower in {m["tower"] for m in matches}
        }
    for tower in layers[0].keys() & layers[1].keys():
        in_base, in_model = (sorted(layers[k][tower]) for k in (0, 1))
        if len(in_base) > 1 and len(in_model) > 1 and in_base[-1] != in_model[-1]:
            return (
                f"the base has {len(in_base)} layers in {tower}, this model {len(in_model)}: "
                "layers of models of unequal depth do not correspond"
            )
    return ""


def note(label: str, renamed: Renames) -> str:
    """Return the note about names that were mapped."""
    rules = listed((str(rule) for rule in renamed.rules), 4)
    return f"{label}: {len(renamed.names)} tensors have other names than in the base ({rules})"


def _candidates(left, free, base, other) -> Counter:
    """Return rules that map at least one name, with the number of names that support each."""
    by_suffix: dict[str, list[str]] = defaultdict(list)
    for name in free:
        for suffix in _suffixes(name):
            by_suffix[suffix].append(name)
    rules: Counter = Counter()
    for name in left:
        for suffix in _suffixes(name):
            prefix = name[: len(name) - len(suffix)]
            if _numbers(prefix):  # Never map a layer to another layer.
                break
            single_part = len(_parts(suffix)) < 2
            for target in by_suffix.get(suffix, ()):
                if single_part and suffix not in (name, target):
                    continue  # A suffix such as `weight` does not identify a tensor.
                rule = _shortest(prefix, target[: len(target) - len(suffix)])
                if _same_shape(other[name], base[target]) and not _numbers(rule.base):
                    rules[rule] += 1
    return rules


def _shortest(model: str, base: str) -> Rule:
    """Return a rule without the equal parts at the end of both prefixes."""
    while (
        model
        and base
        and (tail := re.search(r"[^./]+[./]$", model))
        and base.endswith(tail[0])
        and (len(base) == len(tail[0]) or base[-len(tail[0]) - 1] in "./")
    ):
        model, base = model[: tail.start()], base[: len(base) - len(tail[0])]
    return Rule(model, base)


def _best(candidates, left, free, base, other, unchanged, partial):
    """Return the rule that maps the most names, those names, and whether another rule ties."""
    scored = []
    for rule in candidates:
        below = [name for name in left if name.startswith(rule.model)]
        hits = {name: rule.base + name[len(rule.model) :] for name in below}
        hits = {
            model_name: name
            for model_name, name in hits.items()
            if name in free and len(base[name].shape) == len(other[model_name].shape)
        }
        same_shape = [n for n, name in hits.items() if _same_shape(other[n], base[name])]
        resized = [
            model_name
            for model_name, name in hits.items()
            if _num_differing_axes(base[name], other[model_name]) == 1
        ]
        if not same_shape or len(same_shape) + len(resized) < len(hits):
            continue
        if len(resized) > _MAX_RESIZED:
            continue
        if not partial and _contradicted(rule, hits, unchanged):
            continue
        if _replaces(rule, hits) and len(hits) < _MIN_REPLACED * len(other):
            continue
        shared = len(set(_parts(rule.model)) & set(_parts(rule.base)))
        scored.append(((len(same_shape), shared), rule, hits))
    if not scored:
        return None
    scored.sort(key=lambda item: item[0], reverse=True)
    (score, rule, hits), *rest = scored
    tied = any(
        other_score == score
        and set(other_hits) & set(hits)
        and any(hits[n] != other_hits[n] for n in set(other_hits) & set(hits))
        for other_score, _, other_hits in rest
    )
    return rule, hits, tied


def _contradicted(rule: Rule, hits: Mapping[str, str], unchanged: Iterable[str]) -> bool:
    """Return whether names that match unchanged begin like names that the rule would rename."""
    heads = {rule.model + _parts(name[len(rule.model) :])[0] for name in hits}
    return any(name.startswith(tuple(f"{head}." for head in heads)) for name in unchanged)


def _replaces(rule: Rule, hits: Iterable[str]) -> bool:
    """Return whether a rule replaces words by others, which needs a rename of the entire model.

    A classifier is not the head of a language model, and the head of one task is not that of
    another, although their tensors may have equal shapes. A tower with layers is recognized by a
    part that both prefixes share.
    """
    model, base = set(_parts(rule.model)), set(_parts(rule.base))
    layers = {number for name in hits for number in _numbers(name[len(rule.model) :])[:1]}
    return bool(model - base) and bool(base - model) and not (model & base and len(layers) > 1)


def _summarize(mapped: Mapping[str, str]) -> tuple[Rule, ...]:
    """Return the prefixes in which names differ, most frequent first."""
    rules: Counter = Counter()
    for name, model_name in mapped.items():
        a, b = _parts(model_name), _parts(name)
        while a and b and a[-1] == b[-1]:
            a, b = a[:-1], b[:-1]
        while a and b and a[0] == b[0] and (len(a) > 1 or len(b) > 1):
            if len(a) == 1 or len(b) == 1:
                break
            a, b = a[1:], b[1:]
        rules[Rule(_prefix(a), _prefix(b))] += 1
    return tuple(rule for rule, _ in rules.most_common())


def _prefix(parts: list[str]) -> str:
    return "".join(f"{part}." for part in parts)


def _match_spellings(unmatched: Iterable[str], free: Iterable[str]) -> dict[str, str]:
    """Map base names to model names that differ only by wrappers and old spellings."""
    in_base: dict[str, list[str]] = defaultdict(list)
    for name in free:
        in_base[_normalize(name)].append(name)
    in_model: dict[str, list[str]] = defaultdict(list)
    for name in unmatched:
        in_model[_normalize(name)].append(name)
    return {
        in_base[normalized][0]: names[0]
        for normalized, names in in_model.items()
        if len(names) == 1 and len(in_base.get(normalized, ())) == 1
    }


def _normalize(name: str) -> str:
    """Return a name without the parts that wrappers add, in its current spelling.

    Example:
      >>> _normalize("h.0._orig_mod.ln.gamma"), _normalize("conv.parametrizations.weight.original0")
      ('h.0.ln.weight', 'conv.weight_g')
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    for old, new in _RENAMED.items():
        if tuple(parts[-len(old) :]) == old and len(parts) > len(old):
            parts[-len(old) :] = new
    return ".".join(parts)


def _suffixes(name: str) -> Iterable[str]:
    """Yield the name and the suffix after each separator, longest first."""
    yield name
    for separator in re.finditer(r"[./]", name):
        yield name[separator.end() :]


def _numbers(prefix: str) -> list[str]:
    """Return the layer numbers in a prefix, including parts like `layer_3` or `layer4`.

    Example:
      >>> _numbers("encoder.layer_3."), _numbers("layer4.0."), _numbers("wav2vec2.encoder.")
      (['3'], ['4', '0'], [])
    """
    return re.findall(r"(?:^|[./]|_|layers?|blocks?|stages?|h)(\d+)(?=[./])", prefix)


def _parts(name: str) -> list[str]:
    return [part for part in re.split(r"[./]", name) if part]


def _same_shape(a: TensorInfo, b: TensorInfo) -> bool:
    return a.shape == b.shape


def _num_differing_axes(a: TensorInfo, b: TensorInfo) -> int:
    return sum(m != n for m, n in zip(a.shape, b.shape, strict=True))


# Tensors that a model computes from its config and never trains: position indices, masks and
# frequency tables, in any dtype. `mask_token` and a bare `freqs` are weights in some models, so
# only these endings match.
_INDEX = re.compile(
    r"(?:.*[._])?(?:ids|idx|index|indices|inv_freq|inv_freqs|freqs_cis|cos_cached|sin_cached|"
    r"masked_bias|relative_coords_table)"
)
_MASK = re.compile(r"(?:.*[._])?mask")

# GPT-2's causal mask: a buffer with the name of a weight, recognized by its shape [1, 1, n, n].
_CAUSAL = re.compile(r"(?:.*\.)?attn(?:ention)?\.bias")
_EMBEDDING = re.compile(r"(?:.*[./])?(?:\w*emb\w*|wte|shared|lm_head)(?:\.weight)?")
_NO_EMBEDDING = re.compile(r"pos|type|patch|relative|time|label")
_COUNTER = re.compile(
    r"(?:.*[._])?(?:num_batches_tracked|num_updates|n_averaged|num_steps|global_step|step|steps|"
    r"count|counter|iteration|iterations|epoch)"
)


def is_index(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor is a buffer of indices, frequencies or a mask, which has no mean.

    Example:
      >>> is_index("text_model.embeddings.position_ids", (1, 77))
      True
      >>> is_index("rotary_emb.inv_freq", (32,)), is_index("vit.embeddings.mask_token", (1, 1, 8))
      (True, False)
    """
    if _CAUSAL.fullmatch(name):
        return len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
    return _INDEX.fullmatch(name) is not None


def is_counter(name: str, shape: tuple[int, ...], integer: bool) -> bool:
    """Return whether a tensor counts batches or updates; a merge stores the maximum.

    A single integer is a counter whatever its name, a single float only if its name is known.

    Example:
      >>> is_counter("layer1.bn.num_batches_tracked", (), True)
      True
      >>> is_counter("model_ema.num_updates", (1,), False), is_counter("logit_scale", (), False)
      (True, False)
    """
    single = all(length == 1 for length in shape)
    return single and (integer or _COUNTER.fullmatch(name) is not None)


def is_mask(name: str) -> bool:
    """Return whether a tensor is named like a mask; only its values tell if it is trained.

    Example:
      >>> is_mask("text.attn_mask"), is_mask("embeddings.mask_token")
      (True, False)
    """
    return _MASK.fullmatch(name) is not None


def is_embedding(name: str) -> bool:
    """Return whether the name is that of a tensor with one row per token of a vocabulary.

    Example:
      >>> is_embedding("model.embed_tokens.weight"), is_embedding("position_embeddings.weight")
      (True, False)
    """
    return _EMBEDDING.fullmatch(name) is not None and not _NO_EMBEDDING.search(name)


# A classifier is at the end of a network: a name with a block number is another layer. SigLIP's
# `head` is a pooling attention in its image tower, and a projection in its text tower.
_CLASSIFIER = re.compile(
    r"(?!.*\.\d+\..*)(?!(?:.*\.)?(?:head\.(?:attention|layernorm|mlp)|text_model\.head)\.)"
    r"(?:.*[./])?(?:\w*classifi\w*|score|heads?|fc|qa_outputs|last_linear|"
    r"pre_logits|logits)\.(?:.*\.)?(?:weight|bias)|(?:.*\.)?classifier\.\d+\.(?:weight|bias)|"
    r"head\.safetensors:.*"
)


def is_classifier(name: str) -> bool:
    """Return whether a name is that of a classification head.

    Example:
      >>> is_classifier("head.safetensors:weight"), is_classifier("vit.encoder.layer.0.fc.weight")
      (True, False)
      >>> is_classifier("vision_model.head.mlp.fc1.weight")
      False
    """
    return _CLASSIFIER.fullmatch(name) is not None
