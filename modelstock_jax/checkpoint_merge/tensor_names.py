"""Which tensor of one model is which of another, and which tensors are no weights, by their names.

Buffers of indices, masks, counters, tables of a vocabulary and classification heads have rules of
their own.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from modelstock_jax.errors import listed

# Parts of names that a wrapper adds: torch.compile, FSDP, activation checkpointing, DataParallel.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
# Last parts of names that libraries have renamed: TensorFlow's layer norms, torch's weight norm.
_RENAMED = {
    ("gamma",): ("weight",),
    ("beta",): ("bias",),
    ("parametrizations", "weight", "original0"): ("weight_g",),
    ("parametrizations", "weight", "original1"): ("weight_v",),
}
# Embeddings, heads and their biases, where a vocabulary has grown.
_MAX_RESIZED = 6
# Part of a model's names that are below a prefix which has another name in the base.
_MOST = 0.8
_FUSED_EXPERTS = re.compile(r".*experts\.(?!\d)[A-Za-z_.]*(?:gate|up|down|w\d|proj)\w*")
_APART_EXPERTS = re.compile(r".*experts\.\d+\..+")
# Projections that some models store as one tensor: its part of a name, and those of its parts.
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
    """Shape and safetensors dtype code of a tensor."""

    shape: tuple[int, ...]
    code: str
    written: str | None = None  # dtype code of the output where it is not `code`


_LAYER = re.compile(r"(?P<tower>.*?(?:layers?|blocks?|h|stages?))\.(?P<layer>\d+)\.")


class Rule(NamedTuple):
    """One prefix of a model's names and the base's in its place."""

    own: str
    base: str

    def __str__(self) -> str:
        return f"{self.own or '(nothing)'} -> {self.base or '(nothing)'}"


class Renames(NamedTuple):
    """A model's names that differ from the base's, and how.

    Attributes:
      names: The base's name -> the model's.
      rules: Prefixes in which they differ.
      ambiguous: Names that fit more than one place.
    """

    names: dict[str, str]
    rules: tuple[Rule, ...]
    ambiguous: tuple[str, ...] = ()


def renames(
    base: Mapping[str, TensorInfo], other: Mapping[str, TensorInfo], *, partial: bool = False
) -> Renames:
    """Maps names of a model onto the base's where exactly one prefix rule does it.

    A rule replaces a prefix of the model's names by one of the base's, so that they become names of
    the base that the model lacks, of equal shape but for a vocabulary's rows. It is not taken where
    other names below that prefix fit as they are. Of several rules the one that maps most names is
    taken, then the one whose prefixes share most words; where two are level, none.

    Args:
      base: The base's tensors.
      other: The model's.
      partial: The model holds some tensors alone (an adapter).
    """
    unmatched = [name for name in other if name not in base]
    free = {name for name in base if name not in other}
    found = _of_one_spelling(unmatched, free)
    free -= found.keys()
    left = sorted(set(unmatched) - set(found.values()))
    taken = {name for name in other if name in base}
    rules: list[Rule] = []
    ambiguous: list[str] = []
    while left:
        best = _best(_candidates(left, free, base, other), left, free, base, other, taken, partial)
        if best is None:
            break
        rule, hits, level = best
        if level:
            ambiguous += sorted(hits)
            left = [name for name in left if name not in hits]
            continue
        rules.append(rule)
        for own, name in hits.items():
            found[name] = own
            free.discard(name)
        left = [name for name in left if name not in hits]
    return Renames(found, _summed_up(found), tuple(ambiguous))


def explanation(base: Iterable[str], lacking: Iterable[str], extra: Iterable[str]) -> str:
    """What the difference between two sets of names is called, where it has a name; else nothing.

    Args:
      base: Names of the base.
      lacking: Those that a model lacks.
      extra: Those that only the model has.

    Example:
      >>> explanation([], ["mlp.experts.gate_up_proj"], ["mlp.experts.0.gate_proj.weight"])
      'the base stores experts fused (mlp.experts.gate_up_proj), this model each on its own \
(mlp.experts.0.gate_proj.weight)'
    """
    lacking, extra = sorted(lacking), sorted(extra)
    if depth := _other_depth(base, lacking, extra):
        return depth
    for ours, theirs, words in (
        (lacking, extra, ("the base stores experts fused ({}), this model each on its own ({})")),
        (extra, lacking, ("this model stores experts fused ({}), the base each on its own ({})")),
    ):
        fused = next(
            (n for n in ours if _FUSED_EXPERTS.fullmatch(n) and not _APART_EXPERTS.fullmatch(n)),
            None,
        )
        apart = next((n for n in theirs if _APART_EXPERTS.fullmatch(n)), None)
        if fused and apart:
            return words.format(fused, apart)
    for ours, theirs, words in (
        (lacking, extra, "the base stores {} as one tensor, this model its parts ({})"),
        (extra, lacking, "this model stores {} as one tensor, the base its parts ({})"),
    ):
        for name in ours:
            for fused, parts in _FUSED.items():
                if fused not in name.split("."):
                    continue
                start = name.split(f".{fused}")[0]
                apart = next(
                    (n for n in theirs if n.startswith(start) and set(parts) & set(n.split("."))),
                    None,
                )
                if apart:
                    return words.format(name, apart)
    return ""


def _other_depth(base: Iterable[str], lacking: Sequence[str], extra: Sequence[str]) -> str:
    """Whether one of two models has layers beyond the other's last, all tensors of them."""
    layers = {}
    for names in (set(base), set(base) - set(lacking) | set(extra)):
        found = [match for name in names if (match := _LAYER.match(name))]
        layers[len(layers)] = {
            tower: {int(m["layer"]) for m in found if m["tower"] == tower}
            for tower in {m["tower"] for m in found}
        }
    for tower in layers[0].keys() & layers[1].keys():
        ours, theirs = (sorted(layers[k][tower]) for k in (0, 1))
        if len(ours) > 1 and len(theirs) > 1 and ours[-1] != theirs[-1]:
            return (
                f"the base has {len(ours)} layers in {tower}, this model {len(theirs)}: layers "
                "of models of unequal depth do not correspond"
            )
    return ""


