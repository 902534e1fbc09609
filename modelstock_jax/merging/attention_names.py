"""Names of attentions and blocks in the libraries whose models are merged.

Merge units need to know which tensors are the query, key and value of one attention, and which
belong to one transformer block or one residual block of convolutions. Both are read from names;
shapes only confirm them. This module needs neither arrays nor JAX.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

# Names of the query, key and value projections of one attention, with the libraries that use them.
QKV_NAMES = (
    ("q_proj", "k_proj", "v_proj"),  # this project, Hugging Face (CLIP, Llama)
    ("query", "key", "value"),  # flax nnx and linen, BERT, ViT, t5x, MaxText, big_vision
    ("q", "k", "v"),  # T5
    ("query_proj", "key_proj", "value_proj"),  # equinox, DeBERTa
    ("to_q", "to_k", "to_v"),  # diffusers
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT
    ("wq", "wk", "wv"),  # Meta's Llama
)
_ROLES = {name: role for names in QKV_NAMES for name, role in zip(names, "qkv", strict=True)}
_NAMES_OF = {name: names for names in QKV_NAMES for name in names}
_OUT_NAMES = (
    "out", "out_proj", "o_proj", "o", "output_proj", "to_out.0", "out_lin", "wo",
    "attention_output",
)  # fmt: skip
_BIASES = ("bias", "b")

# These names join q, k and v even if one of them is missing. Measurements depend on it.
_ALONE = re.compile(
    r"(?P<module>(?:.*\.)?(?:\w*att(?:n|ention)|pool))\."
    r"(?P<role>q_proj|k_proj|v_proj|in_proj|out_proj|o_proj)[._](?P<kind>kernel|weight|bias)"
)
_MEMBER = re.compile(
    r"(?:(?P<module>.*)[./])?(?P<part>" + "|".join(_NAMES_OF) + r")[._/]"
    r"(?P<kind>kernel|weight|bias|w|b)"
)
_FUSED = re.compile(
    r"(?:.*[./])?(?:(?:qkv|qkv_proj|c_attn|query_key_value|Wqkv)[._/](?:kernel|weight|bias|w|b)"
    r"|in_proj_(?:weight|bias))"
)
# The first kernel of a residual block: ConvNeXt and ResNet of Hugging Face, and of this project.
_RESIDUAL = re.compile(
    r"(?P<block>(?:.*[./])?(?:stages[./]\d+[./]layers|blocks)[./](?:block_)?\d+)[./]"
    r"(?:dwconv|depthwise|conv1|layer[./]0[./]convolution)[./](?:kernel|weight)"
)
_BLOCK_ALONE = re.compile(
    r"(?P<block>(?:.*?\.)?(?:layers|layer|blocks|resblocks|h)\.(?:block_)?\d+)\."
)
# A module with a number: `layers.0`, `layer_0`, `encoderblock_0`, `Block_0`, `h_0`.
_BLOCK = re.compile(
    r"(?:(?<=[./])|^)(?P<module>\w*?(?:layers?|blocks?)|h)[._/]\d+(?=[./])", re.IGNORECASE
)


class Projection(NamedTuple):
    """A projection of an attention.

    Attributes:
      attention: name of the attention
      role: "q", "k", "v", "qkv" (one tensor of all three) or "out"
      kind: last part of the tensor's name, for example "kernel"
      per_head: whether heads are an axis of the attention's kernels, as in flax: [D, H, head dim],
        of the output projection [H, head dim, D], and of the biases [H, head dim]
      known_alone: whether the name is sufficient, without those of the other projections
    """

    attention: str
    role: str
    kind: str
    per_head: bool = False
    known_alone: bool = False

    @property
    def is_bias(self) -> bool:
        """Whether the tensor is a bias."""
        return self.kind in _BIASES


def projections(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Projection]:
    """Return the projections of all attentions, by tensor name.

    Query, key and value are an attention only if all three exist next to each other, with equally
    many axes. A `memory.query` without `memory.key` and `memory.value` is not one.

    Args:
      shapes: shape of each tensor, by name

    Example:
      >>> kernel = (8, 2, 4)
      >>> found = projections({f"attn.{name}.kernel": kernel for name in ("query", "key", "value")})
      >>> found["attn.query.kernel"].role, found["attn.query.kernel"].per_head
      ('q', True)
      >>> projections({"memory.query.kernel": kernel})
      {}
    """
    found: dict[str, Projection] = {}
    attentions: dict[tuple[str, tuple[str, ...]], str] = {}
    groups: dict[tuple[str, tuple[str, ...], str], dict[str, str]] = defaultdict(dict)
    for name in shapes:
        if match := _ALONE.fullmatch(name):
            role = {"in_proj": "qkv", "out_proj": "out", "o_proj": "out"}.get(match["role"])
            role = role or match["role"][0]
            found[name] = Projection(match["module"], role, match["kind"], known_alone=True)
            attentions[match["module"], QKV_NAMES[0]] = match["module"]
        elif match := _MEMBER.fullmatch(name):
            group = groups[match["module"] or "", _NAMES_OF[match["part"]], match["kind"]]
            group[_ROLES[match["part"]]] = name
    for (module, names, kind), members in groups.items():
        if len(members) == 3 and len({len(shapes[name]) for name in members.values()}) == 1:
            if (module, names) not in attentions:
                second = any(other == module for other, _ in attentions)
                attentions[module, names] = f"{module}.{names[0]}" if second else module
                for name, out_kind in _output_names(module, shapes):
                    out = Projection(attentions[module, names], "out", out_kind)
                    found.setdefault(name, out)
            for role, name in members.items():
                found[name] = Projection(attentions[module, names], role, kind)
    return _mark_per_head(found, shapes)


def qkv_siblings(name: str) -> list[str]:
    """Return the names of query, key and value of the attention of a tensor; [] if it is in none.

    Example:
      >>> qkv_siblings("attn.q_proj.weight")
      ['attn.q_proj.weight', 'attn.k_proj.weight', 'attn.v_proj.weight']
    """
    if (match := _MEMBER.fullmatch(name)) is None:
        return []
    start, stop = match.span("part")
    return [name[:start] + part + name[stop:] for part in _NAMES_OF[match["part"]]]


def _output_names(module: str, names: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the tensors of the output projection of an attention: name and kind."""
    prefixes = [f"{module}{dot}{out}" if module else out for out in _OUT_NAMES for dot in "./"]
    if match := re.fullmatch(r"(?P<parent>.*)(?P<dot>[./])(?:self|attention)", module):
        # BERT and ViT: `attention.self.query` and `attention.output.dense`.
        prefixes.append("{parent}{dot}output{dot}dense".format(**match.groupdict()))
    kinds = ("kernel", "weight", "bias", "w", "b")
    candidates = [
        (f"{prefix}{dot}{kind}", kind) for prefix in prefixes for dot in "./" for kind in kinds
    ]
    return [(name, kind) for name, kind in dict.fromkeys(candidates) if name in names]