def note(label: str, found: Renames) -> str:
    """What a user should know of names that were mapped."""
    rules = listed((str(rule) for rule in found.rules), 4)
    return f"{label}: {len(found.names)} tensors have other names than in the base ({rules})"


def _candidates(left, free, base, other) -> Counter:
    """Rules that map at least one name, each refined by the part of the name that follows it."""
    by_suffix: dict[str, list[str]] = defaultdict(list)
    for name in free:
        for suffix in _suffixes(name):
            by_suffix[suffix].append(name)
    rules: Counter = Counter()
    for name in left:
        for suffix in _suffixes(name):
            own = name[: len(name) - len(suffix)]
            if _numbers(own):  # A layer is never another layer.
                break
            alone = len(_parts(suffix)) < 2
            for target in by_suffix.get(suffix, ()):
                if alone and suffix not in (name, target):
                    continue  # `weight` alone says nothing.
                rule = _shortest(own, target[: len(target) - len(suffix)])
                if _alike(other[name], base[target]) and not _numbers(rule.base):
                    rules[rule] += 1
    return rules


def _shortest(own: str, base: str) -> Rule:
    """A rule without the parts at the end of both prefixes that are equal."""
    while (
        own
        and base
        and (tail := re.search(r"[^./]+[./]$", own))
        and base.endswith(tail[0])
        and (len(base) == len(tail[0]) or base[-len(tail[0]) - 1] in "./")
    ):
        own, base = own[: tail.start()], base[: len(base) - len(tail[0])]
    return Rule(own, base)


def _best(candidates, left, free, base, other, taken, partial):
    """The rule that maps most names, those names, and whether another does as well."""
    scored = []
    for rule in candidates:
        below = [name for name in left if name.startswith(rule.own)]
        hits = {name: rule.base + name[len(rule.own) :] for name in below}
        hits = {
            own: name
            for own, name in hits.items()
            if name in free and len(base[name].shape) == len(other[own].shape)
        }
        alike = [own for own, name in hits.items() if _alike(other[own], base[name])]
        resized = [
            own
            for own, name in hits.items()
            if sum(a != b for a, b in zip(base[name].shape, other[own].shape, strict=True)) == 1
        ]
        if not alike or len(alike) + len(resized) < len(hits) or len(resized) > _MAX_RESIZED:
            continue
        if not partial and _contradicted(rule, hits, taken):
            continue
        if _replaces(rule, hits) and len(hits) < _MOST * len(other):
            continue
        shared = len(set(_parts(rule.own)) & set(_parts(rule.base)))
        scored.append(((len(alike), shared), rule, hits))
    if not scored:
        return None
    scored.sort(key=lambda item: item[0], reverse=True)
    (score, rule, hits), *rest = scored
    level = any(
        other_score == score
        and set(other_hits) & set(hits)
        and any(hits[n] != other_hits[n] for n in set(other_hits) & set(hits))
        for other_score, _, other_hits in rest
    )
    return rule, hits, level


def _contradicted(rule: Rule, hits: Mapping[str, str], taken: Iterable[str]) -> bool:
    """Whether names that fit as they are begin as those do that the rule would rename."""
    heads = {rule.own + _parts(own[len(rule.own) :])[0] for own in hits}
    return any(name.startswith(tuple(f"{head}." for head in heads)) for name in taken)


def _replaces(rule: Rule, hits: Iterable[str]) -> bool:
    """Whether parts of one prefix stand for others: another name of a whole model, or no rule.

    A classifier is no language model's head, and one task's head not another's, though their
    tensors may have equal shapes. A tower with its layers is known by a part that both share.
    """
    own, base = set(_parts(rule.own)), set(_parts(rule.base))
    layers = {number for name in hits for number in _numbers(name[len(rule.own) :])[:1]}
    return bool(own - base) and bool(base - own) and not (own & base and len(layers) > 1)


def _summed_up(found: Mapping[str, str]) -> tuple[Rule, ...]:
    """The prefixes in which names differ, most frequent first."""
    rules: Counter = Counter()
    for name, own in found.items():
        a, b = _parts(own), _parts(name)
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