def _mark_per_head(
    found: dict[str, Projection], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Projection]:
    kernels: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name, projection in found.items():
        if projection.kind == "kernel":
            kernels[projection.attention][projection.role] = shapes[name]
    per_head = {attention for attention, by_role in kernels.items() if _has_head_axis(by_role)}

    def has_heads(name: str, p: Projection) -> bool:
        if p.attention not in per_head or p.role == "qkv":
            return False
        return p.kind == "kernel" or (p.is_bias and p.role != "out" and len(shapes[name]) == 2)

    return {name: p._replace(per_head=has_heads(name, p)) for name, p in found.items()}


def _has_head_axis(kernels: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether the kernels of an attention are [D, H, head dim], in flax's convention."""
    q, k, v, out = (kernels.get(role, ()) for role in ("q", "k", "v", "out"))
    if not len(q) == len(k) == len(v) == 3 or not k[1]:
        return False
    heads_match = q[1] % k[1] == 0 and k[1] == v[1] and q[2] == k[2]
    # A convolution along one axis has three axes, too: [width, inputs, outputs].
    return heads_match and (not out or (len(out) == 3 and out[:2] == (q[1], v[2])))


def is_fused(name: str) -> bool:
    """Return whether the tensor is query, key and value in one, such as `attn.qkv.weight`."""
    match = _ALONE.fullmatch(name)
    return bool(match and match["role"] == "in_proj") or bool(_FUSED.fullmatch(name))


def residual_blocks(names: Iterable[str]) -> set[str]:
    """Return the names of the residual blocks of a ConvNeXt or a ResNet.

    Example:
      >>> residual_blocks(["encoder.stages.1.layers.0.dwconv.weight", "conv1.weight"])
      {'encoder.stages.1.layers.0'}
    """
    return {match["block"] for name in names if (match := _RESIDUAL.fullmatch(name))}


def network_blocks(
    names: Sequence[str], found: Mapping[str, Projection], scanned: Mapping[str, str]
) -> dict[str, str]:
    """Return the block of each tensor that is in one, by tensor name.

    A transformer block contains an attention, a residual block a convolution of a known name.

    Args:
      names: names of all tensors
      found: `projections` of these tensors
      scanned: for tensors that stack layers, the name prefix of the stack. It is the name of the
        block unless the name has a block after the prefix.
    """
    blocks = {
        _block_of_attention(name, name in found and found[name].known_alone, scanned.get(name))
        for name in names
        if name in found or is_fused(name)
    }
    blocks |= residual_blocks(names)
    return {
        name: block
        for name in names
        if (block := _enclosing_block(name, blocks, scanned.get(name))) is not None
    }


def _block_of_attention(name: str, known_alone: bool, stack: str | None) -> str | None:
    """Return the block of a tensor of an attention; None if it is in no block."""
    if stack is None and known_alone and (match := _BLOCK_ALONE.match(name)):
        return match["block"]
    candidates = _block_matches(name, stack)
    # A block is not the attention itself: `layers_0.attention_block_0`.
    candidates = [m for m in candidates if "att" not in m["module"].lower()] or candidates
    if not candidates:
        return stack
    # Swin's `layers.0.blocks.1` and T5's `block.0.layer.1`: the name says which one is the block.
    named = [m for m in candidates if "block" in m["module"].lower()]
    return name[: (named[-1] if named else candidates[0]).end()]


def _enclosing_block(name: str, blocks: Collection[str | None], stack: str | None) -> str | None:
    match = _BLOCK_ALONE.match(name)
    prefixes = [match["block"]] if match else []
    prefixes += [name[: m.end()] for m in reversed(_block_matches(name, stack))]
    if stack is not None:
        prefixes.append(stack)
    return next((prefix for prefix in prefixes if prefix in blocks), None)


def _block_matches(name: str, stack: str | None) -> list[re.Match[str]]:
    return [m for m in _BLOCK.finditer(name) if stack is None or m.start() >= len(stack)]