def _of_one_spelling(unmatched: Iterable[str], free: Iterable[str]) -> dict[str, str]:
    """The base's name -> the model's, where they are equal but for wrappers and old spellings."""
    places: dict[str, list[str]] = defaultdict(list)
    for name in free:
        places[_plain(name)].append(name)
    own: dict[str, list[str]] = defaultdict(list)
    for name in unmatched:
        own[_plain(name)].append(name)
    return {
        places[plain][0]: names[0]
        for plain, names in own.items()
        if len(names) == 1 and len(places.get(plain, ())) == 1
    }


def _plain(name: str) -> str:
    """A name without what wrappers have put into it, in today's spelling.

    Example:
      >>> _plain("h.0._orig_mod.ln.gamma"), _plain("conv.parametrizations.weight.original0")
      ('h.0.ln.weight', 'conv.weight_g')
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    for old, new in _RENAMED.items():
        if tuple(parts[-len(old) :]) == old and len(parts) > len(old):
            parts[-len(old) :] = new
    return ".".join(parts)


def _suffixes(name: str) -> Iterable[str]:
    """The name and what follows each of its dots, longest first."""
    yield name
    for found in re.finditer(r"[./]", name):
        yield name[found.end() :]


def _numbers(prefix: str) -> list[str]:
    """Numbers of layers in a prefix, also those at the end of a part like `layer_3` or `layer4`.

    Example:
      >>> _numbers("encoder.layer_3."), _numbers("layer4.0."), _numbers("wav2vec2.encoder.")
      (['3'], ['4', '0'], [])
    """
    return re.findall(r"(?:^|[./]|_|layers?|blocks?|stages?|h)(\d+)(?=[./])", prefix)


def _parts(name: str) -> list[str]:
    return [part for part in re.split(r"[./]", name) if part]


def _alike(a: TensorInfo, b: TensorInfo) -> bool:
    return a.shape == b.shape


# Which tensors have rules of their own: index-like buffers, masks, counters, embeddings, heads.


# What a model computes from its config and never trains. They are numbers of positions, masks and
# tables of frequencies, in whatever dtype a library stored them. `mask_token` and `freqs` alone are
# weights in some models, so only these endings count.
_INDEX = re.compile(
    r"(?:.*[._])?(?:ids|idx|index|indices|inv_freq|inv_freqs|freqs_cis|cos_cached|sin_cached|"
    r"masked_bias|relative_coords_table)"
)
_MASK = re.compile(r"(?:.*[._])?mask")

# GPT-2's causal mask: a buffer with a weight's name, known by its shape [1, 1, n, n].
_CAUSAL = re.compile(r"(?:.*\.)?attn(?:ention)?\.bias")
_EMBEDDING = re.compile(r"(?:.*[./])?(?:\w*emb\w*|wte|shared|lm_head)(?:\.weight)?")
_NO_EMBEDDING = re.compile(r"pos|type|patch|relative|time|label")
_COUNTER = re.compile(
    r"(?:.*[._])?(?:num_batches_tracked|num_updates|n_averaged|num_steps|global_step|step|steps|"
    r"count|counter|iteration|iterations|epoch)"
)


def is_index(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a buffer of indices, frequencies or a mask: it has no mean.

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
    """Whether a tensor counts batches or updates: the models' numbers differ, the largest is kept.

    A single integer is a counter whatever its name; a single float only by its name.

    Example:
      >>> is_counter("layer1.bn.num_batches_tracked", (), True)
      True
      >>> is_counter("model_ema.num_updates", (1,), False), is_counter("logit_scale", (), False)
      (True, False)
    """
    single = all(length == 1 for length in shape)
    return single and (integer or _COUNTER.fullmatch(name) is not None)


def is_mask(name: str) -> bool:
    """Whether a tensor is a mask by its name; only its numbers tell it from a trained one.

    Example:
      >>> is_mask("text.attn_mask"), is_mask("embeddings.mask_token")
      (True, False)
    """
    return _MASK.fullmatch(name) is not None


def is_embedding(name: str) -> bool:
    """Whether a tensor has a row per token of a vocabulary, by its name.

    Example:
      >>> is_embedding("model.embed_tokens.weight"), is_embedding("position_embeddings.weight")
      (True, False)
    """
    return _EMBEDDING.fullmatch(name) is not None and not _NO_EMBEDDING.search(name)


# At the end of a network: a block's number before it is another layer's.
_CLASSIFIER = re.compile(
    r"(?!.*\.\d+\..*)(?:.*[./])?(?:\w*classifi\w*|score|heads?|fc|qa_outputs|last_linear|"
    r"pre_logits|logits)\.(?:.*\.)?(?:weight|bias)|(?:.*\.)?classifier\.\d+\.(?:weight|bias)|"
    r"head\.safetensors:.*"
)


def is_classifier(name: str) -> bool:
    """Whether a name is that of a classification head.

    Example:
      >>> is_classifier("head.safetensors:weight"), is_classifier("vit.encoder.layer.0.fc.weight")
      (True, False)
    """
    return _CLASSIFIER.fullmatch(name) is not None
